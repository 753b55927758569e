"""The sums behind every figure of a report; without torch, so that the server can use them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass
class Scores:
    """Sums over the scored tokens; every figure of a report is a quotient of two of them."""

    context: str
    """The context rule as text."""
    tokens: int = 0
    nats: float = 0.0
    squared_nats: float = 0.0
    top1: int = 0
    top5: int = 0
    unknown_nats: float = 0.0
    """Of the unknown tokens alone."""
    seconds: float = 0.0

    def add(self, nats: Iterable[float], ranks: Iterable[int | None]) -> None:
        """Add tokens by their nats and their ranks in the model's predictions: 0 is the first, None is above 5."""
        values = list(nats)
        self.tokens += len(values)
        self.nats += math.fsum(values)
        self.squared_nats += math.fsum(value * value for value in values)
        known = [rank for rank in ranks if rank is not None]
        self.top1 += sum(rank < 1 for rank in known)
        self.top5 += sum(rank < 5 for rank in known)

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def accuracy(self) -> float:
        """Share of tokens that the model predicted first."""
        return self.top1 / self.tokens

    @property
    def standard_error(self) -> float:
        """Standard error of `loss`, if tokens are independent samples."""
        variance = max(self.squared_nats / self.tokens - self.loss**2, 0.0)
        return float((variance / self.tokens) ** 0.5)
