"""The mathematics of attention in plain torch, with every number that it computes on the way.

    scores  = Q Kᵀ                                how well each query fits each key
    weights = softmax(scores / sqrt(D))           each row sums to 1
    outputs = weights V                           each query's weighted mean of the values

Shapes: B batch, T queries, L keys (those of earlier tokens first), H query heads, G key-value heads, D head size.

Source: Vaswani et al. 2017, section 3.2.1; Ainslie et al. 2023 (grouped queries).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def attend(
    queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None, *, dropout: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of all heads at once, differentiable.

    Args:
        queries: (B, T, H, D), after normalisation and rotation.
        keys: (B, L, G, D), likewise; H is a multiple of G, and each key-value head serves H / G neighbouring queries.
        values: (B, L, G, D).
        mask: bool, True where a query attends to a key, broadcast to (B, H, T, L). None: causal, and the last key
            belongs to the last query.
        dropout: probability that a weight is dropped before it multiplies a value; the result has all weights.

    Returns:
        scores (B, H, T, L), -inf where a query does not attend; weights (B, H, T, L); outputs (B, T, H, D).
    """
    time, length, head_size = queries.shape[1], keys.shape[1], queries.shape[-1]
    shared = queries.shape[2] // keys.shape[2]
    keys, values = (heads.repeat_interleave(shared, dim=2).transpose(1, 2) for heads in (keys, values))
    if mask is None:
        mask = torch.ones(time, length, dtype=torch.bool, device=queries.device).tril(length - time)
    scores = (queries.transpose(1, 2) @ keys.transpose(2, 3)).masked_fill(~mask, float("-inf"))
    weights = (scores / head_size**0.5).softmax(dim=-1)
    outputs = F.dropout(weights, dropout, training=dropout > 0) @ values
    return scores, weights, outputs.transpose(1, 2)
