"""What a text that was read tells: the figures of `lm eval`, and where in the text a model was surprised.

Each token's nats are spread evenly over the characters that it stands for, so that words, places and models with other
tokens can be compared; the sum stays what it was.

    known = study(
        await read(page, "shakespeare-gru", text, top=5), run=run, state="best", precision="fp32", seconds=0.1
    )
    known.report.bits_per_byte
    known.nats_between(0, 12)
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lm.corpora.prepared import TokenSplit, measure_text
from lm.evaluation.report import Report, make_report
from lm.evaluation.score_sums import Scores
from lm.runs.run import Run
from lm.spelling import spelling_rule
from lm.tokenizers.base import Tokenizer
from lm.version import __version__
from serve.engines.codec import TokenCodec
from serve.engines.model_pool import Model
from serve.page.drawing import Reading

TOP = 5
"""Alternatives that the accuracies need."""
MOST_POINTS = 200
"""Of a curve."""
MOST_COUNTED = 2_000_000
"""Tokens of a training text that are counted for a floor while a visitor waits."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Study:
    """A reading with all that follows from it."""

    reading: Reading
    report: Report
    ends: npt.NDArray[np.int64]
    """Where in the text each token's part ends, in characters; it begins where the one before ends."""
    nats: Floats
    """(N,) of each token."""
    running: Floats
    """(characters + 1,) the nats of all that stands before a place."""
    strange: Counter[str]
    """Symbols outside the vocabulary."""

    @property
    def name(self) -> str:
        """Of the model."""
        return self.reading.model.name

    def parts(self, most: int) -> list[str]:
        """The text of the first `most` tokens, a string a token."""
        begin, parts = 0, []
        for end in self.ends[:most].tolist():
            parts.append(self.reading.text[begin:end])
            begin = end
        return parts

    def nats_between(self, begin: int, end: int) -> float:
        """Of a part of the text."""
        return float(self.running[end] - self.running[begin])


def study(reading: Reading, *, run: Run | None, state: str, precision: str, seconds: float) -> Study:
    """All that a reading with TOP alternatives tells; takes a moment for a long text.

    Args:
        reading: of the whole text.
        run: what was read with, for the floor and for what kind of model it is; None where it is on offer no more.
        state: which weights of the run were read with.
        precision: of the weights.
        seconds: how long the reading took.

    Raises:
        CorpusError: the text holds half of a surrogate pair.
    """
    tokenizer, ids = reading.model.tokenizer, reading.tokens
    strange: Counter[str] = Counter()
    array = tokenizer.encode(reading.text, unknown_counts=strange)
    counts, sha256 = measure_text(reading.text, tokenizer, array, strange)
    nats = np.array([-score.logprob for score in reading.scores], dtype=np.float64)
    scores = Scores(context_rule(reading.model, len(ids)), seconds=seconds)
    ranks = ([token for token, _ in score.top].index(score.token) if any(
        token == score.token for token, _ in score.top) else None for score in reading.scores)  # fmt: skip
    scores.add(nats.tolist(), ranks)
    scores.unknown_nats = float(nats[array == tokenizer.unknown_id].sum()) if counts.unknown_tokens else 0.0
    floor, kind = None, None
    if run is not None:
        start = [tokenizer.start_id, *ids]
        floor = run.floor(
            TokenSplit("text", np.array(start, tokenizer.dtype), counts, sha256), most_tokens=MOST_COUNTED
        )
        kind = run.record.get("kind")
    report = make_report(
        scores, counts, floor, spelling=spelling_rule(tokenizer), run=reading.model.name,
        kind=kind, state=state, step=None, corpus="text", split="text",
        text_sha256=sha256, device=reading.model.decoder.name, precision=precision, version=__version__,
    )  # fmt: skip
    ends = np.array(token_ends(reading.text, tokenizer, ids), dtype=np.int64)
    return Study(reading, report, ends, nats, _running(nats, ends, len(reading.text)), strange)


def context_rule(model: Model, tokens: int) -> str:
    """What a prediction could look back on."""
    context = model.decoder.context_length
    if context is None:
        return "all of the text before it: the state is carried from the first token to the last"
    if tokens <= context:
        return f"all of the text before it: its {tokens:,} tokens fit into the model's window of {context:,}"
    return (
        f"at most {context:,} tokens: when the window is full, its older half is forgotten. lm eval slides the window "
        "the same way but lets the last one end with the text, so that its figures differ a little"
    )


# -- where things stand -----------------------------------------------------------------------------


