"""The n-gram floor: the loss of n-gram counts of the run's training text on the same tokens.

A model should reach a lower loss than its floor. The rule is the same for every run: interpolated modified Kneser-Ney
counts (`lm.models.kneser_ney`) over the run's own tokens, 7-grams for vocabularies of up to 1,000 tokens (bytes,
characters), 4-grams for larger ones (words, subwords). Floors are stored next to the prepared tokens.

A text that is part of the training text has no floor: the counts include it.
"""

from __future__ import annotations

import json
import math
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from lm.corpora import PreparedCorpus, TokenSplit
from lm.corpora.answers import ANSWER
from lm.corpora.batches import conversation_bounds
from lm.corpora.cache import cache_folder
from lm.corpora.leaks import WINDOW_CHARACTERS, cut_windows, says_something
from lm.corpora.windows import WindowFinder
from lm.errors import RunError
from lm.evaluation.report import MAX_OVERLAP, Floor
from lm.files import write_file
from lm.models.kneser_ney import count_text

FLOOR_VERSION = 1
SMALL_VOCABULARY = 1000
ORDERS = 7, 4
"""For vocabularies of at most SMALL_VOCABULARY tokens, and for larger ones."""
MAX_COUNTED = 8_000_000
"""Training tokens that are counted; limits time and memory."""
MAX_STORED = 200
"""Floors that are stored with a corpus."""
READ_AT_ONCE = 1 << 20
"""Training tokens that are searched at once."""
MIN_TOKENS = 8
"""Of a window of the overlap."""
MAX_UNKNOWN = 0.1
"""Share of unknown tokens of a window; others occur in many texts by chance."""


def floor_order(vocab_size: int) -> int:
    """The order of the n-grams for a vocabulary."""
    return ORDERS[0] if vocab_size <= SMALL_VOCABULARY else ORDERS[1]


def find_floor(corpus: PreparedCorpus, part: TokenSplit, *, most_tokens: int | None = None) -> Floor:
    """The floor of a text, from the training split of a corpus.

    Args:
        corpus: of the run's training.
        part: the text, in tokens of the same tokenizer.
        most_tokens: give no loss if more training tokens than these must be counted.
    """
    train = corpus.splits["train"]
    share = 1.0 if part.sha256 == train.sha256 else overlap(corpus, part)
    order, total = floor_order(corpus.tokenizer.vocab_size), len(train.ids) - 1
    if share > MAX_OVERLAP or (most_tokens is not None and total > most_tokens):
        return Floor(None, None, share)
    counted = "the training text" if total <= MAX_COUNTED else f"the first {MAX_COUNTED:,} tokens of the training text"
    path = cache_folder() / "tokens" / corpus.key / "floor.json"
    known = _read(path)
    key = f"{part.sha256} {len(part.ids)}"
    if key not in known:
        counts = count_text(train.ids[: MAX_COUNTED + 1], order=order, vocab_size=corpus.tokenizer.vocab_size)
        logs = counts.log_probabilities_of(part.ids)
        # Of conversations, the answers alone.
        known[key] = -float(np.mean(logs if part.marks is None else logs[np.asarray(part.marks[1:]) == ANSWER]))
        _store(path, known)
    return Floor(known[key], f"{order}-gram counts of {counted}, without a network", share)


def overlap(corpus: PreparedCorpus, part: TokenSplit) -> float:
    """The share of a text that is in the training split (its first MAX_COUNTED tokens).

    It is the share of `lm.corpora.leaks`, in tokens: of windows of about 50 characters that stand in the training
    text. Windows with many unknown tokens are left out too. A text of less than half a window gives 0. Of
    conversations it is the share of those that stand in the training split.
    """
    if part.marks is not None:
        return _shared_conversations(corpus.splits["train"], part)
    train, ids = corpus.splits["train"].ids, np.asarray(part.ids[1:])
    window = max(round(WINDOW_CHARACTERS * len(ids) / max(part.counts.characters, 1)), MIN_TOKENS)
    if len(ids) < window / 2:
        return 0.0
    windows = cut_windows(ids, min(window, len(ids)))
    known = (windows == corpus.tokenizer.unknown_id).mean(axis=1) <= MAX_UNKNOWN
    finder = WindowFinder(windows[says_something(windows) & known])
    for begin in range(1, min(len(train), MAX_COUNTED + 1), READ_AT_ONCE):
        finder.read(np.asarray(train[begin : min(begin + READ_AT_ONCE, MAX_COUNTED + 1)]))
    found = finder.result()
    return float(found.mean()) if len(found) else 0.0


def _shared_conversations(train: TokenSplit, part: TokenSplit) -> float:
    """The share of the conversations of a split that stand in the training split."""
    if train.marks is None or part.marks is None:
        return 0.0
    known, *asked = (
        [np.asarray(split.ids[begin:end]).tobytes() for begin, end in zip(*conversation_bounds(marks), strict=True)]
        for split, marks in ((train, train.marks), (part, part.marks))
    )
    there = set(known)
    return float(np.mean([each in there for each in asked[0]]))


def _read(path: Path) -> dict[str, float]:
    """The stored losses, by text."""
    try:
        content: Any = json.loads(path.read_text("utf-8"))
        if content["version"] == FLOOR_VERSION:
            return {str(key): float(loss) for key, loss in content["losses"].items() if math.isfinite(loss)}
    # A cached file with any error is made again.
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    return {}


def _store(path: Path, losses: dict[str, float]) -> None:
    # If the tokens were deleted meanwhile, or the cache cannot be written, the next call counts again.
    if path.parent.is_dir():
        with suppress(RunError):
            write_file(
                path, json.dumps({"version": FLOOR_VERSION, "losses": dict([*losses.items()][-MAX_STORED:])}) + "\n"
            )
