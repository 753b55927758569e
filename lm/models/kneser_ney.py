"""Counts of a text, and the smoothed n-gram distribution that they give; numpy alone.

Shapes: P positions, V vocabulary, K = order - 1 tokens of context, C contexts, M pairs of a context and a next token.

    counts = count_text(ids, order=6, vocab_size=65)
    counts.probabilities(histories)               # (P, V), each row sums to 1
    counts.left_out(histories, targets)           # the same, as if each target had been left out of the text
    counts.log_probabilities_of(ids)              # (N,) of a text's own tokens; no V anywhere

Interpolated modified Kneser-Ney smoothing: the longest context counts how often a token followed; each shorter one
counts how many different tokens stood before the pair. From every count a discount is taken, which depends on whether
the count is 1, 2 or more, and is handed down to the shorter context; below the empty context all tokens are alike. So
no token ever has probability 0.

The contexts form a trie, a level a length, held as flat sorted arrays: memory grows with the distinct pairs, not with
V to the power of the order.

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
"""Values of whole distributions kept for short contexts, so that these are fetched and not mixed anew (56 MB)."""
VALUES_AT_ONCE = 1 << 20
"""Values of a result that are mixed together: they stay in a processor's cache."""
DIRECT_KEYS = 10_000_000
"""Contexts are looked up in a table of all that there could be, where these are no more (40 MB); else by halving."""
DIRECT = 16
"""Distinct values are found by marking them where they range over at most so many times their number."""
FALLBACK_DISCOUNTS = (0.5, 1.0, 1.5)
"""Where a text is too short to estimate them from."""


class Level:
    """All contexts of one length, with the tokens that followed each, and what their counts come to."""

    def __init__(self, keys: Ints, starts: Ints, tokens: Anything, counts: Anything, vocab_size: int) -> None:
        """Smooth the counts.

        Args:
            keys: (C,) sorted: (number of the context without its oldest token) · V + its oldest token.
            starts: (C + 1,) where each context's pairs begin.
            tokens: (M,) the next tokens, sorted within a context.
            counts: (M,) from 1.
            vocab_size: V.
        """
        self.keys, self.starts = keys, starts
        self._places: npt.NDArray[np.int32] | None = None
        self.tokens = tokens.astype(token_dtype(vocab_size))
        self.counts = counts.astype(np.uint32)
        owner = np.repeat(np.arange(len(keys)), np.diff(starts))
        self.pairs: Ints = owner * vocab_size + tokens
        """(M,) sorted: context · V + token."""
        self.discount = _discounts(counts)
        """(4,) what is taken from a count of 0, 1, 2, 3 or more."""
        taken = self.discount[np.minimum(counts, 3)]
        self.totals: Floats = np.bincount(owner, counts, minlength=len(keys)).astype(np.float64)
        """(C,) sum of a context's counts."""
        mass = np.bincount(owner, taken, minlength=len(keys))
        # Nothing follows the empty context of a text without tokens: all is handed down.
        self.handed_down: Floats = np.where(self.totals > 0, mass / np.maximum(self.totals, 1), 1.0)
        """(C,) the share of it that the shorter context has."""
        self.shares = ((counts - taken) / self.totals[owner]).astype(np.float32)
        """(M,) the rest, by pair."""

    def find(self, keys: Ints, bound: int) -> Ints:
        """Numbers of the contexts of these keys, all below `bound`; -1 where there is none, or the key is -1."""
        if bound > DIRECT_KEYS:
            return _find(self.keys, keys)
        if self._places is None:
            # One more than there could be, for the key -1.
            self._places = np.full(bound + 1, -1, dtype=np.int32)
            self._places[self.keys] = np.arange(len(self.keys))
        return self._places[keys].astype(np.int64)

    def pairs_in(self, contexts: Ints) -> tuple[Ints, Ints]:
        """All pairs of these contexts, one context after the other: whose each is, and where it stands."""
        first = self.starts[contexts]
        lengths = self.starts[contexts + 1] - first
        owner = np.repeat(np.arange(len(contexts)), lengths)
        begun = np.cumsum(lengths) - lengths
        return owner, np.arange(len(owner)) + (first - begun)[owner]

    def pairs_of(self, contexts: Ints, targets: Anything, vocab_size: int) -> Ints:
        """Where the pairs of these contexts and tokens stand, -1 where there is none."""
        return _find(self.pairs, np.where(contexts < 0, -1, contexts * vocab_size + targets))

    def without(self, contexts: Ints, pairs: Ints) -> tuple[Floats, Floats, Floats]:
        """What one occurrence less of each pair would change.

        Returns:
            (P,) each: what the context's shares are multiplied by, what it hands down, and what is then added to the
            pair's own share. A context with nothing left says nothing: 0, 1, 0.
        """
        counts = self.counts[pairs].astype(np.int64)
        total = self.totals[contexts]
        discount, lower = self.discount[np.minimum(counts, 3)], self.discount[np.minimum(counts - 1, 3)]
        left = np.maximum(total - 1, 1)
        nothing = total == 1
        down = np.where(nothing, 1.0, (self.handed_down[contexts] * total - discount + lower) / left)
        change = np.where(nothing, 0.0, ((counts - 1 - lower) - (counts - discount)) / left)
        return np.where(nothing, 0.0, total / left), down, change


