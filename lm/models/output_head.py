"""Output layers: from hidden vectors to the distribution of the next token, and to its loss.

    full        logits = W h + b                                 W is a matrix of its own, or the embedding (tied)
    adaptive    p(token) = p(frequent token), or p(tail) · p(token in tail)          tokens are numbered by frequency

An adaptive softmax cuts the vocabulary at `adaptive_cutoffs`: tokens below the first cut and one entry for each tail
make up the head, and a tail is computed for those positions alone whose target lies in it. With cuts at 2,000 and
10,000, a word of WikiText-2 costs about a seventh of the full softmax in training. All rows keep their full width, so
that the matrix can be the embedding as well. Evaluation and sampling see the whole distribution, which is exact.

The loss of a large vocabulary is computed in chunks, forward and backward together: (B, T, V) logits never stand in
memory as a whole.

Shapes: N positions, V vocabulary, E width of the output matrix, K tails.

Sources: Grave et al. 2017 (adaptive softmax); Press and Wolf 2017 (tied weights).
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor, nn

from lm.config import listed
from lm.kernels.training import entropies, in_its_format, linear, product, stays_in_fp32, usable
from lm.models.base import ModelOptions, cross_entropies
from lm.models.profiled_parts import LOSS, OUTPUT_AND_LOSS, part

LOGITS_AT_ONCE = 1 << 23
"""Logits that a training step may hold at a time; a step of fewer keeps them all."""

ZIPF_SHIFT = 2.7


class HeadOptions(ModelOptions):
    """Options of the output layer."""

    tie_weights: bool = Field(
        False, description="Use the embedding as output layer; a projection is added where its width is another."
    )
    adaptive_cutoffs: tuple[int, ...] = Field(
        (),
        description="Adaptive softmax: where the vocabulary is cut into frequent tokens and tails, such as 2000,10000; "
        "for large vocabularies numbered by frequency, as the word tokenizer's; cuts beyond the vocabulary are left "
        "out. Default: the full softmax.",
    )

    @field_validator("adaptive_cutoffs", mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        return listed(value)

    @field_validator("adaptive_cutoffs")
    @classmethod
    def _rising(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if any(left >= right for left, right in pairwise((0, *value))):
            raise ValueError("give rising numbers of tokens, such as 2000,10000")
        return value


class Tails(nn.Module):
    """What an adaptive softmax adds to a full one: an entry for each tail beside the frequent tokens."""

    def __init__(self, cutoffs: tuple[int, ...], width: int) -> None:
        super().__init__()
        self.cutoffs = cutoffs
        self.weight = nn.Parameter(torch.empty(len(cutoffs), width).uniform_(-(width**-0.5), width**-0.5))
        self.bias = nn.Parameter(torch.zeros(len(cutoffs)))

    def begin_at_zipf(self, bias: Tensor) -> None:
        """Set the biases to Zipf's law with Mandelbrot's shift: p(token of rank r) ~ 1 / (r + 2.7), ranks from 0.

        On WikiText-2 this is a tenth of a nat from the unigram, which a bias would take hundreds of steps to learn.
        """
        logits = -torch.log(torch.arange(len(bias)) + ZIPF_SHIFT)
        bounds = pairwise((*self.cutoffs, len(bias)))
        with torch.no_grad():
            bias.copy_(logits)
            self.bias.copy_(torch.stack([logits[begin:end].logsumexp(dim=0) for begin, end in bounds]))


def make_tails(options: HeadOptions, vocab_size: int, width: int, bias: Tensor | None) -> Tails | None:
    """The tails that the options ask for and the vocabulary has; the output matrix is `width` wide."""
    cutoffs = tuple(cut for cut in options.adaptive_cutoffs if cut < vocab_size)
    if not cutoffs:
        return None
    tails = Tails(cutoffs, width)
    if bias is not None:
        tails.begin_at_zipf(bias)
    return tails


def output_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, tails: Tails | None, *, added: Tensor | None = None
) -> Tensor:
    """(..., E) → (..., V): logits, which under tails are log-probabilities, with those of context tables `added`."""
    logits = linear(hidden, weight, bias)
    if added is not None:
        logits = logits + added
    if tails is None:
        return logits
    entries = in_its_format(tails.weight, F.linear, hidden, tails.weight, tails.bias).float()
    frequent, *parts = logits.float().tensor_split(tails.cutoffs, dim=-1)
    head = torch.cat([frequent, entries], dim=-1).log_softmax(dim=-1)
    first = tails.cutoffs[0]
    within = [head[..., first + k, None] + part.log_softmax(dim=-1) for k, part in enumerate(parts)]
    return torch.cat([head[..., :first], *within], dim=-1)


def output_loss(
    hidden: Tensor,
    targets: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tails: Tails | None,
    *,
    added: Tensor | None = None,
    label_smoothing: float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The loss of a training step: from all logits, or by `mean_nats` where that saves work.

    Args:
        hidden: (B, T, E).
        targets: (B, T) int64.
        weight: (V, E).
        bias: (V,), or None.
        tails: of an adaptive softmax.
        added: (B, T, V) that context tables add to the logits.
        label_smoothing: probability mass of the objective that is spread over all tokens.
        dtype: that softmax and loss are computed in.

    Returns:
        What is minimised, nats per token without gradient, and the logits (B, T, V) without gradient where they were
        made.
    """
    if added is None and label_smoothing == 0 and (tails is not None or targets.numel() * len(weight) > LOGITS_AT_ONCE):
        objective = part(OUTPUT_AND_LOSS, mean_nats, hidden, targets, weight, bias, tails, dtype=dtype)
        return objective, objective.detach(), None
    logits = part("output", output_logits, hidden, weight, bias, tails, added=added)
    return *part(LOSS, cross_entropies, logits, targets, label_smoothing, dtype), logits.detach()


