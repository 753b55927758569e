"""n-gram counts of a text and their smoothed distribution, in numpy.

Shapes: P positions, V vocabulary, K = order - 1 tokens of context, C contexts, M pairs of a context and a next token.

    counts = count_text(ids, order=6, vocab_size=65)
    counts.probabilities(histories)               # (P, V), each row sums to 1
    counts.probabilities(histories, targets)      # leave-one-out: without each target's own occurrence
    counts.log_probabilities_of(ids)              # (N,) of a text's own tokens, without arrays of width V

Interpolated modified Kneser-Ney smoothing. The longest contexts have the raw counts of the tokens that followed.
Shorter contexts have continuation counts: the number of different tokens before the pair. A discount, which depends on
whether the count is 1, 2 or more, moves probability to the shorter context (backoff). The empty context backs off to
the uniform distribution, so no token has probability 0.

The contexts are a trie with one level for each length, in flat sorted arrays: memory grows with the number of distinct
pairs, not with V to the power of the order.

Source: Chen and Goodman 1999, "An empirical study of smoothing techniques for language modeling", section 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Probabilities = npt.NDArray[np.float32]
Anything = npt.NDArray[Any]

DENSE_VALUES = 14_000_000
"""Maximum size of the cached distributions of short contexts (56 MB)."""
CHUNK_VALUES = 1 << 20
"""Values of a result that are computed together: they fit into a processor's cache."""
MAX_DIRECT_KEYS = 10_000_000
"""With at most this many possible contexts, they are found in a table (40 MB); else by binary search."""
MAX_SPARSITY = 16
"""Distinct values are found by a table if their range is at most this many times their number; else by sorting."""
FALLBACK_DISCOUNTS = (0.5, 1.0, 1.5)
"""For texts that are too short to estimate the discounts."""


class Level:
    """All contexts of one length: the counts of the tokens after each, and their smoothed shares."""

    def __init__(self, keys: Ints, starts: Ints, tokens: Anything, counts: Anything, vocab_size: int) -> None:
        """Smooth the counts.

        Args:
            keys: (C,) sorted: (index of the context without its oldest token) · V + its oldest token.
            starts: (C + 1,) index of each context's first pair.
            tokens: (M,) the next tokens, sorted within a context.
            counts: (M,) at least 1.
        """
        self.keys, self.starts = keys, starts
        self._table: npt.NDArray[np.int32] | None = None
        self.tokens = tokens.astype(token_dtype(vocab_size))
        self.counts = counts.astype(np.uint32)
        owner = np.repeat(np.arange(len(keys)), np.diff(starts))
        self.pairs: Ints = owner * vocab_size + tokens
        """(M,) sorted: context · V + token."""
        self.discount = _discounts(counts)
        """(4,) the discounts of the counts 0, 1, 2, and 3 or more."""
        discounts = self.discount[np.minimum(counts, 3)]
        self.totals: Floats = np.bincount(owner, counts, minlength=len(keys)).astype(np.float64)
        """(C,) sum of a context's counts."""
        mass = np.bincount(owner, discounts, minlength=len(keys))
        # Without any count, as in an empty text, all probability backs off.
        self.backoff: Floats = np.where(self.totals > 0, mass / np.maximum(self.totals, 1), 1.0)
        """(C,) the weight of the shorter context's distribution."""
        self.shares = ((counts - discounts) / self.totals[owner]).astype(np.float32)
        """(M,) each pair's probability without backoff."""

    def find(self, keys: Ints, bound: int) -> Ints:
        """The contexts of these keys, which are below `bound`; -1 for an unknown key and for the key -1."""
        if bound > MAX_DIRECT_KEYS:
            return _find(self.keys, keys)
        if self._table is None:
            # The last entry is that of the key -1.
            self._table = np.full(bound + 1, -1, dtype=np.int32)
            self._table[self.keys] = np.arange(len(self.keys))
        return self._table[keys].astype(np.int64)

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
        counts = self.counts[pairs].astype(np.int64)
        total = self.totals[contexts]
        discount, lower = self.discount[np.minimum(counts, 3)], self.discount[np.minimum(counts - 1, 3)]
        left = np.maximum(total - 1, 1)
        empty = total == 1
        backoff = np.where(empty, 1.0, (self.backoff[contexts] * total - discount + lower) / left)
        change = np.where(empty, 0.0, ((counts - 1 - lower) - (counts - discount)) / left)
        return np.where(empty, 0.0, total / left), backoff, change


