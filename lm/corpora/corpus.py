"""What a corpus is: a name, and for each split its text in chunks."""

from __future__ import annotations

import bisect
import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from pathlib import Path

from lm.corpora.text import FileText, Text
from lm.errors import CorpusError

logger = logging.getLogger("lm.corpora")

Progress = Callable[[str, int, int], None]
"""Called as (stage, bytes done, bytes in all); in all is 0 where it is not known."""

SPLIT_NAMES = ("train", "valid", "test")
DEFAULT_FRACTIONS = (0.9, 0.05, 0.05)


@dataclass(frozen=True)
class Split:
    """The text of one split, read as often as it is asked for."""

    name: str
    """train, valid or test."""
    chunks: Callable[[], Iterator[str]]
    """Starts reading anew; at most half a million characters a chunk, cut after a newline wherever there is one."""
    size_bytes: int = 0
    """About how long it is, for progress; 0 where that is not known before reading."""
    blocks: Callable[[], Iterator[bytes]] | None = None
    """The same text as UTF-8 bytes, cut between characters, where it lies there as such: faster to hash and count."""


@dataclass(frozen=True)
class Corpus:
    """Text with its splits, opened but not yet read into memory."""

    name: str
    """Short, for naming a run: the file's stem, the folder's name."""
    source: str
    """What opens the same corpus again: a name, or an absolute path."""
    splits: Mapping[str, Split]
    """In the order train, valid, test; test may be absent."""
    notes: tuple[str, ...] = ()
    """Facts about the text that a run records."""
    tokens: Path | None = None
    """Where its tokens lie, if it was prepared in shards; its text is then what they spell."""


def silent(stage: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


def whole(name: str, text: Text) -> Split:
    """A split that is all of `text`."""
    return Split(name, text.chunks, text.size_bytes, text.blocks if isinstance(text, FileText) else None)


def boundaries(characters: int, fractions: Sequence[float]) -> list[int]:
    """Where each split ends: the whole part of `characters` times the cumulative fraction; the last at the end.

    Fractions are taken as the decimals they were written as: 0.9 of 10 is 9, however 0.9 is stored.
    """
    ends = [int(characters * share) for share in accumulate(Fraction(repr(float(part))) for part in fractions)]
    return [*ends[:-1], characters]


def by_position(text: Text, fractions: Sequence[float], *, progress: Progress = silent) -> dict[str, Split]:
    """Cut a text into train, valid and test by position in characters; reads it once to count them.

    Raises:
        CorpusError: the text cannot be read, or is too short for every split to have a character.
    """
    starts, size = [0], 0
    for chunk in text.chunks():
        starts.append(starts[-1] + len(chunk))
        # Characters stand in for bytes where the size of what is read is not known.
        size = min(text.size_bytes, size + len(chunk)) if text.size_bytes else size + len(chunk)
        progress("reading", size, text.size_bytes)
    total = starts[-1]
    splits, start = {}, 0
    for name, end in zip(SPLIT_NAMES, boundaries(total, fractions), strict=False):
        if end <= start:
            raise CorpusError(
                f"{text.where} is too short to split: of {total:,} characters none would be left for {name}. "
                "Give a longer text, or a folder with train, valid and test files."
            )
        splits[name] = Split(
            name,
            functools.partial(_between, text, starts, start, end),
            text.size_bytes * (end - start) // total,
            functools.partial(_bytes_between, text, starts, start, end) if isinstance(text, FileText) else None,
        )
        start = end
    return splits


def _between(text: Text, starts: list[int], start: int, end: int) -> Iterator[str]:
    """Characters start..end of the text whose chunks begin at `starts`."""
    first = bisect.bisect_right(starts, start) - 1
    position = starts[first]
    for chunk in text.chunks(first):
        if position >= end:
            return
        yield chunk[max(0, start - position) : end - position]
        position += len(chunk)


def _bytes_between(text: FileText, starts: list[int], start: int, end: int) -> Iterator[bytes]:
    """The same as UTF-8; only blocks that hold a boundary are decoded."""
    first = bisect.bisect_right(starts, start) - 1
    for number, block in enumerate(text.blocks(first), first):
        if number + 1 >= len(starts) or starts[number] >= end:
            return
        if start <= starts[number] and starts[number + 1] <= end:
            yield block
        else:
            inside = block.decode("utf-8")[max(0, start - starts[number]) : end - starts[number]]
            yield inside.encode("utf-8")


def fraction_note(fractions: Sequence[float]) -> str:
    """The fact to record about a split by position."""
    return f"split by position {','.join(f'{part:g}' for part in fractions)}"
