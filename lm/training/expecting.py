"""What a plan is likely to end at, told before it begins.

How far a network gets beyond counts of the same text (`lm.evaluation.floor`) depends little on the text and much on
how many tokens it trains on. So the share of the floor's loss that recorded runs of a preset ended at, times the floor
of the text at hand, says about where a run of that preset will end.
"""

from __future__ import annotations

from itertools import pairwise
from math import log

from lm.config import RunConfig, compose
from lm.corpora import PreparedCorpus
from lm.evaluation.floor import find_floor
from lm.training.plan import Plan

RECORDED: dict[str, tuple[tuple[int, float, float], ...]] = {
    "gru-char-small": (
        (370_000, 1.11, 1.22), (1_500_000, 0.97, 1.06), (4_900_000, 0.955, 0.98), (8_600_000, 0.95, 0.975),
    ),
    "gru-char": (
        (4_100_000, 0.93, 1.0), (11_000_000, 0.925, 0.965), (22_000_000, 0.92, 0.95), (39_000_000, 0.915, 0.945),
    ),
}  # fmt: skip
"""By preset: trained tokens, and the least and the most share of the floor's loss that runs of that length ended at,
over tiny-shakespeare, the built-in corpus and Python source, with a margin of about 0.015; see docs/recipes.md."""
LENGTH = {
    "max_steps", "epochs", "minutes", "patience", "evaluate_every", "validation_tokens", "log_every", "seed", "device",
    "checkpoint_every", "checkpoint_epochs", "keep_checkpoints", "log_activations", "sample_tokens",
    "devices", "timeout_seconds",
}  # fmt: skip
"""Training options that do not change what a step learns."""
MOST_COUNTED = 3_000_000
"""Training tokens up to which the floor is counted before the run begins: two seconds."""


def expected_loss(config: RunConfig, corpus: PreparedCorpus, plan: Plan, tokens: int) -> tuple[float, float] | None:
    """The least and the most validation loss, in nats per token, that a run is expected to end at.

    Args:
        config: of the run.
        corpus: its text.
        plan: its length.
        tokens: that the plan comes to.

    Returns:
        None where no runs of such options and length were recorded, or the text is too long to be counted first.
    """
    share = expected_share(config.preset or "", tokens)
    if share is None or len(corpus.splits["train"].ids) > MOST_COUNTED or plan.validation_tokens is not None:
        return None
    usual = compose(config.corpus.source, preset=config.preset or "")
    changed = {
        name for name, value in config.training.model_dump().items() if value != getattr(usual.training, name)
    } - LENGTH
    if changed or config.model != usual.model or config.tokenizer != usual.tokenizer:
        return None
    floor = find_floor(corpus, corpus.splits["valid"])
    return None if floor is None else (share[0] * floor.loss, share[1] * floor.loss)


def expected_share(preset: str, tokens: int) -> tuple[float, float] | None:
    """Of the floor's loss, between the recorded lengths and up to twice the longest; None elsewhere."""
    curve = RECORDED.get(preset, ())
    for (few, *before), (many, *after) in pairwise(curve):
        if few <= tokens <= many:
            way = log(tokens / few) / log(many / few)
            least, most = (one + way * (other - one) for one, other in zip(before, after, strict=True))
            return least, most
    if curve and curve[-1][0] < tokens <= 2 * curve[-1][0]:
        return curve[-1][1:]
    return None
