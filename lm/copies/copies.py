"""What `CopyIndex.find` gives: the verbatim runs of a text, and the longest run around each character."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt


class CopiedRun(NamedTuple):
    """A part of a text that stands in the training text, and would not if it were longer."""

    start: int
    """Its first character in the text."""
    length: int
    """Characters; 0 if no character of the text stands in the training text."""
    source: int
    """A place where it stands: the byte offset in the UTF-8 training text; `CopyIndex.place` gives the line."""


@dataclass(frozen=True, eq=False)
class Copies:
    """The verbatim runs of a text, maximal on both sides, in order. Both starts and ends increase."""

    characters: int
    """Length of the text."""
    starts: npt.NDArray[np.int64]
    """(R,) first character of each run."""
    ends: npt.NDArray[np.int64]
    """(R,) the character after each run."""
    sources: npt.NDArray[np.int64]
    """(R,) a place of each run: its byte offset in the UTF-8 training text."""

    @property
    def longest(self) -> CopiedRun:
        """The longest run; the first one of several."""
        if not len(self.starts):
            return CopiedRun(0, 0, 0)
        best = int(np.argmax(self.ends - self.starts))
        return self._run(best)

    @functools.cached_property
    def around(self) -> npt.NDArray[np.int64]:
        """(N,) for each character the length of the longest run that contains it; 0 if none does."""
        lengths = np.zeros(self.characters, np.int64)
        if not len(self.starts):
            return lengths
        places = np.arange(self.characters)
        # The runs that contain a character are neighbours: from the first that ends after it to the last that starts
        # at it or before.
        first = np.searchsorted(self.ends, places, side="right")
        last = np.searchsorted(self.starts, places, side="right")
        inside = np.flatnonzero(first < last)
        if len(inside):
            bounds = np.stack([first[inside], last[inside]], axis=1).ravel()
            sizes = np.append(self.ends - self.starts, 0)
            lengths[inside] = np.maximum.reduceat(sizes, bounds)[::2]
        return lengths

    def share(self, minimum: int) -> float:
        """The share of the characters that stand in a run of at least `minimum` characters; 0 for an empty text."""
        return float(np.mean(self.around >= minimum)) if self.characters else 0.0

    def spans(self, minimum: int) -> list[tuple[int, int]]:
        """The (start, end) of each part whose characters all stand in runs of at least `minimum` characters."""
        marked = np.concatenate([[False], self.around >= minimum, [False]])
        changes = np.flatnonzero(marked[1:] != marked[:-1])
        return [(int(start), int(end)) for start, end in changes.reshape(-1, 2)]

    def runs(self, minimum: int = 1) -> list[CopiedRun]:
        """The runs of at least `minimum` characters, in order; they may overlap."""
        return [self._run(int(number)) for number in np.flatnonzero(self.ends - self.starts >= minimum)]

    def _run(self, number: int) -> CopiedRun:
        start, end = int(self.starts[number]), int(self.ends[number])
        return CopiedRun(start, end - start, int(self.sources[number]))