class NGramCounts:
    """The counts of a text by context length, and the distribution they give."""

    def __init__(self, levels: list[Level], vocab_size: int) -> None:
        self.levels = levels
        self.vocab_size = vocab_size
        self.reach = len(levels) - 1
        """K: the tokens that a prediction looks back on."""

    @property
    def size(self) -> int:
        """Counts that are stored."""
        return sum(len(level.counts) for level in self.levels)

    # -- distributions --------------------------------------------------------------------------------

    def probabilities(self, histories: Anything) -> Probabilities:
        """The distribution of the next token after each history.

        Args:
            histories: (P, K) tokens, the newest last; -1 where nothing stood.

        Returns:
            (P, V), positive; a row's values depend on its history alone.
        """
        return self._in_parts(histories, None)

    def left_out(self, histories: Anything, targets: Anything) -> Probabilities:
        """As `probabilities`, as if one occurrence of each target after its history had not been in the text.

        It is taken from the longest context that it is found under. Where its count falls to nothing, the pair is gone,
        and one token less stands before the next shorter pair. The discounts stay as they are.

        Args:
            histories: (P, K), as above.
            targets: (P,)
        """
        return self._in_parts(histories, targets)

    def log_probabilities_of(self, ids: Anything) -> Floats:
        """Nats, negative, of each of a text's own tokens given all that stands before it.

        Args:
            ids: (N + 1,) the start token, then N tokens.

        Returns:
            (N,)
        """
        result = np.empty(len(ids) - 1)
        for begin in range(0, len(result), VALUES_AT_ONCE):
            targets = np.asarray(ids[begin + 1 : begin + 1 + VALUES_AT_ONCE], dtype=np.int64)
            probability = np.full(len(targets), 1.0 / self.vocab_size)
            reached = ids[max(0, begin + 1 - max(self.reach, 1)) : begin + len(targets)]
            histories = histories_of(reached[None], self.reach)[0, -len(targets) :]
            for context, level in zip(self._contexts(histories), self.levels, strict=True):
                seen = np.flatnonzero(context >= 0)
                probability[seen] *= level.handed_down[context[seen]]
                pair = level.pairs_of(context[seen], targets[seen], self.vocab_size)
                probability[seen[pair >= 0]] += level.shares[pair[pair >= 0]]
            result[begin : begin + len(targets)] = np.log(probability)
        return result

    # -- the parts ------------------------------------------------------------------------------------

    def _contexts(self, histories: Anything) -> list[Ints]:
        """(P,) numbers of the contexts of each length, -1 where one was never seen."""
        found = np.zeros(len(histories), dtype=np.int64)
        contexts = [found]
        for k in range(1, self.reach + 1):
            token = histories[:, -k]
            key = found * self.vocab_size + token
            key[(found < 0) | (token < 0)] = -1
            found = self.levels[k].find(key, len(self.levels[k - 1].keys) * self.vocab_size)
            contexts.append(found)
        return contexts

    def _in_parts(self, histories: Anything, targets: Anything | None) -> Probabilities:
        result = np.empty((len(histories), self.vocab_size), dtype=np.float32)
        rows = max(1, VALUES_AT_ONCE // self.vocab_size)
        for begin in range(0, len(result), rows):
            part = slice(begin, begin + rows)
            self._mix(histories[part], None if targets is None else targets[part], result[part])
        return result

    def _mix(self, histories: Anything, targets: Anything | None, out: Probabilities) -> None:
        """Fill `out` (P, V), from the longest contexts down.

        A level gives a row its own shares, and the shorter context what it hands down; `weight` is what is left for the
        levels below. A row is done where a whole distribution that is kept can be taken for the rest.
        """
        table, offsets = self._dense
        contexts = self._contexts(histories)
        weight, base = np.ones(len(out)), np.zeros(len(out), dtype=np.int64)
        going_on = np.arange(len(out))
        # Where an occurrence is still to be taken, at this level or where it is found further down.
        less = np.full(len(out), targets is not None)
        own: list[tuple[Ints, Probabilities]] = []
        changes: list[tuple[Ints, Floats]] = []
        for k in range(self.reach, -1, -1):
            if len(going_on) == 0:
                break
            level, context = self.levels[k], contexts[k][going_on]
            if k < len(offsets):
                whole = (context >= 0) & ~less[going_on]
                base[going_on[whole]] = context[whole] + offsets[k]
                going_on, context = going_on[~whole], context[~whole]
            rows, context = going_on[context >= 0], context[context >= 0]
            if len(rows) == 0:
                continue
            owner, within = level.pairs_in(context)
            tokens = level.tokens[within]
            scale, down = weight[rows], level.handed_down[context]
            if targets is not None:
                found = np.flatnonzero(tokens == targets[rows][owner])
                found = found[less[rows[owner[found]]]]
                touched, pair = owner[found], within[found]
                ratio, down[touched], change = level.without(context[touched], pair)
                changes.append((rows[touched] * self.vocab_size + tokens[found], change * scale[touched]))
                scale[touched] *= ratio
                less[rows[touched]] = level.counts[pair] == 1
            own.append((rows[owner] * self.vocab_size + tokens, level.shares[within] * scale.astype(np.float32)[owner]))
            weight[rows] *= down
        np.multiply(table[base], weight.astype(np.float32)[:, None], out=out)
        flat = out.reshape(-1)
        for places, shares in own:
            flat[places] += shares
        for places, change in changes:
            # Where nothing is left of a share, rounding must not go below it.
            flat[places] = np.maximum(flat[places] + change.astype(np.float32), np.float32(1e-12))

    @cached_property
    def _dense(self) -> tuple[Probabilities, list[int]]:
        """Whole distributions: of no knowledge, then of all contexts of the shortest lengths; each length's offset."""
        parts = [np.full((1, self.vocab_size), 1 / self.vocab_size, dtype=np.float32)]
        offsets: list[int] = []
        done = 1
        for level in self.levels:
            count = len(level.keys)
            if offsets and (done + count) * self.vocab_size > DENSE_VALUES:
                break
            whole = parts[-1][level.keys // self.vocab_size] * level.handed_down.astype(np.float32)[:, None]
            whole.reshape(-1)[level.pairs] += level.shares
            parts.append(whole)
            offsets.append(done)
            done += count
        return np.concatenate(parts), offsets

    # -- keeping --------------------------------------------------------------------------------------

    def arrays(self) -> dict[str, Anything]:
        """The counts as plain arrays, by name; those of single tokens with their zeros, so that V shows."""
        singles = np.zeros(self.vocab_size, dtype=np.uint32)
        singles[self.levels[0].tokens] = self.levels[0].counts
        arrays: dict[str, Anything] = {"counts.0": singles}
        for k, level in enumerate(self.levels[1:], 1):
            arrays[f"keys.{k}"], arrays[f"starts.{k}"] = level.keys, level.starts.astype(np.uint32)
            arrays[f"tokens.{k}"], arrays[f"counts.{k}"] = level.tokens, level.counts
        return arrays

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Anything], *, order: int, vocab_size: int) -> NGramCounts:
        """The counts that `arrays` gave.

        Raises:
            ValueError: they are of another order or vocabulary, or do not fit together; names the array.
        """
        names = ("keys", "starts", "tokens", "counts")
        if odd := sorted({"counts.0", *(f"{name}.{k}" for k in range(1, order) for name in names)} ^ arrays.keys()):
            raise ValueError(f"counts and model differ in {', '.join(odd[:4])}")
        singles = np.asarray(arrays["counts.0"])
        if singles.shape != (vocab_size,):
            raise ValueError(f"counts.0 is {singles.shape} in the file, {(vocab_size,)} in the model")
        seen = np.flatnonzero(singles)
        levels = [
            Level(np.zeros(1, np.int64), np.array([0, len(seen)]), seen, singles[seen].astype(np.int64), vocab_size)
        ]
        for k in range(1, order):
            keys, starts, tokens, counts = (np.asarray(arrays[f"{name}.{k}"]).astype(np.int64) for name in names)
            if not _fit_together(keys, starts, tokens, counts, len(levels[-1].keys), vocab_size):
                raise ValueError(f"{', '.join(f'{name}.{k}' for name in names)} in the file do not fit together")
            levels.append(Level(keys, starts, tokens, counts, vocab_size))
        return cls(levels, vocab_size)


