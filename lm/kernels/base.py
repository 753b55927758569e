"""What the kernels of all families share."""

from __future__ import annotations

import functools
import importlib
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from lm.errors import CorruptRunError

Floats = npt.NDArray[np.float32]
Arrays = Mapping[str, npt.NDArray[Any]]
DecodePrecision = Literal["fp32", "int8"]


def native() -> Any:
    """The compiled module, or None where this install has none or INKLING_NATIVE=0 turns it off."""
    return None if os.environ.get("INKLING_NATIVE") == "0" else compiled()


@functools.cache
def compiled() -> Any:
    """The compiled module, or None where this install has none."""
    try:
        return importlib.import_module("lm.kernels._native")
    except ImportError:
        return None


def default_threads() -> int:
    """OMP_NUM_THREADS where it is set, as for torch; else the cores that this process may use."""
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    if asked.isdigit() and int(asked) > 0:
        return int(asked)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Kernel(ABC):
    """One model's native step over preallocated slots, each holding a text.

    Args:
        options: the model's options as `config.json` spells them out.
        arrays: its weights, by the names of the torch model.
        slots: texts held at once.
        precision: of the weights; int8 has a scale for each output, and rounds a token's activations too.
        threads: None takes `default_threads`.
        isa: "avx512", "avx2" or "plain"; None takes the best here.

    Raises:
        CorruptRunError: an array is missing or has the wrong shape.
    """

    context_length: int | None = None

    def __init__(
        self,
        options: Mapping[str, Any],
        arrays: Arrays,
        *,
        slots: int,
        precision: DecodePrecision = "fp32",
        threads: int | None = None,
        isa: str | None = None,
    ) -> None:
        self.isa = isa or native().instruction_sets()[0]
        self.threads = threads or default_threads()
        settings = {"slots": slots, "threads": self.threads, "int8": precision == "int8", "isa": self.isa}
        try:
            self._native = self._build(options, {name: _floats(array) for name, array in arrays.items()}, settings)
        except (KeyError, ValueError, IndexError) as error:
            raise CorruptRunError(
                f"The weights do not fit the model's options ({error}): restore the files saved together."
            ) from None
        self._logits = self._native.logits
        self._views = self._native.views
        self.vocab_size: int
        self._first: Floats = self._logits[:1, : self.vocab_size]
        cutoffs = [cut for cut in options.get("adaptive_cutoffs", ()) if cut < self.vocab_size]
        self._tails = list(pairwise((*cutoffs, self.vocab_size)))
        self._entry_bias = _floats(arrays["tails.bias"]) if self._tails else None

    @classmethod
    def lacks(cls, options: Mapping[str, Any]) -> str | None:
        """What a model with these options needs that the native step has not; None where it has all."""
        both = options.get("adaptive_cutoffs") and options.get("table_orders")
        return "context tables under an adaptive softmax" if both else None

    @abstractmethod
    def _build(self, options: Mapping[str, Any], arrays: Mapping[str, Floats], settings: dict[str, Any]) -> Any:
        """The compiled kernel; sets `vocab_size` and `context_length`."""

    @classmethod
    @abstractmethod
    def slot_bytes(cls, options: Mapping[str, Any]) -> int:
        """Memory of one slot's state."""

    def step(self, slots: Sequence[int], ids: Sequence[int]) -> Floats:
        """Logits (S, V) after one more token in each of S different slots; good until the next call."""
        self._native.step(slots, ids)
        if len(slots) == 1 and not self._tails:
            return self._first
        return self._finished(self._logits[: len(slots)])

    def read(self, slot: int, ids: Sequence[int], *, only_last: bool) -> Floats:
        """Logits (T, V) after each of T tokens of one text, or (1, V) after the last (good until the next call)."""
        if only_last:
            self._native.read(slot, ids, None)
            return self._finished(self._logits[:1]) if self._tails else self._first
        logits = np.empty((len(ids), self.vocab_size + len(self._tails)), np.float32)
        self._native.read(slot, ids, logits)
        return self._finished(logits)

    def _finished(self, logits: Floats) -> Floats:
        """Logits (S, V) from those that the compiled kernel gave; an adaptive softmax's become log-probabilities."""
        if self._entry_bias is None:
            return logits[:, : self.vocab_size]
        first = self._tails[0][0]
        # Row by row: a row's last bits must not depend on its company.
        for row in logits:
            entries = row[self.vocab_size : self.vocab_size + len(self._tails)] + self._entry_bias
            total = _log_sum(np.concatenate([row[:first], entries]))
            row[:first] -= total
            for (begin, end), entry in zip(self._tails, entries, strict=True):
                row[begin:end] += entry - total - _log_sum(row[begin:end])
        return logits[:, : self.vocab_size]

    def clear(self, slot: int) -> None:
        """Forget a slot's text."""
        self._native.clear(slot)

    def copy(self, source: int, target: int) -> None:
        """Let `target` hold the text of `source`."""
        self._native.copy(source, target)

    @abstractmethod
    def save(self, slot: int) -> tuple[dict[str, npt.NDArray[Any]], tuple[int, ...]]:
        """A slot's state as arrays (by the names of the torch model's state, no batch axis), and its window."""

    @abstractmethod
    def load(self, slot: int, arrays: Arrays, window: tuple[int, ...]) -> None:
        """Set a slot to what `save` gave."""


def table_parts(options: Mapping[str, Any], arrays: Mapping[str, Floats]) -> dict[str, Any]:
    """A model's context tables as the compiled kernels take them; none for runs from before there were any."""
    tables = [(order, arrays[f"tables.{order}.weight"]) for order in options.get("table_orders", ())]
    return {"tables": tables, "buckets": int(options.get("table_buckets", 0))}


def with_entries(arrays: Mapping[str, Floats], embedding: Floats, weight: Floats) -> tuple[Floats, Floats]:
    """Embedding and output matrix with a row for each tail of an adaptive softmax, computed with the tokens' own.

    The rows that this adds to the embedding are never looked up.
    """
    entries = arrays.get("tails.weight")
    if entries is None:
        return embedding, weight
    unused = np.zeros((len(entries), embedding.shape[1]), np.float32)
    return np.concatenate([embedding, unused]), np.concatenate([weight, entries])


def _floats(array: npt.NDArray[Any]) -> Floats:
    return np.ascontiguousarray(array, np.float32)


def _log_sum(logits: Floats) -> np.float32:
    """log(sum(exp(logits))) of one row."""
    top = logits.max()
    return np.float32(top + np.log(np.exp(logits - top).sum()))
