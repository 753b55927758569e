"""A text split into whole units: documents, lines, or the parts between blank lines.

Which split a unit goes to depends on a hash of its text alone. So equal units are always in one split, the split is the
same each time, and it does not depend on the order of the text. Within a split the units keep their order.
"""

from __future__ import annotations

import functools
import hashlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from lm.corpora.corpus import (
    SPLIT_NAMES,
    Corpus,
    Progress,
    Split,
    SplitAt,
    SplitBy,
    boundaries,
    fraction_note,
    positioned,
    silent,
    size_note,
)
from lm.corpora.text import Text, lines_of, regroup
from lm.errors import CorpusError
from lm.tokenizers.turns import Conversation

_NAMES = {"document": "documents", "line": "lines", "blank-line": "parts between blank lines"}
_CONVERSATIONS = "conversations"


def split_text(
    name: str, source: str, text: Text, fractions: Sequence[float], *, at: SplitAt = "word", **facts: Any
) -> Corpus:
    """A text split by position or by whole units, as `at` says; arguments and errors as `split_by_units`."""
    if text.conversations is not None:
        if at not in ("word", "document"):
            raise CorpusError(f"{text.where} holds conversations, which are split whole: leave {at!r} out.")
        return split_by_units(name, source, text, fractions, "document", **facts)
    if at == "word" or at == "character":
        return positioned(name, source, text, fractions, at=at, **facts)
    return split_by_units(name, source, text, fractions, at, **facts)


def split_by_units(
    name: str,
    source: str,
    text: Text,
    fractions: Sequence[float],
    by: SplitBy,
    *,
    files: int | None = None,
    notes: Sequence[str] = (),
    progress: Progress = silent,
) -> Corpus:
    """A text split into train, valid and test by whole units; reads the text once to hash them.

    Args:
        name: of the corpus.
        source: opens it again.
        text: the whole text.
        fractions: of each split, in characters; units are whole, so the splits have about these.
        by: the unit.
        files: number of files of the text; None if it is not in files.
        notes: facts about the source.
        progress: called with characters.

    Raises:
        CorpusError: the text cannot be read, or has too few different units.
    """
    units = _NAMES[by] if text.conversations is None else _CONVERSATIONS
    hashes, lengths, size = array("Q"), array("q"), 0
    for unit in units_of(text, by):
        hashes.append(_hash(unit))
        lengths.append(len(unit))
        size += len(unit)
        progress("reading", min(size, text.size_bytes) if text.size_bytes else size, text.size_bytes)
    order = np.argsort(np.frombuffer(hashes, np.uint64), kind="stable")
    ordered, sizes = np.frombuffer(hashes, np.uint64)[order], np.frombuffer(lengths, np.int64)[order]
    middles = np.cumsum(sizes) - sizes // 2
    # In order of their hashes, units belong to the split that their middle falls into; equal ones stay together.
    places = [0, *np.searchsorted(middles, boundaries(size, fractions)).tolist()]
    places = [int(np.searchsorted(ordered, ordered[place])) if place < len(ordered) else place for place in places]
    splits: dict[str, Split] = {}
    for split, begin, end, fraction in zip(SPLIT_NAMES, places, places[1:], fractions, strict=False):
        if begin == end:
            raise CorpusError(
                f"{text.where} has {len(np.unique(ordered)):,} different {units}, and none would be left for "
                f"{split}. Give a longer text, or split it by smaller units."
            )
        # The last hash of the split, because the one after it may not exist.
        ends = int(ordered[begin]), int(ordered[end - 1])
        chunks = functools.partial(_chunks, text, by, *ends)
        conversations = functools.partial(_conversations, text, *ends) if text.conversations else None
        splits[split] = Split(split, chunks, int(text.size_bytes * fraction), conversations=conversations)
    how = f"{fraction_note(fractions)} of {len(hashes):,} {units}".replace("by position", "by whole units")
    return Corpus(name, source, splits, (*notes, size_note(files, size), how))


def units_of(text: Text, by: SplitBy) -> Iterator[str]:
    """The units of a text in order; joined they are the text, with a newline after each document."""
    if by == "document":
        return text.documents()
    lines = lines_of(text.chunks())
    return _with_blank_lines(lines) if by == "line" else _parts(lines)


def _with_blank_lines(lines: Iterable[str]) -> Iterator[str]:
    """Each line with the blank lines after it; those at the start belong to the first line."""
    held, has_text = "", False
    for line in lines:
        if has_text and not line.isspace():
            yield held
            held, has_text = "", False
        held += line
        has_text = has_text or not line.isspace()
    if held:
        yield held


def _parts(lines: Iterable[str]) -> Iterator[str]:
    """Each run of lines with the blank lines after it; those at the start belong to the first run."""
    held: list[str] = []
    has_text = after_blank = False
    for line in lines:
        blank = line.isspace()
        if after_blank and has_text and not blank:
            yield "".join(held)
            held, has_text = [], False
        held.append(line)
        has_text, after_blank = has_text or not blank, blank
    if held:
        yield "".join(held)


def _chunks(text: Text, by: SplitBy, first: int, last: int) -> Iterator[str]:
    return regroup(unit for unit in units_of(text, by) if first <= _hash(unit) <= last)


def _conversations(text: Text, first: int, last: int) -> Iterator[Conversation]:
    assert text.conversations is not None
    return (each for each in text.conversations() if first <= _hash(each.text) <= last)


def _hash(unit: str) -> int:
    """64 bits of a unit without the white space at its ends."""
    return int.from_bytes(hashlib.blake2b(unit.strip().encode("utf-8"), digest_size=8).digest(), "little")
