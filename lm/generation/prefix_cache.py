"""Snapshots of prompt prefixes: a prefix that several prompts share is read once.

A snapshot belongs to a chunk boundary. Its key is a digest of all tokens before it. Each prompt saves its last
boundary, for the same prompt and its continuations, and the last boundary that it shares with an earlier prompt, for
instructions that many prompts begin with. The least recently used snapshots are dropped.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict

import numpy as np

from lm.generation.decoder import Snapshot

Key = bytes

_ENTRY_BYTES = 512
"""Approximate size of an entry without its arrays."""
_MAX_KNOWN = 50_000
"""Keys that are remembered without a snapshot."""


class PrefixCache:
    """Snapshots by the digest of the tokens before them, within `capacity_bytes`."""

    def __init__(self, capacity_bytes: int) -> None:
        self.nbytes = 0
        self.found_tokens = 0
        self._capacity = capacity_bytes
        self._snapshots: OrderedDict[Key, Snapshot] = OrderedDict()
        self._known: OrderedDict[Key, None] = OrderedDict()

    def keys(self, prompt: tuple[int, ...], state: Snapshot | None, chunk: int) -> list[Key]:
        """One key for each chunk boundary of the prompt: after `chunk` tokens, after twice as many, …

        At least one token follows the last boundary: its logits are needed.
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

    def boundaries_to_save(self, keys: list[Key]) -> set[int]:
        """The boundaries, counted from 1, at which to save a snapshot; remembers the keys."""
        shared = next((number for number in range(len(keys), 0, -1) if keys[number - 1] in self._known), 0)
        for key in keys:
            self._known[key] = None
            self._known.move_to_end(key)
        while len(self._known) > _MAX_KNOWN:
            self._known.popitem(last=False)
        return {number for number in (shared, len(keys)) if number and keys[number - 1] not in self._snapshots}

    def find(self, keys: list[Key]) -> tuple[int, Snapshot | None]:
        """The last boundary, counted from 1, that has a snapshot; (0, None) if there is none."""
        for number in range(len(keys), 0, -1):
            snapshot = self._snapshots.get(keys[number - 1])
            if snapshot is not None:
                self._snapshots.move_to_end(keys[number - 1])
                return number, snapshot
        return 0, None

    def save(self, key: Key, snapshot: Snapshot) -> None:
        """Save a snapshot, and drop the least recently used ones if the cache is full."""
        size = snapshot.nbytes + _ENTRY_BYTES
        if key in self._snapshots or size > self._capacity:
            return
        self._snapshots[key] = snapshot
        self.nbytes += size
        while self.nbytes > self._capacity:
            _, old = self._snapshots.popitem(last=False)
            self.nbytes -= old.nbytes + _ENTRY_BYTES


def fingerprint(snapshot: Snapshot) -> bytes:
    """A digest of everything that a snapshot holds."""
    total = hashlib.blake2b(repr((sorted(snapshot.growing), snapshot.window)).encode(), digest_size=16)
    for name in sorted(snapshot.arrays):
        array = np.asarray(snapshot.arrays[name], order="C")
        total.update(f"{name}|{array.dtype}|{array.shape}|".encode())
        total.update(array.tobytes())
    return total.digest()
