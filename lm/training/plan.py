"""How long a run is: the plan in steps, fixed before the first one.

A plan given in minutes is measured: a few steps and a part of a validation run on a trainer that is thrown away,
so that the planned run starts from step 0 exactly as one of the same number of steps would.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from lm.config import TrainingConfig

DEFAULT_MINUTES = 5.0
VALIDATIONS = 10
"""Validations over a plan, where they are cheap enough."""
RESERVE = 0.95
"""Share of the minutes that is planned: machines slow down."""
MOST_VALIDATION_SHARE = 0.15
"""Share of the minutes that validation may take."""


@dataclass(frozen=True)
class Plan:
    """The length of a run, kept in its `config.json`."""

    steps: int
    evaluate_every: int
    validation_tokens: int | None = None
    """Validate on the first so many tokens during training; None: on all."""
    seconds: float | None = None
    """Stop when so much training time is spent; None: never."""
    measured_step_seconds: float | None = None
    expected_least: float | None = None
    """With the next: the validation loss that it is expected to end at, in nats per token; None: not known."""
    expected_most: float | None = None
    expected_bytes: int | None = None
    """Of tensors in each process, at most; None: not known."""

    @property
    def expected(self) -> tuple[float, float] | None:
        """The least and the most validation loss that it is expected to end at."""
        return (
            None
            if self.expected_least is None or self.expected_most is None
            else (self.expected_least, self.expected_most)
        )

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Plan:
        """The plan of a `config.json`; TypeError or ValueError where it is none."""
        plan = cls(**content)
        if not all(isinstance(number, int) and number > 0 for number in (plan.steps, plan.evaluate_every)):
            raise ValueError("steps and evaluate_every are whole numbers from 1")
        if not all(number is None or isinstance(number, int | float) for number in asdict(plan).values()):
            raise TypeError("a plan is made of numbers")
        return plan

    def to_json(self) -> dict[str, Any]:
        """For `config.json`."""
        return asdict(self)


def fixed_plan(config: TrainingConfig, steps_per_epoch: float) -> Plan:
    """The plan of a run given in steps or epochs; the shorter one where both are given."""
    lengths = [config.max_steps] if config.max_steps is not None else []
    if config.epochs is not None:
        lengths.append(max(1, round(config.epochs * steps_per_epoch)))
    steps = min(lengths)
    every = config.evaluate_every or max(1, -(-steps // VALIDATIONS))
    return Plan(steps, every, config.validation_tokens)


def timed_plan(
    config: TrainingConfig, steps_per_epoch: float, step_seconds: float, token_seconds: float, valid_tokens: int
) -> Plan:
    """The plan that fills `config.minutes`.

    Args:
        config: with `minutes`; `max_steps` and `epochs` are upper bounds.
        steps_per_epoch: of the training split.
        step_seconds: measured time of a step.
        token_seconds: measured time to validate on one token.
        valid_tokens: tokens of the validation split.
    """
    assert config.minutes is not None
    seconds = config.minutes * 60
    budget = seconds * RESERVE
    scored = min(config.validation_tokens or valid_tokens, valid_tokens)
    if config.evaluate_every is None:
        # At least the last validation runs; where it alone is too long, it runs on a fixed part of the split.
        most = max(1, int(budget * MOST_VALIDATION_SHARE / token_seconds))
        validations = max(1, min(VALIDATIONS, most // scored))
        if validations < 3 and config.validation_tokens is None:
            validations, scored = 3, max(1, min(scored, most // 3))
        steps = max(1, int((budget - validations * scored * token_seconds) / step_seconds))
        every = max(1, -(-steps // validations))
    else:
        every = config.evaluate_every
        steps = max(1, int(budget / (step_seconds + scored * token_seconds / every)))
    bounds = [steps]
    if config.max_steps is not None:
        bounds.append(config.max_steps)
    if config.epochs is not None:
        bounds.append(max(1, round(config.epochs * steps_per_epoch)))
    if min(bounds) < steps:
        steps = min(bounds)
        every = config.evaluate_every or max(1, -(-steps // VALIDATIONS))
    part = scored if scored < valid_tokens else None
    return Plan(steps, every, part, seconds, step_seconds)
