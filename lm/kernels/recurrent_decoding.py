"""The native decoding step of RNN, GRU and LSTM; equals `lm.models.recurrent`.

The kernel computes the first layer's input products of all tokens in advance, if that table is smaller than 64 MB.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from lm.kernels.decoding import Arrays, DecodePrecision, Floats
from lm.kernels.head_decoding import HeadKernel, HeadParts, context_tables, tails, weights, with_tail_rows

REGISTERS = {"rnn": "RecurrentKernel", "gru": "RecurrentKernel", "lstm": "RecurrentKernel"}


class RecurrentKernel(HeadKernel):
    """All cells and layers of the recurrent family, and the output layer."""

    @classmethod
    def parts(cls, options: Mapping[str, Any], arrays: Arrays, precision: DecodePrecision) -> HeadParts:
        """See `Kernel.parts`."""
        arrays = weights(arrays, precision)
        cell = f"rnn-{options['nonlinearity']}" if options["type"] == "rnn" else options["type"]
        layers = [
            tuple(arrays[f"cell.{part}_l{layer}"] for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
            for layer in range(options["num_layers"])
        ]
        embedding = arrays["embedding.weight"]
        if options["tie_weights"]:
            projection = arrays.get("projection.weight")
            heads: list[tuple[Floats, Floats | None]] = [] if projection is None else [(projection, None)]
            weight, bias = embedding, arrays["output_bias"]
        else:
            heads, weight, bias = [], arrays["output.weight"], arrays["output.bias"]
        vocab_size = len(embedding)
        embedding, weight = with_tail_rows(arrays, embedding, weight)
        heads.append((weight, np.pad(bias, (0, len(weight) - vocab_size))))
        arguments: dict[str, Any] = {"cell": cell, "embedding": embedding, "layers": layers, "heads": heads}
        arguments |= context_tables(options, arrays)
        return HeadParts("recurrent", arguments, vocab_size, **tails(options, arrays, vocab_size))

    def _build(
        self, options: Mapping[str, Any], arrays: Arrays, precision: DecodePrecision, settings: dict[str, Any]
    ) -> Any:
        built = super()._build(options, arrays, precision, settings)
        self._hidden_size = int(options["hidden_size"])
        return built

    @classmethod
    def slot_bytes(cls, options: Mapping[str, Any]) -> int:
        """See `Kernel.slot_bytes`."""
        states = 2 if options["type"] == "lstm" else 1
        return states * int(options["num_layers"]) * int(options["hidden_size"]) * 4

    def save(self, slot: int) -> tuple[dict[str, npt.NDArray[Any]], tuple[int, ...]]:
        """See `Kernel.save`: "hidden" (L, H), "cell" of an LSTM, and the "recent" tokens of context tables."""
        return {name: np.array(self._view(name, slot)) for name in self._views}, ()

    def load(self, slot: int, arrays: Arrays, window: tuple[int, ...]) -> None:
        """See `Kernel.load`."""
        for name in self._views:
            self._view(name, slot)[:] = arrays[name]

    def _view(self, name: str, slot: int) -> npt.NDArray[Any]:
        view: npt.NDArray[Any] = self._views[name][slot]
        return view if name == "recent" else view[:, : self._hidden_size]
