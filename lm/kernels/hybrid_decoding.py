"""The native decoding step of a hybrid: a recurrent kernel, counts, and the gate; equals `lm.models.hybrid`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from lm.kernels.counts import CountArrays
from lm.kernels.decoding import Arrays, DecodePrecision, as_floats
from lm.kernels.head_decoding import HeadParts
from lm.kernels.recurrent_decoding import RecurrentKernel

REGISTERS = {"hybrid": "HybridKernel"}

NETWORK, COUNTS = "network.", "ngram."
"""Prefixes of the names of the network's arrays, and of the counts'."""


class HybridKernel(RecurrentKernel):
    """The network in any precision; the counts and the gate are fp32."""

    @classmethod
    def parts(cls, options: Mapping[str, Any], arrays: Arrays, precision: DecodePrecision) -> HeadParts:
        """See `Kernel.parts`."""
        network = {name.removeprefix(NETWORK): array for name, array in arrays.items() if name.startswith(NETWORK)}
        counts = {name.removeprefix(COUNTS): array for name, array in arrays.items() if name.startswith(COUNTS)}
        mixture = {
            "counts": CountArrays(counts, options["order"], len(network["embedding.weight"])),
            "gate": as_floats(network["gate.weight"][0]),
            "gate_bias": float(network["gate.bias"][0]),
        }
        alone = super().parts(_network(options), network, precision)
        return replace(alone, arguments={**alone.arguments, **mixture})

    def _compiled(self, arguments: Mapping[str, Any]) -> Mapping[str, Any]:
        return {**arguments, "counts": arguments["counts"].compiled()}

    @classmethod
    def lacks(cls, options: Mapping[str, Any]) -> str | None:
        """See `Kernel.lacks`."""
        return "counts under an adaptive softmax" if options.get("adaptive_cutoffs") else None

    @classmethod
    def slot_bytes(cls, options: Mapping[str, Any]) -> int:
        """See `Kernel.slot_bytes`."""
        return super().slot_bytes(_network(options)) + 4 * (int(options["order"]) - 1)

    def save(self, slot: int) -> tuple[dict[str, npt.NDArray[Any]], tuple[int, ...]]:
        """See `Kernel.save`: the network's state, and the "history" (K,) of the counts."""
        arrays, window = super().save(slot)
        return {"history": np.zeros(0, np.int32), **arrays}, window

    def _view(self, name: str, slot: int) -> npt.NDArray[Any]:
        view: npt.NDArray[Any] = self._views[name][slot]
        return view if name == "history" else super()._view(name, slot)


def _network(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of the network alone."""
    return {**options, "type": options["cell"]}
