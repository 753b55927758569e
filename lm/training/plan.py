"""How long a run is: the plan in steps, fixed before the first one; and batches that fit a short text.

A plan given in minutes is measured: a few steps and a part of a validation run on a trainer that is thrown away,
so that the planned run starts from step 0 exactly as one of the same number of steps would.

A plan given in steps or epochs is the same on every machine. So its validations are bounded by counts of tokens.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from lm.config import RunConfig, TrainingConfig

DEFAULT_BPTT = 64
"""Tokens a row in one step, where neither options nor a context length say it."""
DEFAULT_MINUTES = 5.0
VALIDATIONS = 10
"""Validations over a plan, where they are cheap enough."""
RESERVE = 0.95
"""Share of the minutes that is planned: machines slow down."""
MOST_VALIDATION_SHARE = 0.15
"""Share of the plan's time that validation may take."""
VALIDATION_COST = 1 / 3
"""Of a validation token, in training tokens: about that of a forward pass."""
ALWAYS_VALIDATED = 1024
"""Tokens that each of `VALIDATIONS` may score however short the plan is."""
PATIENCE = 3
"""A plan by time stops when so many validations in a row were worse than the best one by more than `HARM`."""
HARM = 0.005
"""Nats per token. More steps that make the loss worse by this much do harm."""
FEW_BATCHES = 4
"""Batches that an epoch of a text has, where batches had to be made smaller for it."""


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
    patience: int | None = None
    """Stop after so many validations in a row that were worse than the best by more than `HARM`; None: never."""
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


def fixed_plan(config: TrainingConfig, steps_per_epoch: float, tokens_per_step: int, valid_tokens: int) -> Plan:
    """The plan of a run given in steps or epochs; the shorter one where both are given.

    Args:
        config: with `max_steps` or `epochs`.
        steps_per_epoch: of the training split.
        tokens_per_step: that an optimizer step trains on.
        valid_tokens: tokens of the validation split.
    """
    lengths = [config.max_steps] if config.max_steps is not None else []
    if config.epochs is not None:
        lengths.append(max(1, round(config.epochs * steps_per_epoch)))
    steps = min(lengths)
    share = MOST_VALIDATION_SHARE / (1 - MOST_VALIDATION_SHARE) / VALIDATION_COST
    affordable = max(int(steps * tokens_per_step * share), VALIDATIONS * ALWAYS_VALIDATED)
    validations, scored = _validations(config, valid_tokens, affordable)
    every = config.evaluate_every or max(1, -(-steps // validations))
    return Plan(steps, every, scored if scored < valid_tokens else None)


def _validations(config: TrainingConfig, valid_tokens: int, affordable: int) -> tuple[int, int]:
    """How many validations a plan has, and on how many tokens each; the options go first.

    Args:
        config: with `evaluate_every` and `validation_tokens`.
        valid_tokens: tokens of the validation split.
        affordable: tokens that all validations may score together.
    """
    scored = min(config.validation_tokens or valid_tokens, valid_tokens)
    if config.evaluate_every is not None:
        return VALIDATIONS, scored
    validations = max(1, min(VALIDATIONS, affordable // scored))
    if validations < 3 and config.validation_tokens is None:
        # Three of them, on the first part of the split.
        validations, scored = 3, max(1, min(scored, affordable // 3))
    return validations, scored


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
    affordable = max(1, int(budget * MOST_VALIDATION_SHARE / token_seconds))
    validations, scored = _validations(config, valid_tokens, affordable)
    if config.evaluate_every is None:
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
    return Plan(steps, every, part, seconds, step_seconds, None if config.patience else PATIENCE)


# -- batches that fit a short text -----------------------------------------------------------------------


def bptt_of(config: RunConfig) -> int:
    """Tokens a row in one step."""
    context: int | None = config.model.model_dump().get("context_length")
    return config.training.bptt or context or DEFAULT_BPTT


def fit_to_text(config: RunConfig, train_tokens: int) -> RunConfig:
    """The same options where the text has a batch of them; else with fewer and shorter rows.

    Args:
        config: of the run.
        train_tokens: tokens of the training split.
    """
    training, bptt = config.training, bptt_of(config)
    if training.batch_size * bptt <= train_tokens:
        return config
    shorter = max(1, min(bptt, max(8, train_tokens // 16), train_tokens))
    rows = max(1, min(training.batch_size, train_tokens // (FEW_BATCHES * shorter)))
    fitted = training.model_copy(update={"batch_size": rows, "bptt": shorter})
    return config.model_copy(update={"training": fitted})
