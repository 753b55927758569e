"""Where two models differ: the bytes of a text divided by what they are.

Each division labels every byte, from the text and from counts of words in the training text:

    part of a word          first letter, later letters, digits, punctuation, white space
    frequency of the word   in the training text: never, 1 to 9 times, … (words only)
    names                   seen or not seen in training (words that begin upper case and never occur in lower case)
    place in the line       first word, the rest, the line end
    place in the text       the first 1,000 bytes, then quarters
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lm.comparison.bootstrap import MIN_BLOCKS, Blocks, Floats, interval, resampled_sums
from lm.comparison.byte_nats import bits
from lm.comparison.result import Place
from lm.tokenizers.base import utf8_sizes

WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")
_FIRST_WORD = re.compile(r"^[^\S\n]*\S+", re.MULTILINE)
OPENING_BYTES = 1000
"""The start of the text, where a model has read little."""
FREQUENCIES = (1, 10, 100, 1000)
FREQUENCY_NAMES = ("never", "1 to 9 times", "10 to 99 times", "100 to 999 times", "1,000 times or more")
NONE = -1
"""The label of a byte outside all parts."""

Labels = npt.NDArray[np.int8]


@dataclass(frozen=True, eq=False)
class Division:
    """A way to divide a text."""

    name: str
    parts: tuple[str, ...]
    labels: Labels
    """(B,) the part of each byte, or NONE."""


def divisions(
    text: str, training: Counter[str] | None, *, sizes: npt.NDArray[np.int64] | None = None
) -> list[Division]:
    """All ways to divide a text.

    Args:
        text: the whole text.
        training: how often each word is in the training text; None leaves out what needs it.
        sizes: (C,) measured bytes of each character; None: all of them.
    """
    sizes = utf8_sizes(text) if sizes is None else sizes
    words = [(match.start(), match.end(), match[0]) for match in WORD.finditer(text)]

    def division(name: str, parts: tuple[str, ...], labels: Labels) -> Division:
        return Division(name, parts, np.repeat(labels, sizes))

    found = [
        division(
            "part of a word",
            ("first letter", "later letters", "digits", "punctuation", "white space"),
            _parts_of_words(text, words),
        )
    ]
    if training is not None:
        frequency = np.full(len(text), NONE, np.int8)
        names = np.full(len(text), NONE, np.int8)
        own_lower = {word for _, _, word in words if word.islower()}
        for begin, end, word in words:
            frequency[begin:end] = bisect_right(FREQUENCIES, training[word])
            lower = word.lower()
            if word[0].isupper() and len(word) > 1 and not training[lower] and lower not in own_lower:
                names[begin:end] = int(not training[word])
        found.append(division("frequency in training", FREQUENCY_NAMES, frequency))
        found.append(division("names", ("seen in training", "not seen in training"), names))
    found.append(division("place in the line", ("first word", "the rest", "line end"), _places_in_lines(text)))
    found.append(_place_in_text(int(sizes.sum())))
    return found


def word_counts(text: str) -> Counter[str]:
    """How often each word is in a text."""
    return Counter(WORD.findall(text))


def _parts_of_words(text: str, words: Sequence[tuple[int, int, str]]) -> Labels:
    classes = {char: _class_of(char) for char in set(text)}
    labels = np.fromiter(map(classes.__getitem__, text), np.int8, len(text))
    for begin, end, _ in words:
        labels[begin] = 0
        labels[begin + 1 : end] = 1
    return labels


def _class_of(char: str) -> int:
    return 2 if char.isdigit() else 4 if char.isspace() else 3


def _places_in_lines(text: str) -> Labels:
    labels = np.ones(len(text), np.int8)
    for match in _FIRST_WORD.finditer(text):
        labels[match.start() : match.end()] = 0
    for match in re.finditer("\n", text):
        labels[match.start()] = 2
    return labels


def _place_in_text(size: int) -> Division:
    opening = min(OPENING_BYTES, size // 4)
    labels = (1 + 4 * np.arange(size) // max(size, 1)).astype(np.int8)
    labels[:opening] = 0
    names = (f"first {opening:,} bytes", "rest of 1st quarter", "2nd quarter", "3rd quarter", "4th quarter")
    return Division("place in the text", names, labels)


def places(
    divided: Sequence[Division],
    nats: Sequence[Floats],
    a: Floats,
    b: Floats,
    blocks: Blocks,
    *,
    widen: float,
    resamples: int,
    seed: int,
) -> Iterator[Place]:
    """The parts of a text that have bytes, each with the difference of two candidates.

    Args:
        divided: the text.
        nats: (B,) nats of each byte, of each ranked candidate.
        a, b: those of the two candidates.
        blocks: of the bootstrap.
        widen: of the intervals; see `lm.comparison.bootstrap.widening`.
        resamples, seed: of the bootstrap.
    """
    block_of, count, difference = blocks.of_bytes, len(blocks.starts), b - a
    columns: list[Floats] = []
    for division in divided:
        parts = len(division.parts) + 1
        # NONE is the last column, which is dropped.
        cells = block_of * parts + division.labels % parts
        for weights in (difference, None):
            table = np.bincount(cells, weights, minlength=count * parts).reshape(count, parts)[:, :-1]
            columns.append(table.astype(np.float64))
    sums = resampled_sums(np.concatenate(columns, axis=1), resamples=resamples, seed=seed)
    start = 0
    for division, gained, sizes in zip(divided, columns[::2], columns[1::2], strict=True):
        parts = len(division.parts)
        drawn, drawn_sizes = sums[:, start : start + parts], sums[:, start + parts : start + 2 * parts]
        start += 2 * parts
        for part, name in enumerate(division.parts):
            size = int(sizes[:, part].sum())
            if not size:
                continue
            estimate = bits(gained[:, part].sum(), size)
            spans = None
            if np.count_nonzero(sizes[:, part]) >= MIN_BLOCKS:
                has = drawn_sizes[:, part] > 0
                spans = interval(estimate, drawn[has, part] / np.log(2) / drawn_sizes[has, part], widen)
            inside = division.labels == part
            yield Place(
                group=division.name,
                name=name,
                bytes=size,
                bits_per_byte=tuple(bits(float(each[inside].sum()), size) for each in nats),
                difference=estimate,
                low=spans.low if spans else None,
                high=spans.high if spans else None,
            )
