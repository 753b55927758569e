"""Layers for training on a CPU: native where the kernels support the inputs, torch's own elsewhere.

    recurrent_layer                        one layer of nn.GRU or nn.LSTM
    transformer_block                      a whole block of a Transformer
    Embedding, Linear, Dropout, RMSNorm    the modules of torch.nn
    linear, linears                        F.linear; several of them over the same inputs
    rms_norm_rope, swiglu, attend          RMSNorm and rotary positions; silu(gate) · up; causal attention
    cross_entropy                          F.cross_entropy

Outputs and gradients equal torch's within fp32 rounding.

Shapes: B batch, T time, E inputs, F outputs, H hidden or heads, D head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lm.kernels import autograd
from lm.kernels.autograd import call
from lm.kernels.dispatch import MIN_ROWS, in_its_format, stays_in_fp32, usable


def recurrent_layer(
    kind: str, inputs: Tensor, weights: Sequence[Tensor], first: Sequence[Tensor] | None, *, ids: Tensor | None = None
) -> tuple[Tensor, ...]:
    """One recurrent layer over sequences of equal length; only for inputs where `kind` is `usable`.

    Args:
        kind: gru or lstm.
        inputs: (B, T, E); with `ids`, the embedding (V, E) whose rows are the inputs.
        weights: weight_ih, weight_hh, bias_ih, bias_hh, as in torch's layers.
        first: the hidden state before the first step (B, H), and the LSTM's cell state; None: zeros.
        ids: (B, T) int64.

    Returns:
        The outputs (B, T, H), the hidden state after the last step (B, H), and the LSTM's cell state.

    Raises:
        IndexError: an id is not in 0 … V - 1.
    """
    hidden, cell = (*(first or ()), None, None)[:2]
    results: tuple[Tensor, ...] = call(autograd.Recurrent, kind == "lstm", inputs, ids, *weights, hidden, cell)
    return results if kind == "lstm" else results[:2]


def transformer_block(
    inputs: Tensor,
    weights: Sequence[Tensor | None],
    rotation: tuple[Tensor, Tensor],
    *,
    heads: int,
    kv_heads: int,
    epsilon: float,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """A Transformer block over whole texts; only for inputs where "block" is `usable`.

    Args:
        inputs: (B, T, E).
        weights: in the order of `autograd.Block.NAMES`; None for a norm that the block does not have.
        rotation: cosines and sines (B, T, 1, D/2).
        heads: query heads, a multiple of `kv_heads`.
        kv_heads: key-value heads.
        epsilon: of the norms.
        dropout: probability for attention weights and for both branches.

    Returns:
        The outputs (B, T, E), keys and values (B, T, kv_heads, D).
    """
    settings = heads, kv_heads, epsilon, dropout, tuple(_seed(dropout) for _ in range(3))
    results: tuple[Tensor, Tensor, Tensor] = call(autograd.Block, settings, *rotation, inputs, *weights)
    return results


def linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`: (..., E) with a weight (F, E) → (..., F)."""
    if stays_in_fp32(weight):
        return in_its_format(weight, F.linear, inputs, weight, bias)
    if inputs.numel() < MIN_ROWS * inputs.shape[-1] or not usable("linear", inputs):
        return F.linear(inputs, weight, bias)
    (outputs,) = call(autograd.Linears, inputs, bias, weight)
    return outputs  # type: ignore[no-any-return]


def linears(inputs: Tensor, layers: Sequence[nn.Linear]) -> tuple[Tensor, ...]:
    """The outputs of several layers without bias over the same inputs."""
    if inputs.numel() < MIN_ROWS * inputs.shape[-1] or not usable("linear", inputs):
        return tuple(layer(inputs) for layer in layers)
    outputs: tuple[Tensor, ...] = call(autograd.Linears, inputs, None, *(layer.weight for layer in layers))
    return outputs


def attend(queries: Tensor, keys: Tensor, values: Tensor, dropout: float = 0.0) -> Tensor:
    """Causal attention; only for inputs where "attention" is `usable`.

    Args:
        queries: (B, T, H, D).
        keys: (B, T, G, D); H is a multiple of G.
        values: (B, T, G, D).
        dropout: probability for attention weights.

    Returns:
        (B, T, H, D).
    """
    outputs: Tensor = call(autograd.Attention, dropout, _seed(dropout), queries, keys, values)
    return outputs


def rms_norm_rope(
    inputs: Tensor, weight: Tensor | None, epsilon: float, rotation: tuple[Tensor, Tensor] | None
) -> Tensor:
    """RMSNorm, then rotary positions, in one pass; only for inputs where "norm" is `usable`.

    Args:
        inputs: (..., H, D).
        weight: (D,) of the norm; None: no norm.
        epsilon: added to the mean square.
        rotation: cosines and sines (..., 1, D/2); dimension i is paired with i + D/2. None: no rotation.
    """
    outputs: Tensor = call(autograd.NormRope, inputs, weight, epsilon, *(rotation or (None, None)))
    return outputs


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up, of the same shape."""
    if not usable("swiglu", gate):
        return F.silu(gate) * up
    outputs: Tensor = call(autograd.SwiGLU, gate, up)
    return outputs


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The mean cross-entropy of logits (N, V) and targets (N,) int64: a scalar, in nats."""
    if not usable("entropy", logits):
        return F.cross_entropy(logits, targets)
    nats: Tensor = call(autograd.CrossEntropy, logits, targets)
    return nats


def _seed(dropout: float) -> int:
    """A seed from torch's generator; 0 without a draw if nothing is dropped."""
    return int(torch.randint(2**62, ())) if dropout else 0


class Embedding(nn.Embedding):
    """`nn.Embedding`."""

    def forward(self, ids: Tensor) -> Tensor:
        """(...) int64 → (..., E); IndexError for an id outside the vocabulary."""
        if self.sparse or self.padding_idx is not None or not usable("embedding", self.weight):
            return super().forward(ids)
        rows: Tensor = call(autograd.EmbeddingRows, ids, self.weight)
        return rows


class Linear(nn.Linear):
    """`nn.Linear`."""

    def forward(self, inputs: Tensor) -> Tensor:
        """(..., E) → (..., F)."""
        return linear(inputs, self.weight, self.bias)


class Dropout(nn.Dropout):
    """`nn.Dropout`; natively with one draw of torch's generator, which seeds the mask."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Any shape."""
        if not self.training or self.p == 0 or not usable("dropout", inputs):
            return super().forward(inputs)
        outputs: Tensor = call(autograd.Dropout, inputs, self.p, _seed(self.p))
        return outputs


class RMSNorm(nn.RMSNorm):
    """`nn.RMSNorm` with a weight over the last axis."""

    def forward(self, inputs: Tensor) -> Tensor:
        """(..., E) → (..., E)."""
        if not usable("norm", inputs):
            return super().forward(inputs)
        assert self.eps is not None
        return rms_norm_rope(inputs, self.weight, self.eps, None)