class NGramCounts:
    """The counts of a text by context length, and their distribution."""

    def __init__(self, levels: list[Level], vocab_size: int) -> None:
        self.levels = levels
        self.vocab_size = vocab_size
        self.context_size = len(levels) - 1
        """K: the number of tokens that a prediction depends on."""

    @property
    def size(self) -> int:
        """The number of counts."""
        return sum(len(level.counts) for level in self.levels)

    # -- distributions --------------------------------------------------------------------------------

    def probabilities(self, histories: Anything, leave_out: Anything | None = None) -> Probabilities:
        """The distribution (P, V) of the next token after each history; all values are positive.

        Args:
            histories: (P, K) tokens, newest last; -1 before the start of the text.
            leave_out: (P,) tokens. Each distribution is without one occurrence of its token after its history. That is
                subtracted in the longest context that has the token. If the count becomes zero, the continuation count
                of the next shorter pair falls by one too. The discounts do not change.
        """
        result = np.empty((len(histories), self.vocab_size), dtype=np.float32)
        rows = max(1, CHUNK_VALUES // self.vocab_size)
        for begin in range(0, len(result), rows):
            chunk = slice(begin, begin + rows)
            self._interpolate(histories[chunk], None if leave_out is None else leave_out[chunk], result[chunk])
        return result

    def log_probabilities_of(self, ids: Anything) -> Floats:
        """Log-probabilities (N,) of each token given the tokens before it; `ids` (N + 1,) begin with a start token."""
        result = np.empty(len(ids) - 1)
        for begin in range(0, len(result), CHUNK_VALUES):
            targets = np.asarray(ids[begin + 1 : begin + 1 + CHUNK_VALUES], dtype=np.int64)
            probability = np.full(len(targets), 1.0 / self.vocab_size)
            text = ids[max(0, begin + 1 - max(self.context_size, 1)) : begin + len(targets)]
            histories = histories_of(text[None], self.context_size)[0, -len(targets) :]
            for context, level in zip(self.contexts(histories), self.levels, strict=True):
                known = np.flatnonzero(context >= 0)
                probability[known] *= level.backoff[context[known]]
                pair = _find(level.pairs, context[known] * self.vocab_size + targets[known])
                probability[known[pair >= 0]] += level.shares[pair[pair >= 0]]
            result[begin : begin + len(targets)] = np.log(probability)
        return result

    def contexts(self, histories: Anything) -> list[Ints]:
        """(P,) contexts of each length, from 0; -1 for unknown ones."""
        context = np.zeros(len(histories), dtype=np.int64)
        contexts = [context]
        for k in range(1, self.context_size + 1):
            token = histories[:, -k]
            key = context * self.vocab_size + token
            key[(context < 0) | (token < 0)] = -1
            context = self.levels[k].find(key, len(self.levels[k - 1].keys) * self.vocab_size)
            contexts.append(context)
        return contexts

    def _interpolate(self, histories: Anything, targets: Anything | None, out: Probabilities) -> None:
        """Fill `out` (P, V), from the longest contexts to the shortest.

        Each level adds its shares to a row; `weight` is the product of the backoff weights so far. A row is complete at
        the first context whose whole distribution is cached.
        """
        table, offsets = self._cached
        contexts = self.contexts(histories)
        weight, base = np.ones(len(out)), np.zeros(len(out), dtype=np.int64)
        pending = np.arange(len(out))
        # Rows whose target's occurrence is still to be subtracted, at the next level that has it.
        subtract = np.full(len(out), targets is not None)
        additions: list[tuple[Ints, Probabilities]] = []
        changes: list[tuple[Ints, Floats]] = []
        for k in range(self.context_size, -1, -1):
            if len(pending) == 0:
                break
            level, context = self.levels[k], contexts[k][pending]
            if k < len(offsets):
                cached = (context >= 0) & ~subtract[pending]
                base[pending[cached]] = context[cached] + offsets[k]
                pending, context = pending[~cached], context[~cached]
            rows, context = pending[context >= 0], context[context >= 0]
            if len(rows) == 0:
                continue
            owner, pairs = level.pairs_in(context)
            tokens = level.tokens[pairs]
            scale, backoff = weight[rows], level.backoff[context]
            if targets is not None:
                hits = np.flatnonzero(tokens == targets[rows][owner])
                hits = hits[subtract[rows[owner[hits]]]]
                hit_rows, pair = owner[hits], pairs[hits]
                factor, backoff[hit_rows], change = level.leave_one_out(context[hit_rows], pair)
                changes.append((rows[hit_rows] * self.vocab_size + tokens[hits], change * scale[hit_rows]))
                scale[hit_rows] *= factor
                subtract[rows[hit_rows]] = level.counts[pair] == 1
            shares = level.shares[pairs] * scale.astype(np.float32)[owner]
            additions.append((rows[owner] * self.vocab_size + tokens, shares))
            weight[rows] *= backoff
        np.multiply(table[base], weight.astype(np.float32)[:, None], out=out)
        flat = out.reshape(-1)
        for indices, shares in additions:
            flat[indices] += shares
        for indices, change in changes:
            # Rounding must not make an empty share negative.
            flat[indices] = np.maximum(flat[indices] + change.astype(np.float32), np.float32(1e-12))

    @cached_property
    def _cached(self) -> tuple[Probabilities, list[int]]:
        """The uniform distribution, then those of all the shortest contexts; and the first row of each length."""
        parts = [np.full((1, self.vocab_size), 1 / self.vocab_size, dtype=np.float32)]
        offsets: list[int] = []
        done = 1
        for level in self.levels:
            count = len(level.keys)
            if offsets and (done + count) * self.vocab_size > DENSE_VALUES:
                break
            distributions = parts[-1][level.keys // self.vocab_size] * level.backoff.astype(np.float32)[:, None]
            distributions.reshape(-1)[level.pairs] += level.shares
            parts.append(distributions)
            offsets.append(done)
            done += count
        return np.concatenate(parts), offsets

    # -- saving ---------------------------------------------------------------------------------------

    def arrays(self) -> dict[str, Anything]:
        """The counts as arrays by name; the unigram counts "counts.0" are (V,), with zeros."""
        unigrams = np.zeros(self.vocab_size, dtype=np.uint32)
        unigrams[self.levels[0].tokens] = self.levels[0].counts
        arrays: dict[str, Anything] = {"counts.0": unigrams}
        for k, level in enumerate(self.levels[1:], 1):
            arrays[f"keys.{k}"], arrays[f"starts.{k}"] = level.keys, level.starts.astype(np.uint32)
            arrays[f"tokens.{k}"], arrays[f"counts.{k}"] = level.tokens, level.counts
        return arrays

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Anything], *, order: int, vocab_size: int) -> NGramCounts:
        """The counts of a result of `arrays`.

        Raises:
            ValueError: they have another order or vocabulary, or are inconsistent; names the array.
        """
        names = ("keys", "starts", "tokens", "counts")
        if odd := sorted({"counts.0", *(f"{name}.{k}" for k in range(1, order) for name in names)} ^ arrays.keys()):
            raise ValueError(f"counts and model differ in {', '.join(odd[:4])}")
        unigrams = np.asarray(arrays["counts.0"])
        if unigrams.shape != (vocab_size,):
            raise ValueError(f"counts.0 is {unigrams.shape} in the file, {(vocab_size,)} in the model")
        tokens = np.flatnonzero(unigrams)
        starts = np.array([0, len(tokens)])
        levels = [Level(np.zeros(1, np.int64), starts, tokens, unigrams[tokens].astype(np.int64), vocab_size)]
        for k in range(1, order):
            keys, starts, tokens, counts = (np.asarray(arrays[f"{name}.{k}"]).astype(np.int64) for name in names)
            if not _is_consistent(keys, starts, tokens, counts, len(levels[-1].keys), vocab_size):
                raise ValueError(f"{', '.join(f'{name}.{k}' for name in names)} in the file do not fit together")
            levels.append(Level(keys, starts, tokens, counts, vocab_size))
        return cls(levels, vocab_size)


