"""The results of a comparison in plain words."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence

from lm.comparison.bootstrap import Interval
from lm.comparison.result import Candidate, Comparison, Difference
from lm.corpora import PreparedCorpus

LONG_TOKEN = 1.5
"""Mean bytes of a token, from which the letters of a word have one figure."""


def decimals(margin: float) -> int:
    """Decimals that show a margin: three, or more if it is smaller."""
    return 3 if margin <= 0 else min(7, max(3, -math.floor(math.log10(margin))))


def counted(number: int, thing: str) -> str:
    """A number of things, such as "1 block" and "2 blocks"."""
    return f"{number:,} {thing}" + ("" if number == 1 else "s")


def size_of(found: Comparison) -> str:
    """How long the compared text is: "1,234 bytes", or "1,234 bytes in 12 answers"."""
    return f"{found.bytes:,} bytes" + ("" if found.answers is None else f" in {counted(found.answers, 'answer')}")


def difference_sentence(
    a: str,
    b: str,
    bits: float,
    span: Interval | None,
    margin: tuple[float, float] | None,
    *,
    comparable: bool,
) -> str:
    """The result of a pair.

    Args:
        a, b: names of the candidates.
        bits: bits per byte of `b` less those of `a`.
        span: its interval; None if the text is too short.
        margin: standard error and 95 % margin of the difference across seeds; None without several seeds.
        comparable: False if the verdict forbids a conclusion.
    """
    better, worse, size = (b, a, -bits) if bits < 0 else (a, b, bits)
    places = decimals(span.half if span else size)
    amount = f"{size:.{places}f}" + (f" ± {span.half:.{places}f}" if span else "") + " bits per byte"
    if not comparable:
        return f"No conclusion, as the runs are not comparable; their figures differ by {amount}."
    if bits == 0:
        return f"{a} and {b} are equal on this text."
    if span is None:
        return f"{better} is better than {worse} by {amount} on this text, which is too short for an interval."
    if not span.excludes_zero:
        return f"{a} and {b} differ by {amount}; that may be chance."
    if margin is not None and size <= margin[1]:
        seeds = f"seeds alone make differences up to {margin[1]:.3f}"
        return f"{better} is better than {worse} by {amount} on this text; but {seeds}."
    return f"{better} is better than {worse} by {amount}; that is not chance."


def notes(
    candidates: Sequence[Candidate],
    differences: Sequence[Difference],
    source: str | None,
    trained_on: Sequence[PreparedCorpus | None],
    *,
    seeds_alone: bool,
) -> Iterator[str]:
    """What was left out, and facts to know.

    Args:
        candidates: ranked.
        differences: of them.
        source: the run whose training text gave the frequencies of words.
        trained_on: the training text of each run.
        seeds_alone: whether all runs differ by their seed alone.
    """
    if source is None:
        yield (
            "No training text is here, so there are no frequencies of words and no new names. To have them, restore "
            "the text at its path."
        )
    elif len({prepared.splits["train"].sha256 if prepared else None for prepared in trained_on}) > 1:
        yield f"Frequencies of words and new names are those of the training text of {source}."
    figures = [candidate.bits_per_byte for candidate in candidates if candidate.bits_per_byte is not None]
    if seeds_alone and len(figures) > 1:
        yield (
            "These runs differ by their seed alone: this is how much seeds move the figure (standard deviation "
            f"{statistics.stdev(figures):.4f} bits per byte)."
        )
    elif all(len(candidate.runs) == 1 for candidate in candidates):
        yield "Each configuration has one seed here. Other seeds move the figures too: train some to know by how much."
    long = [candidate.name for candidate in candidates if candidate.bytes_per_token > LONG_TOKEN]
    if long:
        yield (
            f"The nats of a token are spread evenly over its bytes. So for {', '.join(long)}, parts of a word and line "
            "ends show how the tokens are cut, not where the model knows more."
        )
    if len(differences) > 1:
        yield (
            f"Each interval is for its own pair. Of {len(differences)} pairs without a difference, each has a chance "
            "of 5 % to look like one."
        )
