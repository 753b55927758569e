"""The figures of a text as other programs count them, from the nats that Inkling measured.

    words = WordSums(tokenizer)
    score(model, ids, watchers=[words.add])
    srilm(words.end())["ppl"]

Each program counts words, line ends and unknown words in another way; docs/reference/evaluation.md has the rules. A
word's nats are those of all its tokens, with the white space before it; a line end's those of its newline, with the
white space before that. So the figures are defined for every tokenizer: for a word tokenizer, one token is one word or
one line end.

Sources: lm-evaluation-harness, `lm_eval/api/metrics.py`; KenLM, `lm/ngram_query.hh`; SRILM, ngram(1), "-ppl".
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from lm.evaluation.per_token import Scored
from lm.evaluation.report import Report
from lm.tokenizers.base import Tokenizer

CONVENTIONS = "inkling", "lm-eval", "kenlm", "srilm"


@dataclass
class WordCounts:
    """Sums over the words and line ends of a text; nats are finite: those of a probability of 0 are left out."""

    words: int = 0
    unknown_words: int = 0
    """Words that are, or contain, an unknown token."""
    impossible: int = 0
    """Other words, and line ends, with a token of probability 0."""
    lines: int = 0
    """Newlines."""
    blank_lines: int = 0
    """Those of lines without a word."""
    nats: float = 0.0
    """Of all words and line ends."""
    unknown_nats: float = 0.0
    blank_line_nats: float = 0.0


class WordSums:
    """Divides the nats of tokens among words and line ends, while a text is scored."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._stream = tokenizer.stream()
        self._unknown_id = tokenizer.unknown_id
        self._counts = WordCounts()
        self._nats = 0.0
        """Of the tokens since the last word or line end was counted."""
        self._inside = self._unknown = self._line_has_words = False
        """Inside a word; whether it has an unknown token; whether a word stands in this line."""

    def add(self, scored: Scored) -> None:
        """Add tokens, in the order of the text: a watcher of `score`."""
        for token, nats in zip(scored.targets.tolist(), scored.nats.tolist(), strict=True):
            self._add(self._stream.feed(token), nats, unknown=token == self._unknown_id)

    def end(self) -> WordCounts:
        """The sums. White space after the last word and newline belongs to the word before it."""
        self._inside = self._inside or bool(self._stream.end())
        if self._inside:
            self._end_word()
        else:
            self._counts.nats += self._finite()
            self._nats = 0.0
        return self._counts

    def _add(self, text: str, nats: float, *, unknown: bool) -> None:
        if "\n" in text:
            if self._inside:
                self._end_word()
            self._nats += nats
            self._end_line()
            return
        # A token without text is the beginning of a character.
        if self._inside and text[:1].isspace():
            self._end_word()
        self._nats += nats
        self._unknown |= unknown
        if text and not text.isspace():
            self._inside = True

    def _end_word(self) -> None:
        counts = self._counts
        counts.words += 1
        self._line_has_words = True
        if self._unknown:
            counts.unknown_words += 1
            counts.unknown_nats += self._finite()
        elif math.isinf(self._nats):
            counts.impossible += 1
        counts.nats += self._finite()
        self._nats, self._inside, self._unknown = 0.0, False, False

    def _end_line(self) -> None:
        counts = self._counts
        counts.lines += 1
        if not self._line_has_words:
            counts.blank_lines += 1
            counts.blank_line_nats += self._finite()
        elif math.isinf(self._nats):
            counts.impossible += 1
        counts.nats += self._finite()
        self._nats, self._line_has_words = 0.0, False

    def _finite(self) -> float:
        return 0.0 if math.isinf(self._nats) else self._nats


def lm_eval(report: Report) -> dict[str, Any]:
    """The three figures of lm-evaluation-harness's rolling log-likelihood; the text is one document."""
    nats = report.loss * report.tokens
    return {
        "word_perplexity": _power(math.e, nats, report.lm_eval_words),
        "byte_perplexity": _power(math.e, nats, report.bytes),
        "bits_per_byte": nats / report.bytes / math.log(2),
        "words": report.lm_eval_words,
        "bytes": report.bytes,
    }


def kenlm(counts: WordCounts) -> dict[str, Any]:
    """The summary of KenLM's query: words and a `</s>` a line; unknown words are scored as `<unk>`."""
    tokens = counts.words + counts.lines
    if counts.impossible:
        counts = replace(counts, nats=math.inf)
    total, unknown = (-nats / math.log(10) for nats in (counts.nats, counts.unknown_nats))
    return {
        "perplexity_including_oovs": _power(10, -total, tokens),
        "perplexity_excluding_oovs": _power(10, unknown - total, tokens - counts.unknown_words),
        "oovs": counts.unknown_words,
        "tokens": tokens,
        "log10_total": total,
    }


def srilm(counts: WordCounts) -> dict[str, Any]:
    """The lines of SRILM's ngram -ppl: without unknown words and blank lines."""
    sentences = counts.lines - counts.blank_lines
    logprob = -(counts.nats - counts.unknown_nats - counts.blank_line_nats) / math.log(10)
    scored = counts.words - counts.unknown_words - counts.impossible
    return {
        "sentences": sentences,
        "words": counts.words,
        "oovs": counts.unknown_words,
        "zeroprobs": counts.impossible,
        "logprob": logprob,
        "ppl": _power(10, -logprob, scored + sentences),
        "ppl1": _power(10, -logprob, scored),
    }


def _power(base: float, total: float, count: int) -> float | None:
    """base^(total / count); None if the count is 0, or if the result is too large for a float."""
    try:
        power = float(base ** (total / count))
    except (ZeroDivisionError, OverflowError):
        return None
    return power if math.isfinite(power) else None
