"""Peers' modules behind the contract of `lm.models.base`, so that the one exact evaluator scores all contenders.

A peer numbers its symbols its own way: `ours_to_theirs` (V,) gives their id of each of our ids, -1 for a symbol that
the peer does not have, to which it then gives no probability.

Shapes: B batch, T time, V our vocabulary, W theirs, L layers, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lm.models.base import LanguageModel, State
from lm.tokenizers import Tokenizer

Step = Callable[[Tensor, State | None], tuple[Tensor, State]]


class Adapted(LanguageModel):
    """A module of somebody else's, read through `step`, which is `forward` as the contract has it."""

    def __init__(self, module: nn.Module, step: Step, vocab_size: int, context_length: int | None = None) -> None:
        super().__init__(None, vocab_size)
        self.module = module
        self._step = step
        self._context_length = context_length

    @property
    def context_length(self) -> int | None:
        """The peer's block size; None for a carried state."""
        return self._context_length

    def forward(self, ids: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """See `LanguageModel.forward`."""
        return self._step(ids, state)


def ids_of(tokenizer: Tokenizer, symbols: Sequence[str]) -> Tensor:
    """(V,) their id of each of our ids.

    Args:
        tokenizer: ours, of characters or words.
        symbols: theirs in order of id; a line's end is a newline, or "<eos>" where our tokenizer calls it so.
    """
    found = {symbol: index for index, symbol in enumerate(symbols)}
    own: Iterable[str] = tokenizer.payload()["vocabulary"]
    table = torch.full((tokenizer.vocab_size,), -1, dtype=torch.int64)
    for index, symbol in enumerate(own):
        table[index] = found.get(symbol, -1)
    return table


def windowed(
    module: nn.Module, logits_of: Callable[[Tensor], Tensor], context_length: int, ours_to_theirs: Tensor
) -> Adapted:
    """A module that reads windows and keeps nothing: nanoGPT, a Llama of Hugging Face.

    Args:
        module: whose mode the evaluator sets.
        logits_of: their ids (B, T) → their logits (B, T, W).
        context_length: the longest T.
        ours_to_theirs: see the module's docstring.
    """

    def step(ids: Tensor, state: State | None) -> tuple[Tensor, State]:
        assert state is None, "windows are read afresh"
        return _ours(logits_of(_theirs(ids, ours_to_theirs)), ours_to_theirs), State({})

    return Adapted(module, step, len(ours_to_theirs), context_length)


def word_language_model(module: Any, ours_to_theirs: Tensor) -> Adapted:
    """The recurrent model of PyTorch's example: time first, hidden state (L, B, H), log-probabilities (T * B, W)."""

    def step(ids: Tensor, state: State | None) -> tuple[Tensor, State]:
        batch, time = ids.shape
        hidden = module.init_hidden(batch) if state is None else _hidden(state.tensors)
        scores, hidden = module(_theirs(ids, ours_to_theirs).T.contiguous(), hidden)
        parts = hidden if isinstance(hidden, tuple) else (hidden,)
        kept = {name: part.transpose(0, 1) for name, part in zip(("hidden", "cell"), parts, strict=False)}
        return _ours(scores.view(time, batch, -1).transpose(0, 1), ours_to_theirs), State(kept)

    return Adapted(module, step, len(ours_to_theirs))


def plain_recurrent(module: Any, vocab_size: int) -> Adapted:
    """`benchmarks.loops.PlainRecurrent`, whose ids are ours."""

    def step(ids: Tensor, state: State | None) -> tuple[Tensor, State]:
        logits, hidden = module(ids, None if state is None else _hidden(state.tensors))
        parts = hidden if isinstance(hidden, tuple) else (hidden,)
        kept = {name: part.transpose(0, 1) for name, part in zip(("hidden", "cell"), parts, strict=False)}
        return logits, State(kept)

    return Adapted(module, step, vocab_size)


def _hidden(tensors: Mapping[str, Tensor]) -> Any:
    """torch's own form of a state, (L, B, H) or a pair of those, from ours, which is batch first."""
    parts = tuple(tensor.transpose(0, 1).contiguous() for tensor in tensors.values())
    return parts if len(parts) > 1 else parts[0]


def _theirs(ids: Tensor, ours_to_theirs: Tensor) -> Tensor:
    theirs = ours_to_theirs[ids]
    if bool((theirs < 0).any()):
        raise ValueError("The text has a symbol that the peer does not have.")
    return theirs


def _ours(logits: Tensor, ours_to_theirs: Tensor) -> Tensor:
    """(B, T, W) → (B, T, V)."""
    chosen = logits.index_select(-1, ours_to_theirs.clamp(min=0))
    return chosen.masked_fill(ours_to_theirs < 0, -torch.inf)
