"""The length of a run, and batches that fit a short text.

A plan in steps or epochs is fixed before the first step. It is the same on every machine, so its validations are
bounded by counts of tokens.

A plan by time ends with its minutes. Some steps and a part of a validation are measured first and thrown away: this
gives an estimate of the steps. `lm.training.schedule` plans the rest again during training.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, replace
from typing import Any

from lm.config import RunConfig, TrainingConfig

log = logging.getLogger(__name__)

DEFAULT_MINUTES = 5.0
VALIDATIONS = 10
"""Validations in a plan, if they are fast enough."""
LANDING = 0.99
"""Share of the minutes at which a plan by time ends: the middle of what is allowed, -3 % to +1 %."""
FEWEST_VALIDATIONS = 3
"""Validations in a plan, on a part of the split if need be."""
STEPS_PER_VALIDATION = 10
"""Steps between the fewest validations of a plan by time: one of few long steps has fewer validations."""
MAX_VALIDATION_SHARE = 0.15
"""Share of the plan's time for validation."""
VALIDATION_COST = 1 / 3
"""Time of a validation token in training tokens: about that of a forward pass."""
ALWAYS_VALIDATED = 1024
"""Tokens that each of `VALIDATIONS` may score, even in a short plan."""
HARM = 0.005
"""Nats per token."""
MIN_BATCHES = 4
"""Batches in an epoch of a text that needs smaller batches."""
OLD_KEYS = ("expected_least", "expected_most")
"""Keys in the plans of older runs."""


@dataclass(frozen=True)
class Segment:
    """A part of a plan by time, in which all steps make the same progress."""

    step: int
    """Steps done at its start."""
    progress: float
    """Share of the plan that is done at its start, 0 to 1."""
    per_step: float
    """Progress of a step."""
    validation_every: float | None = None
    """Progress between validations, counted back from 1; None: `Plan.evaluate_every` steps."""

    @property
    def end_step(self) -> int:
        """The step at which the plan ends if no other segment follows."""
        return self.step + round((1 - self.progress) / self.per_step)


