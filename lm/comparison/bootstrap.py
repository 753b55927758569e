"""Paired block bootstrap: how far a difference between two models depends on the text that was drawn.

Neighbouring bytes are alike, so they are no independent samples. The text is cut into blocks of whole lines of at
least 1,000 bytes. Each resample draws as many blocks as there are, with replacement, and takes the difference of both
models on the same blocks. If neighbouring blocks still resemble each other, blocks are joined; what resemblance
remains widens the interval.

Sources: Künsch 1989, "The Jackknife and the Bootstrap for General Stationary Observations"; Hesterberg 2015, "What
Teachers Should Know About the Bootstrap" (the interval is widened for few blocks); Koehn 2004 (paired resampling).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

RESAMPLES = 10_000
LEVEL = 0.95
"""Of all intervals."""
BLOCK_BYTES = 1000
"""Of a block, at least; a shorter text than 20,000 bytes has shorter blocks."""
MIN_BLOCK_BYTES = 50
USUAL_BLOCKS, MAX_BLOCKS, MIN_BLOCKS = 20, 1000, 8
"""Of a short text, of a long text, and for an interval."""
MIN_JOINED = 16
"""Blocks are joined only while at least this many remain."""
DRAWN_AT_ONCE = 1_000_000
"""Blocks that are drawn together; limits memory."""
Z = 1.959964
"""97.5th percentile of the normal distribution."""
_T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}


class Interval(NamedTuple):
    """A 95 % interval."""

    low: float
    high: float

    @property
    def half(self) -> float:
        """Half of its width: what stands after ±."""
        return (self.high - self.low) / 2

    @property
    def excludes_zero(self) -> bool:
        """Whether a value of 0 is outside."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True, eq=False)
class Blocks:
    """The blocks of a text."""

    starts: npt.NDArray[np.int64]
    """(n,) first byte of each."""
    size: int
    """Bytes of the text."""

    @property
    def sizes(self) -> Floats:
        """(n,) bytes of each."""
        return np.diff(np.append(self.starts, self.size)).astype(np.float64)

    @property
    def of_bytes(self) -> npt.NDArray[np.int64]:
        """(B,) the block of each byte."""
        return np.repeat(np.arange(len(self.starts)), np.diff(np.append(self.starts, self.size)))

    def sums(self, values: Floats) -> Floats:
        """(n,) sum of the values (B,) of each block's bytes."""
        summed: Floats = np.add.reduceat(values, self.starts)
        return summed

    def joined(self) -> Blocks:
        """Blocks of two."""
        return Blocks(self.starts[::2], self.size)


def text_blocks(data: bytes, *, ends: npt.NDArray[np.int64] | None = None) -> Blocks:
    """Blocks of whole lines of at least `BLOCK_BYTES`; a line of more than two blocks is cut.

    A long text has larger blocks, so that there are at most `MAX_BLOCKS`; a short one has smaller ones. `ends` are
    rising ends of parts that take the place of lines, in bytes.
    """
    size = len(data)
    least = max(BLOCK_BYTES, -(-size // MAX_BLOCKS))
    least = max(MIN_BLOCK_BYTES, min(least, size // USUAL_BLOCKS))
    if ends is None:
        ends = np.flatnonzero(np.frombuffer(data, np.uint8) == ord("\n")) + 1
    starts, start = [0], 0
    while size - start >= 2 * least:
        place = int(np.searchsorted(ends, start + least))
        end = int(ends[place]) if place < len(ends) else size
        start = end if end <= start + 2 * least and end < size else start + least
        starts.append(start)
    return Blocks(np.array(starts, np.int64), size)


def joined_for(blocks: Blocks, difference: Floats) -> Blocks:
    """Blocks so large that neighbours do not resemble each other, as far as the text is long enough.

    Args:
        blocks: of the text.
        difference: (B,) between two models.
    """
    while len(blocks.starts) >= 2 * MIN_JOINED and resemblance(blocks, difference) > 1 / math.sqrt(len(blocks.starts)):
        blocks = blocks.joined()
    return blocks


def resemblance(blocks: Blocks, difference: Floats) -> float:
    """The correlation of a block's deviation from the mean difference with that of the next block."""
    rest = blocks.sums(difference) - blocks.sizes * difference.mean()
    variance = float(rest @ rest)
    return float(rest[1:] @ rest[:-1]) / variance if variance else 0.0


def resampled_sums(values: Floats, *, resamples: int = RESAMPLES, seed: int = 0) -> Floats:
    """Sums over blocks drawn with replacement; the same blocks for all columns.

    Args:
        values: (n, K) the sum of each quantity in each block.
        resamples: R.
        seed: of the draws.

    Returns:
        (R, K).
    """
    count = len(values)
    generator = np.random.Generator(np.random.PCG64(seed))
    sums = np.empty((resamples, values.shape[1]))
    at_once = max(1, DRAWN_AT_ONCE // count)
    for start in range(0, resamples, at_once):
        rows = min(at_once, resamples - start)
        drawn = generator.integers(0, count, (rows, count))
        drawn += count * np.arange(rows)[:, None]
        times = np.bincount(drawn.ravel(), minlength=rows * count).reshape(rows, count)
        sums[start : start + rows] = times.astype(np.float64) @ values
    return sums


def widening(blocks: Blocks, difference: Floats) -> float:
    """How much wider than the resampled values the interval must be.

    n blocks vary less around their own mean than around the true one: that is the t distribution. Neighbours that
    resemble each other add to the variance of a mean; an estimated correlation of n blocks is too low by 1/n.
    """
    count = len(blocks.starts)
    few = t_quantile(count - 1) / Z * math.sqrt(count / (count - 1))
    return few * math.sqrt(1 + 2 * max(0.0, resemblance(blocks, difference) + 1 / count))


def interval(estimate: float, resampled: Floats, widen: float) -> Interval:
    """The interval of an estimate from its resampled values (R,), with the deviations times `widen`."""
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(resampled, [tail, 100 - tail])
    return Interval(estimate + widen * (float(low) - estimate), estimate + widen * (float(high) - estimate))


def mean_interval(
    difference: Floats, blocks: Blocks, *, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[Interval | None, Blocks]:
    """The interval of the mean of `difference` (B,) (None: too few blocks), and the blocks that were drawn."""
    blocks = joined_for(blocks, difference)
    if len(blocks.starts) < MIN_BLOCKS:
        return None, blocks
    quantities = np.stack([blocks.sums(difference), blocks.sizes], axis=1)
    sums = resampled_sums(quantities, resamples=resamples, seed=seed)
    means = sums[:, 0] / sums[:, 1]
    return interval(float(difference.mean()), means, widening(blocks, difference)), blocks


def t_quantile(freedom: float) -> float:
    """97.5th percentile of Student's t distribution; the expansion of Fisher and Cornish from 5 degrees of freedom."""
    if freedom < 5:
        return _T[max(1, int(freedom))]
    terms = (
        (Z**3 + Z) / 4,
        (5 * Z**5 + 16 * Z**3 + 3 * Z) / 96,
        (3 * Z**7 + 19 * Z**5 + 17 * Z**3 - 15 * Z) / 384,
    )
    return Z + sum(term / freedom ** (power + 1) for power, term in enumerate(terms))
