"""The distribution of n-gram counts by torch's operations alone, for a model that is traced.

The levels are those of `lm.kernels.counts`, a trie: the contexts of a level that continue one context of the level
before are neighbours, sorted by their oldest token. A context is found by binary search among these, with a fixed
number of steps. `lm.models.kneser_ney` is the reference; results differ by the rounding of float32.

Shapes: B batch, T time, K = order - 1 tokens of context, V vocabulary, C contexts of a level, M pairs, W the most pairs
of a context.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lm.kernels.counts import Anything, Level
from lm.models.kneser_ney import NGramCounts


class CountTables(nn.Module):
    """All levels as tensors, which are no weights."""

    def __init__(self, counts: NGramCounts) -> None:
        super().__init__()
        levels = counts.levels
        self.context_size, self.vocab_size = counts.context_size, counts.vocab_size
        root = np.full(self.vocab_size, levels[0].backoff[0] / self.vocab_size)
        root[levels[0].tokens] += levels[0].shares
        self.root: Tensor
        _keep(self, "root", root.astype(np.float32))
        self.levels = nn.ModuleList()
        for before, level in zip(levels, levels[1:], strict=False):
            if len(level.keys) == 0:
                # The text is shorter than these contexts.
                break
            self.levels.append(_LevelTables(level, len(before.keys)))

    def forward(self, text: Tensor) -> Tensor:
        """Probabilities (B, T, V) of the token after each of the last T tokens of `text` (B, K + T).

        Tokens before the start of a text are -1.
        """
        size = self.context_size
        time = text.shape[1] - size
        probabilities = self.root.expand(text.shape[0], time, self.vocab_size)
        context = torch.zeros_like(text[:, size:])
        levels: Any = self.levels
        for back, level in enumerate(levels, start=1):
            token = text[:, size + 1 - back : size + 1 - back + time]
            context = level.find(context, token)
            probabilities = level.interpolate(context, probabilities)
        return probabilities


class _LevelTables(nn.Module):
    """One level; `parents` is C of the level before."""

    first: Tensor
    oldest: Tensor
    starts: Tensor
    tokens: Tensor
    shares: Tensor
    backoff: Tensor

    def __init__(self, level: Level, parents: int) -> None:
        super().__init__()
        owners, oldest = np.divmod(level.keys, level.vocab_size)
        first = np.searchsorted(owners, np.arange(parents + 1))
        self.search_steps = int(np.diff(first).max()).bit_length()
        self.width = int(np.diff(level.starts).max())
        _keep(self, "first", first.astype(np.int32))
        _keep(self, "oldest", oldest.astype(np.int32))
        _keep(self, "starts", level.starts.astype(np.int32))
        # One more entry, so that there is always one to read.
        _keep(self, "tokens", np.append(level.tokens, 0).astype(np.int32))
        _keep(self, "shares", np.append(level.shares, 0).astype(np.float32))
        _keep(self, "backoff", level.backoff.astype(np.float32))

    def find(self, context: Tensor, token: Tensor) -> Tensor:
        """The contexts (B, T) of `context` (B, T) of the level before and an older token (B, T); -1 for unknown."""
        known = (context >= 0) & (token >= 0)
        parent = context.clamp(min=0)
        low, end = self.first[parent].long(), self.first[parent + 1].long()
        high = end
        last = len(self.oldest) - 1
        for _ in range(self.search_steps):
            middle = (low + high) // 2
            right = (low < high) & (self.oldest[middle.clamp(max=last)].long() < token)
            low, high = torch.where(right, middle + 1, low), torch.where(right, high, middle)
        found = known & (low < end) & (self.oldest[low.clamp(max=last)].long() == token)
        return torch.where(found, low, -1)

    def interpolate(self, context: Tensor, shorter: Tensor) -> Tensor:
        """Probabilities (B, T, V): of the shorter contexts, and the shares of these contexts (B, T)."""
        known, own = context >= 0, context.clamp(min=0)
        start = self.starts[own].long()
        count = torch.where(known, self.starts[own + 1].long() - start, 0)
        offsets = torch.arange(self.width)
        valid = offsets < count[..., None]
        pairs = torch.where(valid, start[..., None] + offsets, len(self.tokens) - 1)
        weight = torch.where(known, self.backoff[own], 1.0)[..., None]
        return (shorter * weight).scatter_add(-1, self.tokens[pairs].long(), self.shares[pairs])


def _keep(module: nn.Module, name: str, array: Anything) -> None:
    module.register_buffer(name, torch.from_numpy(array), persistent=False)
