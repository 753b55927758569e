"""The cache model: tokens that followed the same context earlier in this text become more likely.

    p = (1 - weight) · p(model) + weight · count(context, token) / count(context)

The context is the last `order - 1` tokens, the counts are those of the text so far (of its last `window` tokens); of
order 1, these are the counts of single tokens. Where the context is new, p is the model's. A token is scored before it
is counted. Order, window and weight are chosen on validation text.

The figures show how much a text repeats itself, and are not comparable with those of the model alone (static figures).

Source: Kuhn and De Mori 1990, "A cache-based natural language model for speech recognition".
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

ORDERS = 1, 2, 3, 4, 5, 6, 8
WINDOWS = None, 2000, 500
MAX_TUNED = 100_000
"""Tokens from the start of the validation text on which the cache is chosen."""
WEIGHT_STEPS = 60
"""Steps of expectation maximisation."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class CacheOptions:
    """A cache and its weight."""

    order: int
    """Tokens of an n-gram: the context, and the token that follows it."""
    window: int | None
    """How many of the last tokens are counted; None: all of the text so far."""
    weight: float
    """Of the cache where it knows the context, from 0 to 1."""


@dataclass(frozen=True)
class CacheTuning:
    """The cache with the lowest loss on validation text."""

    options: CacheOptions
    tokens: int
    """Of the validation text."""
    static_loss: float
    """Nats per token of that text without the cache."""
    loss: float


def cached_nats(ids: npt.NDArray[Any], nats: npt.NDArray[Any], options: CacheOptions) -> Floats:
    """The nats (N,) of the tokens of a text with a cache.

    Args:
        ids: (N + 1,) the start token, then the N tokens.
        nats: (N,) under the model alone.
        options: of the cache.
    """
    return _mixed(np.asarray(nats, np.float64), cache_probabilities(ids, options.order, options.window), options.weight)


def cache_probabilities(ids: npt.NDArray[Any], order: int, window: int | None) -> Floats:
    """The probability (N,) of each token under the cache alone; NaN where it does not know the context.

    Args:
        ids: (N + 1,) the start token, then the N tokens.
        order: tokens of an n-gram.
        window: how many of the last tokens are counted.
    """
    tokens, size = ids.tolist(), order - 1
    counts: defaultdict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
    totals: Counter[tuple[int, ...]] = Counter()
    contexts = [tuple(tokens[max(0, end - size) : end]) for end in range(1, len(tokens))]
    found = np.full(len(contexts), np.nan)
    for position, (context, token) in enumerate(zip(contexts, tokens[1:], strict=True)):
        if total := totals[context]:
            found[position] = counts[context][token] / total
        counts[context][token] += 1
        totals[context] += 1
        if window is not None and (oldest := position - window) >= 0:
            counts[contexts[oldest]][tokens[oldest + 1]] -= 1
            totals[contexts[oldest]] -= 1
    return found


def tune_cache(ids: npt.NDArray[Any], nats: npt.NDArray[Any]) -> CacheTuning:
    """The cache with the lowest loss on the first `MAX_TUNED` tokens of a validation text; see `cached_nats`."""
    ids, nats = ids[: MAX_TUNED + 1], np.asarray(nats[:MAX_TUNED], np.float64)
    best: CacheTuning | None = None
    for order in ORDERS:
        for window in WINDOWS:
            cache = cache_probabilities(ids, order, window)
            weight = best_weight(nats, cache)
            loss = float(_mixed(nats, cache, weight).mean())
            if best is None or loss < best.loss:
                best = CacheTuning(CacheOptions(order, window, weight), len(nats), float(nats.mean()), loss)
    assert best is not None, "there are orders and windows"
    return best


def best_weight(nats: Floats, cache: Floats) -> float:
    """The weight of a cache with the lowest loss: expectation maximisation, from 0.1."""
    known = np.isfinite(cache)
    if not known.any():
        return 0.0
    own, other = np.exp(-nats[known]), cache[known]
    weight = 0.1
    for _ in range(WEIGHT_STEPS):
        mixed = weight * other
        weight = float(np.mean(mixed / np.maximum(mixed + (1 - weight) * own, 1e-300)))
    return weight


def _mixed(nats: Floats, cache: Floats, weight: float) -> Floats:
    # A weight of 1 would make tokens that are not in the cache impossible; the logarithm keeps small probabilities.
    with np.errstate(divide="ignore"):
        both = np.logaddexp(np.log1p(-weight) - nats, np.log(weight * np.nan_to_num(cache)))
    return np.where(np.isfinite(cache), -both, nats)
