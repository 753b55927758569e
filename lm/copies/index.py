"""An exact index of a text: the longest run at each position of another text, in time linear in its length.

The index has the suffix array of the UTF-8 bytes (libdivsufsort) and, from it, the Burrows-Wheeler transform with
counts of each byte. Backward search gives the rank of each suffix of the other text among the suffixes of this one;
the longest match is with one of the two neighbours in rank. Bytes are exact for any Unicode text and need a fifth of
the memory of code points; a match is cut to whole characters afterwards.

Memory for n bytes: 4n for the suffix array, n for the text, n for the transform, and 4n/256 for each different byte
value; for n above 2^31 the suffix array has 8n.

Sources: Ferragina and Manzini 2000, "Opportunistic Data Structures with Applications" (backward search); Chang and
Lawler 1994, "Sublinear Approximate String Matching" (matching statistics); Kärkkäinen, Manzini and Puglisi 2009,
"Permuted Longest-Common-Prefix Array" (only irreducible matches are compared).
"""

from __future__ import annotations

import importlib
from array import array
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from lm.copies.copies import Copies

Bytes = npt.NDArray[np.uint8]
Positions = npt.NDArray[np.int64]

BLOCK_BITS = 8
"""Counts of each byte are stored for each block of 2^BLOCK_BITS entries of the transform."""
MAX_WIDTH = 4096
"""Bytes of two texts that are compared at once; both are padded by this."""
COMPARED_AT_ONCE = 1 << 20


class Place(NamedTuple):
    """A place in the indexed text."""

    character: int
    """Characters before it."""
    line: int
    """Its line, from 1."""


class CopyIndex:
    """An exact index of a text, which must not change. `find` may be called from several threads."""

    def __init__(self, text: str) -> None:
        """Index a text; about 0.1 seconds a megabyte."""
        self._bytes = _utf8(text)
        size = len(self._bytes)
        self._codes = _padded(self._bytes)
        # The library refuses an empty text.
        order = importlib.import_module("pydivsufsort").divsufsort(self._bytes) if size else np.empty(0, np.int32)
        self._suffixes: npt.NDArray[Any] = order
        # Ranks count the empty suffix first. `_whole` is the rank of the whole text: no byte stands before it.
        self._whole = int(np.flatnonzero(order == 0)[0]) + 1 if size else 0
        before = np.empty(size, np.uint8)
        if size:
            before[0] = self._codes[size - 1]
            # At the rank of the whole text there is no entry.
            before[1 : self._whole] = self._codes[order[: self._whole - 1] - 1]
            before[self._whole :] = self._codes[order[self._whole :] - 1]
        self._before = before.tobytes()
        counts = np.bincount(self._codes[:size], minlength=256)
        self._first = (1 + np.concatenate([[0], np.cumsum(counts)[:-1]])).tolist()
        self._counts = _block_counts(before)

    def find(self, text: str) -> Copies:
        """The runs of a text that stand in the indexed text; about 1 second a megabyte."""
        data = _utf8(text)
        codes = _padded(data)
        ranks = self._ranks(data)
        below, above = ranks - 2, ranks - 1
        size = len(self._suffixes)
        if not size or not len(data):
            nothing = np.empty(0, np.int64)
            return Copies(len(text), nothing, nothing, nothing)
        lower = np.where(below >= 0, self._suffixes[np.maximum(below, 0)], -1).astype(np.int64)
        upper = np.where(above < size, self._suffixes[np.minimum(above, size - 1)], -1).astype(np.int64)
        lower_length, upper_length = (self._common(codes, len(data), other) for other in (lower, upper))
        length = np.maximum(lower_length, upper_length)
        source = np.where(lower_length >= upper_length, lower, upper)
        # From bytes to characters: a match begins at the first byte of a character, and ends after a whole one.
        first_bytes = np.flatnonzero(_begins_character(codes[: len(data)]))
        ends = np.searchsorted(np.append(first_bytes, len(data)), (first_bytes + length[first_bytes]), "right") - 1
        starts = np.arange(len(first_bytes))
        # Maximal to the left: it ends later than the run one character before.
        maximal = (ends > starts) & (ends > np.concatenate([[0], ends[:-1]]))
        return Copies(len(first_bytes), starts[maximal], ends[maximal], source[first_bytes[maximal]])

    def place(self, source: int) -> Place:
        """The place of a byte offset."""
        before = self._codes[:source]
        return Place(int(np.count_nonzero(_begins_character(before))), int(np.count_nonzero(before == 10)) + 1)

    def _ranks(self, data: bytes) -> Positions:
        """For each suffix of `data`, how many suffixes of the text are smaller, the empty one included."""
        ranks = array("q", bytes(8 * len(data)))
        first, counts, before, whole = self._first, self._counts, self._before, self._whole
        rank = 0
        for position in range(len(data) - 1, -1, -1):
            value = data[position]
            found = counts.get(value)
            if found is None:
                rank = first[value]
            else:
                limit = rank - (rank > whole)
                block = limit >> BLOCK_BITS
                rank = first[value] + found[block] + before.count(value, block << BLOCK_BITS, limit)
            ranks[position] = rank
        return np.frombuffer(ranks, np.int64) if data else np.empty(0, np.int64)

    def _common(self, codes: Bytes, size: int, other: Positions) -> Positions:
        """The common length in bytes of the suffix at each position and of the indexed text from `other` on.

        If the suffixes at the position before are those one byte longer, they have one byte more in common. Only the
        others, the heads, are compared.
        """
        text, limit = self._codes, len(self._bytes)
        here = np.arange(size)
        follows = np.zeros(size, np.bool_)
        follows[1:] = (other[1:] > 0) & (other[:-1] == other[1:] - 1) & (codes[: size - 1] == text[other[1:] - 1])
        heads = np.flatnonzero(~follows)
        lengths = np.zeros(size, np.int64)
        # A neighbour in rank has at most one byte less in common than the neighbour at the position before. So half of
        # the heads bound the other half from both sides, and repeated text costs n log n, not n^2.
        step = 1 << len(heads).bit_length()
        while step:
            chosen = heads[step :: 2 * step] if step < len(heads) else heads[:1]
            before = heads[: len(heads) - step : 2 * step] if step < len(heads) else chosen
            known = np.maximum(lengths[before] - (chosen - before), 0)
            lengths[chosen] = _compare(codes, size, chosen, text, limit, other[chosen], known)
            step //= 2
        last_head = np.maximum.accumulate(np.where(follows, 0, here))
        result: Positions = lengths[last_head] - (here - last_head)
        return result


