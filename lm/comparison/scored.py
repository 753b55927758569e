"""A run scored on a text: the nats of each byte, and what the verdict needs to know. Needs torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from lm.comparison.bootstrap import Floats
from lm.comparison.byte_nats import bits, byte_nats
from lm.comparison.seeds import configuration
from lm.comparison.verdict import Facts
from lm.corpora import PreparedCorpus, TokenSplit, encode_text
from lm.device import TO_USE, Precision, enough_memory
from lm.errors import TokenizerError
from lm.evaluation.floor import overlap
from lm.evaluation.perplexity import score
from lm.runs.run import Run
from lm.spelling import spelling_rule


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
    text: str,
    *,
    name: str,
    prepared: PreparedCorpus | None,
    own_split: bool,
    precision: Precision = "fp32",
    progress: Callable[[int, int], None] | None = None,
) -> ScoredRun:
    """Score a run on a text as `lm eval` does.

    Args:
        run: the run.
        label: its name in the comparison.
        text: the whole text.
        name: of the text, for errors.
        prepared: the run's training text; None if it is not here.
        own_split: see `Facts`.
        precision: of the matrix products.
        progress: called with tokens done and tokens in all.

    Raises:
        CorpusError: the text has no token.
    """
    tokenizer = run.tokenizer
    part = encode_text(name, text, tokenizer)
    parts: list[Floats] = []
    with enough_memory(TO_USE):
        scores = score(run.model, part.ids, precision=precision, progress=progress, each=parts.append)
    whole = part.counts.whole_nats(scores.nats)
    nats = None
    if whole is not None:
        try:
            nats = byte_nats(tokenizer, text, part.ids[1:], np.concatenate(parts))
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
        context=scores.context,
        precision=precision,
        training_overlap=None if prepared is None else _overlap(prepared, part),
        own_split=own_split,
    )
    key = configuration(run.config, run.record, run.checkpoint)
    return ScoredRun(
        facts, nats, part, scores.nats, key, run.config.training.seed, int(run.record["parameters"])
    )  # fmt: skip


def _overlap(prepared: PreparedCorpus, part: TokenSplit) -> float:
    return 1.0 if prepared.splits["train"].sha256 == part.sha256 else overlap(prepared, part)
