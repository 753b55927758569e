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
from lm.corpora.cache import cache_folder
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
WINDOWS = 64
"""Parts of a text that are searched in the training text."""
WINDOW_CHARACTERS = 100
MIN_TOKENS = 8
"""Of a window."""
MIN_DISTINCT, MAX_UNKNOWN = 4, 0.1
"""Different tokens, and share of unknown ones, of a window; other windows occur in many texts by chance."""


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
        known[key] = -float(np.mean(counts.log_probabilities_of(part.ids)))
        _store(path, known)
    return Floor(known[key], f"{order}-gram counts of {counted}, without a network", share)


def overlap(corpus: PreparedCorpus, part: TokenSplit) -> float:
    """About the share of a text that is in the training split (its first MAX_COUNTED tokens).

    The search is for WINDOWS windows of about 100 characters, spread evenly over the text. A text of less than half a
    window gives 0.
    """
    train = np.asarray(corpus.splits["train"].ids[: MAX_COUNTED + 1])
    ids = np.asarray(part.ids[1:]).astype(train.dtype)
    window = round(WINDOW_CHARACTERS * len(ids) / max(part.counts.characters, 1))
    window = max(window, MIN_TOKENS)
    if len(ids) < window / 2:
        return 0.0
    window = min(window, len(ids))
    text, size = train.tobytes(), train.itemsize
    searched = found = 0
    for start in np.unique(np.linspace(0, len(ids) - window, WINDOWS).astype(np.int64)).tolist():
        piece = ids[start : start + window]
        unknown = np.count_nonzero(piece == corpus.tokenizer.unknown_id)
        if unknown > MAX_UNKNOWN * window or len(np.unique(piece)) < MIN_DISTINCT:
            continue
        searched += 1
        wanted = piece.tobytes()
        position = text.find(wanted)
        # A match must begin at a token, not inside one.
        while position % size and position >= 0:
            position = text.find(wanted, position + 1)
        found += position >= 0
    return found / searched if searched else 0.0


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
