"""The native decoding step of a model: what the kernels of all families share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from lm.errors import CorruptRunError
from lm.kernels.compiled import default_threads, native

Floats = npt.NDArray[np.float32]
Arrays = Mapping[str, npt.NDArray[Any]]
DecodePrecision = Literal["fp32", "bf16", "int8", "int4"]


@dataclass(frozen=True)
class Parts:
    """What a decoding step is made of: for the compiled kernel, and for exports that decode in another language."""

    kernel: str
    """The compiled kernel: a function of the native module."""
    arguments: Mapping[str, Any]
    """Its arguments by name, apart from slots, threads, precision and instruction set."""
    vocab_size: int
    context_length: int | None = None


def instruction_sets(precision: DecodePrecision) -> list[str]:
    """Those that decode in a precision on this CPU, best first. fp32 and int8 gain nothing from AVX512-BF16."""
    own = [name for name in native().bf16_instruction_sets() if name == "avx512_bf16"] if precision == "bf16" else []
    return [*own, *native().instruction_sets()]


class Kernel(ABC):
    """A model's native step over preallocated slots, each of which holds one text.

    Args:
        options: the model's options, as in `config.json`.
        arrays: its weights, by the names of the torch model.
        slots: number of slots.
        precision: of the weights. bf16 also rounds activations, keys and values to bf16. int8 has a scale for each row
            and also rounds a token's activations. int4 has a scale and a minimum for each 32 weights of a row, but int8
            for embeddings and the output matrix.
        threads: None: `default_threads`.
        isa: one of `instruction_sets(precision)`; None: the best one of this CPU.

    Raises:
        CorruptRunError: an array is missing or has the wrong shape.
    """

    vocab_size: int
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
        self.isa = isa or instruction_sets(precision)[0]
        self.threads = threads or default_threads()
        settings = {"slots": slots, "threads": self.threads, "precision": precision, "isa": self.isa}
        try:
            self._native = self._build(options, arrays, precision, settings)
        except (KeyError, ValueError, IndexError) as error:
            raise CorruptRunError(
                f"The weights do not fit the model's options ({error}): restore the files saved together."
            ) from None
        self._logits = self._native.logits
        self._views = self._native.views
        self._num_outputs = self.vocab_size
        # Sliced once: a step takes microseconds, and a slice is a part of that.
        self._first: Floats = self._logits[:1, : self.vocab_size]

    @classmethod
    def lacks(cls, options: Mapping[str, Any]) -> str | None:
        """The feature of a model with these options that the kernel does not support; None: it supports all."""
        return None

    precisions: ClassVar[tuple[DecodePrecision, ...]] = ("fp32", "bf16", "int8")
    """The precisions that the kernel has."""

    @classmethod
    @abstractmethod
    def parts(cls, options: Mapping[str, Any], arrays: Arrays, precision: DecodePrecision) -> Parts:
        """The parts of the model with these options and arrays, in fp32; in bf16 and int8, its matrices are rounded.

        Raises:
            KeyError, ValueError, IndexError: the arrays do not fit the options.
        """

    def _build(
        self, options: Mapping[str, Any], arrays: Arrays, precision: DecodePrecision, settings: dict[str, Any]
    ) -> Any:
        """The compiled kernel; sets `vocab_size` and `context_length`."""
        parts = self.parts(options, arrays, precision)
        self.vocab_size, self.context_length = parts.vocab_size, parts.context_length
        return getattr(native(), parts.kernel)(**self._compiled(parts.arguments), **settings)

    def _compiled(self, arguments: Mapping[str, Any]) -> Mapping[str, Any]:
        """The arguments as the native module takes them."""
        return arguments

    @classmethod
    @abstractmethod
    def slot_bytes(cls, options: Mapping[str, Any]) -> int:
        """Memory of one slot's state."""

    def step(self, slots: Sequence[int], ids: Sequence[int]) -> Floats:
        """Logits (S, V) after one more token in each of S different slots; valid until the next call."""
        self._native.step(slots, ids)
        if len(slots) == 1 and self._num_outputs == self.vocab_size:
            return self._first
        return self._finish(self._logits[: len(slots)])

    def read(self, slot: int, ids: Sequence[int], *, only_last: bool) -> Floats:
        """Logits (T, V) after each of T tokens of one text, or (1, V) after the last (valid until the next call)."""
        if only_last:
            self._native.read(slot, ids, None)
            return self._finish(self._logits[:1])
        logits = np.empty((len(ids), self._num_outputs), np.float32)
        self._native.read(slot, ids, logits)
        return self._finish(logits)

    def _finish(self, outputs: Floats) -> Floats:
        """Logits (S, V) from the outputs (S, `_num_outputs`) of the compiled kernel."""
        return outputs[:, : self.vocab_size]

    def clear(self, slot: int) -> None:
        """Remove a slot's text."""
        self._native.clear(slot)

    def copy(self, source: int, target: int) -> None:
        """Copy the text of slot `source` to slot `target`."""
        self._native.copy(source, target)

    @abstractmethod
    def save(self, slot: int) -> tuple[dict[str, npt.NDArray[Any]], tuple[int, ...]]:
        """A slot's state as arrays (by the names of the torch model's state, no batch axis), and its window."""

    @abstractmethod
    def load(self, slot: int, arrays: Arrays, window: tuple[int, ...]) -> None:
        """Set a slot to a result of `save`."""


def is_matrix(array: npt.NDArray[Any]) -> bool:
    """Whether the array is a matrix of floats."""
    return array.dtype.kind == "f" and array.ndim == 2


def rounded_to_bf16(array: Floats) -> Floats:
    """The nearest values whose lower 16 bits are zero, ties to even."""
    bits = array.view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)).view(np.float32)


def rounded(matrix: Floats) -> Floats:
    """The matrix (R, C) with each row as whole multiples, from -127 to 127, of 1/127 of its largest value.

    Rounding again changes nothing.
    """
    codes, scales = int8_codes(matrix)
    return codes * scales[:, None]


def int8_codes(matrix: Floats) -> tuple[npt.NDArray[np.int8], Floats]:
    """The whole numbers (R, C) of `rounded`, and the scale (R,) of each row."""
    most = np.abs(matrix).max(axis=1, initial=0)
    inverse = np.divide(np.float32(127), most, out=np.zeros_like(most), where=most > 0)
    return np.rint(matrix * inverse[:, None]).astype(np.int8), most / np.float32(127)


def as_floats(array: npt.NDArray[Any]) -> Floats:
    """A contiguous array of float32."""
    return np.ascontiguousarray(array, np.float32)
