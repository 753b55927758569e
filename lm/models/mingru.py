"""minGRU: a recurrent model whose gates see the input alone, so that training needs no step after another.

    ids ─► embedding ─► num_layers × (RMSNorm ─► convolution ─► minGRU ─► + ; RMSNorm ─► MLP ─► +) ─► RMSNorm ─► logits

    z_t = sigmoid(W_z x_t)      c_t = g(W_c x_t)      h_t = (1 - z_t) · h_{t-1} + z_t · c_t

with g(x) = x + 1/2 above zero and sigmoid(x) below. All products of a text are made at once; what is left is a linear
recurrence, unit by unit. Its factors lie between 0 and 1, so that no logarithms are needed to keep it finite.
The state is h of every layer and the last inputs of every convolution.

Shapes: B batch, T time, V vocabulary, E hidden size, H inner size of the recurrence, K width of the convolution.

Source: Feng et al. 2024, "Were RNNs All We Needed?".
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from lm.models.base import LanguageModel, State
from lm.models.tables import ContextTables, TableOptions

REGISTERS = {"mingru": "MinGRU"}


class MinGRUOptions(TableOptions):
    """Options of the minGRU."""

    type: Literal["mingru"] = Field("mingru", description="Registered name of the model.")
    hidden_size: int = Field(128, ge=1, description="Width of embeddings and residual stream (E).")
    num_layers: int = Field(2, ge=1, description="Blocks, one above the other.")
    inner_size: int | None = Field(None, ge=1, description="Units of a recurrence (H); default: hidden_size.")
    mlp_size: int | None = Field(None, ge=1, description="Inner width of the MLP; default: 4 times hidden_size.")
    conv_size: int = Field(4, ge=1, description="Tokens that the convolution before each recurrence sees.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on embeddings and on both branches of a block.")
    tie_weights: bool = Field(False, description="Use the embedding as output layer.")


class Block(nn.Module):
    """Convolution and recurrence, then an MLP, each behind a norm and added to the residual stream."""

    def __init__(self, options: MinGRUOptions) -> None:
        super().__init__()
        size = options.hidden_size
        inner, mlp = options.inner_size or size, options.mlp_size or 4 * size
        self.norm = nn.RMSNorm(size, eps=1e-6)
        self.conv = nn.Conv1d(size, size, options.conv_size, groups=size)
        self.gates = nn.Linear(size, 2 * inner)
        self.mix = nn.Linear(inner, size, bias=False)
        self.mlp_norm = nn.RMSNorm(size, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(size, mlp), nn.GELU(), nn.Linear(mlp, size))
        self.dropout = nn.Dropout(options.dropout)

    def forward(self, inputs: Tensor, tail: Tensor, first: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One block.

        Args:
            inputs: (B, T, E).
            tail: (B, K - 1, E), what the convolution saw last.
            first: (B, H), the recurrence's state before.

        Returns:
            (B, T, E), and tail and state after.
        """
        normed = torch.cat([tail, self.norm(inputs.float())], dim=1)
        seen = self.conv(normed.transpose(1, 2)).transpose(1, 2)
        update, fresh = self.gates(seen).float().chunk(2, dim=-1)
        update = update.sigmoid()
        fresh = torch.where(fresh >= 0, fresh + 0.5, fresh.sigmoid())
        hidden = linear_scan(1 - update, update * fresh, first)
        inputs = inputs + self.dropout(self.mix(hidden))
        inputs = inputs + self.dropout(self.mlp(self.mlp_norm(inputs.float())))
        return inputs, normed[:, normed.shape[1] - tail.shape[1] :], hidden[:, -1]


