"""A run scored on a text: the nats of each byte, and what the verdict needs to know. Needs torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from lm.comparison.bootstrap import Floats
from lm.comparison.byte_nats import bits
from lm.comparison.compared_text import ComparedText
from lm.comparison.seeds import configuration
from lm.comparison.verdict import Facts
from lm.corpora import PreparedCorpus, TokenSplit
from lm.device import TO_USE, Precision, enough_memory
from lm.errors import TokenizerError
from lm.evaluation.floor import overlap
from lm.evaluation.perplexity import score
from lm.runs.run import Run
from lm.spelling import spelling_rule
from lm.tokenizers.base import Tokenizer


@dataclass(frozen=True, eq=False)
class ScoredRun:
    """A run with the nats of each byte of a text."""

    facts: Facts
    nats: Floats | None
    """(B,) of each byte, spelling cost included; None if symbols were left out."""
    part: TokenSplit
    token_nats: float
    """Sum over the tokens."""
    configuration: str
    """Equal for runs that differ by their seed alone."""
    seed: int
    parameters: int


def score_run(
    run: Run,
    label: str,
    text: ComparedText,
    *,
    name: str,
    prepared: PreparedCorpus | None,
    own_split: bool,
    reads_answers: bool | None = None,
    precision: Precision = "fp32",
    progress: Callable[[int, int], None] | None = None,
) -> ScoredRun:
    """Score a run on a text as `lm eval` does.

    Args:
        run: the run.
        label: its name in the comparison.
        text: the whole text, or conversations.
        name: of the text, for errors.
        prepared: the run's training text; None if it is not here.
        own_split, reads_answers: see `Facts`.
        precision: of the matrix products.
        progress: called with tokens done and tokens in all.

    Raises:
        CorpusError: the text has no token.
    """
    tokenizer = run.tokenizer
    part = text.encode(name, tokenizer)
    parts: list[Floats] = []
    with enough_memory(TO_USE):
        scores = score(
            run.model, part.ids, marks=part.marks, precision=precision, progress=progress, each=parts.append
        )  # fmt: skip
    whole = part.counts.whole_nats(scores.nats)
    nats = None
    if whole is not None:
        try:
            nats = text.byte_nats(tokenizer, part, np.concatenate(parts))
        except TokenizerError:
            whole = None
    spelling = None if whole is None else (part.counts.spelling_nats or 0.0)
    facts = Facts(
        run=label,
        text_sha256=part.sha256,
        bits_per_byte=None if whole is None else bits(whole, part.counts.bytes),
        tokenizer=tokenizer.type,
        tokenizer_sha256=tokenizer.sha256,
        unknown_tokens=part.counts.unknown_tokens,
        unknown_policy=tokenizer.options.unknown,
        spelling_bits_per_byte=None if spelling is None else bits(spelling, part.counts.bytes),
        spelling_rule=spelling_rule(tokenizer),
        context=scores.context if part.marks is None else _turns(tokenizer),
        precision=precision,
        training_overlap=None if prepared is None else _overlap(prepared, part),
        own_split=own_split,
        reads_answers=reads_answers,
    )
    key = configuration(run.config, run.record, run.checkpoint)
    return ScoredRun(
        facts, nats, part, scores.nats, key, run.config.training.seed, int(run.record["parameters"])
    )  # fmt: skip


def _turns(tokenizer: Tokenizer) -> str:
    """The context rule of conversations; it does not depend on their tokens, which differ between runs."""
    turns = "as plain turns" if tokenizer.chat_template is None else "by its chat template"
    return f"each conversation by itself, {turns}"


def _overlap(prepared: PreparedCorpus, part: TokenSplit) -> float:
    return 1.0 if prepared.splits["train"].sha256 == part.sha256 else overlap(prepared, part)