def token_ends(text: str, tokenizer: Tokenizer, ids: Sequence[int]) -> list[int]:
    """Where in a text the part of each of its tokens ends; what no token stands for belongs to a neighbour."""
    tokens = TokenCodec(tokenizer)
    if not tokenizer.lossless:
        return _word_ends(text, tokens, ids)
    decoded, offsets = tokens.offsets(ids)
    if len(decoded) != len(text):
        # Symbols outside the vocabulary were left out: what is left stands in the text in the same order.
        places, place = [], 0
        for character in decoded:
            place = text.index(character, place) + 1
            places.append(place - 1)
        places.append(len(text))
        offsets = [places[offset] for offset in offsets]
    return [*offsets[1:], len(text)]


def _word_ends(text: str, tokens: TokenCodec, ids: Sequence[int]) -> list[int]:
    symbols = re.finditer(r"\n|\S+", text)
    known: dict[str, list[int]] = {}
    ends = []
    for token in ids:
        for symbol in symbols:
            word = symbol[0]
            if word not in known:
                known[word] = tokens.encode(word)
            # Symbols outside the vocabulary may have been left out.
            if token in known[word]:
                ends.append(symbol.end())
                break
    return [*ends[:-1], len(text)]


def _running(nats: Floats, ends: npt.NDArray[np.int64], length: int) -> Floats:
    begins = np.concatenate([[0], ends[:-1]])
    widths = ends - begins
    spread = np.repeat(nats / np.maximum(widths, 1), widths)
    # The first bytes of a character stand for nothing alone: they belong to the character that they begin.
    empty = widths == 0
    np.add.at(spread, np.minimum(begins[empty], length - 1), nats[empty])
    return np.concatenate([[0.0], np.cumsum(spread)])


def word_bounds(text: str) -> npt.NDArray[np.int64]:
    """Where words end, 0 in front: each takes the white space before it, the last one that after it too."""
    ends = [found.end() for found in re.finditer(r"\s*\S+", text)]
    return np.array([0, *ends[:-1], len(text)], dtype=np.int64)


@dataclass(frozen=True)
class Word:
    """A word with how much it surprised."""

    text: str
    line: int
    nats: tuple[float, ...]
    """Of each model."""


def surprising_words(studies: Sequence[Study], most: int) -> list[Word]:
    """The words of a text that surprised its readers most, the most surprising first."""
    text = studies[0].reading.text
    bounds = word_bounds(text)
    nats = np.stack([np.diff(each.running[bounds]) for each in studies])
    words = []
    for place in np.argsort(-nats.sum(axis=0), kind="stable")[:most].tolist():
        begin, end = int(bounds[place]), int(bounds[place + 1])
        part = text[begin:end]
        start = begin + len(part) - len(part.lstrip())
        words.append(Word(part.strip(), text.count("\n", 0, start) + 1, tuple(nats[:, place].tolist())))
    return [word for word in words if word.text]


def smoothed(running: Floats) -> tuple[list[int], list[float]]:
    """Places in a text, MOST_POINTS at most, and the nats per character about each, from its running sum."""
    length = len(running) - 1
    places = np.unique(np.linspace(0, length, min(MOST_POINTS, length + 1)).astype(np.int64))
    reach = max(8, length // 60)
    low, high = np.maximum(places - reach, 0), np.minimum(places + reach, length)
    return places.tolist(), ((running[high] - running[low]) / (high - low)).tolist()


# -- two models ---------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Difference:
    """How much more the first of two models was surprised than the second, part by part."""

    bounds: npt.NDArray[np.int64]
    """(P + 1,) where the parts of the text begin, and its end."""
    nats: Floats
    """(P, 2) of each model."""
    by_token: bool
    """Whether the parts are tokens; else they are words."""

    @property
    def more(self) -> Floats:
        """(P,) nats of the first less those of the second."""
        difference: Floats = self.nats[:, 0] - self.nats[:, 1]
        return difference

    @property
    def may_be_chance(self) -> bool:
        """Whether the sum is within two standard errors of 0, taking parts as independent."""
        more = self.more
        return bool(abs(more.sum()) < 2 * more.std() * math.sqrt(len(more)))


def compare(first: Study, second: Study) -> Difference:
    """Two readings of one text: token by token where both models cut it alike, else word by word."""
    by_token = np.array_equal(first.ends, second.ends)
    if by_token:
        bounds = np.concatenate([[0], first.ends])
        return Difference(bounds, np.stack([first.nats, second.nats], axis=1), by_token)
    bounds = word_bounds(first.reading.text)
    nats: Any = [np.diff(each.running[bounds]) for each in (first, second)]
    return Difference(bounds, np.stack(nats, axis=1), by_token)
