"""Longest run and shares of copies of several texts together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lm.copies.copies import Copies

LENGTHS = 20, 50
"""Characters of the runs whose share is given."""


@dataclass(frozen=True)
class CopyFigures:
    """How much of some texts stands in the training text."""

    texts: int
    characters: int
    longest: int
    """Characters of the longest run."""
    shares: dict[int, float]
    """Length → share of all characters in runs of at least this length."""


def figures_of(found: Iterable[Copies], lengths: Sequence[int] = LENGTHS) -> CopyFigures:
    """The figures of several texts together; shares of no text are 0."""
    every = list(found)
    total = sum(each.characters for each in every)
    shares = {length: sum(each.share(length) * each.characters for each in every) / max(total, 1) for length in lengths}
    return CopyFigures(len(every), total, max((each.longest.length for each in every), default=0), shares)
