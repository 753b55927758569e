"""A corpus: a name, and for each split its text in chunks; splits by position."""

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
from lm.tokenizers.turns import Conversation

logger = logging.getLogger("lm.corpora")

Progress = Callable[[str, int, int], None]
"""Called as (stage, bytes done, bytes in all); in all is 0 if unknown."""

SPLIT_NAMES = ("train", "valid", "test")
SPLIT_ALIASES = {
    "train": "train", "training": "train", "valid": "valid", "validation": "valid", "val": "valid", "dev": "valid",
    "test": "test",
}  # fmt: skip
"""Names of splits in folders and hub data sets → our names."""
DEFAULT_FRACTIONS = (0.9, 0.05, 0.05)
SplitBy = Literal["document", "line", "blank-line"]
SplitAt = Literal["word", "character"] | SplitBy
"""Where a text without splits is cut: by position, at a word or exactly; or by whole units."""
MAX_WORD_SHIFT = 1000
"""Characters by which a cut may move forward to white space."""
_LINE_END_OR_SPACE = re.compile(r"\r\n|\s")


@dataclass(frozen=True)
class Split:
    """The text of one split; it can be read many times."""

    name: str
    """train, valid or test."""
    chunks: Callable[[], Iterator[str]]
    """Reads from the start; gives chunks as `Text.chunks` does."""
    size_bytes: int = 0
    """About the size, for progress; 0 if unknown before reading."""
    blocks: Callable[[], Iterator[bytes]] | None = None
    """The same text as UTF-8 bytes, cut between characters, if it is stored so; faster to hash and count."""
    conversations: Callable[[], Iterator[Conversation]] | None = None
    """Reads its conversations, if it is instruction data; `chunks` then gives their plain turns."""


@dataclass(frozen=True)
class Corpus:
    """Text with its splits, opened but not read."""

    name: str
    """Short, for the run's name: the file's stem, the folder's name."""
    source: str
    """Opens the same corpus again: a name, or an absolute path."""
    splits: Mapping[str, Split]
    """In the order train, valid, test; test may be absent."""
    notes: tuple[str, ...] = ()
    """Facts about the text, for the run's record."""
    tokens: Path | None = None
    """Folder of its shards, if it was prepared in shards; its text is then decoded from their tokens."""


def check_positional(source: str, at: SplitAt) -> None:
    """Refuse units for a text that has splits.

    Raises:
        CorpusError: `at` is a unit.
    """
    if at not in ("word", "character"):
        raise CorpusError(f"{source} has its own splits: leave --split-by {at} out.")


def silent(stage: str, done: int, total: int) -> None:
    """A `Progress` that does nothing."""


def whole(name: str, text: Text) -> Split:
    """A split that is all of `text`."""
    blocks = None if text.conversations else text.blocks
    return Split(name, text.chunks, text.size_bytes, blocks, text.conversations)


def boundaries(characters: int, fractions: Sequence[float]) -> list[int]:
    """The end of each split: floor(`characters` times the cumulative fraction); the last split ends at the end.

    Fractions are exact decimals: 0.9 of 10 is 9, although the float 0.9 is not exact.
    """
    ends = [int(characters * share) for share in accumulate(Fraction(repr(float(part))) for part in fractions)]
    return [*ends[:-1], characters]


