"""The n-gram distribution as the mixture that it is: one distribution for each order, and the uniform one.

Interpolated Kneser-Ney adds shares of contexts of each length, and the backoff weights say how much is left for shorter
contexts. So p(token) is exactly a sum over orders of weight · distribution.

Shapes: P positions, V vocabulary, K = order - 1 tokens of context.
"""

from __future__ import annotations

import numpy as np

from lm.kernels.counts import Anything, Floats
from lm.models.kneser_ney import NGramCounts, Probabilities


def distributions_by_order(counts: NGramCounts, histories: Anything) -> dict[int, tuple[Floats, Probabilities]]:
    """The parts of the distribution after each history.

    Args:
        counts: of a text.
        histories: (P, K) tokens, newest last; -1 before the start of the text.

    Returns:
        By order, from 0 (the uniform distribution) to K + 1: the weight (P,) and the distribution (P, V). The
        weights sum to 1. Where no context of an order is known, its weight and its distribution are 0.
    """
    left = np.ones(len(histories))
    parts: dict[int, tuple[Floats, Probabilities]] = {}
    contexts = counts.contexts(histories)
    for level, context in reversed(list(zip(counts.levels, contexts, strict=True))):
        weight = np.zeros(len(histories))
        distribution = np.zeros((len(histories), counts.vocab_size), dtype=np.float32)
        known = np.flatnonzero(context >= 0)
        owner, pairs = level.pairs_in(context[known])
        mass = np.bincount(owner, level.shares[pairs], minlength=len(known))
        distribution[known[owner], level.tokens[pairs]] = level.shares[pairs] / mass[owner]
        weight[known] = left[known] * mass
        left[known] *= level.backoff[context[known]]
        parts[len(counts.levels) - len(parts)] = weight, distribution
    parts[0] = left, np.full((len(histories), counts.vocab_size), 1 / counts.vocab_size, dtype=np.float32)
    return dict(sorted(parts.items()))
