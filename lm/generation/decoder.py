"""The Decoder contract, and the reference decoder that wraps any LanguageModel.

    slot = decoder.open()
    logits = decoder.prefill(slot, ids)      # (T, V) numpy float32, one row after each id
    logits = decoder.step([slot], [token])   # (1, V)

Past a model's context length the window slides by half: when `context_length` tokens are held, the older half is
forgotten and the newer half is read again. What is held depends on the position in the text alone, never on how the
text arrived. A model with a carried state goes on forever.

A slot's logits do not depend on its company: the same ids give the same bits alone and among others.
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
    """What a slot holds, on the host; immutable, so that it may be shared, kept and saved."""

    arrays: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)
    """The model's state of one text, by the names of `lm.models.base.State` and without its batch axis; empty before
    the first token."""
    growing: frozenset[str] = frozenset()
    """Names of the arrays whose first axis is time."""
    window: tuple[int, ...] = ()
    """The tokens that the state has read; kept only where the context is limited."""

    @property
    def nbytes(self) -> int:
        """Memory it takes."""
        return sum(array.nbytes for array in self.arrays.values()) + 32 * len(self.window)


class Decoder(Protocol):
    """What generation steps through: texts in slots, logits on the host."""

    @property
    def name(self) -> str:
        """Which arithmetic this is, in words: "native fp32, avx512", "torch fp32, cuda:0"."""

    @property
    def vocab_size(self) -> int:
        """V of the model."""

    @property
    def context_length(self) -> int | None:
        """The most tokens that a prediction looks back on; None for a carried state without limit."""

    @property
    def max_slots(self) -> int | None:
        """Slots that may be open at once; None: as many as memory holds."""

    def open(self) -> int:
        """A new, empty slot."""

    def prefill(self, slot: int, ids: Sequence[int], *, only_last: bool = False) -> Logits:
        """Read `ids` (T >= 1); (T, V) logits of what follows each of them, or (1, V) of what follows the last."""

    def step(self, slots: Sequence[int], ids: Sequence[int]) -> Logits:
        """Read one id in each of S different slots; (S, V) logits of what follows, good until the next call."""

    def fork(self, slot: int) -> int:
        """A new slot that goes on from the same text."""

    def export(self, slot: int) -> Snapshot:
        """What the slot holds, for `restore`."""

    def restore(self, snapshot: Snapshot) -> int:
        """A new slot that goes on from an exported one."""

    def close(self, slot: int) -> None:
        """Free the slot."""
