"""n-gram counts of a text and their smoothed distribution, in the native module or in numpy.

Shapes: P positions, V vocabulary, K = order - 1 tokens of context, C contexts, M pairs of a context and a next token.

    counts = count_text(ids, order=6, vocab_size=65)
    counts.probabilities(histories)               # (P, V), each row sums to 1
    counts.probabilities(histories, targets)      # leave-one-out: without each target's own occurrence
    counts.log_probabilities_of(ids)              # (N,) of a text's own tokens, without arrays of width V

Interpolated modified Kneser-Ney smoothing. The longest contexts have the raw counts of the tokens that followed.
Shorter contexts have continuation counts: the number of different tokens before the pair. A discount, which depends on
whether the count is 1, 2 or more, moves probability to the shorter context (backoff). The empty context backs off to
the uniform distribution, so no token has probability 0.

The levels are those of `lm.kernels.counts`. The native module computes the distributions; the numpy code here is the
reference, and takes its place where it is missing. The results differ by the rounding of float32.

Source: Chen and Goodman 1999, "An empirical study of smoothing techniques for language modeling", section 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from lm.kernels.compiled import default_threads, native
from lm.kernels.counts import (
    Anything,
    Floats,
    Ints,
    Level,
    compact_arrays,
    compiled_counts,
    find_sorted,
    levels_from_arrays,
    raw_arrays,
    smoothed_level,
)

Probabilities = npt.NDArray[np.float32]

DENSE_VALUES = 14_000_000
"""Maximum size of the cached distributions of short contexts (56 MB)."""
CHUNK_VALUES = 1 << 20
"""Values of a result that are computed together: they fit into a processor's cache."""
MAX_SPARSITY = 16
"""Distinct values are found by a table if their range is at most this many times their number; else by sorting."""


class NGramCounts:
    """The counts of a text by context length, and their distribution."""

    def __init__(self, levels: list[Level], vocab_size: int, stored: Mapping[str, Anything] | None = None) -> None:
        """Make the lookup.

        Args:
            levels: by the length of the contexts, from 0.
            vocab_size: V.
            stored: the arrays that the levels were read from; None: those of raw counts.
        """
        self._levels: list[Level] | None = levels
        self._stored = stored
        self.vocab_size = vocab_size
        self.context_size = len(levels) - 1
        """K: the number of tokens that a prediction depends on."""
        self.size = sum(len(level.tokens) for level in levels)
        """The number of counts."""
        self.can_leave_out = levels[0].raw is not None
        """Whether these are raw counts, from which an occurrence can be subtracted."""

    @property
    def levels(self) -> list[Level]:
        """The levels by the length of the contexts, from 0."""
        if self._levels is None:
            assert self._stored is not None, "the arrays of these counts were freed"
            self._levels = levels_from_arrays(self._stored, order=self.context_size + 1, vocab_size=self.vocab_size)
        return self._levels

    @cached_property
    def _compiled(self) -> Any:
        compiled = compiled_counts(self.levels)
        if compiled is not None and self._stored is not None:
            self._levels = None
        return compiled

    def free_arrays(self) -> None:
        """Keep only what distributions need; then `arrays` of counts that were not loaded is an error."""
        if self._compiled is not None:
            self._levels = None

    # -- distributions --------------------------------------------------------------------------------

    def probabilities(
        self, histories: Anything, leave_out: Anything | None = None, *, threads: int | None = None
    ) -> Probabilities:
        """The distribution (P, V) of the next token after each history; all values are positive.

        Args:
            histories: (P, K) tokens, newest last; -1 before the start of the text.
            leave_out: (P,) tokens. Each distribution is without one occurrence of its token after its history. That is
                subtracted in the longest context that has the token. If the count becomes zero, the continuation count
                of the next shorter pair falls by one too. The discounts do not change.
            threads: of the native module, None: OMP_NUM_THREADS, or the available cores; the result is the same for
                any number.
        """
        result = np.empty((len(histories), self.vocab_size), dtype=np.float32)
        if self._compiled is not None and native() is not None:
            left_out = None if leave_out is None else np.ascontiguousarray(leave_out, np.int64)
            self._compiled.distributions(
                np.ascontiguousarray(histories, np.int64), left_out, result, *_isa_and_threads(threads)
            )
            return result
        rows = max(1, CHUNK_VALUES // self.vocab_size)
        for begin in range(0, len(result), rows):
            chunk = slice(begin, begin + rows)
            self._interpolate(histories[chunk], None if leave_out is None else leave_out[chunk], result[chunk])
        return result

    def log_probabilities_of(self, ids: Anything) -> Floats:
        """Log-probabilities (N,) of each token given the tokens before it; `ids` (N + 1,) begin with a start token."""
        result = np.empty(len(ids) - 1)
        if self._compiled is not None:
            self._compiled.log_probabilities(np.ascontiguousarray(ids, np.int64), result, *_isa_and_threads(None))
            return result
        for begin in range(0, len(result), CHUNK_VALUES):
            targets = np.asarray(ids[begin + 1 : begin + 1 + CHUNK_VALUES], dtype=np.int64)
            probability = np.full(len(targets), 1.0 / self.vocab_size)
            text = ids[max(0, begin + 1 - max(self.context_size, 1)) : begin + len(targets)]
            histories = histories_of(text[None], self.context_size)[0, -len(targets) :]
            for context, level in zip(self.contexts(histories), self.levels, strict=True):
                known = np.flatnonzero(context >= 0)
                probability[known] *= level.backoff[context[known]]
                pair = find_sorted(level.pairs, context[known] * self.vocab_size + targets[known])
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
                assert level.raw is not None
                subtract[rows[hit_rows]] = level.raw.counts[pair] == 1
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

    def compact_arrays(self) -> dict[str, Anything]:
        """The arrays of the compact form, from which `from_arrays` makes counts without `leave_out`."""
        return compact_arrays(self.levels)

    def arrays(self) -> dict[str, Anything]:
        """The counts as arrays by name, raw or compact."""
        return raw_arrays(self.levels) if self._stored is None else dict(self._stored)

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Anything], *, order: int, vocab_size: int) -> NGramCounts:
        """The counts of a result of `arrays`.

        Raises:
            ValueError: they have another order or vocabulary, or are inconsistent; names the array.
        """
        levels = levels_from_arrays(arrays, order=order, vocab_size=vocab_size)
        return cls(levels, vocab_size, arrays)


