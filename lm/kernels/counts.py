"""n-gram counts as flat sorted arrays, a `Level` for each length of context, and their compiled lookup.

Shapes: V vocabulary, C contexts of a level, M pairs of a context and a next token.

A pair has a share of its context's probability. The rest of it, the backoff weight, goes to the distribution of the
shorter context. The levels are a trie, so memory grows with the number of distinct pairs, not with V to the power of
the order. `lm.models.kneser_ney` has the distributions.

Source: Chen and Goodman 1999, "An empirical study of smoothing techniques for language modeling", section 3.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy

from lm.kernels.compiled import native

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Anything = npt.NDArray[Any]

MAX_DIRECT_KEYS = 10_000_000
"""With at most this many possible contexts, they are found in a table (40 MB); else by binary search."""
FALLBACK_DISCOUNTS = (0.5, 1.0, 1.5)
"""For texts that are too short to estimate the discounts."""


@dataclass(frozen=True, eq=False)
class RawCounts:
    """What leaving out an occurrence needs of a level."""

    counts: npt.NDArray[np.uint32]
    """(M,) of the pairs, at least 1."""
    totals: Floats
    """(C,) sum of a context's counts."""
    discount: Floats
    """(4,) the discounts of the counts 0, 1, 2, and 3 or more."""


@dataclass(frozen=True, eq=False)
class Level:
    """All contexts of one length: the shares of the tokens after each."""

    vocab_size: int
    keys: Ints
    """(C,) sorted: (index of the context without its oldest token) · V + its oldest token."""
    starts: Ints
    """(C + 1,) index of each context's first pair."""
    tokens: Anything
    """(M,) the next tokens, sorted within a context."""
    shares: npt.NDArray[np.float32]
    """(M,) each pair's probability without backoff."""
    backoff: Floats
    """(C,) the weight of the shorter context's distribution."""
    raw: RawCounts | None = None

    @cached_property
    def pairs(self) -> Ints:
        """(M,) sorted: context · V + token."""
        return owners(self) * self.vocab_size + self.tokens

    @cached_property
    def _table(self) -> dict[int, npt.NDArray[np.int32]]:
        return {}

    def find(self, keys: Ints, bound: int) -> Ints:
        """The contexts of these keys, which are below `bound`; -1 for an unknown key and for the key -1."""
        if bound > MAX_DIRECT_KEYS:
            return find_sorted(self.keys, keys)
        if bound not in self._table:
            # The last entry is that of the key -1.
            table = np.full(bound + 1, -1, dtype=np.int32)
            table[self.keys] = np.arange(len(self.keys))
            self._table[bound] = table
        return self._table[bound][keys].astype(np.int64)

    def pairs_in(self, contexts: Ints) -> tuple[Ints, Ints]:
        """All pairs of these contexts in order: the index into `contexts`, and the index of the pair."""
        first = self.starts[contexts]
        lengths = self.starts[contexts + 1] - first
        owner = np.repeat(np.arange(len(contexts)), lengths)
        offsets = np.cumsum(lengths) - lengths
        return owner, np.arange(len(owner)) + (first - offsets)[owner]

    def leave_one_out(self, contexts: Ints, pairs: Ints) -> tuple[Floats, Floats, Floats]:
        """If each pair (P,) had one occurrence less: the factor of its context's shares, and the new backoff weight.

        And the term that is then added to the pair's share. They are 0, 1, 0 for a context without other occurrences.
        """
        assert self.raw is not None
        counts = self.raw.counts[pairs].astype(np.int64)
        total, discounts = self.raw.totals[contexts], self.raw.discount
        discount, lower = discounts[np.minimum(counts, 3)], discounts[np.minimum(counts - 1, 3)]
        left = np.maximum(total - 1, 1)
        empty = total == 1
        backoff = np.where(empty, 1.0, (self.backoff[contexts] * total - discount + lower) / left)
        change = np.where(empty, 0.0, ((counts - 1 - lower) - (counts - discount)) / left)
        return np.where(empty, 0.0, total / left), backoff, change


def owners(level: Level) -> Ints:
    """(M,) the context of each pair."""
    return np.repeat(np.arange(len(level.keys)), np.diff(level.starts))