def token_dtype(vocab_size: int) -> type[np.unsignedinteger[Any]]:
    """The smallest of two types that holds a token."""
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


def histories_of(ids: Anything, reach: int) -> Anything:
    """What stands up to each token of each row, that token included.

    Args:
        ids: (B, L)
        reach: K

    Returns:
        (B, L, K), the newest last; -1 where the row has not begun.
    """
    padded = np.full((len(ids), reach + ids.shape[1]), -1, dtype=np.int64)
    padded[:, reach:] = ids
    if reach == 0:
        return padded[:, :, None][:, :, :0]
    return np.lib.stride_tricks.sliding_window_view(padded, reach, axis=1)[:, 1:]


def _fit_together(keys: Ints, starts: Ints, tokens: Ints, counts: Ints, parents: int, vocab_size: int) -> bool:
    """Whether a level's arrays are what a level is made of, so that no lookup can fail later."""
    if not (all(array.ndim == 1 for array in (keys, starts, tokens, counts)) and len(starts) == len(keys) + 1):
        return False
    whole = starts[0] == 0 and starts[-1] == len(tokens) == len(counts) and bool((np.diff(starts) > 0).all())
    if len(keys) == 0 or not whole:
        return bool(whole)
    return bool(
        (np.diff(keys) > 0).all()
        and keys[0] >= 0
        and keys[-1] < parents * vocab_size
        and tokens.max() < vocab_size
        and tokens.min() >= 0
        and counts.min() > 0
    )


