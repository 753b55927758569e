"""Whether a model has likely seen a training text, by its nats alone: for models whose training text is unknown.

The model scores the first part of the training text and the held-out text, in blocks, and so do n-gram counts of the
rest of the training text, which have seen neither part. The advantage is how much fewer bits per byte the model needs
on the first part than on held-out text that is as hard for the counts. A model that has seen neither part has none. The
test says nothing about a model that has seen both parts, or that read the text only once among many others.

Source: the difference of losses on members and others of a training set is the oldest membership test (Yeom et al.
2018, "Privacy risk in machine learning"); a reference that knows neither part calibrates it (Watson et al. 2022, "On
the importance of difficulty calibration in membership inference attacks").
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from lm.corpora import PreparedCorpus
from lm.corpora.answers import ANSWER, beginning
from lm.evaluation.floor import MAX_COUNTED, floor_order
from lm.evaluation.perplexity import score
from lm.models.base import LanguageModel
from lm.models.kneser_ney import NGramCounts, count_text
from lm.tokenizers.base import Ids

MAX_TOKENS = 20_000
"""Of each part."""
MAX_WORK = 5e11
"""Tokens of a part, times parameters, on a CPU: a model of 100 million parameters would take minutes for more."""
FEWEST_TOKENS = 500
"""Scored tokens of each part, for a result."""
MAX_SHARE = 0.25
"""Of the training text in its first part: the counts need the rest."""
BLOCKS = 20
"""Samples of a part: the means of neighbouring tokens, which are not independent."""
LEAST_ADVANTAGE, LEAST_ERRORS = 0.05, 4.0
"""In bits per byte and in standard errors: with more than both, the model has likely seen the text."""

Nats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Advantage:
    """How much better a model is on the training text than on held-out text, beyond n-gram counts."""

    bits_per_byte: float
    standard_error: float

    @property
    def is_seen(self) -> bool:
        """Whether the model has likely seen the training text."""
        return self.bits_per_byte > max(LEAST_ADVANTAGE, LEAST_ERRORS * self.standard_error)


def advantage_on_training_text(
    model: LanguageModel, corpus: PreparedCorpus, *, progress: Callable[[int, int], None] | None = None
) -> Advantage | None:
    """The advantage of a model on the training split of a corpus over its validation split.

    Args:
        model: of the corpus's tokenizer.
        corpus: a text that the model may have seen.
        progress: called with tokens done and in all.

    Returns:
        None if a split is too short to tell.
    """
    train, valid = corpus.splits["train"], corpus.splits["valid"]
    most = MAX_TOKENS
    if next(model.parameters(), torch.empty(0)).device.type == "cpu":
        most = min(MAX_TOKENS, int(MAX_WORK / max(1, model.num_parameters())))
    first = _Part(*beginning(train, min(most, int(MAX_SHARE * (len(train.ids) - 1)))))
    held_out = _Part(*beginning(valid, most))
    if min(first.tokens, held_out.tokens) < FEWEST_TOKENS:
        return None
    rest = train.ids[len(first.ids) - 1 : MAX_COUNTED]
    counts = count_text(rest, order=floor_order(corpus.tokenizer.vocab_size), vocab_size=corpus.tokenizer.vocab_size)
    there, here = (part.blocks(counts, model, progress) for part in (first, held_out))
    nats, error = _shift(there, here)
    bits = valid.counts.tokens / valid.counts.bytes / math.log(2)
    return Advantage(nats * bits, error * bits)


@dataclass(frozen=True)
class _Part:
    """Tokens of a text, with the marks of conversations."""

    ids: Ids
    marks: npt.NDArray[np.uint8] | None

    @property
    def tokens(self) -> int:
        """Scored tokens."""
        return len(self.ids) - 1 if self.marks is None else int(np.count_nonzero(self.marks == ANSWER))

    def blocks(self, counts: NGramCounts, model: LanguageModel, progress: Callable[[int, int], None] | None) -> Nats:
        """(2, BLOCKS) nats per token under the counts and under the model, of neighbouring tokens."""
        parts: list[Nats] = []
        score(
            model, self.ids, marks=self.marks, each=lambda nats: parts.append(nats.astype(np.float64)),
            progress=progress,
        )  # fmt: skip
        logs = counts.log_probabilities_of(self.ids)
        both = np.stack([-logs if self.marks is None else -logs[self.marks[1:] == ANSWER], np.concatenate(parts)])
        size = both.shape[1] // BLOCKS
        means: Nats = both[:, : size * BLOCKS].reshape(2, BLOCKS, size).mean(axis=2)
        return means


def _shift(there: Nats, here: Nats) -> tuple[float, float]:
    """How much higher the model's nats are `here` than `there` at equal nats of the counts, and the standard error.

    Least squares over the blocks: model = a + b · counts + shift · (1 if here else 0).
    """
    counts, model = np.concatenate([there, here], axis=1)
    is_here = np.repeat([0.0, 1.0], BLOCKS)
    design = np.stack([np.ones_like(counts), counts, is_here], axis=1)
    found, *_ = np.linalg.lstsq(design, model, rcond=None)
    residual = model - design @ found
    variance = float(residual @ residual) / (len(model) - 3) * np.linalg.pinv(design.T @ design)[2, 2]
    return float(found[2]), math.sqrt(max(0.0, variance))