def smoothed_level(keys: Ints, starts: Ints, tokens: Anything, counts: Anything, vocab_size: int) -> Level:
    """A level from the counts (M,) of its pairs, all at least 1; the other arguments are those of `Level`."""
    owner = np.repeat(np.arange(len(keys)), np.diff(starts))
    discount = discounts_of(counts)
    discounts = discount[np.minimum(counts, 3)]
    totals = np.bincount(owner, counts, minlength=len(keys)).astype(np.float64)
    mass = np.bincount(owner, discounts, minlength=len(keys))
    # Without any count, as in an empty text, all probability backs off.
    backoff = np.where(totals > 0, mass / np.maximum(totals, 1), 1.0)
    shares = ((counts - discounts) / totals[owner]).astype(np.float32)
    raw = RawCounts(counts.astype(np.uint32), totals, discount)
    return Level(vocab_size, keys, starts, tokens.astype(token_dtype(vocab_size)), shares, backoff, raw)


def discounts_of(counts: Anything) -> Floats:
    """(4,) the discounts of the counts 0, 1, 2, and 3 or more: Chen and Goodman's estimate."""
    n1, n2, n3, n4 = (int(np.count_nonzero(counts == number)) for number in (1, 2, 3, 4))
    estimates = FALLBACK_DISCOUNTS
    if n1 and n2 and n3:
        y = n1 / (n1 + 2 * n2)
        estimates = (1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3)
    # Estimates from a short text can be negative, or larger than the counts.
    bounded = [
        value if 0 < value <= count else fallback
        for count, value, fallback in zip((1, 2, 3), estimates, FALLBACK_DISCOUNTS, strict=True)
    ]
    return np.array([0.0, *bounded])


def token_dtype(vocab_size: int) -> type[np.unsignedinteger[Any]]:
    """The smaller of two types that can hold all token ids."""
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


def find_sorted(sorted_values: Ints, values: Ints) -> Ints:
    """The index of each value among sorted ones, -1 if it is not there."""
    if len(sorted_values) == 0:
        return np.full(len(values), -1)
    index = sorted_values.searchsorted(values)
    index[index == len(sorted_values)] = 0
    index[sorted_values[index] != values] = -1
    return index


# -- the compiled lookup ------------------------------------------------------------------------------


def compiled_counts(levels: Sequence[Level]) -> Any:
    """The compiled object that looks the levels up; None without the compiled module. It copies what it needs."""
    if native() is None:
        return None
    parts = [
        (
            level.keys.astype(np.int64, copy=False),
            level.starts.astype(np.int64, copy=False),
            level.tokens.astype(np.uint32),
            level.shares,
            level.backoff,
            None if level.raw is None else (level.raw.counts, level.raw.totals, level.raw.discount),
        )
        for level in levels
    ]
    return native().Counts(parts, levels[0].vocab_size)


@dataclass(frozen=True, eq=False)
class CountArrays:
    """The saved counts of a model; see `levels_from_arrays` for the fields and the errors."""

    arrays: Mapping[str, Anything]
    order: int
    vocab_size: int | None = None

    @cached_property
    def levels(self) -> list[Level]:
        """All levels, from the empty context on."""
        return levels_from_arrays(self.arrays, order=self.order, vocab_size=self.vocab_size)

    def compiled(self) -> Any:
        """See `compiled_counts`."""
        return compiled_counts(self.levels)

    def trie(self) -> dict[str, Any]:
        """The counts for exports: "unigrams" (V,), and `PARTS` of each level after the empty context.

        Of compact counts, shares and backoff weights are codes, and "share_values" and "backoff_values" (256,) decode
        them; of raw counts they are float32.
        """
        root, packed = self.levels[0], self.arrays.get("packed")
        unigrams = np.full(root.vocab_size, np.float32(root.backoff[0]) / np.float32(root.vocab_size), np.float32)
        unigrams[root.tokens] += root.shares
        if packed is not None:
            arrays = _unpacked(np.asarray(packed))
            levels = [{name: arrays[f"{name}.{k}"] for name in PARTS} for k in range(1, self.order)]
        else:
            levels = [
                dict(zip(PARTS, (*_shape(level, len(above.keys)), level.shares), strict=True))
                for above, level in pairwise(self.levels)
            ]
        return {
            "unigrams": unigrams,
            "levels": levels,
            "share_values": SHARE_VALUES,
            "backoff_values": BACKOFF_VALUES,
        }


def _shape(level: Level, parents: int) -> tuple[Anything, ...]:
    """`PARTS` of a level without its shares."""
    above, tokens = np.divmod(level.keys, level.vocab_size)
    return (
        _smallest(tokens),
        _smallest(np.bincount(above, minlength=parents)),
        _smallest(np.diff(level.starts)),
        level.backoff.astype(np.float32),
        _smallest(level.tokens),
    )


