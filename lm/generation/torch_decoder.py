"""The reference decoder: any LanguageModel, on any device of torch."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lm.device import computing, send_ids
from lm.generation.decoder import Draw, Drawn, DrawPlan, Logits, Snapshot, check_different
from lm.generation.draw_on_device import can_draw, draw_rows
from lm.generation.state_rows import StateRows
from lm.models.base import LanguageModel, State

MAX_READ_TOKENS = 512
"""Tokens of one forward pass with a carried state: limits the memory for a long text."""


@dataclass(frozen=True)
class _SlotState:
    """The state, and the tokens in the window if the context is limited."""

    state: State | None = None
    """None before the first token, and while the state is in the joined rows."""
    window: tuple[int, ...] = ()


class TorchDecoder:
    """The reference decoder, in fp32.

    Args:
        model: on its device.
        joined: one call of the model steps all slots. That is many times as fast on a GPU, but the last bits of a
            slot's logits then depend on how many slots there are. Without it there is a call for each slot, and its
            logits do not depend on other slots. None: on a device other than the CPU.
        draws: draw tokens on the device in `step_and_draw`. None: on a device other than the CPU.
    """

    max_slots = None

    def __init__(self, model: LanguageModel, *, joined: bool | None = None, draws: bool | None = None) -> None:
        self._model = model.eval()
        self._device = next(model.parameters(), torch.empty(0)).device
        self._slots: dict[int, _SlotState] = {}
        self._numbers = itertools.count()
        is_cpu = self._device.type == "cpu"
        self._rows = StateRows() if (not is_cpu if joined is None else joined) else None
        self.draws = not is_cpu if draws is None else draws
        self.name = f"torch fp32, {self._device}{'' if self._rows is None else ', joined'}"
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
        slot_state = self._read_slot(slot)
        if slot_state.state is None:
            return Snapshot()
        arrays = {name: tensor[0].cpu().numpy() for name, tensor in slot_state.state.tensors.items()}
        return Snapshot(arrays, slot_state.state.growing, slot_state.window)

    def fork(self, slot: int) -> int:
        """See `Decoder.fork`."""
        return self._new_slot(self._read_slot(slot))

    def close(self, slot: int) -> None:
        """See `Decoder.close`."""
        del self._slots[slot]
        if self._rows is not None and slot in self._rows:
            self._rows.drop(slot)

    @torch.inference_mode()
    def _read_slot(self, slot: int) -> _SlotState:
        """The state and window of a slot, also of one in the joined rows."""
        slot_state = self._slots[slot]
        if self._rows is not None and slot in self._rows:
            return _SlotState(self._rows.read(slot), slot_state.window)
        return slot_state

    def prefill(self, slot: int, ids: Sequence[int], *, only_last: bool = False) -> Logits:
        """See `Decoder.prefill`."""
        slot_state, logits = self._prefill(self._read_slot(slot), ids, only_last=only_last)
        self._slots[slot] = slot_state
        if self._rows is not None and slot in self._rows:
            self._rows.drop(slot)
        return logits.cpu().numpy()

    def _prefill(self, slot_state: _SlotState, ids: Sequence[int], *, only_last: bool) -> tuple[_SlotState, Tensor]:
        limit, ids = self.context_length, list(ids)
        parts: list[Tensor] = []
        while ids:
            if limit is not None and len(slot_state.window) == limit:
                slot_state, _ = self._read(_SlotState(), slot_state.window[limit - limit // 2 :])
            room = MAX_READ_TOKENS if limit is None else limit - len(slot_state.window)
            slot_state, logits = self._read(slot_state, ids[:room])
            # Keep one row only: the logits of a long text would need much memory.
            parts = [logits[-1:]] if only_last else [*parts, logits]
            ids = ids[room:]
        return slot_state, torch.cat(parts)

    def _read(self, slot_state: _SlotState, ids: Sequence[int]) -> tuple[_SlotState, Tensor]:
        logits, state = self._forward(send_ids([list(ids)], self._device), slot_state.state)
        window = (*slot_state.window, *ids) if self.context_length is not None else ()
        return _SlotState(state, window), logits[0]

    @torch.inference_mode()
    def _forward(self, ids: Tensor, state: State | None) -> tuple[Tensor, State]:
        with computing(self._device, "fp32"):
            logits, after = self._model(ids, state)
        return logits.float(), after

    # -- a step ---------------------------------------------------------------------------------------

    def step(self, slots: Sequence[int], ids: Sequence[int]) -> Logits:
        """See `Decoder.step`."""
        return self._step(slots, ids).cpu().numpy()

    def can_draw(self, plan: DrawPlan) -> bool:
        """See `DrawingDecoder.can_draw`."""
        return can_draw(plan)

    @torch.inference_mode()
    def step_and_draw(self, slots: Sequence[int], ids: Sequence[int], draws: Sequence[Draw]) -> list[Drawn]:
        """See `DrawingDecoder.step_and_draw`."""
        parts = self._step(slots, ids).split([draw.rows for draw in draws])
        drawn = [draw_rows(part, draw.plan, draw.numbers) for part, draw in zip(parts, draws, strict=True) if draw.plan]
        # One copy to the host for all: each would wait for the device.
        tokens = iter(torch.cat(drawn).tolist() if drawn else [])
        return [
            (
                list(itertools.islice(tokens, draw.rows)) if draw.plan else None,
                part.cpu().numpy() if draw.needs_logits else None,
            )
            for part, draw in zip(parts, draws, strict=True)
        ]

    def _step(self, slots: Sequence[int], ids: Sequence[int]) -> Tensor:
        """The logits (S, V) of `step` on the device."""
        check_different(slots)
        if self._rows is not None:
            return self._step_joined(self._rows, slots, ids)
        found = []
        for slot, token in zip(slots, ids, strict=True):
            self._slots[slot], logits = self._prefill(self._slots[slot], [token], only_last=True)
            found.append(logits)
        return torch.cat(found)

    @torch.inference_mode()
    def _step_joined(self, rows: StateRows, slots: Sequence[int], ids: Sequence[int]) -> Tensor:
        new = [slot for slot in slots if slot not in rows and self._slots[slot].state is None]
        if new:
            # A text that begins has no state to join.
            first = {slot: self.prefill(slot, [token]) for slot, token in zip(slots, ids, strict=True) if slot in new}
            others = [(slot, token) for slot, token in zip(slots, ids, strict=True) if slot not in new]
            known = self._step_joined(rows, *zip(*others, strict=True)) if others else None
            number = {slot: row for row, (slot, _) in enumerate(others)}
            each = [
                torch.from_numpy(first[slot][0]).to(self._device) if known is None or slot in first
                else known[number[slot]] for slot in slots
            ]  # fmt: skip
            return torch.stack(each)
        self._slide(rows, slots)
        for slot in slots:
            if slot not in rows:
                state = self._slots[slot].state
                assert state is not None
                rows.put(slot, state)
        by_row, token_of = rows.gather(slots), dict(zip(slots, ids, strict=True))
        row_of = {slot: row for row, slot in enumerate(by_row)}
        sent = send_ids([[token_of[slot] for slot in by_row], [row_of[slot] for slot in slots]], self._device)
        logits, after = self._forward(sent[0, :, None], rows.begin(len(slots)))
        rows.end(after, len(slots))
        for slot, token in token_of.items():
            window = (*self._slots[slot].window, token) if self.context_length is not None else ()
            self._slots[slot] = _SlotState(None, window)
        last = logits[:, -1]
        return last if by_row == list(slots) else last.index_select(0, sent[1])

    def _slide(self, rows: StateRows, slots: Sequence[int]) -> None:
        """Read the newer half of each full window again, all in one call."""
        limit = self.context_length
        full = [slot for slot in slots if limit is not None and len(self._slots[slot].window) == limit]
        if not full:
            return
        assert limit is not None
        kept = {slot: self._slots[slot].window[limit - limit // 2 :] for slot in full}
        _, state = self._forward(send_ids([kept[slot] for slot in full], self._device), None)
        for row, slot in enumerate(full):
            if slot in rows:
                rows.drop(slot)
            rows.put(slot, state, row)
            self._slots[slot] = _SlotState(None, kept[slot])
