"""The native decoding step of n-gram counts; equals `lm.models.ngram`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from lm.kernels.counts import CountArrays
from lm.kernels.decoding import Arrays, DecodePrecision, Kernel, Parts

REGISTERS = {"ngram": "NGramKernel"}


class NGramKernel(Kernel):
    """Counts alone; they are the same in any precision."""

    @classmethod
    def parts(cls, options: Mapping[str, Any], arrays: Arrays, precision: DecodePrecision) -> Parts:
        """See `Kernel.parts`."""
        counts = CountArrays(arrays, options["order"])
        return Parts("ngram", {"counts": counts}, counts.levels[0].vocab_size)

    def _compiled(self, arguments: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"counts": arguments["counts"].compiled()}

    @classmethod
    def slot_bytes(cls, options: Mapping[str, Any]) -> int:
        """See `Kernel.slot_bytes`."""
        return 4 * (int(options["order"]) - 1)

    def save(self, slot: int) -> tuple[dict[str, npt.NDArray[Any]], tuple[int, ...]]:
        """See `Kernel.save`: the "history" (K,)."""
        return {"history": np.array(self._views["history"][slot]) if self._views else np.zeros(0, np.int32)}, ()

    def load(self, slot: int, arrays: Arrays, window: tuple[int, ...]) -> None:
        """See `Kernel.load`."""
        if self._views:
            self._views["history"][slot] = arrays["history"]
