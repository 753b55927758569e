"""Leaks: how much of the validation and test splits also stands in the training split.

The share is of windows of 50 characters, one after another, that stand word for word anywhere in the training text. A
held-out split that repeats the training text flatters every figure. Windows of rules and blanks say nothing and are
left out. The result is stored as leaks.json with the prepared tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
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

LEAKS_VERSION = 1
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
WAYS_OUT = (
    "--dedupe leaves such lines out of the held-out splits; --split-by document, line or blank-line keeps equal parts "
    "in one split."
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

    @property
    def share(self) -> float:
        """found / windows; 0 without windows."""
        return self.found / self.windows if self.windows else 0.0


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
    held_out = {name: _windows_of(split.chunks()) for name, split in splits.items() if name != "train"}
    finder = WindowFinder(np.concatenate([*held_out.values(), np.empty((0, WINDOW_CHARACTERS), np.uint32)]))
    train = splits["train"]
    done = 0
    for chunk in train.chunks():
        finder.read(code_points(chunk))
        done += len(chunk)
        progress("comparing the splits", min(done, train.size_bytes or done), train.size_bytes)
    stands, leaks = finder.result(), {}
    for name, windows in held_out.items():
        mine, stands = stands[: len(windows)], stands[len(windows) :]
        leaks[name] = Leak(len(windows), int(mine.sum()), _examples(windows[mine]))
    return leaks


def _windows_of(chunks: Iterable[str]) -> Symbols:
    windows = cut_windows(np.concatenate([np.empty(0, np.uint32), *map(code_points, chunks)]), WINDOW_CHARACTERS)
    return windows[says_something(windows)]


def _examples(windows: Symbols) -> tuple[str, ...]:
    chosen = np.unique(np.linspace(0, max(len(windows) - 1, 0), EXAMPLES).astype(np.int64))
    texts = (
        windows[number].astype("<u4").tobytes().decode("utf-32-le", "replace") for number in chosen[: len(windows)]
    )
    return tuple(dict.fromkeys(texts))


# -- stored with the prepared corpus -----------------------------------------------------------------------


def stored_leaks(folder: Path, splits: Mapping[str, Split], progress: Progress = silent) -> dict[str, Leak]:
    """The leaks of a folder of tokens: read from it, or found and stored there.

    Args:
        folder: of the tokens.
        splits: the same texts.
        progress: as for `find_leaks`.
    """
    found = read_leaks(folder)
    if found is None:
        found = find_leaks(splits, progress)
        content = {"version": LEAKS_VERSION, "splits": {name: asdict(leak) for name, leak in found.items()}}
        # A cache that cannot be written costs time, not the training.
        with suppress(RunError):
            write_file(folder / LEAKS, json.dumps(content, indent=1) + "\n")
    return found


def read_leaks(folder: Path) -> dict[str, Leak] | None:
    """The stored leaks; None if there are none, or they are damaged."""
    try:
        content: Any = json.loads((folder / LEAKS).read_text("utf-8"))
        if content["version"] != LEAKS_VERSION:
            return None
        return {
            str(name): Leak(int(leak["windows"]), int(leak["found"]), tuple(map(str, leak["examples"])))
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
        examples = tuple(example for leak in mine for example in leak.examples)[:EXAMPLES]
        joined[name] = Leak(sum(leak.windows for leak in mine), sum(leak.found for leak in mine), examples)
    return joined


# -- in plain words ------------------------------------------------------------------------------------------


def leak_notes(leaks: Mapping[str, Leak]) -> Iterator[str]:
    """A note for the run's record: the share of each split, from LEAST_SHARE on."""
    shares = ", ".join(f"{leak.share:.1%} of {name}" for name, leak in leaks.items() if leak.share >= LEAST_SHARE)
    if shares:
        yield f"in train too: {shares}, in windows of {WINDOW_CHARACTERS} characters"


def is_leak(share: float, windows: int) -> bool:
    """Whether a share of so many windows is worth a warning."""
    return share > MAX_SHARE and round(share * windows) >= MIN_FOUND


def warn_of_leaks(corpus: str, leaks: Mapping[str, Leak], ways_out: str = WAYS_OUT) -> None:
    """Log a warning, with examples, for each split of which more than MAX_SHARE stands in the training text.

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
