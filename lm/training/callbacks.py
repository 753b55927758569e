"""Callbacks of a training run: all receive the same events, and none can change the training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from lm.training.plan import VALIDATION_COST

StopReason = Literal["finished", "stop_after", "interrupted", "out_of_time", "no_progress"]
"""Why training ended; "out_of_time" is in older runs only."""

Row = dict[str, Any]
"""A line of metrics.jsonl."""


@dataclass(frozen=True)
class Start:
    """Training begins or continues."""

    run: str
    model: str
    parameters: int
    corpus: str
    step: int
    plan_steps: int
    """In a plan by time, an estimate."""
    tokens_per_step: int
    steps_per_epoch: float
    device: str
    precision: str
    seconds: float = 0.0
    """Training time before."""
    counts: int = 0
    """Counts of the training text; a model with as many parameters has no other ones."""
    adapter_parameters: int = 0
    """The parameters that are trained, if all others are frozen."""
    memory_bytes: int | None = None
    """Expected peak of tensors in each process."""
    plan_seconds: float | None = None
    """Training time of a plan by time; None: a plan in steps."""
    step_seconds: float | None = None
    """Measured time of a step, of a plan by time."""
    report_seconds: float | None = None
    """Expected time of the report after a plan by time."""
    max_steps: int | None = None
    """Most steps of a plan by time; None: no limit."""
    validations: int = 0
    """In the whole plan."""
    validation_tokens: int | None = None
    """Tokens that each validation scores; None: all."""
    valid_tokens: int = 0
    """Tokens of the validation split."""
    member: tuple[int, int] | None = None
    """The member of an ensemble that is trained, from 1, and the number of members. Steps and seconds are those of all
    members together."""


@dataclass(frozen=True)
class Tick:
    """A step is done."""

    step: int
    loss: float
    seconds: float
    progress: float = 0.0
    """Share of the plan that is done, 0 to 1."""
    plan_steps: int = 0
    """Steps of the whole plan; in a plan by time, an estimate."""


@dataclass(frozen=True)
class End:
    """Training ends, and everything is saved."""

    reason: StopReason
    step: int
    plan_steps: int
    seconds: float
    best_loss: float | None
    best_step: int | None
    signal: int | None = None
    """The signal that interrupted it."""
    learning_rate_share: float | None = None
    """Share of the peak learning rate in the last step."""


class TimeLeft:
    """Seconds until the end of training, from the times of the steps and validations so far."""

    def __init__(self, start: Start) -> None:
        self._start = start
        self._validations: list[float] = []

    def add(self, row: Row) -> None:
        """Add a line of metrics.jsonl."""
        if row.get("valid_loss") is not None and row.get("validation_seconds") is not None:
            self._validations.append(row["validation_seconds"])

    def seconds(self, step: int, seconds: float) -> float:
        """The time left after `step`, with `seconds` of training done."""
        start, spent = self._start, sum(self._validations)
        time_left = None if start.plan_seconds is None else max(0.0, start.plan_seconds - seconds)
        if time_left is not None and start.max_steps is None:
            return time_left
        step_seconds = max(0.0, seconds - start.seconds - spent) / max(1, step - start.step)
        if self._validations:
            validation_seconds = spent / len(self._validations)
        else:
            scored = start.validation_tokens or start.valid_tokens
            validation_seconds = scored * VALIDATION_COST * step_seconds / start.tokens_per_step
        every = -(-(start.max_steps or start.plan_steps) // max(1, start.validations))
        validations = max(0, start.validations - step // every)
        left = ((start.max_steps or start.plan_steps) - step) * step_seconds + validations * validation_seconds
        return left if time_left is None else min(left, time_left)


class Callback:
    """Receives events; override the methods that you need."""

    def on_start(self, start: Start) -> None:
        """Before the first step."""

    def on_step(self, tick: Tick) -> None:
        """After every step."""

    def on_log(self, row: Row) -> None:
        """After a new line of metrics.jsonl; with "valid_loss" after a validation."""

    def on_validation(self, done: int, total: int) -> None:
        """During a validation: tokens scored, tokens in all."""

    def on_save(self, step: int) -> None:
        """After the `last` checkpoint of `step` is written, in the background: training may be some steps further."""

    def on_end(self, end: End) -> None:
        """After the last step, with everything saved."""

    def on_report(self, done: int, total: int) -> None:
        """During the final report, after the end: tokens scored, tokens in all."""

    def close(self) -> None:
        """At last, also after an error: release the terminal, files, …"""