def _compare(
    first: Bytes, first_size: int, at: Positions, second: Bytes, second_size: int, other: Positions, known: Positions
) -> Positions:
    """How many bytes of two padded texts are equal, from each pair of positions on; 0 for a position of -1.

    `known` is how many are equal for certain.
    """
    most = np.where(other >= 0, np.minimum(first_size - at, second_size - other), 0)
    lengths = np.minimum(known, most)
    active = np.flatnonzero(most > lengths)
    while len(active):
        width = int(np.clip(COMPARED_AT_ONCE // len(active), 16, MAX_WIDTH))
        left = np.lib.stride_tricks.sliding_window_view(first, width)
        right = np.lib.stride_tricks.sliding_window_view(second, width)
        kept = []
        for part in np.array_split(active, -(-len(active) * width // COMPARED_AT_ONCE)):
            done = lengths[part]
            differ = left[at[part] + done] != right[other[part] + done]
            equal = np.where(differ.any(axis=1), differ.argmax(axis=1), width)
            lengths[part] = np.minimum(done + equal, most[part])
            kept.append(part[(equal == width) & (lengths[part] < most[part])])
        active = np.concatenate(kept)
    return lengths


def _block_counts(before: Bytes) -> dict[int, array[int]]:
    """For each byte value of the transform: how often it stands before each block."""
    blocks = (len(before) >> BLOCK_BITS) + 1
    values = np.flatnonzero(np.bincount(before, minlength=256))
    kind: Any = np.uint32 if len(before) < 1 << 32 else np.uint64
    counts = np.zeros((len(values), blocks), kind)
    step = 1 << 20
    for begin in range(0, len(before), step):
        part = before[begin : begin + step].astype(np.int32)
        part += (np.arange(len(part), dtype=np.int32) >> BLOCK_BITS) << 8
        rows = -(-len(part) >> BLOCK_BITS)
        found = np.bincount(part, minlength=rows << 8).reshape(rows, 256)
        start = begin >> BLOCK_BITS
        # The counts of a block are before the block after it.
        width = min(rows, blocks - 1 - start)
        counts[:, start + 1 : start + 1 + width] = found[:width, values].T
    np.cumsum(counts, axis=1, out=counts)
    code = "I" if kind is np.uint32 else "Q"
    return {int(value): array(code, row.tobytes()) for value, row in zip(values, counts, strict=True)}


def _begins_character(codes: Bytes) -> npt.NDArray[np.bool_]:
    """Which bytes begin a character: all except 0x80 to 0xBF, as signed numbers -128 to -65."""
    return codes.view(np.int8) > -65


def _padded(data: bytes) -> Bytes:
    codes = np.zeros(len(data) + MAX_WIDTH, np.uint8)
    codes[: len(data)] = np.frombuffer(data, np.uint8)
    return codes


def _utf8(text: str) -> bytes:
    """UTF-8; half of a surrogate pair, which a prompt can hold, becomes three bytes."""
    return text.encode("utf-8", "surrogatepass")
