"""The perplexity report: every figure with its denominator, context rule and data hash.

All figures come from one sum of log-likelihoods (`lm.evaluation.score_sums`), divided by different counts. Bits per
byte and per character include the spelling cost (`lm.spelling`), so that they are comparable across tokenizers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import Field

from lm.config import Options
from lm.evaluation import report_fields as shared

if TYPE_CHECKING:
    from lm.corpora import Counts
    from lm.evaluation.score_sums import Scores

FLOOR_MARGIN = 3e-3
"""Nats per token above the floor without a note: n-gram models equal their floor, but their counts are compact."""
MAX_OVERLAP = 0.2
"""Share of a text that may be in the training text, as phrases and headers are, before its figures show memory."""
MIN_NOTED_BITS = 0.001
"""Bits per byte of spelling cost that a note mentions."""
REMEMBERED = "is in the training text: the figures show how well it is memorised, not how well new text is predicted."
NOT_MEASURED = "An older Inkling did not measure the spelling cost of unknown words and white space."
EOS_CONVENTION = (
    "words are len(text.split()); word_perplexity divides by them alone, word_eos_perplexity by words plus one "
    "end-of-line mark a line, as published WikiText and Penn Treebank figures do"
)

_COUNTS = "tokens", "context_tokens", "words", "lines", "lm_eval_words", "characters", "bytes", "unknown_tokens"
_IN_REPR = "run", "state", "corpus", "split", "loss", "perplexity", "bits_per_byte", "tokens"
"""Fields in `repr`; `model_dump()` has all."""


@dataclass(frozen=True)
class Floor:
    """The loss of n-gram counts on a text; `loss` and `sentence` are None if they say nothing about it."""

    loss: float | None
    """Nats per token."""
    sentence: str | None
    """What was counted."""
    overlap: float = 0.0
    """Share of the text that stands in the training text, in windows of about 50 characters."""


class FineTuning(Options):
    """A fine-tuned run compared with others on the same held-out text, in bits per byte."""

    base: str = Field(description="The run and checkpoint that it started from.")
    base_bits_per_byte: float | None = Field(None, description="Of the base. Null if it was not measured.")
    tuned_bits_per_byte: float | None = Field(None, description="Of the fine-tuned run.")
    scratch: str | None = Field(
        None, description="The best run from scratch on the same corpus, in the same folder of runs. Null if none."
    )
    scratch_bits_per_byte: float | None = Field(None, description="Of that run.")
    floor_bits_per_byte: float | None = Field(None, description="Of n-gram counts of the training text.")
    base_overlap: float | None = Field(
        None, description="Share of the held-out text that stands in the base's training text. Null if unknown."
    )
    base_training_overlap: float | None = Field(
        None, description="Share of this run's training text that stands in the base's. Null if unknown."
    )
    base_advantage: float | None = Field(
        None,
        description="If the base's training text is unknown: how many bits per byte the base is better on the first "
        "part of the training text than on the held-out text, beyond n-gram counts of the rest of the training text.",
    )
    base_advantage_error: float | None = Field(None, description="Standard error of base_advantage.")
    base_passages: int | None = Field(
        None,
        description="If the base's training text is unknown: passages of the first part of the training text that the "
        "base's first choices write word for word.",
    )
    base_held_out_passages: int | None = Field(None, description="The same of the held-out text.")
    warning: str | None = Field(None, description="What the base has seen, or has likely seen.")
    note: str | None = Field(None, description="Why a figure is missing, or that no warning does not mean unseen.")

    def rows(self) -> list[tuple[str, float | None, str]]:
        """Name, bits per byte and remark of each line of the table."""
        return [
            ("base", self.base_bits_per_byte, self.base),
            ("fine-tuned", self.tuned_bits_per_byte, "this run"),
            ("from scratch", self.scratch_bits_per_byte, self.scratch or "no run on this corpus yet"),
            ("n-gram floor", self.floor_bits_per_byte, "counts of the training text"),
        ]


class Report(Options):
    """The figures that `lm eval` prints and saves."""

    run: str = Field(description="Name of the run.")
    kind: str | None = Field(None, description="Kind of model, if it is not a network alone.")
    state: str = Field(description="Checkpoint: best, last or step-N.")
    step: int | None = Field(description="Optimizer step of the weights.")
    corpus: str = Field(description="Name of the text.")
    split: shared.Split
    text_sha256: shared.TextHash

    loss: float = Field(description="Nats per token: the sum of log-likelihoods over the number of tokens.")
    standard_error: float = Field(description="Standard error of the loss, if tokens are independent samples.")
    perplexity: float | None = Field(description="exp(loss), per token; comparable only between equal tokenizers.")
    perplexity_without_unknown: float | None = Field(
        None,
        description="exp(nats / tokens) of all tokens except the unknown token. KenLM calls it excluding OOVs.",
    )
    word_perplexity: float | None = Field(
        description="exp(nats / words). Null if the text has no words, or if the number is too large for a float."
    )
    word_eos_perplexity: float | None = Field(description="exp(nats / (words + lines)).")
    lm_eval_word_perplexity: float | None = Field(
        description="exp(nats / lm_eval_words): words as lm-evaluation-harness counts them."
    )
    bits_per_char: float | None = Field(
        description="Bits per character of the original text, with the spelling cost. Null if that cost is unknown."
    )
    bits_per_byte: float | None = Field(
        description="Bits per UTF-8 byte, with the spelling cost: comparable across all tokenizers. Null if the "
        "spelling cost is unknown."
    )
    token_bits_per_byte: float | None = Field(
        None, description="Bits per UTF-8 byte of the tokens alone, without the spelling cost."
    )
    spelling_nats: float | None = Field(
        None, description="Nats to spell unknown words and white space. Null if unknown."
    )
    spelling: str | None = Field(None, description="Rule of the spelling cost. Null if the cost is 0.")
    floor_loss: float | None = Field(None, description="Nats per token of n-gram counts of the training text.")
    floor_bits_per_byte: float | None = Field(None, description="floor_loss in bits per UTF-8 byte.")
    floor: str | None = Field(
        None, description="Name of the n-gram counts. Null if the training text is missing or contains this text."
    )
    training_overlap: float | None = Field(
        None,
        description="Share of this text that is also in the training text, in pieces of about 50 characters. Null if "
        "unknown.",
    )
    accuracy: float = Field(description="Share of tokens that were the model's first prediction.")
    top5_accuracy: float = Field(description="Share of tokens that were among the model's first five predictions.")

    tokens: shared.Tokens
    words: int = Field(description="Number of words: len(text.split()).")
    lines: shared.Lines
    lm_eval_words: int = Field(description="Number of words of lm-evaluation-harness: len(re.split(r'\\s+', text)).")
    characters: shared.Characters
    bytes: shared.Bytes
    unknown_tokens: shared.UnknownTokens
    unknown_nats: float | None = Field(None, description="Nats of the unknown tokens. The loss includes them.")
    unknown_rate: float = Field(description="unknown_tokens / tokens.")

    context: shared.Context
    convention: str = Field(EOS_CONVENTION, description="How words are counted.")
    notes: tuple[str, ...] = Field((), description="Facts that matter when figures are compared.")
    tokens_per_second: float = Field(description="Speed of this evaluation.")
    device: str = Field(description="Device of this evaluation.")
    precision: shared.Precision
    version: shared.Version
    context_tokens: int = Field(
        0, description="Tokens of conversations that are context alone. All other figures are of their answers."
    )
    fine_tuning: FineTuning | None = Field(
        None, description="Of a fine-tuned run: other runs and the base on the same text."
    )
    signature: str | None = Field(
        None, description="How the figure was measured, in one line: see lm.evaluation.signature."
    )

    def __repr_args__(self) -> Iterable[tuple[str, object]]:
        return ((name, getattr(self, name)) for name in _IN_REPR)

    @property
    def remembered(self) -> bool:
        """Whether too much of the text is in the training text, so that its figures show memorised text."""
        return (self.training_overlap or 0.0) > MAX_OVERLAP

    @property
    def misses_floor(self) -> bool:
        """Whether the n-gram floor predicts the same tokens better."""
        return self.floor_loss is not None and self.loss > self.floor_loss + FLOOR_MARGIN


def make_report(
    scores: Scores, counts: Counts, floor: Floor | None = None, *, spelling: str | None = None, **facts: object
) -> Report:
    """All figures from the sums.

    Args:
        scores: sums over the whole text; `scores.tokens` must be `counts.tokens`.
        counts: how long the text is in every unit.
        floor: of the same tokens; None if unknown.
        spelling: rule of `counts.spelling_nats`.
        facts: the other fields: what was measured, and where.
    """
    assert scores.tokens == counts.tokens, "every token is scored once"
    words_and_lines = counts.words + counts.lines
    known_tokens = scores.tokens - counts.unknown_tokens
    whole = counts.whole_nats(scores.nats)
    floor_loss = floor.loss if floor else None
    whole_floor = None if floor_loss is None else counts.whole_nats(floor_loss * counts.tokens)
    report = Report.model_validate(
        {
            "loss": scores.loss,
            "standard_error": scores.standard_error,
            "perplexity": _exp(scores.loss),
            "perplexity_without_unknown": _exp((scores.nats - scores.unknown_nats) / known_tokens)
            if known_tokens
            else None,
            "word_perplexity": _exp(scores.nats / counts.words) if counts.words else None,
            "word_eos_perplexity": _exp(scores.nats / words_and_lines) if words_and_lines else None,
            "lm_eval_word_perplexity": _exp(scores.nats / counts.lm_eval_words),
            "bits_per_char": _bits(whole, counts.characters),
            "bits_per_byte": _bits(whole, counts.bytes),
            "token_bits_per_byte": _bits(scores.nats, counts.bytes),
            "spelling_nats": None if whole is None else counts.spelling_nats,
            "spelling": spelling if whole is not None and counts.spelling_nats else None,
            "floor_loss": floor_loss,
            "floor_bits_per_byte": _bits(whole_floor, counts.bytes),
            "floor": floor.sentence if floor else None,
            "training_overlap": floor.overlap if floor else None,
            "accuracy": scores.top1 / scores.tokens,
            "top5_accuracy": scores.top5 / scores.tokens,
            **{name: getattr(counts, name) for name in _COUNTS},
            "unknown_nats": scores.unknown_nats,
            "unknown_rate": counts.unknown_tokens / counts.tokens,
            "context": scores.context,
            "tokens_per_second": scores.tokens / max(scores.seconds, 1e-9),
            **facts,
        }
    )
    return report.model_copy(update={"notes": tuple(_notes(report, counts))})


def _notes(report: Report, counts: Counts) -> Iterator[str]:
    # Imported only here: it loads numpy, which reading a report does not need.
    from lm.corpora.leaks import WINDOW_CHARACTERS, is_leak

    if counts.spelling_nats is None:
        yield f"{NOT_MEASURED} To measure it, run this where the text is: lm eval {report.run}."
    elif report.spelling_nats is None:
        yield (
            "Symbols outside the vocabulary were left out, so the tokens do not determine the text. There are no bits "
            "per byte and per character."
        )
    if report.unknown_tokens:
        yield (
            f"{report.unknown_tokens:,} of the tokens are the unknown token and are scored as such. Loss, perplexities "
            "and accuracies do not include the words they replace; bits per byte and per character do."
        )
    if report.spelling and report.token_bits_per_byte is not None and report.bits_per_byte is not None:
        share = report.bits_per_byte - report.token_bits_per_byte
        if share >= MIN_NOTED_BITS:
            yield (
                f"Bits per byte and per character include a spelling cost of {share:.4f} bits per byte: "
                f"{report.spelling}."
            )
    if report.remembered:
        yield f"About {100 * (report.training_overlap or 0):.0f} % of this text {REMEMBERED}"
    elif is_leak(report.training_overlap or 0.0, report.characters // WINDOW_CHARACTERS):
        yield f"{report.training_overlap:.1%} of this text also stands in the training text: its figures are too good."
    if report.misses_floor:
        figures = report.floor_bits_per_byte, report.bits_per_byte, "bits per byte"
        if report.bits_per_byte is None:
            figures = report.floor_loss, report.loss, "nats per token"
        yield (
            f"The model does not beat the floor: {report.floor}, predict these tokens better "
            f"({figures[0]:.4f} {figures[2]}, the model {figures[1]:.4f})."
        )


def as_measured_now(report: dict[str, Any], *, lossless: bool) -> dict[str, Any]:
    """A saved report with the current fields.

    An older Inkling gave the bits of the tokens alone. If the tokens do not determine the text, these are not
    comparable across tokenizers: such figures become null and a note asks for a new measurement.

    Args:
        report: as it was saved.
        lossless: whether the run's tokens, except unknown symbols, determine the text.
    """
    if "spelling_nats" in report:
        return report
    now = {"token_bits_per_byte": report["bits_per_byte"], "spelling_nats": 0.0, "spelling": None}
    if not lossless or report["unknown_tokens"]:
        again = f"{NOT_MEASURED} Measure again: lm eval {report.get('run')} --split {report.get('split')}."
        now |= {
            "spelling_nats": None, "bits_per_byte": None, "bits_per_char": None, "floor_bits_per_byte": None,
            "notes": [*report["notes"], again],
        }  # fmt: skip
    return report | now


def bits_per_byte(report: Report, loss: float) -> float | None:
    """Bits per byte of the report's text at another loss, with the same spelling cost; None if that is unknown."""
    spelling = report.spelling_nats
    return _bits(None if spelling is None else loss * report.tokens + spelling, report.bytes)


def _bits(nats: float | None, count: int) -> float | None:
    return None if nats is None else nats / math.log(2) / max(count, 1)


def _exp(nats: float) -> float | None:
    """exp, or None if it exceeds a float, as for a text without white space, which is one word of many nats."""
    return math.exp(nats) if nats < 709 else None
