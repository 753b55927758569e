"""The perplexity report: every figure with its denominator, context rule and data hash.

All figures come from one sum of log-likelihoods (`lm.evaluation.scores`), divided by different counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

from pydantic import Field

from lm.config import Options

if TYPE_CHECKING:
    from lm.corpora import Counts
    from lm.evaluation.floor import Floor
    from lm.evaluation.scores import Scores

FLOOR_MARGIN = 1e-4
"""Nats per token by which a model may miss the floor before it is said: rounding, and counts that are the floor."""
EOS_CONVENTION = (
    "words are len(text.split()); word_perplexity divides by them alone, word_eos_perplexity by words plus one "
    "end-of-line mark a line, as published WikiText and Penn Treebank figures do"
)

_SHORTLY = "run", "state", "corpus", "split", "loss", "perplexity", "bits_per_byte", "tokens"
"""What a report shows itself as in an interpreter; all fields are in `model_dump()`."""


class Report(Options):
    """What `lm eval` prints and saves."""

    run: str = Field(description="Name of the run.")
    kind: str | None = Field(None, description="What the model is, where it is no network alone.")
    state: str = Field(description="Which weights: best, last, or a kept step.")
    step: int | None = Field(description="Optimizer step of the weights.")
    corpus: str = Field(description="Name of the text.")
    split: str = Field(description="Which part of it.")
    text_sha256: str = Field(description="Hash of the UTF-8 text that was scored.")

    loss: float = Field(description="Nats per token: the sum of log-likelihoods over the number of tokens.")
    standard_error: float = Field(description="Of the loss, taking tokens as independent.")
    perplexity: float | None = Field(description="exp(loss): of a token; compare only between equal tokenizers.")
    word_perplexity: float | None = Field(
        description="exp(nats / words); null without words or beyond the range of a float."
    )
    word_eos_perplexity: float | None = Field(description="exp(nats / (words + lines)).")
    lm_eval_word_perplexity: float | None = Field(
        description="exp(nats / lm_eval_words), as lm-evaluation-harness counts."
    )
    bits_per_char: float = Field(description="Bits per character of the original text.")
    bits_per_byte: float = Field(description="Bits per UTF-8 byte: comparable across all tokenizers.")
    floor_loss: float | None = Field(
        None, description="Nats per token of n-gram counts on the same tokens: what a model must beat."
    )
    floor_bits_per_byte: float | None = Field(None, description="The same in bits per UTF-8 byte.")
    floor: str | None = Field(None, description="What was counted; null where the training text is not at hand.")
    accuracy: float = Field(description="Share of tokens that were the model's first choice.")
    top5_accuracy: float = Field(description="Share of tokens among its first five choices.")

    tokens: int = Field(description="Tokens scored: all of the split.")
    words: int = Field(description="len(text.split()).")
    lines: int = Field(description="Newlines in the text.")
    lm_eval_words: int = Field(description="len(re.split(r'\\s+', text)).")
    characters: int = Field(description="Unicode characters of the original text.")
    bytes: int = Field(description="UTF-8 bytes of the original text.")
    unknown_tokens: int = Field(description="Tokens that are the unknown token.")
    unknown_rate: float = Field(description="unknown_tokens / tokens.")

    context: str = Field(description="What a prediction could look back on.")
    convention: str = Field(EOS_CONVENTION, description="How words are counted.")
    notes: tuple[str, ...] = Field((), description="What to know before comparing these figures.")
    tokens_per_second: float = Field(description="Speed of this evaluation.")
    device: str = Field(description="Where it ran.")
    precision: str = Field(description="Number format of the matrix products.")
    version: str = Field(description="Version of Inkling.")

    def __repr_args__(self) -> Iterable[tuple[str, object]]:
        return ((name, getattr(self, name)) for name in _SHORTLY)

    @property
    def misses_floor(self) -> bool:
        """Whether counting predicts the same tokens better."""
        return self.floor_loss is not None and self.loss > self.floor_loss + FLOOR_MARGIN


def make_report(scores: Scores, counts: Counts, floor: Floor | None = None, **facts: object) -> Report:
    """All figures from the sums.

    Args:
        scores: sums over the whole text; `scores.tokens` must be `counts.tokens`.
        counts: how long the text is in every unit.
        floor: what counting reaches on the same tokens; None where that is not known.
        facts: the fields that say what was measured and where.
    """
    assert scores.tokens == counts.tokens, "every token is scored once"
    words_and_lines = counts.words + counts.lines
    bits = scores.nats / math.log(2)
    notes = []
    if counts.unknown_tokens:
        notes.append(
            f"{counts.unknown_tokens:,} of the tokens are the unknown token, scored as such and not as the text they "
            "stand for: figures per character, byte and word are kinder than the truth."
        )
    report = Report.model_validate(
        {
            "loss": scores.loss,
            "standard_error": scores.standard_error,
            "perplexity": _exp(scores.loss),
            "word_perplexity": _exp(scores.nats / counts.words) if counts.words else None,
            "word_eos_perplexity": _exp(scores.nats / words_and_lines) if words_and_lines else None,
            "lm_eval_word_perplexity": _exp(scores.nats / counts.lm_eval_words),
            "bits_per_char": bits / max(counts.characters, 1),
            "bits_per_byte": bits / max(counts.bytes, 1),
            "floor_loss": floor.loss if floor else None,
            "floor_bits_per_byte": floor.loss * counts.tokens / math.log(2) / max(counts.bytes, 1) if floor else None,
            "floor": floor.sentence if floor else None,
            "accuracy": scores.top1 / scores.tokens,
            "top5_accuracy": scores.top5 / scores.tokens,
            "tokens": counts.tokens,
            "words": counts.words,
            "lines": counts.lines,
            "lm_eval_words": counts.lm_eval_words,
            "characters": counts.characters,
            "bytes": counts.bytes,
            "unknown_tokens": counts.unknown_tokens,
            "unknown_rate": counts.unknown_tokens / counts.tokens,
            "context": scores.context,
            "notes": tuple(notes),
            "tokens_per_second": scores.tokens / max(scores.seconds, 1e-9),
            **facts,
        }
    )
    if not report.misses_floor:
        return report
    missed = (
        f"This does not beat the floor: {report.floor}, predict these tokens better, at "
        f"{report.floor_bits_per_byte:.4f} bits per byte against {report.bits_per_byte:.4f}."
    )
    return report.model_copy(update={"notes": (*report.notes, missed)})


def _exp(nats: float) -> float | None:
    """exp, or None where it does not fit a float: text without white space is one word of very many nats."""
    return math.exp(nats) if nats < 709 else None
