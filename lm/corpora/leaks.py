"""Leaks: how much of the validation and test splits also stands in the training split.

The share is of windows of 50 characters, one after another, that stand word for word anywhere in the training text. A
held-out split that repeats the training text flatters every figure. Windows of rules and blanks say nothing and are
left out. The result is stored as leaks.json with the prepared tokens.

Near duplicates are found in letters and digits alone, in lower case, so that other line breaks, punctuation and case do
not hide a copy. A piece of 160 of them is a near duplicate if at least half of its eight windows of 20 stand in the
training text. So a few changed words do not hide a copy either. Unlike MinHash (Broder 1997) this needs no units that
begin at the same place in both texts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lm.corpora.corpus import Progress, Split, logger, silent
from lm.corpora.windows import Symbols, WindowFinder, code_points
from lm.errors import RunError
from lm.files import write_file

LEAKS_VERSION = 2
LEAKS = "leaks.json"
WINDOW_CHARACTERS = 50
MAX_WINDOWS = 100_000
"""Of a split; of a longer one, this many windows are spread evenly."""
MIN_DISTINCT, MAX_EQUAL = 4, 0.5
"""Different symbols, and share of the most frequent one, of a window; others are rules, blanks and padding."""
MAX_SHARE = 0.01
"""Share of a split that may stand in the training text without a warning, as common phrases do."""
LEAST_SHARE = 0.0005
"""Share that a note mentions: with one decimal, less is 0.0 %."""
MIN_FOUND = 3
"""Windows that are needed for a warning: one or two in a short split are chance."""
EXAMPLES = 3
NEAR_CHARACTERS, NEAR_WINDOWS = 20, 8
"""Letters and digits of a window of a near duplicate, and windows of a piece."""
MIN_NEAR = 0.5
"""Share of the windows of a piece that makes it a near duplicate."""
_UNICODE = 0x110000
WAYS_OUT = (
    "--dedupe leaves such lines out of the held-out splits; --split-by document, line or blank-line keeps equal parts "
    "in one split."
)
NEAR_WAYS_OUT = (
    "--split-by document or blank-line keeps whole parts together, if they are equal; else give another text for it."
)


@dataclass(frozen=True)
class Leak:
    """How much of a held-out split stands in the training split."""

    windows: int
    """Windows that were searched."""
    found: int
    """How many of them stand in the training split."""
    examples: tuple[str, ...] = ()
    """Some of those, from all parts of the split."""
    pieces: int = 0
    """Pieces that were searched for near duplicates."""
    near: int = 0
    """How many of them are near duplicates, exact copies included."""
    near_examples: tuple[str, ...] = ()
    """The starts of some of those."""

    @property
    def share(self) -> float:
        """found / windows; 0 without windows."""
        return self.found / self.windows if self.windows else 0.0

    @property
    def near_share(self) -> float:
        """near / pieces; 0 without pieces."""
        return self.near / self.pieces if self.pieces else 0.0


def cut_windows(symbols: Symbols, size: int) -> Symbols:
    """(M, size) windows of a text, one after another, at most MAX_WINDOWS; the rest at the end is left out."""
    count = len(symbols) // size
    rows = symbols[: count * size].reshape(count, size)
    return rows if count <= MAX_WINDOWS else rows[np.linspace(0, count - 1, MAX_WINDOWS).astype(np.int64)]


def says_something(windows: Symbols) -> npt.NDArray[np.bool_]:
    """(M,) whether a window is more than a rule, blanks or padding; those stand in many texts by chance."""
    if not len(windows):
        return np.zeros(0, np.bool_)
    ordered = np.sort(windows, axis=1)
    changes = ordered[:, 1:] != ordered[:, :-1]
    # More than this many equal symbols: in order, two symbols that far apart are equal.
    reach = int(MAX_EQUAL * windows.shape[1])
    uniform = (ordered[:, reach:] == ordered[:, : ordered.shape[1] - reach]).any(axis=1)
    informative: npt.NDArray[np.bool_] = (changes.sum(axis=1) + 1 >= MIN_DISTINCT) & ~uniform
    return informative


def find_leaks(splits: Mapping[str, Split], progress: Progress = silent) -> dict[str, Leak]:
    """The leak of each split except train, by exact search; reads each text once.

    Args:
        splits: of a corpus, with train.
        progress: called with bytes, in the stage "comparing the splits".
    """
    folded = _Folded()
    texts = {
        name: np.concatenate([np.empty(0, np.uint32), *map(code_points, split.chunks())])
        for name, split in splits.items()
        if name != "train"
    }
    held_out = {name: _windows_of(codes) for name, codes in texts.items()}
    pieces = {name: _Pieces.of(codes, folded) for name, codes in texts.items()}
    finder = WindowFinder(np.concatenate([*held_out.values(), np.empty((0, WINDOW_CHARACTERS), np.uint32)]))
    near_finder = WindowFinder(
        np.concatenate([*(each.windows for each in pieces.values()), np.empty((0, NEAR_CHARACTERS), np.uint32)])
    )
    train = splits["train"]
    done = 0
    for chunk in train.chunks():
        codes = code_points(chunk)
        finder.read(codes)
        symbols = folded(codes)
        near_finder.read(symbols[symbols > 0])
        done += len(chunk)
        progress("comparing the splits", min(done, train.size_bytes or done), train.size_bytes)
    stands, near, leaks = finder.result(), near_finder.result(), {}
    for name, windows in held_out.items():
        mine, stands = stands[: len(windows)], stands[len(windows) :]
        own = pieces[name]
        found, near = near[: len(own.windows)], near[len(own.windows) :]
        copied = own.near_duplicates(found)
        leaks[name] = Leak(
            len(windows), int(mine.sum()), _examples(windows[mine]), len(own.starts), len(copied),
            _examples(own.original(copied, texts[name])),
        )  # fmt: skip
    return leaks


def _windows_of(codes: Symbols) -> Symbols:
    windows = cut_windows(codes, WINDOW_CHARACTERS)
    return windows[says_something(windows)]


def _examples(windows: Symbols) -> tuple[str, ...]:
    chosen = np.unique(np.linspace(0, max(len(windows) - 1, 0), EXAMPLES).astype(np.int64))
    texts = (
        windows[number].astype("<u4").tobytes().decode("utf-32-le", "replace") for number in chosen[: len(windows)]
    )
    return tuple(dict.fromkeys(texts))


class _Folded:
    """Maps code points to lower case, and all but letters and digits to 0."""

    def __init__(self) -> None:
        self._known = np.zeros(_UNICODE, np.bool_)
        self._folded = np.zeros(_UNICODE, np.uint32)

    def __call__(self, codes: Symbols) -> Symbols:
        for code in np.unique(codes[~self._known[codes]]).tolist():
            letter = chr(code)
            self._folded[code] = ord(letter.lower()[0]) if letter.isalnum() else 0
            self._known[code] = True
        return self._folded[codes]


@dataclass(frozen=True, eq=False)
class _Pieces:
    """The pieces of a held-out text in which near duplicates are searched."""

    starts: npt.NDArray[np.int64]
    """(P,) the code point at which each begins in the text."""
    windows: Symbols
    """(P * NEAR_WINDOWS, NEAR_CHARACTERS) letters and digits."""

    @classmethod
    def of(cls, codes: Symbols, folded: _Folded) -> _Pieces:
        """The pieces of a text that say something, at most MAX_WINDOWS / NEAR_WINDOWS."""
        symbols = folded(codes)
        places = np.flatnonzero(symbols)
        size = NEAR_CHARACTERS * NEAR_WINDOWS
        count = len(places) // size
        numbers = np.unique(np.linspace(0, count - 1, min(count, MAX_WINDOWS // NEAR_WINDOWS)).astype(np.int64))
        rows = symbols[places[: count * size]].reshape(count, size)[numbers]
        informative = (
            says_something(rows.reshape(-1, NEAR_CHARACTERS)).reshape(-1, NEAR_WINDOWS).mean(axis=1) >= MIN_NEAR
        )
        return cls(places[numbers[informative] * size], rows[informative].reshape(-1, NEAR_CHARACTERS))

    def near_duplicates(self, found: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
        """The numbers of the pieces with enough windows that are found."""
        counted = (found & says_something(self.windows)).reshape(-1, NEAR_WINDOWS)
        return np.flatnonzero(counted.mean(axis=1) >= MIN_NEAR) if len(counted) else np.zeros(0, np.int64)

    def original(self, numbers: npt.NDArray[np.int64], codes: Symbols) -> Symbols:
        """(M, WINDOW_CHARACTERS) the start of each of these pieces, as in the text."""
        texts: Symbols = codes[self.starts[numbers][:, None] + np.arange(WINDOW_CHARACTERS)]
        return texts


# -- stored with the prepared corpus -----------------------------------------------------------------------


def stored_leaks(
    folder: Path, splits: Mapping[str, Split], progress: Progress = silent
) -> tuple[dict[str, Leak], bool]:
    """The leaks of a folder of tokens, read from it, or found and stored there; and whether they are new.

    Args:
        folder: of the tokens.
        splits: the same texts.
        progress: as for `find_leaks`.
    """
    found = read_leaks(folder)
    if found is not None:
        return found, False
    found = find_leaks(splits, progress)
    content = {"version": LEAKS_VERSION, "splits": {name: asdict(leak) for name, leak in found.items()}}
    # A cache that cannot be written costs time, not the training.
    with suppress(RunError):
        write_file(folder / LEAKS, json.dumps(content, indent=1) + "\n")
    return found, True


def read_leaks(folder: Path) -> dict[str, Leak] | None:
    """The stored leaks; None if there are none, or they are damaged."""
    try:
        content: Any = json.loads((folder / LEAKS).read_text("utf-8"))
        if content["version"] != LEAKS_VERSION:
            return None
        return {
            str(name): Leak(
                int(leak["windows"]),
                int(leak["found"]),
                tuple(map(str, leak["examples"])),
                int(leak["pieces"]),
                int(leak["near"]),
                tuple(map(str, leak["near_examples"])),
            )
            for name, leak in content["splits"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def joined_leaks(parts: Sequence[Mapping[str, Leak]]) -> dict[str, Leak]:
    """The leaks of several shards together, each found within its shard."""
    names = dict.fromkeys(name for part in parts for name in part)
    joined = {}
    for name in names:
        mine = [part[name] for part in parts if name in part]
        examples, near_examples = (
            tuple(example for leak in mine for example in getattr(leak, kind))[:EXAMPLES]
            for kind in ("examples", "near_examples")
        )
        windows, found, pieces, near = (
            sum(getattr(leak, kind) for leak in mine) for kind in ("windows", "found", "pieces", "near")
        )
        joined[name] = Leak(windows, found, examples, pieces, near, near_examples)
    return joined


# -- in plain words ------------------------------------------------------------------------------------------


def leak_notes(leaks: Mapping[str, Leak]) -> Iterator[str]:
    """A note for the run's record: the share of each split, from LEAST_SHARE on."""
    shares = ", ".join(f"{leak.share:.1%} of {name}" for name, leak in leaks.items() if leak.share >= LEAST_SHARE)
    if shares:
        yield f"in train too: {shares}, in windows of {WINDOW_CHARACTERS} characters"
    near = ", ".join(f"{leak.near_share:.1%} of {name}" for name, leak in leaks.items() if leak.near)
    if near:
        yield f"in train with small changes: {near}"


