"""Filters: pure numpy functions on logits, composed in one documented order, the same for every decoder.

    ban → logit_bias → repetition_penalty → presence_penalty, frequency_penalty → temperature → top_k → top_p → min_p
        → typical_p → draw

Shapes: B rows, V vocabulary, float64. A masked token has the logit -inf; at least one token a row survives every
filter. A row's result does not depend on the rows beside it, to the last bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Logits = npt.NDArray[np.float64]
Places = npt.NDArray[np.int64]

_MASKED = np.array(-np.inf)
_HUGE = 1e300
"""Stands for infinity, so that differences of logits stay numbers."""
_SMALL = 128
"""Rows of so few tokens are sorted whole."""


def greatest(logits: Logits) -> Logits | float:
    """The greatest logit of each row, (B, 1), or a plain number where there is one row."""
    if len(logits) == 1:
        # A third of the time of a maximum, and of what is done with it.
        return logits.item(logits.argmax())
    largest: Logits = np.maximum.reduce(logits, axis=-1, keepdims=True)
    return largest


def softmax(logits: Logits) -> Logits:
    """Probabilities (B, V) of logits (B, V)."""
    shifted = np.exp(logits - greatest(logits))
    total: Logits = shifted / shifted.sum(axis=-1, keepdims=True)
    return total


def log_softmax(logits: Logits) -> Logits:
    """Logarithms (B, V) of the probabilities of logits (B, V)."""
    best = greatest(logits)
    normalised: Logits = logits - (best + np.log(np.exp(logits - best).sum(axis=-1, keepdims=True)))
    return normalised


# -- before the temperature -------------------------------------------------------------------------


def ban(logits: npt.NDArray[np.floating[Any]], tokens: Sequence[int] | Places) -> Logits:
    """Mask some tokens; the first of the filters, which takes a decoder's float32 and gives float64."""
    masked = logits.astype(np.float64)
    if len(tokens) == 1:
        # A fraction of the time of a list of one.
        if len(masked) == 1:
            masked[0, tokens[0]] = -np.inf
        else:
            masked[:, tokens[0]] = -np.inf
    elif len(tokens):
        masked[:, tokens] = -np.inf
    return masked


def add_bias(logits: Logits, tokens: Sequence[int] | Places, biases: Sequence[float] | Logits) -> Logits:
    """Add to the logits of some tokens, each named once."""
    biased = logits.copy()
    biased[:, tokens] += biases
    return biased


def penalise_repetition(logits: Logits, counts: npt.NDArray[Any], penalty: float) -> Logits:
    """Divide the positive logits of tokens that were met by `penalty`, and multiply the negative ones.

    Args:
        logits: (..., V).
        counts: how often each token was met, (..., V).
        penalty: above 1 makes them less likely.

    Source: Keskar et al. 2019, "CTRL".
    """
    # A tiny penalty would make infinities, of which no temperature could make probabilities.
    with np.errstate(over="ignore"):
        changed = np.where(logits > 0, logits / penalty, logits * penalty).clip(max=_HUGE)
    penalised: Logits = np.where(counts > 0, changed, logits)
    return penalised


def penalise_presence(logits: Logits, counts: npt.NDArray[Any], presence: float, frequency: float) -> Logits:
    """Take `presence` from the logits of tokens that were drawn, and `frequency` for each time they were.

    Args:
        logits: (..., V).
        counts: how often each token was drawn, (..., V).
        presence: taken once.
        frequency: taken for each time.
    """
    penalised: Logits = logits - (presence * (counts > 0) + frequency * counts)
    return penalised


def ensure_finite_row(logits: Logits, allowed: int) -> Logits:
    """Give rows without any probability a token to live by; what is no number gets none, infinity becomes a certainty.

    Args:
        logits: (B, V).
        allowed: the token for rows that are masked throughout.
    """
    # Infinity has no difference from itself.
    living: Logits = np.minimum(np.where(np.isnan(logits), -np.inf, logits), _HUGE)
    living[np.isneginf(living).all(axis=-1), allowed] = 0.0
    return living


# -- the temperature and what comes after it --------------------------------------------------------


def apply_temperature(
    logits: Logits, temperature: float | npt.NDArray[np.float64], best: Logits | float | None = None
) -> Logits:
    """Divide by the temperature, > 0: one for all rows, or one a row (B, 1). The likeliest token gets 0.

    `best` is the greatest logit of each row, where that is known.
    """
    # Shifted first: a tiny temperature would make infinities, whose difference is no number.
    shifted: Logits = logits - (greatest(logits) if best is None else best)
    if isinstance(temperature, float) and temperature > 1e-6:
        if temperature != 1.0:
            shifted /= temperature
        return shifted
    with np.errstate(over="ignore"):
        shifted /= temperature
    return shifted


def keep_top_k(logits: Logits, top_k: int) -> Logits:
    """Mask all but the k likeliest tokens; of equals at the border the lower ids stay."""
    size = logits.shape[-1]
    if top_k >= size:
        return logits.copy()
    if len(logits) == 1 and size <= _SMALL:
        # A short row is put in order as quickly as it is parted, and then shows its equals.
        ordered = logits.copy()
        ordered.sort()
        border = ordered.item(size - top_k)
        if ordered.item(size - top_k - 1) < border:
            filtered = logits.copy()
            np.putmask(filtered, logits < border, _MASKED)
            return filtered
    parted = logits.copy()
    parted.partition(size - top_k, axis=-1)
    borders = parted[:, size - top_k, None] if len(logits) > 1 else parted.item(size - top_k)
    return _keep_from(logits, borders, top_k)