def _find(values: Ints, wanted: Ints) -> Ints:
    """Where each wanted number stands among sorted ones, -1 where it does not."""
    if len(values) == 0:
        return np.full(len(wanted), -1)
    place = values.searchsorted(wanted)
    place[place == len(values)] = 0
    place[values[place] != wanted] = -1
    return place


def _discounts(counts: Anything) -> Floats:
    """(4,) discounts of counts 0, 1, 2 and more, from how many counts are 1, 2, 3 and 4."""
    once, twice, thrice, four = (int(np.count_nonzero(counts == number)) for number in (1, 2, 3, 4))
    found = FALLBACK_DISCOUNTS
    if once and twice and thrice:
        share = once / (once + 2 * twice)
        found = (1 - 2 * share * twice / once, 2 - 3 * share * thrice / twice, 3 - 4 * share * four / thrice)
    # A short text can give discounts beyond the counts, or none at all.
    bounded = [
        value if 0 < value <= most else other
        for value, most, other in zip(found, (1, 2, 3), FALLBACK_DISCOUNTS, strict=True)
    ]
    return np.array([0.0, *bounded])


# -- counting -----------------------------------------------------------------------------------------


def count_text(ids: npt.NDArray[Any], *, order: int, vocab_size: int) -> NGramCounts:
    """Count a text.

    Args:
        ids: (N + 1,) the start token, then N tokens. The start token stands before the text and is not predicted.
        order: the longest context has order - 1 tokens.
        vocab_size: V.
    """
    ids = np.asarray(ids, dtype=np.int64)
    targets = ids[1:]
    context = np.zeros(len(targets), dtype=np.int64)
    keys = [np.zeros(1, dtype=np.int64)]
    # Of each level: the pair that stands at the start of the text, where nothing can stand before it.
    first: list[int | None] = [None]
    for k in range(1, order):
        # A context of k tokens stands before the targets from the k-th on; the oldest token of the first is ids[0].
        context = context[1:] if k > 1 else context
        parents = context * vocab_size + ids[: max(0, len(targets) - k + 1)]
        found, context = _distinct(parents, len(keys[-1]) * vocab_size)
        keys.append(found)
        first.append(int(context[0] * vocab_size + targets[k - 1]) if len(context) else None)
    pairs = context * vocab_size + targets[max(0, order - 2) :]
    levels = []
    for k in range(order - 1, -1, -1):
        found, counts = _counted(pairs, len(keys[k]) * vocab_size)
        owner, tokens = np.divmod(found, vocab_size)
        starts = np.searchsorted(owner, np.arange(len(keys[k]) + 1))
        levels.append(Level(keys[k], starts, tokens, counts, vocab_size))
        if k:
            # The shorter pair has a count of 1 for each different token before it, and for the start of the text.
            pairs = keys[k][owner] // vocab_size * vocab_size + tokens
            if (start := first[k - 1]) is not None:
                pairs = np.append(pairs, start)
    return NGramCounts(levels[::-1], vocab_size)


def _distinct(values: Ints, bound: int) -> tuple[Ints, Ints]:
    """The distinct values, sorted, and of each value which one it is; all are below `bound`."""
    if bound > DIRECT * len(values):
        return np.unique(values, return_inverse=True)
    marks = np.zeros(bound, dtype=np.int32)
    marks[values] = 1
    found = np.flatnonzero(marks)
    marks[found] = np.arange(len(found), dtype=np.int32)
    return found, marks[values].astype(np.int64)


def _counted(values: Ints, bound: int) -> tuple[Ints, Ints]:
    """The distinct values, sorted, and how often each is there; all are below `bound`."""
    if bound > DIRECT * len(values):
        return np.unique(values, return_counts=True)
    counts = np.bincount(values, minlength=bound)
    found = np.flatnonzero(counts)
    return found, counts[found]