def is_leak(share: float, windows: int) -> bool:
    """Whether a share of so many windows is worth a warning."""
    return share > MAX_SHARE and round(share * windows) >= MIN_FOUND


def warn_of_leaks(corpus: str, leaks: Mapping[str, Leak], ways_out: str = WAYS_OUT) -> None:
    """Log a warning, with examples, for each split of which more than MAX_SHARE stands in the training text.

    Near duplicates are named where the exact copies are no reason for a warning.

    Args:
        corpus: its name.
        leaks: by split.
        ways_out: one sentence.
    """
    for name, leak in leaks.items():
        if is_leak(leak.share, leak.windows):
            logger.warning(
                "%s: %.1f %% of %s also stands in the training text, so its figures are too good. Examples: %s. %s",
                corpus, 100 * leak.share, name, ", ".join(map(repr, leak.examples)), ways_out,
            )  # fmt: skip
        elif is_leak(leak.near_share, leak.pieces):
            logger.warning(
                "%s: %.1f %% of %s stands in the training text with small changes (words, case, punctuation, line "
                "breaks), so its figures may be too good. Examples: %s. %s",
                corpus, 100 * leak.near_share, name, ", ".join(map(repr, leak.near_examples)), NEAR_WAYS_OUT,
            )  # fmt: skip
