"""The reference decoder: any LanguageModel, on any device torch has."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lm.generation.decoder import Logits, Snapshot
from lm.models.base import LanguageModel, State

READ_AT_ONCE = 512
"""Tokens run through a carried state at once: bounds the memory of a long text."""


@dataclass(frozen=True)
class _Held:
    """A slot: the state, and the tokens it has read where the context is limited."""

    state: State | None = None
    window: tuple[int, ...] = ()


class TorchDecoder:
    """The reference decoder, in fp32.

    Each slot is computed by itself, so that its logits do not depend on its company.
    """

    max_slots = None

    def __init__(self, model: LanguageModel) -> None:
        self._model = model.eval()
        self._device = next(model.parameters(), torch.empty(0)).device
        self._slots: dict[int, _Held] = {}
        self._numbers = itertools.count()
        self.name = f"torch fp32, {self._device}"
        self.vocab_size = model.vocab_size
        self.context_length = model.context_length

    def open(self) -> int:
        """See `Decoder.open`."""
        return self._hold(_Held())

    def _hold(self, held: _Held) -> int:
        slot = next(self._numbers)
        self._slots[slot] = held
        return slot

    def restore(self, snapshot: Snapshot) -> int:
        """See `Decoder.restore`."""
        if not snapshot.arrays:
            return self.open()
        tensors = {name: torch.from_numpy(np.array(array))[None] for name, array in snapshot.arrays.items()}
        state = State(tensors, growing=snapshot.growing).to(self._device)
        return self._hold(_Held(state, snapshot.window))

    def export(self, slot: int) -> Snapshot:
        """See `Decoder.export`."""
        held = self._slots[slot]
        if held.state is None:
            return Snapshot()
        arrays = {name: tensor[0].cpu().numpy() for name, tensor in held.state.tensors.items()}
        return Snapshot(arrays, held.state.growing, held.window)

    def fork(self, slot: int) -> int:
        """See `Decoder.fork`."""
        return self._hold(self._slots[slot])

    def close(self, slot: int) -> None:
        """See `Decoder.close`."""
        del self._slots[slot]

    def step(self, slots: Sequence[int], ids: Sequence[int]) -> Logits:
        """See `Decoder.step`."""
        return np.concatenate([self.prefill(slot, [token]) for slot, token in zip(slots, ids, strict=True)])

    def prefill(self, slot: int, ids: Sequence[int], *, only_last: bool = False) -> Logits:
        """See `Decoder.prefill`."""
        held, limit, ids = self._slots[slot], self.context_length, list(ids)
        parts: list[Logits] = []
        while ids:
            if limit is not None and len(held.window) == limit:
                held, _ = self._read(_Held(), held.window[limit - limit // 2 :])
            room = READ_AT_ONCE if limit is None else limit - len(held.window)
            held, logits = self._read(held, ids[:room])
            # Only one row is asked for: a long text must not hold a row of logits for each of its tokens.
            parts = [logits[-1:]] if only_last else [*parts, logits]
            ids = ids[room:]
        self._slots[slot] = held
        return np.concatenate(parts)

    @torch.inference_mode()
    def _read(self, held: _Held, ids: Sequence[int]) -> tuple[_Held, Logits]:
        logits, state = self._model(torch.tensor([list(ids)], device=self._device), held.state)
        window = (*held.window, *ids) if self.context_length is not None else ()
        return _Held(state, window), logits[0].float().cpu().numpy()
