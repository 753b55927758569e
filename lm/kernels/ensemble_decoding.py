"""The native decoding step of an ensemble: a kernel for each member, and the mean of their probabilities.

It equals `lm.models.ensemble`. Slot k of the ensemble is slot k of each kernel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from lm.errors import CorruptRunError
from lm.kernels.decoding import Arrays, DecodePrecision, Floats, Kernel, Parts
from lm.registry import KERNELS

REGISTERS = {"ensemble": "EnsembleKernel"}

MEMBERS = "members.{}."
"""Prefix of the names of a member's arrays, with the member's number from 0."""
SHARED = "shared."
"""Prefix of the names of arrays that are stored once for all members."""


class EnsembleKernel(Kernel):
    """The kernels of all members."""

    def __init__(self, options: Mapping[str, Any], arrays: Arrays, *, slots: int, **settings: Any) -> None:
        member = options["member"]
        cls: Any = KERNELS.resolve(member["type"])
        size = int(options["size"])
        self._kernels: list[Kernel] = [
            cls(member, member_arrays(arrays, number), slots=slots, **settings) for number in range(size)
        ]
        first = self._kernels[0]
        self.vocab_size, self.context_length = first.vocab_size, first.context_length
        if any(kernel.vocab_size != self.vocab_size for kernel in self._kernels):
            raise CorruptRunError("The ensemble's members have different vocabularies: restore the file saved last.")
        self.isa, self.threads = first.isa, first.threads
        self._log_size = np.float32(np.log(size))
        self._means = np.empty((slots, self.vocab_size), np.float32)

    @classmethod
    def lacks(cls, options: Mapping[str, Any]) -> str | None:
        """See `Kernel.lacks`."""
        member = options["member"]
        if member["type"] not in KERNELS.names():
            return f"a kernel for {member['type']} members"
        return KERNELS.resolve(member["type"]).lacks(member)

    @classmethod
    def slot_bytes(cls, options: Mapping[str, Any]) -> int:
        """See `Kernel.slot_bytes`."""
        member = options["member"]
        if member["type"] not in KERNELS.names():
            return 0
        return int(options["size"]) * KERNELS.resolve(member["type"]).slot_bytes(member)

    @classmethod
    def parts(cls, options: Mapping[str, Any], arrays: Arrays, precision: DecodePrecision) -> Parts:
        """See `Kernel.parts`; the members' kernels build themselves."""
        member, size = options["member"], int(options["size"])
        kernel: type[Kernel] = KERNELS.resolve(member["type"])
        members = [kernel.parts(member, member_arrays(arrays, number), precision) for number in range(size)]
        return Parts("ensemble", {"members": members}, members[0].vocab_size, members[0].context_length)

    def step(self, slots: Sequence[int], ids: Sequence[int]) -> Floats:
        """See `Kernel.step`; log-probabilities."""
        return self._mean([kernel.step(slots, ids) for kernel in self._kernels], self._means[: len(slots)])

    def read(self, slot: int, ids: Sequence[int], *, only_last: bool) -> Floats:
        """See `Kernel.read`; log-probabilities."""
        logits = [kernel.read(slot, ids, only_last=only_last) for kernel in self._kernels]
        return self._mean(logits, np.empty_like(logits[0]))

    def _mean(self, members: list[Floats], means: Floats) -> Floats:
        """The logarithm of the mean of the members' probabilities (S, V), from their logits, in `means`."""
        # Row by row: the last bits of a row must not depend on the other rows.
        for row, *logits in zip(means, *members, strict=True):
            row[:] = _log_softmax(logits[0])
            for each in logits[1:]:
                np.logaddexp(row, _log_softmax(each), out=row)
            row -= self._log_size
        return means

    def clear(self, slot: int) -> None:
        """See `Kernel.clear`."""
        for kernel in self._kernels:
            kernel.clear(slot)

    def copy(self, source: int, target: int) -> None:
        """See `Kernel.copy`."""
        for kernel in self._kernels:
            kernel.copy(source, target)

    def save(self, slot: int) -> tuple[dict[str, npt.NDArray[Any]], tuple[int, ...]]:
        """See `Kernel.save`: the arrays of all members, as MEMBER/NAME. All members have the same window."""
        arrays: dict[str, npt.NDArray[Any]] = {}
        window: tuple[int, ...] = ()
        for number, kernel in enumerate(self._kernels):
            own, window = kernel.save(slot)
            arrays |= {f"{number}/{name}": array for name, array in own.items()}
        return arrays, window

    def load(self, slot: int, arrays: Arrays, window: tuple[int, ...]) -> None:
        """See `Kernel.load`."""
        for number, kernel in enumerate(self._kernels):
            start = f"{number}/"
            own = {name.removeprefix(start): array for name, array in arrays.items() if name.startswith(start)}
            kernel.load(slot, own, window)


def member_arrays(arrays: Arrays, number: int) -> dict[str, npt.NDArray[Any]]:
    """The arrays of member `number` (from 0) of an ensemble: its own, and those that all members share."""
    found: dict[str, npt.NDArray[Any]] = {}
    for start in (SHARED, MEMBERS.format(number)):
        found |= {name.removeprefix(start): array for name, array in arrays.items() if name.startswith(start)}
    return found


def _log_softmax(logits: Floats) -> Floats:
    """Log-probabilities of one row (V,)."""
    shifted: Floats = logits - logits.max()
    shifted -= np.log(np.exp(shifted).sum())
    return shifted