def token_dtype(vocab_size: int) -> type[np.unsignedinteger[Any]]:
    """The smaller of two types that can hold all token ids."""
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


def histories_of(ids: Anything, context_size: int) -> Anything:
    """The last K tokens (B, L, K), newest last, up to and including each token of `ids` (B, L); -1 before a row."""
    padded = np.full((len(ids), context_size + ids.shape[1]), -1, dtype=np.int64)
    padded[:, context_size:] = ids
    if context_size == 0:
        return padded[:, :, None][:, :, :0]
    return np.lib.stride_tricks.sliding_window_view(padded, context_size, axis=1)[:, 1:]


def _is_consistent(keys: Ints, starts: Ints, tokens: Ints, counts: Ints, parents: int, vocab_size: int) -> bool:
    """Whether arrays from a file make a valid level, in which no lookup can fail."""
    if not (all(array.ndim == 1 for array in (keys, starts, tokens, counts)) and len(starts) == len(keys) + 1):
        return False
    complete = starts[0] == 0 and starts[-1] == len(tokens) == len(counts) and bool((np.diff(starts) > 0).all())
    if len(keys) == 0 or not complete:
        return bool(complete)
    return bool(
        (np.diff(keys) > 0).all()
        and keys[0] >= 0
        and keys[-1] < parents * vocab_size
        and tokens.max() < vocab_size
        and tokens.min() >= 0
        and counts.min() > 0
    )