def _keep_from(logits: Logits, border: Logits | float, count: int | npt.NDArray[np.int64]) -> Logits:
    """Mask what is below the border (B, 1), and of its equals the higher ids where more than `count` would stay."""
    masked = logits < border
    if masked.size - np.count_nonzero(masked) > (len(logits) * count if isinstance(count, int) else count.sum()):
        equal = logits == border
        room = count - (logits > border).sum(axis=-1, keepdims=True)
        masked |= equal & (equal.cumsum(axis=-1) > room)
    # Half the time of np.where.
    filtered = logits.copy()
    np.putmask(filtered, masked, _MASKED)
    return filtered


def keep_top_p(logits: Logits, top_p: float) -> Logits:
    """Mask the tokens outside the smallest set that holds `top_p` of the probability.

    Of equals at the border the lower ids stay.

    Source: Holtzman et al. 2019, "The Curious Case of Neural Text Degeneration".
    """
    if top_p >= 1.0:
        return logits.copy()
    size = logits.shape[-1]
    if size <= _SMALL:
        likeliest = np.sort(logits, axis=-1)[:, ::-1]
        mass = np.add.accumulate(np.exp(likeliest - likeliest[:, :1]), axis=-1)
        enough = top_p * mass[:, -1:]
    else:
        best = greatest(logits)
        enough = top_p * np.exp(logits - best).sum(axis=-1, keepdims=True)
        # Only the likeliest tokens have to be put in order: so many as hold the share.
        most = _SMALL
        while True:
            most = min(most, size)
            likeliest = np.sort(np.partition(logits, size - most, axis=-1)[:, size - most :], axis=-1)[:, ::-1]
            mass = np.add.accumulate(np.exp(likeliest - best), axis=-1)
            if most == size or (mass[:, -1:] >= enough).all():
                break
            most *= 8
    # The mass before each token decides, so that the token which crosses the border stays.
    if len(logits) == 1:
        last = int(mass[0, :-1].searchsorted(enough.item()))
        return _keep_from(logits, likeliest.item(last), last + 1)
    count = 1 + (mass[:, :-1] < enough).sum(axis=-1, keepdims=True)
    return _keep_from(logits, np.take_along_axis(likeliest, count - 1, axis=-1), count)


def keep_min_p(logits: Logits, min_p: float) -> Logits:
    """Mask the tokens with less than `min_p` times the probability of the likeliest one.

    Source: Nguyen et al. 2024, "Turning Up the Heat: Min-p Sampling for Creative and Coherent LLM Outputs".
    """
    filtered: Logits = np.where(np.exp(logits - greatest(logits)) >= min_p, logits, _MASKED)
    return filtered


def keep_typical_p(logits: Logits, typical_p: float) -> Logits:
    """Mask all but the tokens whose surprise is nearest to the expected one and that hold `typical_p` together.

    Of equals at the border the lower ids stay. The likeliest token that stays gets 0.

    Source: Meister et al. 2022, "Locally Typical Sampling".
    """
    if typical_p >= 1.0:
        return logits.copy()
    probabilities = softmax(logits)
    living = probabilities > 0
    surprise = -np.log(np.where(living, probabilities, 1.0))
    expected = (probabilities * surprise).sum(axis=-1, keepdims=True)
    distance = np.where(living, np.abs(surprise - expected), np.inf)
    order = np.argsort(distance, axis=-1, kind="stable")
    mass = np.take_along_axis(probabilities, order, axis=-1).cumsum(axis=-1)
    kept = np.empty(logits.shape, dtype=np.bool_)
    # The mass before each token decides, so that the token which crosses the border stays.
    np.put_along_axis(kept, order[:, 1:], mass[:, :-1] < typical_p, axis=-1)
    np.put_along_axis(kept, order[:, :1], np.True_, axis=-1)
    filtered: Logits = np.where(kept, logits, _MASKED)
    return filtered - greatest(filtered)


# -- the draw ---------------------------------------------------------------------------------------


def uniforms(seed: int, index: int, position: int, count: int) -> list[float]:
    """Random numbers in [0, 1) for `count` positions of a text, from `position` on.

    They come from a counter-based generator keyed by the request's seed and the sample's index, and counted by the
    position in the drawn text: nothing else that was drawn before, here or elsewhere, can change them.

    Source: Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3" (Philox).
    """
    generator = np.random.Generator(np.random.Philox(key=[seed, index], counter=position))
    # One count of the counter gives four numbers; the first is used.
    numbers: list[float] = generator.random(4 * count)[::4].tolist()
    return numbers


def draw(logits: Logits, numbers: Sequence[float]) -> list[int]:
    """One token a row of filtered logits (B, V), of which the greatest is near 0, by one number in [0, 1) a row."""
    weights = np.exp(logits)
    if len(logits) == 1:
        cumulative = np.add.accumulate(weights[0])
        return [int(cumulative.searchsorted(numbers[0] * cumulative.item(-1), "right"))]
    cumulative = np.add.accumulate(weights, axis=-1)
    thresholds = np.array(numbers)[:, None] * cumulative[:, -1:]
    tokens: list[int] = (cumulative <= thresholds).sum(axis=-1).tolist()
    return tokens