def mean_nats(
    hidden: Tensor,
    targets: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tails: Tails | None,
    *,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The mean loss in nats, equal to the cross-entropy of `output_logits`, which is never made.

    Args:
        hidden: (..., E).
        targets: (...) int64.
        weight: (V, E).
        bias: (V,), or None.
        tails: of an adaptive softmax.
        dtype: that softmax and loss are computed in.

    Returns:
        A scalar in fp32. Its gradients are computed along with it, and only once.
    """
    bias = weight.new_zeros(len(weight)) if bias is None else bias
    entries = (weight[:0].detach(), bias[:0].detach()) if tails is None else (tails.weight, tails.bias)
    cutoffs = () if tails is None else tails.cutoffs
    apply: Any = _MeanNats.apply
    loss: Tensor = apply(hidden.flatten(0, -2), targets.flatten(), cutoffs, dtype, weight, bias, *entries)
    return loss


class _MeanNats(torch.autograd.Function):
    """The loss and all its gradients in one go, so that no logits are kept for the way back."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        targets: Tensor,
        cutoffs: tuple[int, ...],
        dtype: torch.dtype,
        weight: Tensor,
        bias: Tensor,
        entry_weight: Tensor,
        entry_bias: Tensor,
    ) -> Tensor:
        device = hidden.device.type
        # Matrix products run in the format of autocast, or of the weights; everything else in `dtype`.
        low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        if stays_in_fp32(weight):
            low = torch.float32
        bounds = *cutoffs, len(weight)
        first = bounds[0]
        with torch.autocast(device, enabled=False):
            vectors = hidden.to(low)
            grads = [_zeros(each) for each in (hidden, weight, bias, entry_weight, entry_bias)]
            grad_hidden, grad_weight, grad_bias, grad_entry_weight, grad_entry_bias = grads
            tail = torch.bucketize(targets, torch.tensor(cutoffs, dtype=torch.int64, device=targets.device), right=True)
            wanted = torch.where(tail == 0, targets, first - 1 + tail)
            head = torch.cat([weight[:first], entry_weight]), torch.cat([bias[:first], entry_bias])
            sums = _zeros(head[0]), _zeros(head[1])
            nats = _softmax(vectors, wanted, head, grad_hidden, sums, dtype)
            grad_weight[:first], grad_entry_weight[:] = sums[0][:first], sums[0][first:]
            grad_bias[:first], grad_entry_bias[:] = sums[1][:first], sums[1][first:]
            for number, (begin, end) in enumerate(pairwise(bounds), start=1):
                rows = (tail == number).nonzero()[:, 0]
                own = vectors[rows]
                back = _zeros(own)
                layer, into = (weight[begin:end], bias[begin:end]), (grad_weight[begin:end], grad_bias[begin:end])
                nats += _softmax(own, targets[rows] - begin, layer, back, into, dtype)
                grad_hidden.index_add_(0, rows, back)
        ctx.count, ctx.grads = len(targets), grads
        return nats / len(targets)

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> Any:
        hidden, *weights = (grad.mul_(outer / ctx.count) for grad in ctx.grads)
        del ctx.grads
        return hidden, None, None, None, *weights


def _zeros(like: Tensor) -> Tensor:
    return torch.zeros_like(like, dtype=torch.float32)


def _softmax(
    vectors: Tensor,
    targets: Tensor,
    layer: tuple[Tensor, Tensor],
    grad_vectors: Tensor,
    grad_layer: tuple[Tensor, Tensor],
    dtype: torch.dtype,
) -> Tensor:
    """The summed loss of one softmax layer; its gradients are added to what `grad_vectors` and `grad_layer` hold."""
    weight, bias = layer[0].to(vectors.dtype), layer[1]
    grad_weight, grad_bias = grad_layer
    nats = torch.zeros((), device=vectors.device)
    at_once = max(1, LOGITS_AT_ONCE // len(weight))
    native = dtype == torch.float32 and usable("entropy", vectors)
    for begin in range(0, len(vectors), at_once):
        piece = slice(begin, begin + at_once)
        if native:
            logits = product(vectors[piece], weight.T, bias=bias)
            nats += entropies(logits, targets[piece], into=logits, d_bias=grad_bias).sum()
            product(logits.T, vectors[piece], into=grad_weight)
            product(logits, weight, into=grad_vectors[piece])
            continue
        logits = F.linear(vectors[piece], weight).to(dtype).add_(bias)
        logs = logits.log_softmax(dim=1)
        index = targets[piece, None]
        nats -= logs.gather(1, index).sum(dtype=torch.float32)
        # The gradient of the logits is the distribution, less one at the target.
        slope = logs.exp_().scatter_add_(1, index, logs.new_full(index.shape, -1.0))
        grad_bias += slope.sum(dim=0)
        slope = slope.to(vectors.dtype)
        grad_weight += slope.T @ vectors[piece]
        grad_vectors[piece] += slope @ weight
    return nats
