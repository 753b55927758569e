"""What watches a training run: each callback sees the same events, and none can change the training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from lm.training.plan import VALIDATION_COST

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
    plan_seconds: float | None = None
    """Training stops when so much time is spent; None: never."""
    validations: int = 0
    """In the whole plan."""
    validation_tokens: int | None = None
    """Each validation scores the first so many tokens of the split; None: all."""
    valid_tokens: int = 0
    """Tokens of the validation split."""


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
    learning_rate_share: float | None = None
    """Share of its peak that the learning rate still had in the last step."""


class TimeLeft:
    """Seconds until the end of training, from the time that steps and validations took so far."""

    def __init__(self, start: Start) -> None:
        self._start = start
        self._validated = 0
        self._validation_seconds = 0.0

    def add(self, row: Row) -> None:
        """Take a line of metrics.jsonl."""
        if row.get("valid_loss") is not None and row.get("validation_seconds") is not None:
            self._validated += 1
            self._validation_seconds += row["validation_seconds"]

    def seconds(self, step: int, seconds: float) -> float:
        """The time that is left after `step`, when `seconds` of training are spent."""
        start = self._start
        done = max(1, step - start.step)
        a_step = max(0.0, seconds - start.seconds - self._validation_seconds) / done
        if self._validated:
            a_validation = self._validation_seconds / self._validated
        else:
            scored = start.validation_tokens or start.valid_tokens
            a_validation = scored * VALIDATION_COST * a_step / start.tokens_per_step
        every = -(-start.plan_steps // max(1, start.validations))
        validations = max(0, start.validations - step // every)
        left = (start.plan_steps - step) * a_step + validations * a_validation
        return left if start.plan_seconds is None else min(left, max(0.0, start.plan_seconds - seconds))


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

    def on_report(self, done: int, total: int) -> None:
        """While the closing report is measured, after the end: tokens scored, tokens in all."""

    def close(self) -> None:
        """Last of all, also where an error ended the training: give back the terminal, files, …"""
