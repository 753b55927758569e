"""Analysis of a text: the report of `lm eval`, and the loss of each part of the text.

The nats of a token are divided evenly among its characters. Thus words, and models with different tokens, can be
compared; the sum is unchanged.

    analysis = analyze(
        await score(page, "shakespeare-gru", text, top=5), run=run, checkpoint="best", precision="fp32", seconds=0.1
    )
    analysis.report.bits_per_byte
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lm.corpora import TokenSplit, measure_text
from lm.evaluation.report import Report, make_report
from lm.evaluation.score_sums import Scores
from lm.runs.run import Run
from lm.spelling import spelling_rule
from lm.tokenizers.base import Tokenizer
from lm.version import __version__
from serve.engines.codec import TokenCodec
from serve.engines.model_pool import Model
from serve.page.text_generation import ScoredText

TOP = 5
"""Alternatives of each token; top-5 accuracy needs them."""
MAX_POINTS = 200
"""Points of a line."""
MAX_FLOOR_TOKENS = 2_000_000
"""Training tokens that are counted for the n-gram floor."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class TextAnalysis:
    """A scored text with its report."""

    scored: ScoredText
    report: Report
    ends: npt.NDArray[np.int64]
    """(N,) position at which each token's part of the text ends, in characters."""
    nats: Floats
    """(N,) loss of each token."""
    cumulative: Floats
    """(characters + 1,) nats of all text before a position."""
    unknown_symbols: Counter[str]
    """Symbols outside the vocabulary."""

    def parts(self, limit: int) -> list[str]:
        """The text of each of the first `limit` tokens."""
        ends = [0, *self.ends[:limit].tolist()]
        return [self.scored.text[begin:end] for begin, end in itertools.pairwise(ends)]


def analyze(scored: ScoredText, *, run: Run | None, checkpoint: str, precision: str, seconds: float) -> TextAnalysis:
    """Make the report; takes a moment for a long text.

    Args:
        scored: the whole text with TOP alternatives.
        run: the run of the model, for the n-gram floor and the kind of model; None if it is no longer offered.
        checkpoint: of the run.
        precision: of the weights.
        seconds: how long the scoring took.

    Raises:
        CorpusError: the text has half of a surrogate pair.
    """
    tokenizer, ids = scored.model.tokenizer, scored.tokens
    unknown_symbols: Counter[str] = Counter()
    array = tokenizer.encode(scored.text, unknown_counts=unknown_symbols)
    counts, sha256 = measure_text(scored.text, tokenizer, array, unknown_symbols)
    nats = np.array([-score.logprob for score in scored.scores], dtype=np.float64)
    sums = Scores(context_rule(scored.model, len(ids)), seconds=seconds)
    tops = [([token for token, _ in score.top], score.token) for score in scored.scores]
    sums.add(nats.tolist(), [top.index(token) if token in top else None for top, token in tops])
    sums.unknown_nats = float(nats[array == tokenizer.unknown_id].sum()) if counts.unknown_tokens else 0.0
    floor, kind = None, None
    if run is not None:
        start = np.array([tokenizer.start_id, *ids], tokenizer.dtype)
        floor = run.floor(TokenSplit("text", start, counts, sha256), most_tokens=MAX_FLOOR_TOKENS)
        kind = run.record.get("kind")
    report = make_report(
        sums, counts, floor, spelling=spelling_rule(tokenizer), run=scored.model.name,
        kind=kind, state=checkpoint, step=None, corpus="text", split="text",
        text_sha256=sha256, device=scored.model.decoder.name, precision=precision, version=__version__,
    )  # fmt: skip
    ends = np.array(token_ends(scored.text, tokenizer, ids), dtype=np.int64)
    return TextAnalysis(scored, report, ends, nats, _cumulative(nats, ends, len(scored.text)), unknown_symbols)


def context_rule(model: Model, tokens: int) -> str:
    """The text that the model saw before each token."""
    context = model.decoder.context_length
    if context is None:
        return "all of the text before the token: the state is carried from the first token to the last"
    if tokens <= context:
        return f"all of the text before the token: {tokens:,} tokens fit into the model's window of {context:,}"
    return (
        f"at most {context:,} tokens before the token: a full window drops its older half. lm eval does the same, "
        "except that its last window ends with the text: its figures differ a little"
    )