def _isa_and_threads(threads: int | None) -> tuple[str, int]:
    return native().instruction_sets()[0], threads or default_threads()


def histories_of(ids: Anything, context_size: int) -> Anything:
    """The last K tokens (B, L, K), newest last, up to and including each token of `ids` (B, L); -1 before a row."""
    padded = np.full((len(ids), context_size + ids.shape[1]), -1, dtype=np.int64)
    padded[:, context_size:] = ids
    if context_size == 0:
        return padded[:, :, None][:, :, :0]
    return np.lib.stride_tricks.sliding_window_view(padded, context_size, axis=1)[:, 1:]


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
        levels.append(smoothed_level(keys[k], starts, tokens, counts, vocab_size))
        if k:
            # Continuation counts: one for each different token before the shorter pair, and for the start of the text.
            pairs = keys[k][owner] // vocab_size * vocab_size + tokens
            if (start := first[k - 1]) is not None:
                pairs = np.append(pairs, start)
    return NGramCounts(levels[::-1], vocab_size)


def _distinct(values: Ints, bound: int) -> tuple[Ints, Ints]:
    """The distinct values, sorted, and the index of each value among them; all values are below `bound`."""
    if bound > MAX_SPARSITY * len(values):
        return _distinct_by_sorting(values, bound)
    marks = np.zeros(bound, dtype=np.int32)
    marks[values] = 1
    distinct = np.flatnonzero(marks)
    marks[distinct] = np.arange(len(distinct), dtype=np.int32)
    return distinct, marks[values].astype(np.int64)


def _distinct_by_sorting(values: Ints, bound: int) -> tuple[Ints, Ints]:
    shift = len(values).bit_length()
    if bound.bit_length() + shift > 63:
        return np.unique(values, return_inverse=True)
    # To sort values with their places in their last bits takes half the time of sorting the places by value.
    values = np.sort((values << shift) | np.arange(len(values)))
    places = values & ((1 << shift) - 1)
    values >>= shift
    is_first = np.ones(len(values), dtype=bool)
    np.not_equal(values[1:], values[:-1], out=is_first[1:])
    index = np.empty(len(values), dtype=np.int64)
    index[places] = np.cumsum(is_first) - 1
    return values[is_first], index


def _counted(values: Ints, bound: int) -> tuple[Ints, Ints]:
    """The distinct values, sorted, and their counts; all values are below `bound`."""
    if bound > MAX_SPARSITY * len(values):
        return np.unique(values, return_counts=True)
    counts = np.bincount(values, minlength=bound)
    distinct = np.flatnonzero(counts)
    return distinct, counts[distinct]