def _find(sorted_values: Ints, values: Ints) -> Ints:
    """The index of each value among sorted ones, -1 if it is not there."""
    if len(sorted_values) == 0:
        return np.full(len(values), -1)
    index = sorted_values.searchsorted(values)
    index[index == len(sorted_values)] = 0
    index[sorted_values[index] != values] = -1
    return index


def _discounts(counts: Anything) -> Floats:
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


# -- counting -----------------------------------------------------------------------------------------


def count_text(ids: npt.NDArray[Any], *, order: int, vocab_size: int) -> NGramCounts:
    """The counts of a text `ids` (N + 1,), which begins with a start token, in contexts of up to order - 1 tokens."""
    ids = np.asarray(ids, dtype=np.int64)
    targets = ids[1:]
    context = np.zeros(len(targets), dtype=np.int64)
    keys = [np.zeros(1, dtype=np.int64)]
    # The first pair of the text at each level, which has no token before it.
    first: list[int | None] = [None]
    for k in range(1, order):
        # The targets from the k-th on have a context of k tokens; the oldest token of the first context is ids[0].
        context = context[1:] if k > 1 else context
        parents = context * vocab_size + ids[: max(0, len(targets) - k + 1)]
        distinct, context = _distinct(parents, len(keys[-1]) * vocab_size)
        keys.append(distinct)
        first.append(int(context[0] * vocab_size + targets[k - 1]) if len(context) else None)
    pairs = context * vocab_size + targets[max(0, order - 2) :]
    levels = []
    for k in range(order - 1, -1, -1):
        distinct, counts = _counted(pairs, len(keys[k]) * vocab_size)
        owner, tokens = np.divmod(distinct, vocab_size)
        starts = np.searchsorted(owner, np.arange(len(keys[k]) + 1))
        levels.append(Level(keys[k], starts, tokens, counts, vocab_size))
        if k:
            # Continuation counts: one for each different token before the shorter pair, and for the start of the text.
            pairs = keys[k][owner] // vocab_size * vocab_size + tokens
            if (start := first[k - 1]) is not None:
                pairs = np.append(pairs, start)
    return NGramCounts(levels[::-1], vocab_size)


def _distinct(values: Ints, bound: int) -> tuple[Ints, Ints]:
    """The distinct values, sorted, and the index of each value among them; all values are below `bound`."""
    if bound > MAX_SPARSITY * len(values):
        return np.unique(values, return_inverse=True)
    marks = np.zeros(bound, dtype=np.int32)
    marks[values] = 1
    distinct = np.flatnonzero(marks)
    marks[distinct] = np.arange(len(distinct), dtype=np.int32)
    return distinct, marks[values].astype(np.int64)


def _counted(values: Ints, bound: int) -> tuple[Ints, Ints]:
    """The distinct values, sorted, and their counts; all values are below `bound`."""
    if bound > MAX_SPARSITY * len(values):
        return np.unique(values, return_counts=True)
    counts = np.bincount(values, minlength=bound)
    distinct = np.flatnonzero(counts)
    return distinct, counts[distinct]
