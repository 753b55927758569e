"""Passages on which one model wins most: whole lines of a readable length, that do not overlap."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from lm.comparison.bootstrap import Floats
from lm.comparison.result import Passage, PassageWord
from lm.tokenizers.base import utf8_sizes

SHOWN = 10
"""Passages of each side."""
LEAST, MOST = 80, 240
"""Characters of a passage; shorter lines are joined, longer ones cut after a space."""
_WORDS = re.compile(r"\s*\S+|\s+$")


def passage_bounds(text: str) -> list[tuple[int, int]]:
    """Begin and end, in characters, of passages that cover a text in order.

    Lines are joined until there are `LEAST` characters; a line beyond `MOST` is cut after a space.
    """
    found: list[tuple[int, int]] = []
    begin = end = 0
    while end < len(text):
        line = text.find("\n", end) + 1 or len(text)
        if line - begin > MOST:
            if end - begin >= LEAST // 2:
                # What is there already is long enough, or the next line is too long to join.
                line = end
            else:
                space = text.rfind(" ", begin + LEAST, begin + MOST)
                line = space + 1 if space >= 0 else begin + MOST
        end = line
        if end - begin >= LEAST or end == len(text) or _stands_alone(text, begin, end):
            found.append((begin, end))
            begin = end
    return found


def _stands_alone(text: str, begin: int, end: int) -> bool:
    """Whether the next line is too long to be joined to a passage that is long enough."""
    line = text.find("\n", end) + 1 or len(text)
    return end - begin >= LEAST // 2 and line - begin > MOST


def passages(
    text: str, a: Floats, b: Floats, names: tuple[str, str], *, sizes: npt.NDArray[np.int64] | None = None
) -> tuple[list[Passage], list[Passage]]:
    """Up to ten passages on which `a` needs fewest bits compared with `b`, and ten for `b`; best first.

    Args:
        text: the whole text.
        a, b: (B,) nats of each byte.
        names: of the two candidates.
        sizes: (C,) measured bytes of each character; None: all of them.
    """
    offsets = np.append(0, np.cumsum(utf8_sizes(text) if sizes is None else sizes))
    # The end of an answer has no bytes, and may be a whole passage.
    bounds = [(begin, end) for begin, end in passage_bounds(text) if offsets[begin] < offsets[end]]
    if not bounds:
        return [], []
    begins = [begin for begin, _ in bounds]
    gains = np.add.reduceat(b - a, offsets[begins])
    order = np.argsort(gains, kind="stable")
    lines = 1 + np.cumsum([text.count("\n", *part) for part in pairwise([0, *begins])])

    def passage(index: int, winner: str) -> Passage:
        begin, end = bounds[index]
        start, stop = int(offsets[begin]), int(offsets[end])
        return Passage(
            winner=winner,
            line=int(lines[index]),
            begin=start,
            bytes=stop - start,
            text=text[begin:end],
            bits_a=float(a[start:stop].sum()) / math.log(2),
            bits_b=float(b[start:stop].sum()) / math.log(2),
            words=tuple(_words(text, begin, end, offsets, b - a)),
        )

    wins_b = [passage(index, names[1]) for index in order[:SHOWN].tolist() if gains[index] < 0]
    wins_a = [passage(index, names[0]) for index in order[::-1][:SHOWN].tolist() if gains[index] > 0]
    return wins_a, wins_b


def _words(
    text: str, begin: int, end: int, offsets: np.ndarray[tuple[int], np.dtype[np.int64]], difference: Floats
) -> Iterator[PassageWord]:
    for match in _WORDS.finditer(text, begin, end):
        start, stop = int(offsets[match.start()]), int(offsets[match.end()])
        yield PassageWord(text=match[0], bits=float(difference[start:stop].sum()) / math.log(2))
