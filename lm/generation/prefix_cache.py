"""Snapshots of prompt starts, so that equal starts are read once.

A state is kept at a chunk border and known by a digest of everything read before it. Kept are the last border of each
prompt, which serves the same prompt and those that go on from it, and the last border that a prompt shares with an
earlier one, which serves instructions that many prompts begin with. The states used longest ago make room.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict

import numpy as np

from lm.generation.decoder import Snapshot

Key = bytes

_ENTRY_BYTES = 512
"""What an entry takes beside its arrays, about."""
_MOST_REMEMBERED = 50_000
"""Borders that are remembered without their state."""


class PrefixCache:
    """Snapshots by what was read before them, within a number of bytes."""

    def __init__(self, capacity_bytes: int) -> None:
        self.nbytes = 0
        self.found_tokens = 0
        self._capacity = capacity_bytes
        self._kept: OrderedDict[Key, Snapshot] = OrderedDict()
        self._met: OrderedDict[Key, None] = OrderedDict()

    def keys(self, prompt: tuple[int, ...], state: Snapshot | None, chunk: int) -> list[Key]:
        """One key for each border inside the prompt: after `chunk` tokens, after twice as many, …

        At least one token comes after the last of them, so that there are logits to go on from.
        """
        count = (len(prompt) - 1) // chunk
        if count == 0 or self._capacity == 0:
            return []
        keys, before = [], b"" if state is None else fingerprint(state)
        ids = np.array(prompt[: count * chunk], dtype=np.int64).tobytes()
        step = len(ids) // count
        for begin in range(0, len(ids), step):
            before = hashlib.blake2b(before + ids[begin : begin + step], digest_size=16).digest()
            keys.append(before)
        return keys

    def borders_to_keep(self, keys: list[Key]) -> set[int]:
        """At which borders, counted from 1, the state should be kept when it comes by; the keys are then known."""
        shared = next((place for place in range(len(keys), 0, -1) if keys[place - 1] in self._met), 0)
        for key in keys:
            self._met[key] = None
            self._met.move_to_end(key)
        while len(self._met) > _MOST_REMEMBERED:
            self._met.popitem(last=False)
        return {place for place in (shared, len(keys)) if place and keys[place - 1] not in self._kept}

    def find(self, keys: list[Key]) -> tuple[int, Snapshot | None]:
        """The last border, counted from 1, with a state; (0, None) if there is none."""
        for place in range(len(keys), 0, -1):
            snapshot = self._kept.get(keys[place - 1])
            if snapshot is not None:
                self._kept.move_to_end(keys[place - 1])
                return place, snapshot
        return 0, None

    def keep(self, key: Key, snapshot: Snapshot) -> None:
        """Keep a state, and let the ones used longest ago go."""
        size = snapshot.nbytes + _ENTRY_BYTES
        if key in self._kept or size > self._capacity:
            return
        self._kept[key] = snapshot
        self.nbytes += size
        while self.nbytes > self._capacity:
            _, old = self._kept.popitem(last=False)
            self.nbytes -= old.nbytes + _ENTRY_BYTES


def fingerprint(snapshot: Snapshot) -> bytes:
    """A digest of all that a snapshot holds."""
    total = hashlib.blake2b(repr((sorted(snapshot.growing), snapshot.window)).encode(), digest_size=16)
    for name in sorted(snapshot.arrays):
        array = np.asarray(snapshot.arrays[name], order="C")
        total.update(f"{name}|{array.dtype}|{array.shape}|".encode())
        total.update(array.tobytes())
    return total.digest()
