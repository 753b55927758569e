"""The training loops one writes by hand: plain `nn.GRU` and `nn.LSTM`, and a Llama of Hugging Face transformers.

Each has what such a loop has: AdamW, a clipped gradient, contiguous rows with carried state for the recurrent ones and
random windows for the Llama.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Ids = npt.NDArray[Any]
TrainStep = Callable[[float], float]
"""Does one step at this learning rate; returns its loss."""


class PlainRecurrent(nn.Module):
    """Embedding, `nn.GRU` or `nn.LSTM`, linear output."""

    def __init__(self, kind: Literal["gru", "lstm"], vocab_size: int, size: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, size)
        self.cell = (nn.GRU if kind == "gru" else nn.LSTM)(size, hidden, layers, batch_first=True)
        self.output = nn.Linear(hidden, vocab_size)

    def forward(self, ids: Tensor, hidden: Any = None) -> tuple[Tensor, Any]:
        """(B, T) → logits (B, T, V), and torch's own state."""
        out, hidden = self.cell(self.embedding(ids), hidden)
        return self.output(out), hidden


def recurrent_steps(
    module: PlainRecurrent, ids: Ids, *, batch_size: int, bptt: int, low: torch.dtype | None = None
) -> TrainStep:
    """Steps of truncated back-propagation through time over contiguous rows, on the module's device.

    Args:
        module: the model.
        ids: of the training split.
        batch_size, bptt: rows and tokens of a row.
        low: format of autocast; None: fp32.
    """
    device = module.output.weight.device
    autocast = torch.autocast(device.type, dtype=low, enabled=low is not None)
    length = (len(ids) - 1) // batch_size
    inputs = torch.from_numpy(ids[: batch_size * length].astype(np.int64)).view(batch_size, length).to(device)
    targets = torch.from_numpy(ids[1 : batch_size * length + 1].astype(np.int64)).view(batch_size, length).to(device)
    optimizer = torch.optim.AdamW(module.parameters())
    place, hidden = 0, None

    def step(rate: float) -> float:
        nonlocal place, hidden
        if place + bptt > length:
            place, hidden = 0, None
        with autocast:
            logits, after = module(inputs[:, place : place + bptt], hidden)
            loss = F.cross_entropy(logits.flatten(0, 1), targets[:, place : place + bptt].reshape(-1))
        _update(optimizer, module, loss, rate)
        hidden = tuple(part.detach() for part in after) if isinstance(after, tuple) else after.detach()
        place += bptt
        return loss.item()

    return step


def llama(vocab_size: int, *, hidden: int, layers: int, heads: int, inner: int, context: int) -> Any:
    """An untrained `LlamaForCausalLM` with tied embeddings, shaped like our Transformer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    options: dict[str, Any] = {
        "vocab_size": vocab_size, "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
        "intermediate_size": inner, "max_position_embeddings": context, "tie_word_embeddings": True,
        "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**options))


def llama_steps(module: Any, ids: Ids, *, batch_size: int, context: int, seed: int = 1) -> TrainStep:
    """Steps over random windows; the model computes its own loss, as its documentation has it."""
    tokens = torch.from_numpy(ids.astype(np.int64))
    optimizer = torch.optim.AdamW(module.parameters(), weight_decay=0.1, betas=(0.9, 0.99))
    draws = np.random.default_rng(seed)

    def step(rate: float) -> float:
        starts = draws.integers(0, len(tokens) - context, size=batch_size)
        # The library shifts the labels itself, so that the row is one token longer than what is predicted.
        rows = torch.stack([tokens[start : start + context + 1] for start in starts])
        loss: Tensor = module(input_ids=rows, labels=rows).loss
        _update(optimizer, module, loss, rate)
        return loss.item()

    return step


def _update(optimizer: torch.optim.Optimizer, module: nn.Module, loss: Tensor, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    optimizer.step()


def for_seconds(
    step: TrainStep, seconds: float, *, rate: float, begin: float = 0.0, whole: float | None = None, floor: float = 0.05
) -> tuple[int, float]:
    """Train for so long.

    Args:
        step: of a loop.
        seconds: how long.
        rate: the learning rate's peak.
        begin: seconds trained already.
        whole: the seconds over which the learning rate falls by a cosine, after a fiftieth of them to warm up; None:
            it stays.
        floor: its end, as a share of the peak.

    Returns:
        Steps done and seconds taken.
    """
    begun, steps = time.perf_counter(), 0
    while (spent := time.perf_counter() - begun) < seconds:
        share = 1.0
        if whole is not None:
            done = min(1.0, (begin + spent) / whole)
            share = (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))) * min(1.0, 0.02 + done * 50)
        step(rate * share)
        steps += 1
    return steps, time.perf_counter() - begun
