"""The floor beside a report: what n-gram counts of the run's training text reach on the same tokens.

Counting takes a second or so and no network. A model that predicts no better has learned nothing worth its time.

The rule is the same for every run: interpolated modified Kneser-Ney counts (`lm.models.kneser_ney`) over the run's own
tokens, 7-grams for vocabularies of up to 1,000 tokens (bytes, characters), 4-grams for larger ones (words, subwords).
What was found is kept beside the prepared tokens, so that nothing is counted twice.

A text that stands in the training text has no floor: counting has read it, and so has the model.
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
FEW_TOKENS = 1000
ORDERS = 7, 4
"""For vocabularies of at most FEW_TOKENS, and for larger ones."""
MAX_COUNTED = 8_000_000
"""Training tokens that are counted: bounds time and memory."""
MAX_STORED = 200
"""Texts whose floor is remembered with a corpus."""
WINDOWS = 64
"""Parts of a text that are looked for in the training text."""
WINDOW_CHARACTERS = 100
MIN_TOKENS = 8
"""Of a window."""
MIN_DISTINCT, MAX_UNKNOWN = 4, 0.1
"""Different tokens, and share of unknown ones, of a window: others stand in many places by chance."""


def floor_order(vocab_size: int) -> int:
    """The order of the n-grams that are counted for a vocabulary."""
    return ORDERS[0] if vocab_size <= FEW_TOKENS else ORDERS[1]


def find_floor(corpus: PreparedCorpus, part: TokenSplit, *, most_tokens: int | None = None) -> Floor:
    """The floor of a text, from the training split of a corpus.

    Args:
        corpus: what the run was trained on.
        part: the text, in tokens of the same tokenizer.
        most_tokens: do without a loss where more than these would have to be counted.
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
        _keep(path, known)
    return Floor(known[key], f"{order}-gram counts of {counted}, without a network", share)


def overlap(corpus: PreparedCorpus, part: TokenSplit) -> float:
    """About the share of a text that stands in the training split (its first MAX_COUNTED tokens).

    WINDOWS windows of about 100 characters, spread evenly over the text, are looked for. A text of less than half a
    window is too short to say; 0 then.
    """
    train = np.asarray(corpus.splits["train"].ids[: MAX_COUNTED + 1])
    ids = np.asarray(part.ids[1:]).astype(train.dtype)
    window = round(WINDOW_CHARACTERS * len(ids) / max(part.counts.characters, 1))
    window = max(window, MIN_TOKENS)
    if len(ids) < window / 2:
        return 0.0
    window = min(window, len(ids))
    text, size = train.tobytes(), train.itemsize
    looked = found = 0
    for start in np.unique(np.linspace(0, len(ids) - window, WINDOWS).astype(np.int64)).tolist():
        piece = ids[start : start + window]
        unknown = np.count_nonzero(piece == corpus.tokenizer.unknown_id)
        if unknown > MAX_UNKNOWN * window or len(np.unique(piece)) < MIN_DISTINCT:
            continue
        looked += 1
        wanted = piece.tobytes()
        place = text.find(wanted)
        # Bytes of two neighbouring tokens can look like a token.
        while place % size and place >= 0:
            place = text.find(wanted, place + 1)
        found += place >= 0
    return found / looked if looked else 0.0


def _read(path: Path) -> dict[str, float]:
    """The losses kept so far, by text."""
    try:
        content: Any = json.loads(path.read_text("utf-8"))
        if content["version"] == FLOOR_VERSION:
            return {str(key): float(loss) for key, loss in content["losses"].items() if math.isfinite(loss)}
    # Whatever is wrong with a cached file, the answer is to count again.
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    return {}


def _keep(path: Path, losses: dict[str, float]) -> None:
    # The tokens may have gone in the meantime, or the cache cannot be written: it is counted again next time.
    if path.parent.is_dir():
        with suppress(RunError):
            write_file(
                path, json.dumps({"version": FLOOR_VERSION, "losses": dict([*losses.items()][-MAX_STORED:])}) + "\n"
            )
