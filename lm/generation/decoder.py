"""The Decoder contract: texts in slots, logits on the host.

    slot = decoder.open()
    logits = decoder.prefill(slot, ids)      # (T, V) numpy float32, one row after each id
    logits = decoder.step([slot], [token])   # (1, V)

Beyond the context length, the window slides by half: when it holds `context_length` tokens, the older half is dropped
and the newer half is read again. So the window depends only on the position in the text. A model with a carried state
has no window.

The logits of a slot do not depend on other slots: the same ids give the same bits. A decoder that joins its slots in
products of torch breaks this rule in the last bits, and its name says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

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
        """Read one id in each of S different slots. Returns logits (S, V), valid until the next call.

        Raises:
            ValueError: a slot occurs twice.
        """

    def fork(self, slot: int) -> int:
        """Open a slot with a copy of another slot."""

    def export(self, slot: int) -> Snapshot:
        """Copy a slot to the host."""

    def restore(self, snapshot: Snapshot) -> int:
        """Open a slot with an exported snapshot."""

    def close(self, slot: int) -> None:
        """Free the slot."""


def check_different(slots: Sequence[int]) -> None:
    """Check the slots of a step.

    Raises:
        ValueError: a slot occurs twice.
    """
    if len(set(slots)) < len(slots):
        twice = next(slot for index, slot in enumerate(slots) if slot in slots[:index])
        raise ValueError(f"slot {twice} occurs twice in one step")


# -- drawing where the logits are -----------------------------------------------------------------------


@dataclass(frozen=True)
class DrawPlan:
    """How to draw with options that look at the logits alone, not at the text before."""

    bans: npt.NDArray[np.int64]
    """Tokens that are not drawn."""
    fallback: int
    """The token for a row without finite logits."""
    temperature: float
    """0: the most likely token."""
    filters: tuple[tuple[Callable[..., Any], tuple[Any, ...]], ...]
    """The filters after the temperature: functions of `lm.generation.filters`, with the values of their options."""


@dataclass(frozen=True)
class Draw:
    """What to do with some rows of a step."""

    rows: int
    plan: DrawPlan | None = None
    """Draws a token for each row; None: no token is drawn."""
    numbers: Sequence[float] = ()
    """A random number in [0, 1) for each row; not read at temperature 0."""
    needs_logits: bool = True


Drawn = tuple[list[int] | None, Logits | None]
"""The tokens and the logits (rows, V) of a `Draw`, each if it asks for them."""


@runtime_checkable
class DrawingDecoder(Protocol):
    """A decoder that can draw tokens on its device, so that logits stay there."""

    draws: bool
    """Whether it does so."""

    def can_draw(self, plan: DrawPlan) -> bool:
        """Whether it knows the filters of a plan."""

    def step_and_draw(self, slots: Sequence[int], ids: Sequence[int], draws: Sequence[Draw]) -> list[Drawn]:
        """As `Decoder.step`; `draws` divide the S rows in order."""