# -- saving -------------------------------------------------------------------------------------------
# Raw counts of level k are "counts.k" with "keys.k", "starts.k" and "tokens.k". Compact counts are one array, "packed":
# a compressed safetensors file with "unigrams", the distribution of the empty context, and `PARTS` of the other levels.

PARTS = ("contexts", "children", "sizes", "backoffs", "tokens", "shares")
"""Arrays of a compact level: the oldest token of each context (C,); how many contexts end in each context one token
shorter; pairs of each context (C,); rounded backoff weights (C,); next tokens (M,); rounded shares (M,)."""
COMPRESSION = 1
"""The level of zlib: higher ones take five times as long for 8 % less."""
MAX_RATIO = 100
"""Bytes for each compressed byte, at most: a small file of a stranger cannot fill the memory."""
SHARE_STEPS = 16
"""A share is exp(-code / 16), within 3 %. The shares of a context are then scaled to the sum 1 - backoff weight."""
BACKOFF_STEPS = 12
"""A backoff weight is 1 / (1 + exp((128 - code) / 12)): it and 1 minus it are within 4 %."""
SHARE_VALUES = np.exp(-np.arange(256) / SHARE_STEPS)
BACKOFF_VALUES = 1 / (1 + np.exp((128 - np.arange(256)) / BACKOFF_STEPS))


def raw_arrays(levels: Sequence[Level]) -> dict[str, Anything]:
    """The raw counts as arrays by name; the unigram counts "counts.0" are (V,), with zeros."""
    arrays: dict[str, Anything] = {}
    for k, level in enumerate(levels):
        assert level.raw is not None
        if k == 0:
            arrays["counts.0"] = np.zeros(level.vocab_size, dtype=np.uint32)
            arrays["counts.0"][level.tokens] = level.raw.counts
        else:
            arrays[f"keys.{k}"], arrays[f"starts.{k}"] = level.keys, level.starts.astype(np.uint32)
            arrays[f"tokens.{k}"], arrays[f"counts.{k}"] = level.tokens, level.raw.counts
    return arrays


def compact_arrays(levels: Sequence[Level]) -> dict[str, Anything]:
    """The levels as one small array, with shares and backoff weights rounded to 8 bits."""
    root, vocab_size = levels[0], levels[0].vocab_size
    unigrams = np.full(vocab_size, root.backoff[0] / vocab_size)
    unigrams[root.tokens] += root.shares
    arrays: dict[str, Anything] = {"unigrams": unigrams.astype(np.float32)}
    for k, level in enumerate(levels[1:], 1):
        parents, tokens = np.divmod(level.keys, vocab_size)
        shares = np.rint(-SHARE_STEPS * np.log(np.maximum(level.shares, 1e-30)))
        odds = np.log(level.backoff) - np.log(np.maximum(1 - level.backoff, 1e-9))
        parts = (
            _smallest(tokens),
            _smallest(np.bincount(parents, minlength=len(levels[k - 1].keys))),
            _smallest(np.diff(level.starts)),
            np.clip(np.rint(odds * BACKOFF_STEPS) + 128, 0, 255).astype(np.uint8),
            _smallest(level.tokens),
            np.clip(shares, 0, 255).astype(np.uint8),
        )
        arrays |= {f"{name}.{k}": part for name, part in zip(PARTS, parts, strict=True)}
    return {"packed": np.frombuffer(zlib.compress(safetensors.numpy.save(arrays), COMPRESSION), np.uint8)}


def _unpacked(packed: Anything) -> dict[str, Anything]:
    """The arrays in "packed".

    Raises:
        ValueError: it holds something else, or far more than counts.
    """
    try:
        unpacking = zlib.decompressobj()
        content = unpacking.decompress(packed.tobytes(), MAX_RATIO * len(packed) + (1 << 20))
        if unpacking.eof:
            return safetensors.numpy.load(content)
    except (zlib.error, safetensors.SafetensorError, TypeError):
        pass
    raise ValueError("packed in the file does not hold counts")


def _smallest(values: Anything) -> Anything:
    """The values in the smallest unsigned type that holds them."""
    return values.astype(np.min_scalar_type(int(values.max(initial=0))))