# -- positions in the text ---------------------------------------------------------------------------


def token_ends(text: str, tokenizer: Tokenizer, ids: Sequence[int]) -> list[int]:
    """(N,) position at which each token's part of the text ends. Text that no token encodes goes to a neighbour."""
    tokens = TokenCodec(tokenizer)
    if not tokenizer.lossless:
        return _word_ends(text, tokens, ids)
    decoded, offsets = tokens.offsets(ids)
    if len(decoded) != len(text):
        # The tokenizer skipped unknown symbols; the others have the same order in the text.
        positions, position = [], 0
        for character in decoded:
            position = text.index(character, position) + 1
            positions.append(position - 1)
        positions.append(len(text))
        offsets = [positions[offset] for offset in offsets]
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
            # The tokenizer may have skipped unknown symbols.
            if token in known[word]:
                ends.append(symbol.end())
                break
    return [*ends[:-1], len(text)]


def _cumulative(nats: Floats, ends: npt.NDArray[np.int64], length: int) -> Floats:
    begins = np.concatenate([[0], ends[:-1]])
    widths = ends - begins
    spread = np.repeat(nats / np.maximum(widths, 1), widths)
    # The first bytes of a character have no text of their own: their nats go to that character.
    empty = widths == 0
    np.add.at(spread, np.minimum(begins[empty], length - 1), nats[empty])
    return np.concatenate([[0.0], np.cumsum(spread)])


def word_bounds(text: str) -> npt.NDArray[np.int64]:
    """(words + 1,) bounds of the words. A word includes the white space before it, the last one also that after it."""
    ends = [found.end() for found in re.finditer(r"\s*\S+", text)]
    return np.array([0, *ends[:-1], len(text)], dtype=np.int64)


@dataclass(frozen=True)
class Word:
    """A word with its loss."""

    text: str
    line: int
    nats: tuple[float, ...]
    """Of each model."""


def surprising_words(analyses: Sequence[TextAnalysis], limit: int) -> list[Word]:
    """The words with the highest loss, highest first."""
    text = analyses[0].scored.text
    bounds = word_bounds(text)
    nats = np.stack([np.diff(each.cumulative[bounds]) for each in analyses])
    words = []
    for index in np.argsort(-nats.sum(axis=0), kind="stable")[:limit].tolist():
        begin, end = int(bounds[index]), int(bounds[index + 1])
        part = text[begin:end]
        start = begin + len(part) - len(part.lstrip())
        words.append(Word(part.strip(), text.count("\n", 0, start) + 1, tuple(nats[:, index].tolist())))
    return [word for word in words if word.text]


def smoothed(cumulative: Floats) -> tuple[list[int], list[float]]:
    """At most MAX_POINTS positions in a text, and the mean nats per character around each, from the cumulative sum."""
    length = len(cumulative) - 1
    positions = np.unique(np.linspace(0, length, min(MAX_POINTS, length + 1)).astype(np.int64))
    reach = max(8, length // 60)
    low, high = np.maximum(positions - reach, 0), np.minimum(positions + reach, length)
    return positions.tolist(), ((cumulative[high] - cumulative[low]) / (high - low)).tolist()


@dataclass(frozen=True, eq=False)
class Difference:
    """The losses of two models on each part of a text."""

    bounds: npt.NDArray[np.int64]
    """(P + 1,) positions at which the parts begin, and the end of the text."""
    nats: Floats
    """(P, 2) of each model."""
    by_token: bool
    """Whether the parts are tokens; otherwise they are words."""


def compare(first: TextAnalysis, second: TextAnalysis) -> Difference:
    """Compare two models on one text: token by token if the tokens have the same text, else word by word."""
    by_token = np.array_equal(first.ends, second.ends)
    if by_token:
        return Difference(np.array([0, *first.ends]), np.stack([first.nats, second.nats], axis=1), by_token)
    bounds = word_bounds(first.scored.text)
    nats: Any = [np.diff(each.cumulative[bounds]) for each in (first, second)]
    return Difference(bounds, np.stack(nats, axis=1), by_token)
