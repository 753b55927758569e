"""The states of many texts in the rows of one preallocated state, so that one call of the model steps them all."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lm.models.base import State

BLOCK = 16
"""Positions of a step are rounded up to it: kernels for attention want whole blocks, and see few different sizes."""


class StateRows:
    """States of slots, each in a row; rows and positions double when they are full.

    All methods need `torch.inference_mode`.
    """

    def __init__(self) -> None:
        self._buffers: State | None = None
        self._owners: list[int | None] = []
        """The slot in each row."""
        self._row_of: dict[int, int] = {}
        self._lengths: dict[int, int] = {}
        """Positions of each slot in the growing tensors; 0 without such tensors."""

    def __contains__(self, slot: int) -> bool:
        return slot in self._row_of

    def put(self, slot: int, state: State, number: int = 0) -> None:
        """Store row `number` of a state, by copy; all its rows are of the same length."""
        length = max((state.tensors[name].shape[1] for name in state.growing), default=0)
        row = self._owners.index(None) if None in self._owners else len(self._owners)
        self._reserve(state, row + 1, length + 1)
        assert self._buffers is not None
        for name, buffer in self._buffers.tensors.items():
            own = state.tensors[name][number]
            (buffer[row, :length] if name in state.growing else buffer[row]).copy_(own)
        if row == len(self._owners):
            self._owners.append(None)
        self._owners[row] = slot
        self._row_of[slot], self._lengths[slot] = row, length

    def read(self, slot: int) -> State:
        """A copy of the state of a slot."""
        assert self._buffers is not None
        row, length, growing = self._row_of[slot], self._lengths[slot], self._buffers.growing
        tensors = {
            name: (buffer[row : row + 1, :length] if name in growing else buffer[row : row + 1]).clone()
            for name, buffer in self._buffers.tensors.items()
        }
        return State(tensors, growing)

    def drop(self, slot: int) -> None:
        """Free the row of a slot."""
        row = self._row_of.pop(slot)
        del self._lengths[slot]
        self._owners[row] = None

    def gather(self, slots: Sequence[int]) -> list[int]:
        """Bring these slots into the first rows; the slots by row. Others there change places with them."""
        wanted, count = set(slots), len(slots)
        late = [slot for slot in slots if self._row_of[slot] >= count]
        for row in range(count):
            owner = self._owners[row]
            if owner not in wanted:
                self._exchange(row, self._row_of[late.pop()])
        return [owner for owner in self._owners[:count] if owner is not None]

    def begin(self, count: int) -> State:
        """A view of the first `count` rows, with room for one more position each."""
        longest = 1 + max((self._lengths[slot] for slot in self._owners[:count] if slot is not None), default=0)
        assert self._buffers is not None
        self._reserve(self._buffers, count, longest)
        positions = -(-longest // BLOCK) * BLOCK
        tensors = {
            name: buffer[:count, :positions] if name in self._buffers.growing else buffer[:count]
            for name, buffer in self._buffers.tensors.items()
        }
        return State(tensors, self._buffers.growing, reserved=True)

    def end(self, after: State, count: int) -> None:
        """Store the state after a step of the rows of `begin`; growing tensors were written in place."""
        assert self._buffers is not None
        for name, buffer in self._buffers.tensors.items():
            if name not in after.growing:
                buffer[:count].copy_(after.tensors[name])
        if after.growing:
            for slot in self._owners[:count]:
                assert slot is not None
                self._lengths[slot] += 1

    def _exchange(self, row: int, other: int) -> None:
        """Exchange two rows; the second has a slot."""
        assert self._buffers is not None
        one, two = self._owners[row], self._owners[other]
        for buffer in self._buffers.tensors.values():
            kept = None if one is None else buffer[row].clone()
            buffer[row] = buffer[other]
            if kept is not None:
                buffer[other] = kept
        self._owners[row], self._owners[other] = two, one
        for slot, place in ((one, other), (two, row)):
            if slot is not None:
                self._row_of[slot] = place

    def _reserve(self, like: State, rows: int, positions: int) -> None:
        """Make room for so many rows and positions."""
        old = self._buffers
        if old is None:
            self._buffers = State({name: self._larger(t, name in like.growing, rows, positions, None)
                                   for name, t in like.tensors.items()}, like.growing)  # fmt: skip
            return
        held_rows = len(next(iter(old.tensors.values())))
        held = min((old.tensors[name].shape[1] for name in old.growing), default=positions)
        if rows <= held_rows and positions <= held:
            return
        rows = held_rows if rows <= held_rows else max(rows, 2 * held_rows)
        positions = held if positions <= held else max(positions, 2 * held)
        self._buffers = State({name: self._larger(t, name in old.growing, rows, positions, t)
                               for name, t in old.tensors.items()}, old.growing)  # fmt: skip

    @staticmethod
    def _larger(like: Tensor, grows: bool, rows: int, positions: int, content: Tensor | None) -> Tensor:
        """Zeros for rows (and positions, if the tensor grows), with the content of a smaller buffer."""
        shape = (-(-positions // BLOCK) * BLOCK, *like.shape[2:]) if grows else like.shape[1:]
        made = like.new_zeros((rows, *shape))
        if content is not None:
            made[tuple(slice(size) for size in content.shape)] = content
        return made
