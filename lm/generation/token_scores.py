"""Log-probabilities of tokens and their alternatives, under the model, before any filter."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lm.generation.decoder import Logits
from lm.generation.distribution import log_softmax
from lm.generation.request import Score

_SMALL = 256
"""Rows of at most this many tokens are sorted whole."""


def score_rows(logits: Logits, tokens: Sequence[int], alternatives: int) -> list[Score]:
    """Score one token of each row.

    Args:
        logits: (T, V) float32.
        tokens: (T,) the tokens.
        alternatives: how many of the most likely tokens to add to each score.
    """
    if not len(tokens):
        return []
    logprobs = log_softmax(logits.astype(np.float64))
    tops = _most_likely(logprobs, alternatives)
    own = logprobs[np.arange(len(tokens)), list(tokens)].tolist()
    return [Score(token, logprob, top) for token, logprob, top in zip(tokens, own, tops, strict=True)]


def _most_likely(logprobs: np.ndarray, count: int) -> list[tuple[tuple[int, float], ...]]:
    """The `count` most likely tokens of each row with their log-probabilities; among equals the lower id first."""
    size = logprobs.shape[-1]
    count = min(count, size)
    if count == 0:
        return [()] * len(logprobs)
    if count == 1:
        first = logprobs.argmax(axis=-1).tolist()
        return [((token, float(row[token])),) for token, row in zip(first, logprobs, strict=True)]
    if size <= _SMALL:
        order = np.argsort(-logprobs, axis=-1, kind="stable")[:, :count]
        ranked = np.take_along_axis(logprobs, order, axis=-1).tolist()
        return [tuple(zip(*row, strict=True)) for row in zip(order.tolist(), ranked, strict=True)]
    borders = np.partition(logprobs, size - count, axis=-1)[:, size - count].tolist()
    tops = []
    for row, border in zip(logprobs, borders, strict=True):
        ids = np.flatnonzero(row >= border)
        ids = ids[np.argsort(-row[ids], kind="stable")][:count]
        tops.append(tuple(zip(ids.tolist(), row[ids].tolist(), strict=True)))
    return tops
