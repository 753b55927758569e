"""Compact counts: pairs that add little to the prediction of a text are dropped, the others are rounded to 8 bits.

Shapes: C contexts of a level, M pairs of a context and a next token.

    compact = compacted(count_text(ids, order=8, vocab_size=65))

A dropped pair's share goes to the backoff weight of its context, so each distribution still sums to 1. The loss of a
pair is the relative entropy of the distributions with and without it, times the expected number of tokens of another
text that the context predicts. The pairs with the smallest losses are dropped, up to `EXPECTED_LOSS` in all.
`lm.kernels.counts` rounds the others.

Source: Stolcke 1998, "Entropy-based pruning of backoff language models"; here for interpolated distributions.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt

from lm.kernels.counts import (
    Anything,
    Floats,
    Ints,
    Level,
    compact_arrays,
    discounts_of,
    find_sorted,
    owners,
)
from lm.models.kneser_ney import NGramCounts

EXPECTED_LOSS = 0.0012
"""Nats per token that the dropped pairs of a long text cost in all, by the estimate."""
HALF_LOSS_TOKENS = 300_000
"""Tokens of a text whose pairs may cost half of that. A short text has a small file, and a less certain estimate."""

Marks = npt.NDArray[np.bool_]


def compacted(counts: NGramCounts) -> NGramCounts:
    """The compact form of raw counts: what a file holds, and what evaluation and sampling use."""
    levels = counts.levels
    losses = _losses(levels)
    tokens = _occurrences(levels)[0].sum()
    budget = EXPECTED_LOSS * tokens**2 / (tokens + HALF_LOSS_TOKENS)
    smallest = np.sort(np.concatenate([np.zeros(0), *losses[1:]]))
    dropped = int(np.searchsorted(np.cumsum(smallest), budget, side="right"))
    threshold = smallest[dropped] if dropped < len(smallest) else np.inf
    # All tokens stay in the distribution of the empty context.
    kept = [np.ones(len(loss), dtype=bool) if k == 0 else loss >= threshold for k, loss in enumerate(losses)]
    arrays = compact_arrays(_pruned(levels, kept))
    return NGramCounts.from_arrays(arrays, order=len(levels), vocab_size=counts.vocab_size)


def _occurrences(levels: list[Level]) -> list[Floats]:
    """(C,) of each level: how often each context occurs in the text before a token that has a longest context."""
    assert levels[-1].raw is not None
    found = [levels[-1].raw.totals]
    for shorter, longer in pairwise(levels[::-1]):
        parents = shorter.keys // shorter.vocab_size
        found.append(np.bincount(parents, found[-1], minlength=len(longer.keys)))
    return found[::-1]


def _predictions(levels: list[Level]) -> list[Floats]:
    """(C,) of each level: the expected share of each context in the predictions of another text of the same length.

    Of the occurrences of a context in that text, as many as its discount are expected to be of new contexts instead. A
    context predicts with its weight in the distributions of longer contexts, and alone if the longer context is new.
    """
    discounts = []
    for occurrences in (found := _occurrences(levels)):
        discount = discounts_of(occurrences)[np.minimum(occurrences, 3).astype(np.int64)]
        discounts.append(np.minimum(discount, occurrences))
    shares = [found[-1] - discounts[-1]]
    for k in range(len(levels) - 1, 0, -1):
        level, parents = levels[k], levels[k].keys // levels[k].vocab_size
        passed = np.bincount(parents, shares[-1] * level.backoff + discounts[k], minlength=len(levels[k - 1].keys))
        shares.append(np.maximum(passed - discounts[k - 1], 0))
    return shares[::-1]


def _losses(levels: list[Level]) -> list[Floats]:
    """(M,) of each level: nats that a text of the same length is expected to cost more without the pair."""
    losses = []
    probabilities = np.zeros(0)
    for k, (level, predictions) in enumerate(zip(levels, _predictions(levels), strict=True)):
        owner, size = owners(level), len(level.keys)
        lower: Floats = np.full(len(owner), 1 / level.vocab_size)
        if k:
            # A pair of a longer context is one of the shorter context too.
            parents = (level.keys // level.vocab_size)[owner]
            lower = probabilities[find_sorted(levels[k - 1].pairs, parents * level.vocab_size + level.tokens)]
        shares, backoff = level.shares.astype(np.float64), level.backoff[owner]
        probabilities = shares + backoff * lower
        known = np.bincount(owner, lower, minlength=size)
        unknown = np.maximum(level.backoff * (1 - known), 0)
        # The token itself becomes rarer; tokens without a pair, and those with another pair, more likely.
        loss = probabilities * np.log(probabilities / ((backoff + shares) * lower))
        loss -= unknown[owner] * np.log1p(shares / backoff) + shares * (known[owner] - lower)
        losses.append(np.maximum(loss, 0) * predictions[owner])
    return losses


def _pruned(levels: list[Level], kept: list[Marks]) -> list[Level]:
    """The levels with these pairs, and with the contexts that have one or are the start of one that does."""
    used = [
        np.bincount(owners(level), mark, minlength=len(level.keys)) > 0
        for level, mark in zip(levels, kept, strict=True)
    ]
    used[0][:] = True
    for k in range(len(levels) - 1, 0, -1):
        used[k - 1][(levels[k].keys // levels[k].vocab_size)[used[k]]] = True
    found = []
    places: Ints = np.zeros(1, dtype=np.int64)
    for k, (level, mark) in enumerate(zip(levels, kept, strict=True)):
        owner, size, vocab_size = owners(level), len(level.keys), level.vocab_size
        dropped = np.bincount(owner, np.where(mark, 0.0, level.shares), minlength=size)
        numbers = np.bincount(owner[mark], minlength=size)[used[k]]
        keys = level.keys[used[k]]
        if k:
            keys = places[keys // vocab_size] * vocab_size + keys % vocab_size
        places = np.cumsum(used[k]) - 1
        starts: Anything = np.concatenate([[0], np.cumsum(numbers)]).astype(np.int64)
        backoff = np.minimum(level.backoff + dropped, 1.0)[used[k]]
        found.append(Level(vocab_size, keys, starts, level.tokens[mark], level.shares[mark], backoff))
    return found
