"""Whether a model has likely seen a text, by its predictions alone: for models whose training text is unknown.

The model scores the first part of the training text and the held-out text. Two signs are read from these scores.

**Passages.** A passage is a stretch of the text that greedy decoding writes word for word after the text before it: the
model's first choice is right for every token. It has at least `PASSAGE_TOKENS` tokens and `PASSAGE_CHARACTERS`
characters, is mostly letters, and stands nowhere else in the text, from which the model could copy it. Text that a
model cannot have read has no such passages.

**Advantage.** The training text and the held-out text are scored in blocks. So do n-gram counts of the rest of the
training text, which have seen neither part. The advantage is how much fewer bits per byte the model needs on the first
part than on held-out text that is as hard for the counts. A model that has seen neither part has none, and so has one
that has seen both.

Neither sign shows that a text was not read. A text that was read once among many others leaves no trace that differs
from that of other text of its kind.

Source: the model's own continuation of a prefix is the test of discoverable memorisation (Carlini et al. 2022,
"Quantifying Memorization Across Neural Language Models"). The difference of losses on members and others of a training
set is the oldest membership test (Yeom et al. 2018, "Privacy risk in machine learning"); a reference that knows neither
part calibrates it (Watson et al. 2022, "On the importance of difficulty calibration in membership inference attacks").
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from lm.corpora import PreparedCorpus, TokenSplit
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
"""Scored tokens of each part, for an advantage."""
MAX_SHARE = 0.25
"""Of the training text in its first part: the counts need the rest."""
BLOCKS = 20
"""Samples of a part: the means of neighbouring tokens, which are not independent."""
LEAST_ADVANTAGE, LEAST_ERRORS = 0.05, 4.0
"""In bits per byte and in standard errors: with more than both, the model has likely seen the text."""
PASSAGE_TOKENS, PASSAGE_CHARACTERS = 32, 120
"""Of a passage, at least."""
PASSAGE_LETTERS = 0.5
"""Share of letters in a passage, at least: anyone can continue a row of numbers."""
FEWEST_PASSAGES = 2
"""One may be a quotation, or chance."""

Nats = npt.NDArray[np.float64]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Advantage:
    """How much better a model is on the training text than on held-out text, beyond n-gram counts."""

    bits_per_byte: float
    standard_error: float

    @property
    def is_seen(self) -> bool:
        """Whether the model has likely seen the training text."""
        return self.bits_per_byte > max(LEAST_ADVANTAGE, LEAST_ERRORS * self.standard_error)


@dataclass(frozen=True)
class Signs:
    """What the predictions of a model say about a text."""

    advantage: Advantage | None
    """None: a part is too short."""
    training_passages: tuple[str, ...]
    """Passages of the first part of the training text that the model writes word for word; none of conversations."""
    held_out_passages: tuple[str, ...]
    """The same of the held-out text."""

    @property
    def has_passages(self) -> bool:
        """Whether the passages are enough to say that the model has seen the text."""
        return len(self.training_passages) + len(self.held_out_passages) >= FEWEST_PASSAGES


def signs_of_seen_text(model: LanguageModel, corpus: PreparedCorpus, *, progress: Progress | None = None) -> Signs:
    """The signs that a model has seen the text of a corpus.

    Args:
        model: of the corpus's tokenizer.
        corpus: a text that the model may have seen.
        progress: called with tokens done and in all.
    """
    first, held_out = _parts(model, corpus)
    found = [part.scored(model, progress) for part in (first, held_out)]
    # The answers of conversations are not one text.
    passages = [
        () if part.marks is not None else _passages(part.ids, hits, corpus)
        for part, (_, hits) in zip((first, held_out), found, strict=True)
    ]
    advantage = None
    if min(first.tokens, held_out.tokens) >= FEWEST_TOKENS:
        train, vocab_size = corpus.splits["train"], corpus.tokenizer.vocab_size
        rest = train.ids[len(first.ids) - 1 : MAX_COUNTED]
        counts = count_text(rest, order=floor_order(vocab_size), vocab_size=vocab_size)
        blocks = [part.blocks(counts, nats) for part, (nats, _) in zip((first, held_out), found, strict=True)]
        shift, error = _shift(*blocks)
        measured = corpus.splits["valid"].counts
        bits = measured.tokens / measured.bytes / math.log(2)
        advantage = Advantage(shift * bits, error * bits)
    return Signs(advantage, *passages)


def tokens_to_score(model: LanguageModel, corpus: PreparedCorpus) -> int:
    """The tokens that `signs_of_seen_text` scores."""
    return sum(len(part.ids) - 1 for part in _parts(model, corpus))


def _parts(model: LanguageModel, corpus: PreparedCorpus) -> tuple[_Part, _Part]:
    """The first part of the training text, and the held-out text."""
    train, valid = corpus.splits["train"], corpus.splits["valid"]
    most = MAX_TOKENS
    if next(model.parameters(), torch.empty(0)).device.type == "cpu":
        most = min(MAX_TOKENS, int(MAX_WORK / max(1, model.num_parameters())))
    return _part(train, min(most, int(MAX_SHARE * (len(train.ids) - 1)))), _part(valid, most)


def _part(split: TokenSplit, tokens: int) -> _Part:
    return _Part(*beginning(split, max(1, tokens)))


@dataclass(frozen=True)
class _Part:
    """Tokens of a text, with the marks of conversations."""

    ids: Ids
    marks: npt.NDArray[np.uint8] | None

    @property
    def tokens(self) -> int:
        """Scored tokens."""
        return len(self.ids) - 1 if self.marks is None else int(np.count_nonzero(self.marks == ANSWER))

    def scored(self, model: LanguageModel, progress: Progress | None) -> tuple[Nats, npt.NDArray[np.bool_]]:
        """(N,) nats of the scored tokens, and whether each was the model's first choice."""
        nats: list[Nats] = []
        hits: list[npt.NDArray[np.bool_]] = []
        score(
            model, self.ids, marks=self.marks, each=lambda part: nats.append(part.astype(np.float64)),
            each_rank=lambda part: hits.append(part == 0), progress=progress,
        )  # fmt: skip
        return np.concatenate(nats or [np.empty(0)]), np.concatenate(hits or [np.empty(0, np.bool_)])

    def blocks(self, counts: NGramCounts, nats: Nats) -> Nats:
        """(2, BLOCKS) nats per token under the counts and under the model, of neighbouring tokens."""
        logs = counts.log_probabilities_of(self.ids)
        both = np.stack([-logs if self.marks is None else -logs[self.marks[1:] == ANSWER], nats])
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


