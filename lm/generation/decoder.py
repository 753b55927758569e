"""The Decoder contract: texts in slots, logits on the host.

    slot = decoder.open()
    logits = decoder.prefill(slot, ids)      # (T, V) numpy float32, one row after each id
    logits = decoder.step([slot], [token])   # (1, V)

Beyond the context length, the window slides by half: when it holds `context_length` tokens, the older half is dropped
and the newer half is read again. So the window depends only on the position in the text. A model with a carried state
has no window.

The logits of a slot do not depend on other slots: the same ids give the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Logits = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Snapshot:
    """The arrays of one slot, on the host. It is immutable, and any decoder of the model can continue from it.

    `lm.generation.snapshots` gives snapshots names and saves them in files.
    """

    arrays: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)
    """The model's state, by the names of `lm.models.base.State`, without the batch axis; empty before the first
    token."""
    growing: frozenset[str] = frozenset()
    """Names of the arrays whose first axis is time."""
    window: tuple[int, ...] = ()
    """The tokens in the window; empty if the context has no limit."""

    @property
    def nbytes(self) -> int:
        """Size in memory."""
        return sum(array.nbytes for array in self.arrays.values()) + 32 * len(self.window)


class Decoder(Protocol):
    """Computes the logits of several texts, each in a slot."""

    @property
    def name(self) -> str:
        """The implementation: "native fp32, avx512", "torch fp32, cuda:0"."""

    @property
    def vocab_size(self) -> int:
        """V of the logits."""

    @property
    def context_length(self) -> int | None:
        """Size of the window in tokens; None for a carried state without limit."""

    @property
    def max_slots(self) -> int | None:
        """Slots that can be open at once; None: as many as memory holds."""

    def open(self) -> int:
        """Open an empty slot."""

    def prefill(self, slot: int, ids: Sequence[int], *, only_last: bool = False) -> Logits:
        """Read `ids` (T >= 1). Returns the logits after each id, (T, V), or only after the last, (1, V)."""

    def step(self, slots: Sequence[int], ids: Sequence[int]) -> Logits:
        """Read one id in each of S different slots. Returns logits (S, V), valid until the next call."""

    def fork(self, slot: int) -> int:
        """Open a slot with a copy of another slot."""

    def export(self, slot: int) -> Snapshot:
        """Copy a slot to the host."""

    def restore(self, snapshot: Snapshot) -> int:
        """Open a slot with an exported snapshot."""

    def close(self, slot: int) -> None:
        """Free the slot."""
