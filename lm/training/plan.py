"""The length of a run as a plan in steps, fixed before the first one; and batches that fit a short text.

A plan by time is measured: some steps and a part of a validation run first and are thrown away. So the planned run
starts from step 0 like a run with a plan in steps.

A plan in steps or epochs is the same on every machine, so its validations are bounded by counts of tokens.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from lm.config import RunConfig, TrainingConfig

DEFAULT_BPTT = 64
"""Tokens of a row in one step, without an option or a context length."""
DEFAULT_MINUTES = 5.0
VALIDATIONS = 10
"""Validations in a plan, if they are fast enough."""
RESERVE = 0.95
"""Share of the minutes that is planned, because machines slow down."""
MAX_VALIDATION_SHARE = 0.15
"""Share of the plan's time for validation."""
VALIDATION_COST = 1 / 3
"""Time of a validation token in training tokens: about that of a forward pass."""
ALWAYS_VALIDATED = 1024
"""Tokens that each of `VALIDATIONS` may score, even in a short plan."""
PATIENCE = 3
"""A plan by time stops after this many validations in a row that were worse than the best one by more than `HARM`."""
HARM = 0.005
"""Nats per token."""
MIN_BATCHES = 4
"""Batches in an epoch of a text that needs smaller batches."""
OLD_KEYS = ("expected_least", "expected_most")
"""Keys in the plans of older runs."""


@dataclass(frozen=True)
class Plan:
    """The length of a run, saved in its `config.json`."""

    steps: int
    evaluate_every: int
    validation_tokens: int | None = None
    """Tokens at the start of the split to validate on during training; None: all."""
    seconds: float | None = None
    """Training time at which to stop; None: no limit."""
    measured_step_seconds: float | None = None
    patience: int | None = None
    """Validations in a row worse than the best one by more than `HARM` at which to stop; None: no limit."""
    expected_bytes: int | None = None
    """Peak of tensors in each process; None: unknown."""

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Plan:
        """The plan of a `config.json`; TypeError or ValueError if it is none."""
        if not isinstance(content, dict):
            raise TypeError("a plan must be an object")
        plan = cls(**{key: value for key, value in content.items() if key not in OLD_KEYS})
        if not all(isinstance(number, int) and number > 0 for number in (plan.steps, plan.evaluate_every)):
            raise ValueError("steps and evaluate_every must be whole numbers from 1")
        if not all(number is None or isinstance(number, int | float) for number in asdict(plan).values()):
            raise TypeError("all values of a plan must be numbers")
        return plan

    def to_json(self) -> dict[str, Any]:
        """For `config.json`."""
        return asdict(self)


def fixed_plan(config: TrainingConfig, steps_per_epoch: float, tokens_per_step: int, valid_tokens: int) -> Plan:
    """The plan of a run in steps or epochs; the shorter one if both are given.

    Args:
        config: with `max_steps` or `epochs`.
        steps_per_epoch: of the training split.
        tokens_per_step: trained tokens in an optimizer step.
        valid_tokens: tokens of the validation split.
    """
    steps = min(_limits(config, steps_per_epoch))
    share = MAX_VALIDATION_SHARE / (1 - MAX_VALIDATION_SHARE) / VALIDATION_COST
    affordable = max(int(steps * tokens_per_step * share), VALIDATIONS * ALWAYS_VALIDATED)
    validations, scored = _validations(config, valid_tokens, affordable)
    every = config.evaluate_every or max(1, -(-steps // validations))
    return Plan(steps, every, scored if scored < valid_tokens else None)


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
    affordable = max(1, int(budget * MAX_VALIDATION_SHARE / token_seconds))
    validations, scored = _validations(config, valid_tokens, affordable)
    if config.evaluate_every is None:
        steps = max(1, int((budget - validations * scored * token_seconds) / step_seconds))
        every = max(1, -(-steps // validations))
    else:
        every = config.evaluate_every
        steps = max(1, int(budget / (step_seconds + scored * token_seconds / every)))
    limit = min(_limits(config, steps_per_epoch), default=steps)
    if limit < steps:
        steps = limit
        every = config.evaluate_every or max(1, -(-steps // VALIDATIONS))
    part = scored if scored < valid_tokens else None
    return Plan(steps, every, part, seconds, step_seconds, None if config.patience else PATIENCE)


def _limits(config: TrainingConfig, steps_per_epoch: float) -> list[int]:
    """The steps of `max_steps` and `epochs`, if given."""
    steps = [] if config.max_steps is None else [config.max_steps]
    return steps if config.epochs is None else [*steps, max(1, round(config.epochs * steps_per_epoch))]


def _validations(config: TrainingConfig, valid_tokens: int, affordable: int) -> tuple[int, int]:
    """The number of validations in a plan, and the tokens of each; options have priority.

    Args:
        config: with `evaluate_every` and `validation_tokens`.
        valid_tokens: tokens of the validation split.
        affordable: tokens that all validations together may score.
    """
    scored = min(config.validation_tokens or valid_tokens, valid_tokens)
    if config.evaluate_every is not None:
        return VALIDATIONS, scored
    validations = max(1, min(VALIDATIONS, affordable // scored))
    if validations < 3 and config.validation_tokens is None:
        # Three of them, on the first part of the split.
        validations, scored = 3, max(1, min(scored, affordable // 3))
    return validations, scored


# -- batches that fit a short text -----------------------------------------------------------------------


def bptt_of(config: RunConfig) -> int:
    """Tokens of a row in one step."""
    context: int | None = config.model.model_dump().get("context_length")
    return config.training.bptt or context or DEFAULT_BPTT


def fit_to_text(config: RunConfig, train_tokens: int) -> RunConfig:
    """The same options if the text has at least one batch; else with fewer and shorter rows.

    Args:
        config: of the run.
        train_tokens: tokens of the training split.
    """
    training, bptt = config.training, bptt_of(config)
    if training.batch_size * bptt <= train_tokens:
        return config
    shorter = max(1, min(bptt, max(8, train_tokens // 16), train_tokens))
    rows = max(1, min(training.batch_size, train_tokens // (MIN_BATCHES * shorter)))
    fitted = training.model_copy(update={"batch_size": rows, "bptt": shorter})
    return config.model_copy(update={"training": fitted})