def levels_from_arrays(arrays: Mapping[str, Anything], *, order: int, vocab_size: int | None = None) -> list[Level]:
    """The levels of a result of `raw_arrays` or `compact_arrays`.

    Args:
        arrays: by name.
        order: number of the levels.
        vocab_size: V; None: that of the arrays.

    Raises:
        ValueError: they have another order or vocabulary, or are inconsistent; names the array.
    """
    compact = "packed" in arrays
    if compact:
        arrays = {**arrays, **_unpacked(np.asarray(arrays["packed"]))}
        del arrays["packed"]
    root, parts = ("unigrams", PARTS) if compact else ("counts.0", ("keys", "starts", "tokens", "counts"))
    if odd := sorted({root, *(f"{name}.{k}" for k in range(1, order) for name in parts)} ^ arrays.keys()):
        raise ValueError(f"counts and model differ in {', '.join(odd[:4])}")
    unigrams = np.asarray(arrays[root])
    vocab_size = unigrams.size if vocab_size is None else vocab_size
    if unigrams.shape != (vocab_size,):
        raise ValueError(f"{root} is {unigrams.shape} in the file, {(vocab_size,)} in the model")
    if compact and not ((unigrams > 0) & (unigrams <= 1)).all():
        raise ValueError("unigrams in the file are no probabilities")
    levels = [_compact_root(unigrams) if compact else _raw_root(unigrams)]
    for k in range(1, order):
        make = _compact_level if compact else _raw_level
        level = make([np.asarray(arrays[f"{name}.{k}"]) for name in parts], len(levels[-1].keys), vocab_size)
        if level is None:
            raise ValueError(f"{', '.join(f'{name}.{k}' for name in parts)} in the file do not fit together")
        levels.append(level)
    return levels


def _raw_root(unigrams: Anything) -> Level:
    tokens = np.flatnonzero(unigrams)
    starts = np.array([0, len(tokens)])
    return smoothed_level(np.zeros(1, np.int64), starts, tokens, unigrams[tokens].astype(np.int64), len(unigrams))


def _raw_level(parts: Sequence[Anything], parents: int, vocab_size: int) -> Level | None:
    """A level from keys, starts, tokens and counts; None if they are inconsistent."""
    keys, starts, tokens, counts = (part.astype(np.int64) for part in parts)
    if not (all(part.ndim == 1 for part in parts) and len(starts) == len(keys) + 1):
        return None
    complete = starts[0] == 0 and starts[-1] == len(tokens) == len(counts) and bool((np.diff(starts) > 0).all())
    if not complete or not _are_sorted(keys, parents * vocab_size) or counts.min(initial=1) < 1:
        return None
    level = smoothed_level(keys, starts, tokens, counts, vocab_size)
    return level if _has_known_tokens(level) else None


def _compact_root(unigrams: Anything) -> Level:
    """The empty context, whose distribution is known as a whole."""
    starts = np.array([0, len(unigrams)])
    tokens = np.arange(len(unigrams), dtype=token_dtype(len(unigrams)))
    return Level(len(unigrams), np.zeros(1, np.int64), starts, tokens, unigrams.astype(np.float32), np.zeros(1))


def _compact_level(parts: Sequence[Anything], parents: int, vocab_size: int) -> Level | None:
    """A level from its `PARTS`; None if they are inconsistent."""
    contexts, children, sizes, backoffs, tokens, shares = parts
    if not all(part.ndim == 1 and part.dtype.kind == "u" for part in parts):
        return None
    lengths = len(children), len(sizes), len(backoffs), len(shares)
    if lengths != (parents, len(contexts), len(contexts), len(tokens)) or contexts.max(initial=0) >= vocab_size:
        return None
    if children.sum(dtype=np.int64) != len(contexts) or sizes.sum(dtype=np.int64) != len(tokens):
        return None
    keys = np.repeat(np.arange(parents), children) * vocab_size + contexts
    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes, dtype=np.int64)])
    backoff = BACKOFF_VALUES[backoffs]
    backoff[sizes == 0] = 1
    owner = np.repeat(np.arange(len(contexts)), sizes)
    rounded = SHARE_VALUES[shares]
    scale = (1 - backoff) / np.maximum(np.bincount(owner, rounded, minlength=len(contexts)), 1e-9)
    scaled = (rounded * scale[owner]).astype(np.float32)
    level = Level(vocab_size, keys, starts, tokens.astype(token_dtype(vocab_size)), scaled, backoff)
    return level if _are_sorted(keys, parents * vocab_size) and _has_known_tokens(level) else None


def _has_known_tokens(level: Level) -> bool:
    """Whether the tokens of each context are sorted, and in the vocabulary."""
    return int(level.tokens.max(initial=0)) < level.vocab_size and _are_sorted(
        owners(level) * level.vocab_size + level.tokens, len(level.keys) * level.vocab_size
    )


def _are_sorted(values: Ints, bound: int) -> bool:
    """Whether the values rise from at least 0 to below `bound`."""
    return len(values) == 0 or bool(values[0] >= 0 and values[-1] < bound and (np.diff(values) > 0).all())
