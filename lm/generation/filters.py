"""Filters: pure numpy functions on logits, composed in one documented order, the same for every decoder.

    ban the unknown token → temperature → top_k → top_p → draw

Shapes: B rows, V vocabulary. A masked token has the logit -inf; at least one token a row survives every filter.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lm.generation.options import SamplingOptions

Logits = npt.NDArray[np.float64]


def softmax(logits: Logits) -> Logits:
    """Probabilities (B, V) of logits (B, V)."""
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    total: Logits = shifted / shifted.sum(axis=-1, keepdims=True)
    return total


def ban(logits: Logits, tokens: tuple[int, ...]) -> Logits:
    """Mask some tokens."""
    masked = logits.copy()
    masked[:, list(tokens)] = -np.inf
    return masked


def apply_temperature(logits: Logits, temperature: float) -> Logits:
    """Divide by the temperature; 0 keeps the likeliest token alone, the first of equals."""
    if temperature > 0:
        # Shifted first: a tiny temperature would make infinities, whose difference is no number.
        with np.errstate(over="ignore"):
            scaled: Logits = (logits - logits.max(axis=-1, keepdims=True)) / temperature
        return scaled
    best = logits.argmax(axis=-1)
    greedy = np.full_like(logits, -np.inf)
    rows = np.arange(len(logits))
    greedy[rows, best] = logits[rows, best]
    return greedy


def keep_top_k(logits: Logits, top_k: int) -> Logits:
    """Mask all but the k likeliest tokens; of equals at the border the lower ids stay."""
    if top_k >= logits.shape[-1]:
        return logits.copy()
    order = np.argsort(-logits, axis=-1, kind="stable")[:, :top_k]
    kept = np.full_like(logits, -np.inf)
    np.put_along_axis(kept, order, np.take_along_axis(logits, order, axis=-1), axis=-1)
    return kept


def keep_top_p(logits: Logits, top_p: float) -> Logits:
    """Mask the tokens outside the smallest set that holds `top_p` of the probability.

    Source: Holtzman et al. 2019, "The Curious Case of Neural Text Degeneration".
    """
    order = np.argsort(-logits, axis=-1, kind="stable")
    ordered = np.take_along_axis(logits, order, axis=-1)
    probabilities = softmax(ordered)
    # The mass before each token decides, so that the token which crosses the border stays.
    outside = probabilities.cumsum(axis=-1) - probabilities >= top_p
    kept = np.empty_like(logits)
    np.put_along_axis(kept, order, np.where(outside, -np.inf, ordered), axis=-1)
    return kept


def apply_filters(logits: npt.NDArray[np.float32], options: SamplingOptions, banned: tuple[int, ...] = ()) -> Logits:
    """All filters that `options` ask for, in the documented order; (B, V) → (B, V) float64."""
    filtered: Logits = logits.astype(np.float64)
    if banned:
        filtered = ban(filtered, banned)
    filtered = apply_temperature(filtered, options.temperature)
    if options.top_k is not None:
        filtered = keep_top_k(filtered, options.top_k)
    if options.top_p is not None:
        filtered = keep_top_p(filtered, options.top_p)
    return filtered


def draw(logits: Logits, seed: int, index: int, position: int) -> npt.NDArray[np.int64]:
    """One token a row (B,) of filtered logits (B, V).

    The random number comes from a counter-based generator keyed by the request's seed and the sample's index, and
    counted by the position in the text: nothing else that was drawn before, here or elsewhere, can change it.

    Source: Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3" (Philox).
    """
    generator = np.random.Generator(np.random.Philox(key=[seed, index], counter=position))
    cumulative = softmax(logits).cumsum(axis=-1)
    threshold = generator.random() * cumulative[:, -1:]
    drawn: npt.NDArray[np.int64] = (cumulative <= threshold).sum(axis=-1)
    return drawn
