"""What a plan is likely to end at, told before it begins.

How far a network gets beyond n-gram counts of the text that it reads (`lm.models.kneser_ney`) depends less on the text
than on how many tokens it trains on. So the share of those counts' loss that recorded runs of a preset
ended at, times the counts' loss on the text at hand, says about where a run of that preset will end.

Counted is what the run will read: of a text that is longer than the run, as much of each row of its batches.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from math import log

import numpy as np

from lm.config import RunConfig, compose
from lm.corpora import PreparedCorpus
from lm.jobs.autoconfig import LONG_CHARACTERS, MIDDLE_CHARACTERS
from lm.models.kneser_ney import count_text
from lm.tokenizers.base import Ids
from lm.training.plan import Plan

Curves = Mapping[str, tuple[tuple[int, float, float], ...]]

RECORDED: Curves = {
    "gru-char-small": (
        (370_000, 1.01, 1.13), (800_000, 0.975, 1.075), (2_200_000, 0.945, 1.05), (4_900_000, 0.915, 1.05),
        (8_600_000, 0.91, 1.05),
    ),
    "gru-char": (
        (1_200_000, 0.925, 1.17), (2_500_000, 0.925, 1.08), (4_500_000, 0.9, 1.05), (11_000_000, 0.9, 1.005),
        (22_000_000, 0.9, 0.995), (39_000_000, 0.9, 0.96),
    ),
    "gru-char-large": (
        (1_100_000, 0.95, 1.235), (2_300_000, 0.945, 1.14), (5_500_000, 0.895, 1.06), (11_000_000, 0.89, 1.01),
        (28_000_000, 0.875, 0.98),
    ),
    "gru-subword-small": (
        (400_000, 0.965, 1.065), (1_200_000, 0.885, 1.02), (2_700_000, 0.83, 1.0), (6_000_000, 0.8, 0.965),
        (30_000_000, 0.74, 0.915),
    ),
    "gru-subword-medium": ((3_400_000, 0.8, 0.98), (19_000_000, 0.74, 0.9)),
    "gru-subword": ((300_000, 1.05, 1.16), (1_000_000, 0.9, 1.105), (3_000_000, 0.9, 1.07)),
}  # fmt: skip
"""By preset: trained tokens, and the least and the most share of the counts' loss that runs of that length ended at,
with a margin of about 0.015 around the texts of docs/recipes.md; by subwords these are few and differ more."""
RECORDED_MIDDLE: Curves = {"gru-char": ((11_000_000, 0.865, 1.03), (35_000_000, 0.85, 0.985))}
"""The same, by characters of a training text from `MIDDLE_CHARACTERS` to `LONG_CHARACTERS`."""
LENGTH = {
    "max_steps", "epochs", "minutes", "patience", "evaluate_every", "validation_tokens", "log_every", "seed", "device",
    "checkpoint_every", "checkpoint_epochs", "keep_checkpoints", "log_activations", "sample_tokens",
    "devices", "timeout_seconds",
}  # fmt: skip
"""Training options that do not change what a step learns."""
ORDERS = {"char": 7, "subword": 3}
"""Of the n-grams that are counted: of subwords about as far back in characters, or text that repeats itself at length
would be told what only counts know by heart."""
MOST_COUNTED = 3_000_000
"""Tokens that are counted, and at most scored, before the run begins: a second or so."""


def expected_loss(config: RunConfig, corpus: PreparedCorpus, plan: Plan, tokens: int) -> tuple[float, float] | None:
    """The least and the most validation loss, in nats per token, that a run is expected to end at.

    Args:
        config: of the run.
        corpus: its text.
        plan: its length.
        tokens: that the plan comes to.

    Returns:
        None where no runs of such options and length were recorded.
    """
    train, valid = corpus.splits["train"], corpus.splits["valid"]
    characters = len(train.ids) if config.tokenizer.type == "char" else 0
    curves = RECORDED_MIDDLE if characters > MIDDLE_CHARACTERS else RECORDED
    share = expected_share(config.preset or "", tokens, curves)
    if share is None or train.sha256 == valid.sha256 or characters > LONG_CHARACTERS:
        return None
    usual = compose(config.corpus.source, preset=config.preset or "")
    changed = {
        name for name, value in config.training.model_dump().items() if value != getattr(usual.training, name)
    } - LENGTH
    if changed or config.model != usual.model or config.tokenizer != usual.tokenizer:
        return None
    scored = min(plan.validation_tokens or MOST_COUNTED, MOST_COUNTED)
    read = read_first(train.ids, config.training.batch_size, min(tokens, MOST_COUNTED))
    counts = count_text(read, order=ORDERS[config.tokenizer.type], vocab_size=corpus.tokenizer.vocab_size)
    loss = -float(np.mean(counts.log_probabilities_of(valid.ids[: scored + 1])))
    return share[0] * loss, share[1] * loss


def read_first(ids: Ids, rows: int, tokens: int) -> Ids:
    """The start token, and the first tokens that training reads of a text in so many rows (`StreamBatches`)."""
    length = (len(ids) - 1) // rows
    columns = min(length, -(-tokens // rows))
    return np.concatenate([ids[:1], *(ids[begin : begin + columns] for begin in range(1, 1 + rows * length, length))])


def expected_share(preset: str, tokens: int, recorded: Curves = RECORDED) -> tuple[float, float] | None:
    """Of the counts' loss, between the recorded lengths and up to twice the longest; None elsewhere."""
    curve = recorded.get(preset, ())
    for (few, *before), (many, *after) in pairwise(curve):
        if few <= tokens <= many:
            way = log(tokens / few) / log(many / few)
            least, most = (one + way * (other - one) for one, other in zip(before, after, strict=True))
            return least, most
    if curve and curve[-1][0] < tokens <= 2 * curve[-1][0]:
        return curve[-1][1:]
    return None