class MinGRU(LanguageModel):
    """A stack of minGRU blocks."""

    Options = MinGRUOptions
    batching = "streams"

    options: MinGRUOptions

    def __init__(self, options: MinGRUOptions, vocab_size: int) -> None:
        super().__init__(options, vocab_size)
        size = options.hidden_size
        self.embedding = nn.Embedding(vocab_size, size)
        self.dropout = nn.Dropout(options.dropout)
        self.layers = nn.ModuleList(Block(options) for _ in range(options.num_layers))
        self.norm = nn.RMSNorm(size, eps=1e-6)
        self.output = None if options.tie_weights else nn.Linear(size, vocab_size, bias=False)
        if options.tie_weights:
            # As output weights, embeddings of unit variance would start with logits of size sqrt(E).
            nn.init.normal_(self.embedding.weight, std=0.02)
        self.tables = ContextTables(options, vocab_size)

    def forward(self, ids: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """See `LanguageModel.forward`."""
        options, hidden = self.options, self.dropout(self.embedding(ids))
        if state is None:
            inner, layers = options.inner_size or options.hidden_size, options.num_layers
            begun = torch.zeros(len(ids), layers, inner, device=ids.device)
            tails = torch.zeros(len(ids), layers, options.conv_size - 1, options.hidden_size, device=ids.device)
        else:
            begun, tails = state.tensors["hidden"], state.tensors["tail"]
        after: list[tuple[Tensor, Tensor]] = []
        for index, layer in enumerate(self.layers):
            hidden, *kept = layer(hidden, tails[:, index], begun[:, index])
            after.append((kept[0], kept[1]))
        tail, last = (torch.stack(parts, dim=1) for parts in zip(*after, strict=True))
        added, grown = self.tables(ids, state, State({"hidden": last, "tail": tail}))
        weight = self.embedding.weight if self.output is None else self.output.weight
        logits = F.linear(self.norm(hidden.float()), weight)
        return logits if added is None else logits + added, grown


def linear_scan(decay: Tensor, values: Tensor, first: Tensor) -> Tensor:
    """h_t = decay_t · h_{t-1} + values_t for all t, with its gradient.

    Args:
        decay: (B, T, H), between 0 and 1.
        values: (B, T, H).
        first: (B, H), h before the first step.
    """
    hidden: Tensor = _LinearScan.apply(decay, values, first)  # type: ignore[no-untyped-call]
    return hidden


class _LinearScan(torch.autograd.Function):
    """The gradient of a linear recurrence is the same recurrence backwards: autograd need not keep its steps."""

    @staticmethod
    def forward(ctx: Any, decay: Tensor, values: Tensor, first: Tensor) -> Tensor:
        hidden = _scan(decay, values, first)
        ctx.save_for_backward(decay, hidden, first)
        return hidden

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        decay, hidden, first = ctx.saved_tensors
        # What reaches h_t: its own slope, and that of h_{t+1} through decay_{t+1}.
        later = torch.cat([decay[:, 1:], torch.zeros_like(decay[:, :1])], dim=1)
        slopes = _scan(later.flip(1), outer.flip(1), torch.zeros_like(first)).flip(1)
        before = torch.cat([first[:, None], hidden[:, :-1]], dim=1)
        return slopes * before, slopes, slopes[:, 0] * decay[:, 0]


def _scan(decay: Tensor, values: Tensor, first: Tensor) -> Tensor:
    return scan_by_doubling(decay, values, first) if decay.is_cuda else scan_by_steps(decay, values, first)


def scan_by_steps(decay: Tensor, values: Tensor, first: Tensor) -> Tensor:
    """One step after another: the fewest operations, and the fastest on a CPU."""
    hidden = torch.empty_like(values)
    before = first
    for time in range(values.shape[1]):
        before = torch.addcmul(values[:, time], decay[:, time], before, out=hidden[:, time])
    return hidden


def scan_by_doubling(decay: Tensor, values: Tensor, first: Tensor) -> Tensor:
    """Spans of 1, 2, 4, … steps put together: log2 T operations over all of the text, for a GPU.

    Source: Hillis and Steele 1986, "Data Parallel Algorithms".
    """
    values = torch.cat([torch.addcmul(values[:, :1], decay[:, :1], first[:, None]), values[:, 1:]], dim=1)
    span = 1
    while span < values.shape[1]:
        head, factor = values[:, :span], decay[:, span:]
        values = torch.cat([head, torch.addcmul(values[:, span:], factor, values[:, :-span])], dim=1)
        decay = torch.cat([decay[:, :span], factor * decay[:, :-span]], dim=1)
        span *= 2
    return values
