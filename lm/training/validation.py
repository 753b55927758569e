"""Validation during training: the loss of the current weights on a split."""

from __future__ import annotations

from collections.abc import Callable

from lm.corpora.answers import Marks
from lm.evaluation.perplexity import Scores, score
from lm.tokenizers.base import Ids
from lm.training.train_step import TrainStep

VALIDATION_ROWS = 64
"""Parts of the split that are read as one batch; reports read the split as one row."""
VALIDATION_WARM_UP = 256
"""Tokens before its part that a row reads first: then the loss is within 0.005 nats of the report's."""


def validate(
    step: TrainStep, ids: Ids, *, marks: Marks | None = None, progress: Callable[[int, int], None] | None = None
) -> Scores:
    """The scores of all processes together, with averaged weights if there is an average.

    Args:
        step: whose model is scored.
        ids: (N + 1,) a token, then the N scored ones.
        marks: (N + 1,) of conversations, whose answers alone are scored.
        progress: called with tokens scored and N.
    """
    with step.averaged(), step.mixed.computing():
        scores = score(
            step.model, ids, precision=None, rows=VALIDATION_ROWS, warm_up=VALIDATION_WARM_UP, share=step.world.share,
            progress=progress, marks=marks,
        )  # fmt: skip
    return step.world.sum_scores(scores)
