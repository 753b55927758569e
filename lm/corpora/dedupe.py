"""Held-out splits without the lines that are copies from the training split.

A line of validation or test is left out if at least half of it stands in the training text, in runs of 50 or more
characters; a run may begin and end in other lines, so repeated verse and code with short lines are found too. The
training split is unchanged.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from lm.corpora.corpus import Corpus, Progress, Split, silent
from lm.corpora.leaks import WINDOW_CHARACTERS, says_something
from lm.corpora.text import MemoryText, lines_of
from lm.corpora.windows import WindowFinder, code_points
from lm.errors import CorpusError

PIECE = 1 << 22
"""Characters that are searched at once; the training text is read once for each piece."""
MIN_COPIED = 0.5
"""Share of a line that makes it a copy."""


def dedupe(corpus: Corpus, progress: Progress = silent) -> Corpus:
    """A corpus whose validation and test splits have no copied lines; these splits are then in memory.

    Args:
        corpus: with splits of text.
        progress: called with characters, in the stage "comparing the splits".

    Raises:
        CorpusError: nothing would be left of a split.
    """
    splits, notes = dict(corpus.splits), []
    for name, split in corpus.splits.items():
        if name == "train":
            continue
        kept: list[str] = []
        lines = 0
        for piece in _pieces(split.chunks()):
            copied = _copied(piece, corpus.splits["train"], progress)
            position = 0
            for line in lines_of([piece]):
                share = np.count_nonzero(copied[position : position + len(line)]) / len(line)
                position += len(line)
                lines += 1
                if share < MIN_COPIED:
                    kept.append(line)
        text = "".join(kept)
        if not text or text.isspace():
            raise CorpusError(
                f"{corpus.name}: every line of {name} stands in the training text, so nothing is left without copies. "
                "Give another text for it, or split the text with --split-by line."
            )
        whole = MemoryText(f"{corpus.source} ({name})", text)
        splits[name] = Split(name, whole.chunks, whole.size_bytes, whole.blocks)
        notes.append(f"{lines - len(kept):,} of {lines:,} lines of {name} left out as copies")
    return replace(corpus, splits=splits, notes=(*corpus.notes, *notes))


def _copied(text: str, train: Split, progress: Progress) -> npt.NDArray[np.bool_]:
    """(N,) which characters stand in runs of at least WINDOW_CHARACTERS of the training text."""
    codes = code_points(text)
    copied = np.zeros(len(codes), np.bool_)
    if len(codes) < WINDOW_CHARACTERS:
        return copied
    windows = np.lib.stride_tricks.sliding_window_view(codes, WINDOW_CHARACTERS)
    finder, done = WindowFinder(windows), 0
    for chunk in train.chunks():
        finder.read(code_points(chunk))
        done += len(chunk)
        progress("comparing the splits", min(done, train.size_bytes or done), train.size_bytes)
    found = np.flatnonzero(finder.result())
    found = found[says_something(windows[found])]
    changes = np.zeros(len(codes) + 1, np.int64)
    np.add.at(changes, found, 1)
    np.add.at(changes, found + WINDOW_CHARACTERS, -1)
    result: npt.NDArray[np.bool_] = np.cumsum(changes)[:-1] > 0
    return result


def _pieces(chunks: Iterable[str]) -> Iterator[str]:
    """The text in pieces of about PIECE characters, cut between lines."""
    held, size = list[str](), 0
    for line in lines_of(chunks):
        held.append(line)
        size += len(line)
        if size >= PIECE:
            yield "".join(held)
            held, size = [], 0
    if held:
        yield "".join(held)
