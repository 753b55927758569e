"""Exact sums: what each source of a model adds to a logit, and to the log-probability of a token.

**Logits.** The logits of a network are a sum over sources: the matrix product ("network"), the output bias ("bias") and
one context table an order ("table 2" is the row of the last token, "table 3" of the last two, …).

**Log-probabilities.** The softmax subtracts one number from all logits of a position, log Σ exp(logits). This number
has to be divided among the sources. Scale all logits by a, from 0 (the uniform distribution) to 1 (the model's). A
small step of a changes the log-probability of a token by its logit, less the mean logit under the distribution at a.
So each source counts by how much it lifts the token above the mean token, over the whole way:

    term of a source(token) = c(token) - Σ_u w(u) c(u)          w = mean over a of softmax(a · logits), sums to 1

The terms add up to log p(token) - log(1/V). A source that adds the same to all tokens gets 0.

**Mixtures.** A mixture p = Σ_s w_s p_s, such as a hybrid, or counts of several orders. Part s has given the share
r_s = w_s p_s / p of a token's probability. Then exactly

    log p = Σ_s r_s log p_s  +  "mixing"                        mixing = - Σ_s r_s log(r_s / w_s), never positive

Mixing is the price of weights that were set before the token was known.

Terms also have "uniform": log(1/V), what each token has without any source.

Shapes: B batch, T time, V vocabulary.

Sources: Aumann and Shapley 1974 (the path from 0 to 1); Sundararajan et al. 2017 (integrated gradients); Neal and
Hinton 1998 (the sum over the parts of a mixture).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lm.models.base import MixturePart

NETWORK, BIAS, MIXING, UNIFORM = "network", "bias", "mixing", "uniform"
NODES = 16
"""Distributions between the uniform and the model's; `path_weights` makes their sum exact."""

Contributions = dict[str, Tensor]


def log_terms(contributions: Mapping[str, Tensor]) -> Contributions:
    """The terms (B, T, V) of the log-probabilities from those of the logits.

    Args:
        contributions: name → (B, T, V); their sum are the logits.

    Returns:
        The same names and "uniform"; their sum is the log-softmax of the logits.
    """
    parts = {name: part.float() if part.dtype.itemsize < 4 else part for name, part in contributions.items()}
    logits = total(parts)
    weights = path_weights(logits)
    terms = {name: part - (weights * part).sum(dim=-1, keepdim=True) for name, part in parts.items()}
    return terms | {UNIFORM: uniform(logits)}


def path_weights(logits: Tensor) -> Tensor:
    """The mean (..., V) of softmax(a · logits) over a from 0 to 1.

    It is computed at `NODES` values of a. The error of the sum that is left moves a little weight between the two ends,
    so that Σ weights · logits is log Σ exp(logits) - log V to rounding.
    """
    nodes, shares = np.polynomial.legendre.leggauss(NODES)
    mean = torch.zeros_like(logits)
    for node, share in zip((nodes + 1) / 2, shares / 2, strict=True):
        mean = torch.add(mean, (node * logits).softmax(dim=-1), alpha=share)
    exact = logits.logsumexp(dim=-1, keepdim=True) - math.log(logits.shape[-1])
    change = logits.softmax(dim=-1) - 1 / logits.shape[-1]
    effect = (change * logits).sum(dim=-1, keepdim=True)
    missing = exact - (mean * logits).sum(dim=-1, keepdim=True)
    return mean + torch.where(effect > 1e-6, missing / effect.clamp(min=1e-6), 0.0) * change


def head_contributions(
    vectors: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    added: Mapping[str, Tensor],
    tails: tuple[tuple[int, ...], Tensor, Tensor] | None = None,
) -> Contributions:
    """What each source adds to the logits (B, T, V) of an output layer.

    Args:
        vectors: (B, T, E), the inputs of the output matrix.
        weight: (V, E), the output matrix.
        bias: (V,)
        added: name → (B, T, V), other terms of the logits.
        tails: cutoffs, weight (K, E) and bias (K,) of an adaptive softmax. Its logits are log-probabilities: the sum of
            two softmax layers for a token in a tail. Each is divided as `log_terms` does, so "uniform" is a constant of
            each tail.
    """
    product = F.linear(vectors, weight)
    parts = {NETWORK: product} | ({} if bias is None else {BIAS: bias.expand_as(product)}) | dict(added)
    if tails is None:
        return parts
    cutoffs, tail_weight, tail_bias = tails
    entries = F.linear(vectors, tail_weight)
    head_entries = {NETWORK: entries, BIAS: tail_bias.expand_as(entries)}
    parts.setdefault(BIAS, torch.zeros_like(product))
    bounds = list(pairwise((*cutoffs, len(weight))))
    first = {
        name: torch.cat([part[..., : cutoffs[0]], head_entries.get(name, torch.zeros_like(entries))], dim=-1)
        for name, part in parts.items()
    }
    head = log_terms(first)
    within = [log_terms({name: part[..., begin:end] for name, part in parts.items()}) for begin, end in bounds]
    return {
        name: torch.cat(
            [part[..., : cutoffs[0]]] + [part[..., cutoffs[0] + k, None] + tail[name] for k, tail in enumerate(within)],
            dim=-1,
        )
        for name, part in head.items()
    }


def mixture_log_probabilities(parts: Sequence[MixturePart]) -> Tensor:
    """Log-probabilities (B, T, V) of a mixture."""
    return torch.stack([part.weight.log()[..., None] + part.log_probabilities for part in parts]).logsumexp(dim=0)


def mixture_terms(parts: Mapping[str, MixturePart], terms: Mapping[str, Mapping[str, Tensor]]) -> Contributions:
    """The terms (B, T, V) of a mixture's log-probabilities from those of its parts.

    Args:
        parts: the parts by name.
        terms: for each part, the terms of its log-probabilities. Terms of one name are added. A part that gives a token
            no probability has no term there, so its terms may be infinite.

    Returns:
        The terms of the parts by their own names, and "mixing"; their sum is the log-probability.
    """
    logs = mixture_log_probabilities(list(parts.values()))
    result: Contributions = {}
    mixing = torch.zeros_like(logs)
    for name, part in parts.items():
        weighted = part.weight.log()[..., None] + part.log_probabilities
        share = (weighted - logs).exp()
        # 0 · log 0 is 0, in the value and in the gradient.
        nothing = share == 0
        price = (part.weight.log()[..., None] - (weighted - logs).masked_fill(nothing, 0.0)).masked_fill(nothing, 0.0)
        mixing = mixing + share * price
        for key, term in terms[name].items():
            result[key] = result.get(key, 0.0) + share * term.masked_fill(nothing, 0.0)
    return result | {MIXING: result.get(MIXING, 0.0) + mixing}


def count_terms(mixture: Mapping[str, MixturePart]) -> dict[str, Contributions]:
    """The terms of each part of an n-gram mixture: the part itself, over what the uniform distribution gives."""
    return {
        name: {UNIFORM: uniform(part.log_probabilities)}
        | ({} if name == UNIFORM else {name: part.log_probabilities - uniform(part.log_probabilities)})
        for name, part in mixture.items()
    }


def uniform(like: Tensor) -> Tensor:
    """log(1/V) in the shape (..., V) of `like`."""
    return torch.full_like(like, -math.log(like.shape[-1]))


def total(contributions: Mapping[str, Tensor]) -> Tensor:
    """The sum (B, T, V) of contributions."""
    first, *others = contributions.values()
    return sum(others, start=first)