# -- passages -------------------------------------------------------------------------------------------


def _passages(ids: Ids, hits: npt.NDArray[np.bool_], corpus: PreparedCorpus) -> tuple[str, ...]:
    """The texts of passages in the order of the text.

    Args:
        ids: (N + 1,) the token before the first scored one, then the scored ones.
        hits: (N,) whether each was the model's first choice.
        corpus: whose text a passage may stand in only once.
    """
    whole = [np.ascontiguousarray(split.ids[:MAX_COUNTED], np.uint32).tobytes() for split in corpus.splits.values()]
    edges = np.flatnonzero(np.diff(np.concatenate([[False], hits, [False]])))
    found = []
    for begin, end in edges.reshape(-1, 2).tolist():
        if end - begin < PASSAGE_TOKENS:
            continue
        stretch = np.ascontiguousarray(ids[1 + begin : 1 + end], np.uint32)
        text = corpus.tokenizer.decode(stretch.tolist())
        if len(text) < PASSAGE_CHARACTERS or sum(map(str.isalpha, text)) < PASSAGE_LETTERS * len(text):
            continue
        # Its last tokens: those before may be a beginning that the text has more than once.
        last = stretch[-PASSAGE_TOKENS:].tobytes()
        if sum(content.count(last) for content in whole) <= 1:
            found.append(text)
    return tuple(found)
