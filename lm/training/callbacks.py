"""What watches a training run: each callback sees the same events, and none can change the training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

StopReason = Literal["finished", "stop_after", "interrupted", "out_of_time", "no_progress"]

Row = dict[str, Any]
"""A line of metrics.jsonl."""


@dataclass(frozen=True)
class Start:
    """Training begins or goes on."""

    run: str
    model: str
    parameters: int
    corpus: str
    step: int
    plan_steps: int
    tokens_per_step: int
    steps_per_epoch: float
    device: str
    precision: str
    seconds: float = 0.0
    """Training time spent before."""
    counts: int = 0
    """Counts made of the training text; a model that has as many parameters has nothing else to learn."""
    expected: tuple[float, float] | None = None
    """The least and the most validation loss that the plan is expected to end at, in nats per token."""
    memory_bytes: int | None = None
    """Expected to be taken by tensors, at most, in each process."""


@dataclass(frozen=True)
class Tick:
    """A step is done; cheap numbers for a live display."""

    step: int
    loss: float
    seconds: float


@dataclass(frozen=True)
class End:
    """Training ends, with everything saved."""

    reason: StopReason
    step: int
    plan_steps: int
    seconds: float
    best_loss: float | None
    best_step: int | None
    signal: int | None = None
    """The signal that interrupted it."""


class Callback:
    """Override what is of interest."""

    def on_start(self, start: Start) -> None:
        """Before the first step."""

    def on_step(self, tick: Tick) -> None:
        """After every step."""

    def on_log(self, row: Row) -> None:
        """After a line was added to metrics.jsonl; a line with validation has "valid_loss"."""

    def on_validation(self, done: int, total: int) -> None:
        """While a validation runs: tokens scored, tokens in all."""

    def on_save(self, step: int) -> None:
        """Once `last/` holds the state of this step, which may be some steps ago: it is written beside training."""

    def on_end(self, end: End) -> None:
        """After the last step, with everything saved."""

    def close(self) -> None:
        """Last of all, also where an error ended the training: give back the terminal, files, …"""
