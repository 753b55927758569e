"""The Decoder contract, and the reference decoder that wraps any LanguageModel.

    slot = decoder.open()
    logits = decoder.prefill(slot, ids)      # (T, V) numpy float32, one row after each id
    logits = decoder.step([slot], [token])   # (1, V)

Past a model's context length the window slides by half: when `context_length` tokens are held, the older half is
forgotten and the newer half is read again. What is held depends on the position in the text alone, never on how the
text arrived. A model with a carried state goes on forever.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from lm.models.base import LanguageModel, State

Logits = npt.NDArray[np.float32]
PREFILL_CHUNK = 512
"""Prompt tokens run through a carried state at once: bounds the memory of a long prompt."""


@dataclass(frozen=True)
class Snapshot:
    """What a slot holds; immutable, so that it may be shared."""

    state: State | None = None
    window: tuple[int, ...] = field(default=())
    """The tokens that `state` has read; kept only where the context is limited."""


class Decoder(Protocol):
    """What generation steps through: texts in slots, logits on the host."""

    def open(self) -> int:
        """A new, empty slot."""

    def prefill(self, slot: int, ids: Sequence[int]) -> Logits:
        """Read `ids` (T >= 1); (T, V) logits of what follows each of them."""

    def step(self, slots: Sequence[int], ids: Sequence[int]) -> Logits:
        """Read one id in each of S slots; (S, V) logits of what follows."""

    def fork(self, slot: int) -> int:
        """A new slot that goes on from the same text."""

    def export(self, slot: int) -> Snapshot:
        """What the slot holds, for `restore`."""

    def restore(self, snapshot: Snapshot) -> int:
        """A new slot that goes on from an exported one."""

    def close(self, slot: int) -> None:
        """Free the slot."""


class TorchDecoder:
    """The reference decoder: any LanguageModel, on any device, in fp32.

    Each slot is computed by itself, so that its logits do not depend on its company.
    """

    def __init__(self, model: LanguageModel) -> None:
        self._model = model.eval()
        self._device = next(model.parameters(), torch.empty(0)).device
        self._slots: dict[int, Snapshot] = {}
        self._numbers = itertools.count()

    def open(self) -> int:
        """See `Decoder.open`."""
        return self.restore(Snapshot())

    def restore(self, snapshot: Snapshot) -> int:
        """See `Decoder.restore`."""
        slot = next(self._numbers)
        self._slots[slot] = snapshot
        return slot

    def export(self, slot: int) -> Snapshot:
        """See `Decoder.export`."""
        return self._slots[slot]

    def fork(self, slot: int) -> int:
        """See `Decoder.fork`."""
        return self.restore(self.export(slot))

    def close(self, slot: int) -> None:
        """See `Decoder.close`."""
        del self._slots[slot]

    def step(self, slots: Sequence[int], ids: Sequence[int]) -> Logits:
        """See `Decoder.step`."""
        return np.concatenate([self.prefill(slot, [token]) for slot, token in zip(slots, ids, strict=True)])

    def prefill(self, slot: int, ids: Sequence[int]) -> Logits:
        """See `Decoder.prefill`."""
        held, limit, parts, ids = self._slots[slot], self._model.context_length, [], list(ids)
        while ids:
            if limit is not None and len(held.window) == limit:
                held, _ = self._read(Snapshot(), held.window[limit - limit // 2 :])
            room = PREFILL_CHUNK if limit is None else limit - len(held.window)
            held, logits = self._read(held, ids[:room])
            parts.append(logits)
            ids = ids[room:]
        self._slots[slot] = held
        return np.concatenate(parts)

    @torch.inference_mode()
    def _read(self, held: Snapshot, ids: Sequence[int]) -> tuple[Snapshot, Logits]:
        logits, state = self._model(torch.tensor([list(ids)], device=self._device), held.state)
        window = (*held.window, *ids) if self._model.context_length is not None else ()
        return Snapshot(state, window), logits[0].float().cpu().numpy()
