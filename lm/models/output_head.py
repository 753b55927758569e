"""The output layer: from hidden vectors to logits and loss.

    full        logits = W h + b                                 W is a separate matrix, or the embedding (tied)
    adaptive    p(token) = p(frequent token), or p(tail) · p(token | tail)       tokens are numbered by frequency

An adaptive softmax cuts the vocabulary at `adaptive_cutoffs`. The first softmax is over the tokens below the first cut
and one entry for each tail. Training computes a tail only at positions whose target is in it. With cuts at 2,000 and
10,000, a word of WikiText-2 costs about a seventh of the full softmax. All rows have the full width, so that the matrix
can be the embedding. Evaluation and sampling compute the exact distribution over all tokens.

The loss of a large vocabulary is computed in chunks, forward and backward together, so that the logits (B, T, V) are
never in memory as a whole.

On a GPU the host must not wait for the number of positions in a tail. The host makes the batches, so it lists these
positions itself (`tail_positions`), padded to a few sizes. Then shapes seldom change, and the padding costs 8 % more
work. All tails at all positions would need no list, but five times the work.

Shapes: B batch, T time, N positions, V vocabulary, E width of the output matrix, K tails.

Sources: Grave et al. 2017 (adaptive softmax); Press and Wolf 2017 (tied weights).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from pydantic import BeforeValidator, Field, field_validator
from torch import Tensor, nn

from lm.config import listed
from lm.kernels.autograd import apply, entropies, linear, product
from lm.kernels.dispatch import in_its_format, isa_and_threads, keep_in_fp32, stays_in_fp32, usable
from lm.models.base import ModelOptions, State, TrainingLoss, at_places, cross_entropies, scored_part
from lm.models.contributions import Contributions, head_contributions, log_terms
from lm.models.layout import Shape, Stage
from lm.models.profiled_parts import LOSS, OUTPUT_AND_LOSS, run_part
from lm.models.target_scores import MAX_RANK, TargetScores, scores_of, tokens_before

MAX_LOGITS, MAX_GPU_LOGITS = 1 << 23, 1 << 28
"""Logits that a training step may hold at a time; a step with fewer computes them all at once. A CPU is fast with few;
a GPU needs large products."""
SCORED_LOGITS = 1 << 22
"""Logits of a tail that an evaluation on a CPU computes at once: the C library gives larger memory back each time."""
POSITION_SIZES = 32
"""A list of positions is padded to a multiple of this share of the batch."""

ZIPF_SHIFT = 2.7
TAIL = "tail"
"""Of the names of host inputs: "tail 1", …"""


class HeadOptions(ModelOptions):
    """Options of the output layer."""

    tie_weights: bool = Field(
        False,
        description="Use the embedding as output matrix; a projection is added if the hidden size differs from its "
        "width.",
    )
    adaptive_cutoffs: Annotated[tuple[int, ...], BeforeValidator(listed)] = Field(
        (),
        description="Adaptive softmax: numbers of frequent tokens at which the vocabulary is cut into tails, such as "
        "2000,10000. For large vocabularies numbered by frequency, as the word tokenizer's. Cuts beyond the vocabulary "
        "are ignored. Default: full softmax.",
    )

    @field_validator("adaptive_cutoffs")
    @classmethod
    def _rising(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if any(left >= right for left, right in pairwise((0, *value))):
            raise ValueError("give rising numbers of tokens, such as 2000,10000")
        return value


class Tails(nn.Module):
    """The entries of the tails in the first softmax of an adaptive one: weight (K, E) and bias (K,)."""

    optimizer_kind = "adamw"

    def __init__(self, cutoffs: tuple[int, ...], width: int) -> None:
        super().__init__()
        self.cutoffs = cutoffs
        self.weight = nn.Parameter(torch.empty(len(cutoffs), width).uniform_(-(width**-0.5), width**-0.5))
        self.bias = nn.Parameter(torch.zeros(len(cutoffs)))

    def init_biases_by_zipf(self, bias: Tensor) -> None:
        """Set both biases to the Zipf-Mandelbrot law: p(token of rank r) ~ 1 / (r + 2.7), ranks from 0.

        On WikiText-2 this is 0.1 nats from the unigram distribution, which a bias needs hundreds of steps to learn.
        """
        logits = -torch.log(torch.arange(len(bias)) + ZIPF_SHIFT)
        bounds = pairwise((*self.cutoffs, len(bias)))
        with torch.no_grad():
            bias.copy_(logits)
            self.bias.copy_(torch.stack([logits[begin:end].logsumexp(dim=0) for begin, end in bounds]))


def make_tails(options: HeadOptions, vocab_size: int, width: int, bias: Tensor | None = None) -> Tails | None:
    """The tails of an output matrix of this width; also initialises the output bias (V,). None for a full softmax."""
    cutoffs = tuple(cut for cut in options.adaptive_cutoffs if cut < vocab_size)
    if not cutoffs:
        return None
    tails = Tails(cutoffs, width)
    if bias is not None:
        tails.init_biases_by_zipf(bias)
    return tails


def output_stage(parameters: dict[str, Shape], width: str, tails: Tails | None, *, shares: str | None) -> Stage:
    """The stage of an output layer; see `LanguageModel.layout`.

    Args:
        parameters: its own ones, without those of the tails.
        width: the symbol of E.
        tails: of an adaptive softmax.
        shares: name of the embedding that is the output matrix; None: it has its own.
    """
    products = [("B·T", width, "V")]
    formula = f"W h + b, W = {shares}" if shares else "W h + b"
    if tails is not None:
        parameters = {**parameters, "tails.weight": ("K", width), "tails.bias": ("K",)}
        products.append(("B·T", width, "K"))
        formula = f"log-probabilities of {formula}, by tails"
    return Stage("output", formula, parameters, {"logits": ("B", "T", "V")}, tuple(products))


def tail_positions(targets: npt.NDArray[np.int64], tails: Tails | None, vocab_size: int) -> dict[str, Tensor]:
    """Host inputs: for each tail the positions of its targets, (P,) int64, padded with -1; none without tails.

    Args:
        targets: of a batch, any shape; positions are those of the flat array.
        tails: of the output layer.
        vocab_size: V.
    """
    if tails is None:
        return {}
    flat, found = targets.ravel(), {}
    unit = -(-flat.size // POSITION_SIZES)
    for number, (begin, end) in enumerate(pairwise((*tails.cutoffs, vocab_size)), start=1):
        positions = np.flatnonzero((flat >= begin) & (flat < end))
        padded = np.full(-(-max(1, len(positions)) // unit) * unit, -1)
        padded[: len(positions)] = positions
        found[f"{TAIL} {number}"] = torch.from_numpy(padded)
    return found


@dataclass(frozen=True)
class OutputHead:
    """The output layer of a network, over parameters that the network owns and names."""

    weight: Tensor
    """(V, E): a separate matrix, or the embedding."""
    bias: Tensor | None = None
    """(V,)"""
    tails: Tails | None = None
    projection: nn.Module | None = None
    """From the hidden size to E; None: they are equal."""

    def logits(self, hidden: Tensor, added: Tensor | None = None) -> Tensor:
        """Logits (..., V) of hidden vectors (..., H) plus `added` (..., V); log-probabilities if there are tails."""
        return run_part("output", self._logits, self._project(hidden), added)

    def contributions(self, hidden: Tensor, added: Mapping[str, Tensor]) -> Contributions:
        """What each source adds to the logits of hidden vectors (B, T, H): "network", "bias", and those of `added`.

        With tails the logits are log-probabilities, and these are their terms: see `lm.models.contributions`.
        """
        vectors, tails = self._project(hidden), self.tails
        adaptive = None if tails is None else (tails.cutoffs, tails.weight, tails.bias)
        return head_contributions(vectors, self.weight, self.bias, added, adaptive)

    def terms(self, contributions: Mapping[str, Tensor]) -> Contributions:
        """The terms of the log-probabilities, from a result of `contributions`."""
        return log_terms(contributions) if self.tails is None else dict(contributions)

    def loss(
        self,
        hidden: Tensor,
        targets: Tensor,
        state: State,
        *,
        added: Tensor | None,
        label_smoothing: float,
        dtype: torch.dtype,
        soft_targets: Tensor | None = None,
        host_inputs: Mapping[str, Tensor] | None = None,
        learned: Tensor | None = None,
    ) -> TrainingLoss:
        """The loss of hidden vectors (B, T, H) at targets (B, T); in chunks if all logits need too much memory.

        Args:
            state: the network's, after the step.
            added: (B, T, V), added to the logits.
            label_smoothing: see `LanguageModel.training_loss`.
            dtype: of softmax and loss.
            soft_targets: see `LanguageModel.training_loss`; then all logits are in memory.
            host_inputs: with those of `tail_positions`; None: found here, and on a GPU the host waits for them.
            learned: see `LanguageModel.training_loss`; no logits are computed at other places.
        """
        if learned is not None:
            hidden, targets = at_places(hidden, learned), targets.flatten()[learned][None]
            added = None if added is None else at_places(added, learned)
            # Their positions are those of the whole batch.
            host_inputs = None
        large = self.tails is not None or targets.numel() * len(self.weight) > max_logits(targets.device)
        if added is None and label_smoothing == 0 and soft_targets is None and large:
            vectors = self._project(hidden)
            objective = run_part(OUTPUT_AND_LOSS, self._mean_nats, vectors, targets, dtype, host_inputs)
            return TrainingLoss(objective, objective.detach(), state)
        logits = self.logits(hidden, added)
        objective, nats = run_part(LOSS, cross_entropies, logits, targets, label_smoothing, dtype, soft_targets)
        return TrainingLoss(objective, nats, state, logits.detach)

    def target_scores(self, hidden: Tensor, targets: Tensor, added: Tensor | None) -> TargetScores:
        """See `LanguageModel.target_scores`.

        Args:
            hidden: (B, T, H).
            targets: (R, S) int64: after the last S of the first R rows.
            added: (B, T, V), added to the logits.
        """
        hidden = scored_part(hidden, targets)
        if added is not None or self.tails is None or not hidden.is_cpu:
            added = None if added is None else scored_part(added, targets)
            return scores_of(self.logits(hidden, added).flatten(0, -2), targets.flatten())
        return run_part("output", self._adaptive_scores, self._project(hidden).flatten(0, -2), targets.flatten())

    def logits_per_target(self, *, has_added: bool) -> int:
        """See `LanguageModel.logits_per_target`."""
        if has_added or self.tails is None or not self.weight.is_cpu:
            return len(self.weight)
        return self.tails.cutoffs[0] + len(self.tails.cutoffs)

    def _adaptive_scores(self, vectors: Tensor, targets: Tensor) -> TargetScores:
        """The scores of targets (N,) after vectors (N, E), from the log-probabilities of `logits`.

        A tail is computed only where it has the target, or may have tokens that are more probable than the target.
        """
        tails = self.tails
        assert tails is not None, "the caller asked"
        first = tails.cutoffs[0]
        of_tails = in_its_format(tails.weight, F.linear, vectors, tails.weight, tails.bias).float()
        head = torch.cat([self._logits_between(vectors, 0, first), of_tails], dim=1).log_softmax(dim=1)
        tail_of = torch.bucketize(targets, targets.new_tensor(tails.cutoffs), right=True)
        own = head.gather(1, targets.clamp(max=first - 1)[:, None])
        ranks = torch.zeros_like(targets)
        for number, (begin, end) in enumerate(pairwise((*tails.cutoffs, len(self.weight))), start=1):
            of_tail = head[:, first - 1 + number, None]
            for rows in _chunks(tail_of == number, end - begin):
                logs = self._logits_between(vectors[rows], begin, end).log_softmax(dim=1).add_(of_tail[rows])
                own[rows] = logs.gather(1, targets[rows, None] - begin)
                ranks[rows] += tokens_before(logs, own[rows], targets[rows] - begin)
        ranks += tokens_before(head[:, :first], own, targets)
        # No token of a tail is more probable than the tail.
        for number, (begin, end) in enumerate(pairwise((*tails.cutoffs, len(self.weight))), start=1):
            of_tail = head[:, first - 1 + number, None]
            may_be = (tail_of != number) & (ranks < MAX_RANK) & (of_tail >= own)[:, 0]
            for rows in _chunks(may_be, end - begin):
                logs = self._logits_between(vectors[rows], begin, end).log_softmax(dim=1).add_(of_tail[rows])
                ranks[rows] += tokens_before(logs, own[rows], targets[rows] - begin)
        return TargetScores(-own[:, 0], ranks.clamp_(max=MAX_RANK))

    def _logits_between(self, vectors: Tensor, begin: int, end: int) -> Tensor:
        """The logits (N, end - begin) of the tokens from `begin` on, float32, before any softmax."""
        weight, bias = self.weight[begin:end], None if self.bias is None else self.bias[begin:end]
        if stays_in_fp32(self.weight):
            keep_in_fp32(weight)
        return linear(vectors, weight, bias).float()

    def _project(self, hidden: Tensor) -> Tensor:
        return hidden if self.projection is None else self.projection(hidden)

    def _logits(self, vectors: Tensor, added: Tensor | None) -> Tensor:
        logits = linear(vectors, self.weight, self.bias)
        if added is not None:
            logits = logits + added
        tails = self.tails
        if tails is None:
            return logits
        tail_logits = in_its_format(tails.weight, F.linear, vectors, tails.weight, tails.bias).float()
        frequent, *parts = logits.float().tensor_split(tails.cutoffs, dim=-1)
        head = torch.cat([frequent, tail_logits], dim=-1).log_softmax(dim=-1)
        first = tails.cutoffs[0]
        within = [head[..., first + k, None] + part.log_softmax(dim=-1) for k, part in enumerate(parts)]
        return torch.cat([head[..., :first], *within], dim=-1)

    def _mean_nats(
        self, vectors: Tensor, targets: Tensor, dtype: torch.dtype, host_inputs: Mapping[str, Tensor] | None
    ) -> Tensor:
        """The mean cross-entropy in nats, a scalar in fp32, in chunks; backward works once."""
        weight, tails = self.weight, self.tails
        bias = weight.new_zeros(len(weight)) if self.bias is None else self.bias
        tail_layer = (weight[:0].detach(), bias[:0].detach()) if tails is None else (tails.weight, tails.bias)
        cutoffs = () if tails is None else tails.cutoffs
        flat = vectors.flatten(0, -2), targets.flatten()
        listed = () if host_inputs is None else [host_inputs[f"{TAIL} {number + 1}"] for number in range(len(cutoffs))]
        return apply(_MeanNats, *flat, cutoffs, dtype, weight, bias, *tail_layer, *listed)


class _MeanNats(torch.autograd.Function):
    """The loss and all its gradients, computed together in forward, so that no logits are kept for backward."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, targets: Tensor, cutoffs: tuple[int, ...], dtype: torch.dtype, *others: Tensor
    ) -> Tensor:
        weight, bias, tail_weight, tail_bias, *listed = others
        device = hidden.device.type
        # Matrix products run in autocast's format, or the weights'; everything else in `dtype`.
        low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        way = None
        if stays_in_fp32(weight):
            low = torch.float32
        elif not listed and dtype == torch.float32 and usable("entropy", weight):
            # Native products round their operands themselves.
            low, way = torch.float32, isa_and_threads()
        bounds = *cutoffs, len(weight)
        first = bounds[0]
        with torch.autocast(device, enabled=False):
            vectors = hidden.to(low)
            # A frozen matrix without tails needs no gradient.
            frozen = not cutoffs and not ctx.needs_input_grad[4]
            d_hidden, d_bias, d_tail_weight, d_tail_bias = map(_zeros, (hidden, bias, tail_weight, tail_bias))
            # `_softmax` fills it.
            d_weight = torch.empty_like(weight[:0] if frozen else weight, dtype=torch.float32)
            grads = d_hidden, d_weight, d_bias, d_tail_weight, d_tail_bias
            tail = torch.zeros_like(targets)
            for cut in cutoffs:
                tail += targets >= cut
            head_targets = torch.where(tail == 0, targets, first - 1 + tail)
            if cutoffs:
                head = torch.cat([weight[:first], tail_weight]), torch.cat([bias[:first], tail_bias])
                d_head: tuple[Tensor | None, Tensor] = torch.empty_like(head[0], dtype=torch.float32), _zeros(head[1])
            else:
                head, d_head = (weight, bias), (None if frozen else d_weight, d_bias)
            nats = _softmax(vectors, head_targets, head, d_hidden, d_head, dtype, way=way)
            if cutoffs and d_head[0] is not None:
                d_weight[:first], d_tail_weight[:] = d_head[0][:first], d_head[0][first:]
                d_bias[:first], d_tail_bias[:] = d_head[1][:first], d_head[1][first:]
            for number, (begin, end) in enumerate(pairwise(bounds), start=1):
                if listed:
                    padded = listed[number - 1]
                    rows, is_real = padded.clamp(min=0), padded >= 0
                else:
                    rows, is_real = (tail == number).nonzero()[:, 0], None
                selected, own = vectors[rows], targets[rows] - begin
                # The target of padding, position 0, may be outside the tail.
                own = own if is_real is None else own.where(is_real, 0)
                d_selected = _zeros(selected)
                layer, d_layer = (weight[begin:end], bias[begin:end]), (d_weight[begin:end], d_bias[begin:end])
                nats += _softmax(selected, own, layer, d_selected, d_layer, dtype, is_real, way)
                d_hidden.index_add_(0, rows, d_selected)
        ctx.save_for_backward(*grads)
        ctx.count, ctx.listed, ctx.frozen = len(targets), len(listed), frozen
        return nats / len(targets)

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> Any:
        factor = outer / ctx.count
        d_hidden, d_weight, *d_others = (grad.mul_(factor) for grad in ctx.saved_tensors)
        return d_hidden, None, None, None, None if ctx.frozen else d_weight, *d_others, *[None] * ctx.listed


