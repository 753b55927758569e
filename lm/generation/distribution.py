"""From logits to probabilities, and from probabilities to a token.

Shapes: B rows, V vocabulary, float64. The result of a row does not depend on the other rows, to the last bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lm.late_numpy import np

if TYPE_CHECKING:
    import numpy.typing as npt

    Logits = npt.NDArray[np.float64]
else:
    Logits = Any


def row_max(logits: Logits) -> Logits | float:
    """The maximum of each row, (B, 1), or a plain number if there is one row."""
    if len(logits) == 1:
        # Three times as fast as a maximum over an axis.
        return logits.item(logits.argmax())
    largest: Logits = np.maximum.reduce(logits, axis=-1, keepdims=True)
    return largest


def softmax(logits: Logits) -> Logits:
    """Probabilities (B, V) of logits (B, V)."""
    shifted = np.exp(logits - row_max(logits))
    probabilities: Logits = shifted / shifted.sum(axis=-1, keepdims=True)
    return probabilities


def log_softmax(logits: Logits) -> Logits:
    """Natural logarithms (B, V) of the probabilities of logits (B, V)."""
    largest = row_max(logits)
    normalised: Logits = logits - (largest + np.log(np.exp(logits - largest).sum(axis=-1, keepdims=True)))
    return normalised


def uniforms(seed: int, index: int, position: int, count: int) -> list[float]:
    """Random numbers in [0, 1) for `count` positions of a text, from `position` on.

    The generator is counter-based. Its key is the seed of the request and the index of the sample. Its counter is the
    position in the generated text. So the numbers do not depend on anything else that is drawn.

    Source: Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3" (Philox).
    """
    generator = np.random.Generator(np.random.Philox(key=[seed, index], counter=position))
    # Each count of the counter gives four numbers. The first is used.
    numbers: list[float] = generator.random(4 * count)[::4].tolist()
    return numbers


def draw(logits: Logits, numbers: Sequence[float]) -> list[int]:
    """Draw one token for each row.

    Args:
        logits: (B, V), filtered; the maximum of each row is near 0.
        numbers: (B,) random numbers in [0, 1).
    """
    weights = np.exp(logits)
    if len(logits) == 1:
        cumulative = np.add.accumulate(weights[0])
        return [int(cumulative.searchsorted(numbers[0] * cumulative.item(-1), "right"))]
    cumulative = np.add.accumulate(weights, axis=-1)
    thresholds = np.array(numbers)[:, None] * cumulative[:, -1:]
    tokens: list[int] = (cumulative <= thresholds).sum(axis=-1).tolist()
    return tokens
