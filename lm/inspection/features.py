"""Features of a text, one value a character, computed from the text alone.

To add a feature: write one function, and add one line to `FEATURES`.

    values = FEATURES[0].values("To be,\nor")        # position in line: 1 2 3 4 5 6 0 1 2
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.float32]

QUOTES = {'"': '"', "“": "”", "„": "“", "«": "»"}
"""Opening → closing mark. An apostrophe is also a single quote, so single quotes do not count."""
BRACKETS = {"(": ")", "[": "]", "{": "}"}
_PARAGRAPH_END = re.compile(r"\n\s*\n")
_WORD = re.compile(r"\w+(?:['’]\w+)*")
_SPEAKER = re.compile(r"^[A-Z][\w .'’-]{0,38}:(?=\s|$)", re.MULTILINE)


def position_in_line(text: str) -> Values:
    """Number of characters since the last newline; 0 at a newline."""
    index = np.arange(1, len(text) + 1)
    newlines = np.where(_codes(text) == ord("\n"), index, 0)
    return (index - np.maximum.accumulate(newlines)).astype(np.float32)


def inside_quotes(text: str) -> Values:
    """1 from an opening quotation mark to the last character before the closing one.

    Only pairs within a paragraph count.
    """
    return _filled(text, _pairs(text, QUOTES))


def inside_brackets(text: str) -> Values:
    """1 from an opening bracket to the last character before the closing one; brackets may be nested."""
    return _filled(text, _pairs(text, BRACKETS))


def word_length(text: str) -> Values:
    """Number of the word's characters so far; 0 between words."""
    values = np.zeros(len(text), np.float32)
    for word in _WORD.finditer(text):
        values[word.start() : word.end()] = np.arange(1, len(word[0]) + 1)
    return values


def upper_case(text: str) -> Values:
    """1 at an upper-case letter."""
    return np.fromiter(map(str.isupper, text), np.float32, len(text))


def speaker_name(text: str) -> Values:
    """1 in a name at the start of a line, up to its colon, as in a play: `NAME:`."""
    return _filled(text, (found.span() for found in _SPEAKER.finditer(text)))


@dataclass(frozen=True)
class Feature:
    """Something that a unit may track."""

    name: str
    description: str
    values: Callable[[str], Values]
    """A text of N characters → (N,) float32; 0 or 1 if `binary`."""
    binary: bool
    anywhere: bool = False
    """A token has the feature if one of its characters has it; else its last character that is not a space counts."""


FEATURES: Sequence[Feature] = (
    Feature("position in line", "characters since the last newline", position_in_line, binary=False),
    Feature("inside quotes", "between quotation marks", inside_quotes, binary=True),
    Feature("inside brackets", "between ( ), [ ] or { }", inside_brackets, binary=True),
    Feature("word length", "characters of the word so far", word_length, binary=False),
    Feature("upper case", "an upper-case letter", upper_case, binary=True, anywhere=True),
    Feature("speaker name", "a name and colon that begin a line", speaker_name, binary=True),
)


def _codes(text: str) -> npt.NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


def _filled(text: str, spans: Iterator[tuple[int, int]]) -> Values:
    values = np.zeros(len(text), np.float32)
    for begin, end in spans:
        values[begin:end] = 1
    return values


def _pairs(text: str, closing: dict[str, str]) -> Iterator[tuple[int, int]]:
    """The positions of each opening mark and its closing one, within a paragraph; others are left out."""
    marks = re.compile("[" + re.escape("".join({*closing, *closing.values()})) + "]")
    begin = 0
    while begin < len(text):
        border = _PARAGRAPH_END.search(text, begin)
        end = border.end() if border else len(text)
        opened: list[tuple[int, str]] = []
        for mark in marks.finditer(text, begin, end):
            expected = [closing[character] for _, character in opened]
            if mark[0] in expected:
                # Marks that were opened inside and never closed are dropped.
                del opened[len(expected) - expected[::-1].index(mark[0]) :]
                yield opened.pop()[0], mark.start()
            elif mark[0] in closing:
                opened.append((mark.start(), mark[0]))
        begin = end
