"""The parts of native decoding that belong to `lm.models.output_head` and `lm.models.context_tables`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from lm.kernels.decoding import (
    Arrays,
    DecodePrecision,
    Floats,
    Kernel,
    Parts,
    as_floats,
    is_matrix,
    rounded,
    rounded_to_bf16,
)

TABLES = "tables."
"""Prefix of the names of context tables."""


@dataclass(frozen=True)
class HeadParts(Parts):
    """The parts of a `HeadKernel`."""

    tails: tuple[tuple[int, int], ...] = ()
    """The first and the last + 1 token of each tail of an adaptive softmax."""
    tail_bias: Floats | None = None
    """A number for each tail, added to its logit."""


class HeadKernel(Kernel):
    """A kernel whose outputs are a full or an adaptive softmax, or a full one with context tables."""

    def __init__(self, options: Mapping[str, Any], arrays: Arrays, **settings: Any) -> None:
        super().__init__(options, arrays, **settings)
        found = tails(options, arrays, self.vocab_size)
        self._tails, self._tail_bias = found["tails"], found["tail_bias"]
        self._num_outputs += len(self._tails)

    @classmethod
    def lacks(cls, options: Mapping[str, Any]) -> str | None:
        """See `Kernel.lacks`."""
        both = options.get("adaptive_cutoffs") and options.get("table_orders")
        return "context tables under an adaptive softmax" if both else None

    def _finish(self, outputs: Floats) -> Floats:
        """See `Kernel._finish`; the logits of an adaptive softmax are log-probabilities."""
        logits = outputs[:, : self.vocab_size]
        if self._tail_bias is None:
            return logits
        first = self._tails[0][0]
        # Row by row: the last bits of a row must not depend on the other rows.
        for row, tail_logits in zip(logits, outputs[:, self.vocab_size : self._num_outputs], strict=True):
            tail_logits = tail_logits + self._tail_bias
            total = _log_sum(np.concatenate([row[:first], tail_logits]))
            row[:first] -= total
            for (begin, end), tail_logit in zip(self._tails, tail_logits, strict=True):
                row[begin:end] += tail_logit - total - _log_sum(row[begin:end])
        return logits


def weights(arrays: Arrays, precision: DecodePrecision) -> dict[str, npt.NDArray[Any]]:
    """The arrays, floats as contiguous float32, in bf16 and int8 with rounded matrices.

    Those of integers are unchanged, and context tables in bf16: they are added, not multiplied.
    """
    floats = {name: array if array.dtype.kind in "iu" else as_floats(array) for name, array in arrays.items()}
    if precision == "fp32":
        return floats
    if precision == "bf16":
        return {
            name: rounded_to_bf16(array) if is_matrix(array) and not name.startswith(TABLES) else array
            for name, array in floats.items()
        }
    return {name: rounded(array) if is_matrix(array) else array for name, array in floats.items()}


def tails(options: Mapping[str, Any], arrays: Arrays, vocab_size: int) -> dict[str, Any]:
    """The fields of `HeadParts` about an adaptive softmax; empty for runs older than the option."""
    cutoffs = [cut for cut in options.get("adaptive_cutoffs", ()) if cut < vocab_size]
    found = tuple(pairwise((*cutoffs, vocab_size)))
    return {"tails": found, "tail_bias": as_floats(arrays["tails.bias"]) if found else None}


def context_tables(options: Mapping[str, Any], arrays: Mapping[str, Floats]) -> dict[str, Any]:
    """A model's context tables as the compiled kernels take them; empty for runs older than the option."""
    tables = [(order, arrays[f"{TABLES}{order}.weight"]) for order in options.get("table_orders", ())]
    return {"tables": tables, "buckets": int(options.get("table_buckets", 0))}


def with_tail_rows(arrays: Mapping[str, Floats], embedding: Floats, weight: Floats) -> tuple[Floats, Floats]:
    """The embedding and the output matrix, each with one more row for each tail of an adaptive softmax.

    No id selects the rows that are added to the embedding.
    """
    tails = arrays.get("tails.weight")
    if tails is None:
        return embedding, weight
    unused = np.zeros((len(tails), embedding.shape[1]), np.float32)
    return np.concatenate([embedding, unused]), np.concatenate([weight, tails])


def _log_sum(logits: Floats) -> np.float32:
    """log(sum(exp(logits))) of one row."""
    top = logits.max()
    return np.float32(top + np.log(np.exp(logits - top).sum()))