def _chunks(chosen: Tensor, columns: int) -> Iterator[Tensor]:
    """The positions of True in (N,), in chunks of at most `SCORED_LOGITS` in so many columns."""
    rows = chosen.nonzero()[:, 0]
    return (chunk for chunk in rows.split(max(1, SCORED_LOGITS // columns)) if len(chunk))


def _zeros(like: Tensor) -> Tensor:
    return torch.zeros_like(like, dtype=torch.float32)


Layer = tuple[Tensor, Tensor]


def max_logits(device: torch.device) -> int:
    """Logits that a training step may hold at a time."""
    return MAX_LOGITS if device.type == "cpu" else MAX_GPU_LOGITS


def _softmax(
    vectors: Tensor,
    targets: Tensor,
    layer: Layer,
    d_vectors: Tensor,
    d_layer: tuple[Tensor | None, Tensor],
    dtype: torch.dtype,
    is_real: Tensor | None = None,
    way: tuple[str, int] | None = None,
) -> Tensor:
    """The summed nats of one softmax layer, in chunks; adds its gradients to `d_vectors` and the bias of `d_layer`.

    The gradient of the weight is written, not added; a frozen weight has None in `d_layer`. Rows where `is_real`
    is False count for nothing. `way`: of native products; None: as things are.
    """
    weight, bias = layer[0].to(vectors.dtype), layer[1]
    d_weight, d_bias = d_layer
    nats = torch.zeros((), device=vectors.device)
    chunk_size = max(1, max_logits(vectors.device) // len(weight))
    native = is_real is None and dtype == torch.float32 and usable("entropy", vectors)
    if d_weight is not None and not (native and len(vectors)):
        d_weight.zero_()
    for begin in range(0, len(vectors), chunk_size):
        chunk = slice(begin, begin + chunk_size)
        if native:
            logits = product(vectors[chunk], weight.T, bias=bias, way=way)
            nats += entropies(logits, targets[chunk], into=logits, d_bias=d_bias).sum()
            if d_weight is not None:
                product(logits.T, vectors[chunk], into=d_weight, adds=begin > 0, way=way)
            product(logits, weight, into=d_vectors[chunk], way=way)
            continue
        logits = F.linear(vectors[chunk], weight).to(dtype).add_(bias)
        logs = logits.log_softmax(dim=1)
        index = targets[chunk, None]
        own = logs.gather(1, index)
        nats -= (own if is_real is None else own * is_real[chunk, None]).sum(dtype=torch.float32)
        # The gradient of the logits: softmax minus one-hot.
        grad = logs.exp_().scatter_add_(1, index, logs.new_full(index.shape, -1.0))
        if is_real is not None:
            grad *= is_real[chunk, None]
        d_bias += grad.sum(dim=0)
        grad = grad.to(vectors.dtype)
        if d_weight is not None:
            d_weight += grad.T @ vectors[chunk]
        d_vectors[chunk] += grad @ weight
    return nats