@dataclass(frozen=True)
class Plan:
    """The length of a run, saved in its `config.json`."""

    steps: int
    """In a plan by time, the estimate before training."""
    evaluate_every: int
    """Steps between validations; in a plan by time with `validations`, an estimate."""
    validation_tokens: int | None = None
    """Tokens at the start of the split to validate on during training; None: all."""
    seconds: float | None = None
    """Training time of a plan by time; None: a plan in steps."""
    measured_step_seconds: float | None = None
    patience: int | None = None
    """Validations in a row worse than the best one by more than `HARM` at which to stop; None: no limit. Plans of older
    runs have it."""
    expected_bytes: int | None = None
    """Peak of tensors in each process; None: unknown."""
    measured_validation_seconds: float | None = None
    report_seconds: float | None = None
    """Expected time of the report, which comes after a plan by time; None: unknown."""
    validations: int | None = None
    """Validations of a plan by time; None: one every `evaluate_every` steps."""
    max_steps: int | None = None
    """Most steps of a plan by time; None: no limit."""
    segments: tuple[Segment, ...] | None = None
    """Recorded segments that a plan by time repeats without a look at the clock; None: it follows the clock."""

    @property
    def validation_count(self) -> int:
        """Validations in the whole plan, as far as it is known."""
        return self.validations or -(-self.steps // self.evaluate_every)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Plan:
        """The plan of a `config.json`; TypeError or ValueError if it is none."""
        if not isinstance(content, dict):
            raise TypeError("a plan must be an object")
        known = {key: value for key, value in content.items() if key not in OLD_KEYS}
        segments = known.pop("segments", None)
        plan = cls(**known)
        if not all(isinstance(number, int) and number > 0 for number in (plan.steps, plan.evaluate_every)):
            raise ValueError("steps and evaluate_every must be whole numbers from 1")
        if not all(number is None or isinstance(number, int | float) for number in asdict(plan).values()):
            raise TypeError("all values of a plan must be numbers")
        return plan if segments is None else replace(plan, segments=tuple(Segment(**each) for each in segments))

    def to_json(self) -> dict[str, Any]:
        """For `config.json`."""
        content = asdict(self)
        if self.segments is None:
            del content["segments"]
        return content


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
    """The plan of `config.minutes`, with an estimate of its steps.

    Args:
        config: with `minutes`; `max_steps` and `epochs` are upper bounds.
        steps_per_epoch: of the training split.
        step_seconds: measured time of a step.
        token_seconds: measured time to validate on one token.
        valid_tokens: tokens of the validation split.
    """
    assert config.minutes is not None
    seconds = config.minutes * 60
    budget = seconds * LANDING
    affordable = max(1, int(budget * MAX_VALIDATION_SHARE / token_seconds))
    fewest = min(FEWEST_VALIDATIONS, max(1, int(budget / step_seconds) // STEPS_PER_VALIDATION))
    validations, scored = _validations(config, valid_tokens, affordable, fewest)
    if config.evaluate_every is None:
        steps = max(1, int((budget - validations * scored * token_seconds) / step_seconds))
    else:
        steps = max(1, int(budget / (step_seconds + scored * token_seconds / config.evaluate_every)))
    limit = min(_limits(config, steps_per_epoch), default=None)
    if limit is not None and limit < steps:
        steps, validations = limit, VALIDATIONS
    return Plan(
        steps=steps,
        evaluate_every=config.evaluate_every or max(1, -(-steps // validations)),
        validation_tokens=scored if scored < valid_tokens else None,
        seconds=seconds,
        measured_step_seconds=step_seconds,
        measured_validation_seconds=scored * token_seconds,
        validations=validations if config.evaluate_every is None else None,
        max_steps=limit,
    )


def _limits(config: TrainingConfig, steps_per_epoch: float) -> list[int]:
    """The steps of `max_steps` and `epochs`, if given."""
    steps = [] if config.max_steps is None else [config.max_steps]
    return steps if config.epochs is None else [*steps, max(1, round(config.epochs * steps_per_epoch))]


def _validations(
    config: TrainingConfig, valid_tokens: int, affordable: int, fewest: int = FEWEST_VALIDATIONS
) -> tuple[int, int]:
    """The number of validations in a plan, and the tokens of each; options have priority.

    Args:
        config: with `evaluate_every` and `validation_tokens`.
        valid_tokens: tokens of the validation split.
        affordable: tokens that all validations together may score.
        fewest: validations, on a part of the split if need be.
    """
    scored = min(config.validation_tokens or valid_tokens, valid_tokens)
    if config.evaluate_every is not None:
        return VALIDATIONS, scored
    validations = max(1, min(VALIDATIONS, affordable // scored))
    if validations <= fewest and config.validation_tokens is None:
        validations, scored = fewest, max(1, min(scored, affordable // fewest))
    return validations, scored


# -- batches that fit a short text -----------------------------------------------------------------------


def fit_to_text(config: RunConfig, train_tokens: int) -> RunConfig:
    """The same options if the text has at least one batch; else with fewer and shorter rows, which a notice reports.

    Args:
        config: of the run.
        train_tokens: tokens of the training split.
    """
    training, bptt = config.training, config.row_length
    if training.batch_size * bptt <= train_tokens:
        return config
    shorter = max(1, min(bptt, max(8, train_tokens // 16), train_tokens))
    rows = max(1, min(training.batch_size, train_tokens // (MIN_BATCHES * shorter)))
    log.warning(
        "The training text has %s tokens: a batch has %d rows of %d tokens instead of %d rows of %d.",
        f"{train_tokens:,}",
        rows,
        shorter,
        training.batch_size,
        bptt,
    )
    fitted = training.model_copy(update={"batch_size": rows, "bptt": shorter})
    return config.model_copy(update={"training": fitted})