def positioned(
    name: str,
    source: str,
    text: Text,
    fractions: Sequence[float],
    *,
    at: Literal["word", "character"] = "word",
    files: int | None = None,
    notes: Sequence[str] = (),
    progress: Progress = silent,
) -> Corpus:
    """A text split into train, valid and test by position; reads the text once to count its characters.

    Args:
        name: of the corpus.
        source: opens it again.
        text: the whole text.
        fractions: of each split.
        at: "word": a cut moves forward to the start of a word.
        files: number of files of the text; None if it is not in files.
        notes: facts about the source; facts about the text are added.
        progress: called with the bytes read.

    Raises:
        CorpusError: the text cannot be read, or is too short for every split to have a character.
    """
    starts, size = [0], 0
    for chunk in text.chunks():
        starts.append(starts[-1] + len(chunk))
        # If the size in bytes is unknown, progress counts characters.
        size = min(text.size_bytes, size + len(chunk)) if text.size_bytes else size + len(chunk)
        progress("reading", size, text.size_bytes)
    total, splits, start = starts[-1], {}, _Cut(0)
    ends = boundaries(total, fractions)
    for split, end, limit in zip(SPLIT_NAMES, ends, [*ends[1:], None], strict=False):
        if end <= start.position:
            raise CorpusError(
                f"{text.where} is too short to split: of {total:,} characters none would be left for {split}. "
                "Give a longer text, or a folder with train, valid and test files."
            )
        stop = _Cut(end, limit if at == "word" else None)
        splits[split] = Split(
            split,
            functools.partial(_between, text, starts, start, stop),
            text.size_bytes * (end - start.position) // total,
            functools.partial(_bytes_between, text, starts, start, stop),
        )
        start = stop
    return Corpus(name, source, splits, (*notes, size_note(files, total), fraction_note(fractions)))


@dataclass(frozen=True)
class _Cut:
    """The boundary between two splits."""

    position: int
    """In characters."""
    limit: int | None = None
    """The end of the next split: the cut moves forward to the start of a word before it; None: it does not move."""

    def is_in(self, start: int, end: int) -> bool:
        """Whether the character before the cut is in start..end; then that chunk alone determines the cut."""
        return start < self.position <= end

    def within(self, chunk: str, start: int) -> int:
        """The position of the cut, from the chunk that begins at `start`.

        Chunks end after white space. If none follows in the chunk, none is near, or the text ends.
        """
        if self.limit is None:
            return self.position
        # From the character before the cut: after white space, the cut is already at the start of a word.
        begin = self.position - 1 - start
        found = _LINE_END_OR_SPACE.search(chunk, begin)
        moved = start + found.end() if found and found.start() <= begin + MAX_WORD_SHIFT else self.position
        # The cut does not move if that would leave the next split empty.
        return moved if moved < self.limit else self.position


def _between(text: Text, starts: list[int], start: _Cut, stop: _Cut) -> Iterator[str]:
    """The characters between two cuts of the text whose chunks begin at `starts`."""
    first = _chunk_of(start, starts)
    for chunk, position in zip(text.chunks(first), starts[first:-1], strict=False):
        if position >= stop.position:
            return
        if part := _part(chunk, position, start, stop):
            yield part


def _bytes_between(text: Text, starts: list[int], start: _Cut, stop: _Cut) -> Iterator[bytes]:
    """The same as UTF-8; only blocks that hold a cut are decoded."""
    first = _chunk_of(start, starts)
    for block, position, end in zip(text.blocks(first), starts[first:-1], starts[first + 1 :], strict=False):
        if position >= stop.position:
            return
        if not (start.is_in(position, end) or stop.is_in(position, end)):
            yield block
        elif part := _part(block.decode("utf-8"), position, start, stop):
            yield part.encode("utf-8")


def _chunk_of(cut: _Cut, starts: list[int]) -> int:
    """The index of the chunk that determines a cut."""
    return bisect.bisect_right(starts, max(0, cut.position - 1)) - 1


def _part(chunk: str, position: int, start: _Cut, stop: _Cut) -> str:
    """The part of the chunk at `position` between two cuts."""
    end = position + len(chunk)
    begin = start.within(chunk, position) if start.is_in(position, end) else start.position
    until = stop.within(chunk, position) if stop.is_in(position, end) else stop.position
    return chunk[max(0, begin - position) : max(0, until - position)]


def size_note(files: int | None, characters: int | None = None) -> str:
    """A note on the size of a text, such as "3 files, 1,200 characters"."""
    parts = [] if files is None else [f"{files:,} file{'' if files == 1 else 's'}"]
    return ", ".join([*parts, *([] if characters is None else [f"{characters:,} characters"])])


def fraction_note(fractions: Sequence[float]) -> str:
    """A note on a split by position."""
    return f"split by position {','.join(f'{part:g}' for part in fractions)}"
