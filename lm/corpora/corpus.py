"""What a corpus is: a name, and for each split its text in chunks."""

from __future__ import annotations

import bisect
import functools
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from pathlib import Path
from typing import Literal

from lm.corpora.text import Text
from lm.errors import CorpusError

logger = logging.getLogger("lm.corpora")

Progress = Callable[[str, int, int], None]
"""Called as (stage, bytes done, bytes in all); in all is 0 where it is not known."""

SPLIT_NAMES = ("train", "valid", "test")
DEFAULT_FRACTIONS = (0.9, 0.05, 0.05)
SplitAt = Literal["word", "character"]
WORD_REACH = 1000
"""How many characters a cut by position looks forward for white space."""
_LINE_END_OR_SPACE = re.compile(r"\r\n|\s")


@dataclass(frozen=True)
class Split:
    """The text of one split, read as often as it is asked for."""

    name: str
    """train, valid or test."""
    chunks: Callable[[], Iterator[str]]
    """Starts reading anew; gives chunks as `Text.chunks` does."""
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
    return Split(name, text.chunks, text.size_bytes, text.blocks)


def boundaries(characters: int, fractions: Sequence[float]) -> list[int]:
    """Where each split ends: the whole part of `characters` times the cumulative fraction; the last at the end.

    Fractions are taken as the decimals they were written as: 0.9 of 10 is 9, however 0.9 is stored.
    """
    ends = [int(characters * share) for share in accumulate(Fraction(repr(float(part))) for part in fractions)]
    return [*ends[:-1], characters]


def positioned(
    name: str,
    source: str,
    text: Text,
    fractions: Sequence[float],
    *,
    at: SplitAt = "word",
    files: int | None = None,
    notes: Sequence[str] = (),
    progress: Progress = silent,
) -> Corpus:
    """A text as a corpus, cut into train, valid and test by position in characters; reads it once to count them.

    Args:
        name: of the corpus.
        source: what opens it again.
        text: all of it.
        fractions: of each split.
        at: whether a cut moves forward to the start of a word.
        files: how many files the text is in, where it is in files.
        notes: facts of the source, before those of the text.
        progress: called with the bytes read.

    Raises:
        CorpusError: the text cannot be read, or is too short for every split to have a character.
    """
    starts, size = [0], 0
    for chunk in text.chunks():
        starts.append(starts[-1] + len(chunk))
        # Characters stand in for bytes where the size of what is read is not known.
        size = min(text.size_bytes, size + len(chunk)) if text.size_bytes else size + len(chunk)
        progress("reading", size, text.size_bytes)
    total, splits, start = starts[-1], {}, _Cut(0)
    ends = boundaries(total, fractions)
    for split, end, limit in zip(SPLIT_NAMES, ends, [*ends[1:], None], strict=False):
        if end <= start.place:
            raise CorpusError(
                f"{text.where} is too short to split: of {total:,} characters none would be left for {split}. "
                "Give a longer text, or a folder with train, valid and test files."
            )
        stop = _Cut(end, limit if at == "word" else None)
        splits[split] = Split(
            split,
            functools.partial(_between, text, starts, start, stop),
            text.size_bytes * (end - start.place) // total,
            functools.partial(_bytes_between, text, starts, start, stop),
        )
        start = stop
    return Corpus(name, source, splits, (*notes, size_note(files, total), fraction_note(fractions)))


@dataclass(frozen=True)
class _Cut:
    """Where one split ends and the next one starts."""

    place: int
    """In characters."""
    limit: int | None = None
    """The end of the next split, before which it moves forward to the start of a word; None: it stays."""

    def lies_in(self, start: int, end: int) -> bool:
        """Whether the character before the cut is one of start..end; then the cut is found in that chunk alone."""
        return start < self.place <= end

    def within(self, chunk: str, start: int) -> int:
        """The place of the cut, found in the chunk that begins at `start`.

        Chunks end behind white space: where none follows in the chunk, none is near, or the text ends.
        """
        if self.limit is None:
            return self.place
        # Beginning with the character before: behind white space the place is good already.
        begin = self.place - 1 - start
        found = _LINE_END_OR_SPACE.search(chunk, begin)
        moved = start + found.end() if found and found.start() <= begin + WORD_REACH else self.place
        # In a text so short that the next split would be empty, the cut stays.
        return moved if moved < self.limit else self.place


def _between(text: Text, starts: list[int], start: _Cut, stop: _Cut) -> Iterator[str]:
    """The characters between two cuts of the text whose chunks begin at `starts`."""
    first = _chunk_of(start, starts)
    for chunk, position in zip(text.chunks(first), starts[first:-1], strict=False):
        if position >= stop.place:
            return
        if part := _part(chunk, position, start, stop):
            yield part


def _bytes_between(text: Text, starts: list[int], start: _Cut, stop: _Cut) -> Iterator[bytes]:
    """The same as UTF-8; only blocks that hold a cut are decoded."""
    first = _chunk_of(start, starts)
    for block, position, end in zip(text.blocks(first), starts[first:-1], starts[first + 1 :], strict=False):
        if position >= stop.place:
            return
        if not (start.lies_in(position, end) or stop.lies_in(position, end)):
            yield block
        elif part := _part(block.decode("utf-8"), position, start, stop):
            yield part.encode("utf-8")


def _chunk_of(cut: _Cut, starts: list[int]) -> int:
    """The number of the chunk that a cut is found in."""
    return bisect.bisect_right(starts, max(0, cut.place - 1)) - 1


def _part(chunk: str, position: int, start: _Cut, stop: _Cut) -> str:
    """What lies between two cuts of the chunk that begins at `position`."""
    end = position + len(chunk)
    begin = start.within(chunk, position) if start.lies_in(position, end) else start.place
    until = stop.within(chunk, position) if stop.lies_in(position, end) else stop.place
    return chunk[max(0, begin - position) : max(0, until - position)]


def size_note(files: int | None, characters: int | None = None) -> str:
    """The fact to record about the size of a text: "3 files, 1,200 characters"."""
    parts = [] if files is None else [f"{files:,} file{'' if files == 1 else 's'}"]
    return ", ".join([*parts, *([] if characters is None else [f"{characters:,} characters"])])


def fraction_note(fractions: Sequence[float]) -> str:
    """The fact to record about a split by position."""
    return f"split by position {','.join(f'{part:g}' for part in fractions)}"
