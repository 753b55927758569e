"""Which short windows of a text stand in another text: a rolling hash over the other text, each hit confirmed exactly.

The other text is read once, in pieces, with constant memory; about 40 million characters a second.

Source: Karp and Rabin 1987, "Efficient randomized pattern-matching algorithms".
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

Symbols = npt.NDArray[Any]
"""(N,) code points of a text, or its tokens: whole numbers of at most 32 bits."""

_MULTIPLIERS = 0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0xD6E8FEB86659FD93
"""Odd numbers, tried in order; the next one is for windows that collide under the one before."""
_AT_ONCE = 1 << 17
_MIN_TABLE_BITS, _MAX_TABLE_BITS = 16, 26


def code_points(text: str) -> npt.NDArray[np.uint32]:
    """(N,) the code points of a text."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.dtype("<u4"))


class WindowFinder:
    """Finds windows, all of one size, in a text that comes in pieces."""

    def __init__(self, windows: Symbols) -> None:
        """`windows` is (M, W): M windows of W symbols; a view is not copied."""
        self._windows = np.asarray(windows, np.uint32)
        self.found = np.zeros(len(windows), np.bool_)
        """(M,) which windows stand in the pieces so far."""
        self._size = windows.shape[1]
        self._held = np.empty(0, np.uint32)
        for multiplier in _MULTIPLIERS:
            self._set_multiplier(multiplier)
            if self._is_exact():
                break
        # One slot in 64 is taken, so that few places need the slower search.
        bits = int(np.clip(6 + np.log2(max(len(windows), 1)), _MIN_TABLE_BITS, _MAX_TABLE_BITS))
        self._shift = np.uint64(64 - bits)
        self._table = np.zeros(1 << bits, np.bool_)
        self._table[self._slot(self._hashes)] = True

    def _set_multiplier(self, multiplier: int) -> None:
        inverse = pow(multiplier, -1, 1 << 64)
        length = _AT_ONCE + self._size
        self._powers = _powers(multiplier, length)
        self._inverses = _powers(inverse, length)
        every = np.array([], np.uint64)
        if len(self._windows):
            every = np.concatenate([self._hash(part.ravel())[:: self._size] for part in self._parts()])
        order = np.argsort(every, kind="stable")
        first = np.ones(len(order), np.bool_)
        first[1:] = every[order[1:]] != every[order[:-1]]
        self._order, self._first = order, first
        self._hashes = every[order[first]]
        self._samples = order[first]

    def _parts(self) -> Iterable[Symbols]:
        return np.array_split(self._windows, -(-self._windows.size // _AT_ONCE))

    def _is_exact(self) -> bool:
        """Whether windows with the same hash are equal."""
        twins = np.flatnonzero(~self._first)
        return all(
            np.array_equal(self._windows[self._order[part]], self._windows[self._order[part - 1]])
            for part in np.array_split(twins, len(twins) // _AT_ONCE + 1)
        )

    def _hash(self, symbols: Symbols) -> npt.NDArray[np.uint64]:
        """(N - W + 1,) the hash of each window of at most _AT_ONCE + W - 1 symbols, modulo 2^64."""
        terms = symbols.astype(np.uint64) + np.uint64(1)
        terms *= self._inverses[: len(terms)]
        sums = np.zeros(len(terms) + 1, np.uint64)
        np.cumsum(terms, out=sums[1:])
        hashes = sums[self._size :] - sums[: -self._size]
        hashes *= self._powers[: len(hashes)]
        return hashes

    def _slot(self, hashes: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        """The place of a hash in the table; the high bits of the product depend on all bits of the hash."""
        slots: npt.NDArray[np.uint64] = (hashes * np.uint64(0xFF51AFD7ED558CCD)) >> self._shift
        return slots

    def read(self, symbols: Symbols) -> None:
        """Search the next piece; windows across pieces are found too."""
        for begin in range(0, len(symbols), _AT_ONCE):
            piece = np.concatenate([self._held, symbols[begin : begin + _AT_ONCE].astype(np.uint32)])
            if len(piece) >= self._size and len(self._windows):
                self._search(piece)
            self._held = piece[max(len(piece) - self._size + 1, 0) :]

    def _search(self, piece: Symbols) -> None:
        hashes = self._hash(piece)
        places = np.flatnonzero(self._table[self._slot(hashes)])
        if not len(places):
            return
        groups = np.searchsorted(self._hashes, hashes[places])
        groups[groups == len(self._hashes)] = 0
        samples = self._samples[groups]
        hit = (self._hashes[groups] == hashes[places]) & ~self.found[samples]
        places, samples = places[hit], samples[hit]
        if not len(places):
            return
        # One place of each window is enough, unless the hash was equal by chance.
        _, one = np.unique(samples, return_index=True)
        for chosen in (one, np.arange(len(places))):
            equal = self._equal(piece, places[chosen], samples[chosen])
            self.found[samples[chosen][equal]] = True
            if equal.all():
                return

    def _equal(self, piece: Symbols, places: npt.NDArray[Any], samples: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        there = np.lib.stride_tricks.sliding_window_view(piece, self._size)
        equal = np.zeros(len(places), np.bool_)
        step = max(1, (1 << 22) // self._size)
        for begin in range(0, len(places), step):
            part = slice(begin, begin + step)
            equal[part] = (there[places[part]] == self._windows[samples[part]]).all(axis=1)
        return equal

    def result(self) -> npt.NDArray[np.bool_]:
        """(M,) which windows stand in the text."""
        found = np.zeros(len(self._windows), np.bool_)
        # Equal windows share the answer of the first one.
        group = np.cumsum(self._first) - 1
        found[self._order] = self.found[self._samples][group]
        return found


def _powers(base: int, count: int) -> npt.NDArray[np.uint64]:
    """(count,) the powers of a number modulo 2^64, from 1 on."""
    powers = np.ones(count, np.uint64)
    powers[1:] = np.uint64(base)
    np.cumprod(powers, out=powers)
    return powers
