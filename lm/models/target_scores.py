"""Nats and ranks of the targets of a text: what an evaluation needs of a model's predictions.

N tokens, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_RANK = 5
"""Ranks on the CPU stop here: reports have the shares of the first 1 and of the first 5."""


class TargetScores(NamedTuple):
    """The scores of N targets."""

    nats: Tensor
    """(N,) float32: minus the natural logarithms of their probabilities."""
    ranks: Tensor
    """(N,) int64: the tokens with a greater logit, or an equal one and a lower id; on the CPU at most `MAX_RANK`."""


def scores_of(logits: Tensor, targets: Tensor) -> TargetScores:
    """The scores of targets (N,) by their logits (N, V)."""
    logits = logits.float()
    own = logits.gather(1, targets[:, None])
    return TargetScores(F.cross_entropy(logits, targets, reduction="none"), tokens_before(logits, own, targets))


def tokens_before(logits: Tensor, own: Tensor, targets: Tensor) -> Tensor:
    """The number (N,) of columns of logits (N, V) before the target, whose logit is `own` (N, 1).

    That is a greater logit, or an equal one and a lower column. On the CPU at most `MAX_RANK`. Targets may be outside
    0 … V - 1: then only their order counts.
    """
    columns = logits.shape[1]
    if not logits.is_cpu:
        # More work than below, but the host need not wait for the number of ties.
        lower = torch.arange(columns, device=logits.device) < targets[:, None]
        return ((logits > own) | ((logits == own) & lower)).sum(dim=1)
    first = logits.topk(min(MAX_RANK, columns), dim=1).values
    before = (first > own).sum(dim=1)
    is_column = (targets >= 0) & (targets < columns)
    is_equal = first == own
    tied = ((is_equal.sum(dim=1) > is_column) | is_equal[:, -1]).nonzero()[:, 0]
    if len(tied):
        lower = torch.arange(columns) < targets[tied, None]
        before[tied] += ((logits[tied] == own[tied]) & lower).sum(dim=1)
    return before.clamp_(max=MAX_RANK)
