"""The reference decoder: any LanguageModel, on any device of torch."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lm.generation.decoder import Logits, Snapshot
from lm.models.base import LanguageModel, State

MAX_READ_TOKENS = 512
"""Tokens of one forward pass with a carried state: limits the memory for a long text."""


@dataclass(frozen=True)
class _SlotState:
    """The state, and the tokens in the window if the context is limited."""

    state: State | None = None
    window: tuple[int, ...] = ()


class TorchDecoder:
    """The reference decoder, in fp32.

    It computes each slot separately: the logits do not depend on other slots.
    """

    max_slots = None

    def __init__(self, model: LanguageModel) -> None:
        self._model = model.eval()
        self._device = next(model.parameters(), torch.empty(0)).device
        self._slots: dict[int, _SlotState] = {}
        self._numbers = itertools.count()
        self.name = f"torch fp32, {self._device}"
        self.vocab_size = model.vocab_size
        self.context_length = model.context_length

    def open(self) -> int:
        """See `Decoder.open`."""
        return self._new_slot(_SlotState())

    def _new_slot(self, slot_state: _SlotState) -> int:
        slot = next(self._numbers)
        self._slots[slot] = slot_state
        return slot

    def restore(self, snapshot: Snapshot) -> int:
        """See `Decoder.restore`."""
        if not snapshot.arrays:
            return self.open()
        tensors = {name: torch.from_numpy(np.array(array))[None] for name, array in snapshot.arrays.items()}
        state = State(tensors, growing=snapshot.growing).to(self._device)
        return self._new_slot(_SlotState(state, snapshot.window))

    def export(self, slot: int) -> Snapshot:
        """See `Decoder.export`."""
        slot_state = self._slots[slot]
        if slot_state.state is None:
            return Snapshot()
        arrays = {name: tensor[0].cpu().numpy() for name, tensor in slot_state.state.tensors.items()}
        return Snapshot(arrays, slot_state.state.growing, slot_state.window)

    def fork(self, slot: int) -> int:
        """See `Decoder.fork`."""
        return self._new_slot(self._slots[slot])

    def close(self, slot: int) -> None:
        """See `Decoder.close`."""
        del self._slots[slot]

    def step(self, slots: Sequence[int], ids: Sequence[int]) -> Logits:
        """See `Decoder.step`."""
        return np.concatenate([self.prefill(slot, [token]) for slot, token in zip(slots, ids, strict=True)])

    def prefill(self, slot: int, ids: Sequence[int], *, only_last: bool = False) -> Logits:
        """See `Decoder.prefill`."""
        slot_state, limit, ids = self._slots[slot], self.context_length, list(ids)
        parts: list[Logits] = []
        while ids:
            if limit is not None and len(slot_state.window) == limit:
                slot_state, _ = self._read(_SlotState(), slot_state.window[limit - limit // 2 :])
            room = MAX_READ_TOKENS if limit is None else limit - len(slot_state.window)
            slot_state, logits = self._read(slot_state, ids[:room])
            # Keep one row only: the logits of a long text would need much memory.
            parts = [logits[-1:]] if only_last else [*parts, logits]
            ids = ids[room:]
        self._slots[slot] = slot_state
        return np.concatenate(parts)

    @torch.inference_mode()
    def _read(self, slot_state: _SlotState, ids: Sequence[int]) -> tuple[_SlotState, Logits]:
        logits, state = self._model(torch.tensor([list(ids)], device=self._device), slot_state.state)
        window = (*slot_state.window, *ids) if self.context_length is not None else ()
        return _SlotState(state, window), logits[0].float().cpu().numpy()
