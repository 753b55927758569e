"""How many steps a run has."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from lm.config import CorpusConfig, RunConfig, Section, TrainingConfig
from lm.training.plan import Plan, Segment, fit_to_text, fixed_plan, timed_plan


def fixed(*, epoch: float = 10.0, tokens: int = 10_000, valid: int = 1000, **options: Any) -> Plan:
    return fixed_plan(TrainingConfig(**options), epoch, tokens, valid)


def timed(
    *, epoch: float = 1000.0, step: float = 0.01, token: float = 1e-6, valid: int = 10_000, **options: Any
) -> Plan:
    return timed_plan(TrainingConfig(**options), epoch, step, token, valid)


def test_epochs_are_turned_into_steps() -> None:
    assert fixed(epochs=2.5).steps == 25


def test_of_steps_and_epochs_the_shorter_holds() -> None:
    assert fixed(epochs=2, max_steps=7).steps == 7
    assert fixed(epochs=0.5, max_steps=7).steps == 5


def test_a_fraction_of_an_epoch_is_at_least_one_step() -> None:
    assert fixed(epochs=0.001) == Plan(1, 1)


def test_ten_validations_fall_on_a_plan() -> None:
    assert fixed(max_steps=1000).evaluate_every == 100
    assert fixed(max_steps=15).evaluate_every == 2
    assert fixed(max_steps=1000, evaluate_every=7).evaluate_every == 7


def test_minutes_are_filled_to_99_percent_with_steps_and_ten_validations() -> None:
    plan = timed(minutes=1)
    # 59.4 s; ten validations of 0.01 s leave 59.3 s, 5,930 steps of 0.01 s.
    assert plan == Plan(5930, 593, None, 60.0, 0.01, measured_validation_seconds=0.01, validations=10)


def test_validation_that_is_too_slow_runs_three_times_on_a_part_of_the_split() -> None:
    # 59.4 s × 15 % = 8.91 s pay for 9,123 tokens of 1/1024 s, of a split of 10,000: three times 3,041.
    plan = timed(minutes=1, token=2**-10)
    assert (plan.validation_tokens, plan.validations) == (3041, 3)
    assert plan.evaluate_every == -(-plan.steps // 3)
    assert plan.steps * 0.01 + 3 * 3041 * 2**-10 <= 59.4


def test_minutes_are_bounded_by_steps_and_epochs() -> None:
    bounded = timed(minutes=1, max_steps=50)
    assert (bounded.steps, bounded.evaluate_every, bounded.validations, bounded.max_steps) == (50, 5, 10, 50)
    assert timed(minutes=1, epochs=0.1).steps == 100
    # A bound that the estimate does not reach is kept: the machine may turn out faster.
    assert (timed(minutes=1, max_steps=9000).steps, timed(minutes=1, max_steps=9000).max_steps) == (5930, 9000)


def test_a_given_interval_between_validations_is_paid_for() -> None:
    # Each step costs 0.01 s and a tenth of a validation of 1 s: 59.4 / 0.11 = 540 steps.
    plan = timed(minutes=1, evaluate_every=10, token=1e-4)
    assert (plan.steps, plan.evaluate_every, plan.validations) == (540, 10, None)


def test_less_time_than_a_step_takes_is_a_plan_of_one_step() -> None:
    assert timed(minutes=0.001, step=10.0, token=1.0).steps == 1


def test_a_plan_comes_back_from_json() -> None:
    plan = Plan(10, 2, 300, 60.0, 0.5)
    assert Plan.from_json(plan.to_json()) == plan
    recorded = replace(plan, segments=(Segment(0, 0.0, 0.1, 0.1), Segment(4, 0.4, 0.2)))
    assert Plan.from_json(json.loads(json.dumps(recorded.to_json()))) == recorded
    assert "segments" not in plan.to_json()


def test_a_segment_has_the_end_of_the_plan() -> None:
    assert Segment(4, 0.4, 0.2).end_step == 7


def test_the_plan_of_an_older_run_is_read_without_its_expected_loss() -> None:
    old = {**Plan(10, 2).to_json(), "expected_least": 1.3, "expected_most": None}
    assert Plan.from_json(old) == Plan(10, 2)


@pytest.mark.parametrize(
    "bad",
    [
        {"steps": "9"},
        {"steps": 0},
        {"seconds": "soon"},
        {"what": 1},
        {"evaluate_every": None},
        {"segments": 3},
        {"segments": [{"step": 1}]},
    ],  # fmt: skip
)
def test_an_edited_plan_is_refused(bad: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError)):
        Plan.from_json({**Plan(10, 2).to_json(), **bad})


def test_validation_takes_at_most_a_small_share_of_a_plan_in_steps() -> None:
    # 1,000 steps of 4,096 tokens. Validation may take 15 % of the time, at a third of a training token's cost:
    # 4,096,000 × (0.15 / 0.85) × 3 = 2,168,470 tokens, which are 9 validations of 217,646.
    assert fixed(max_steps=1000, tokens=4096, valid=217_646) == Plan(1000, 112, None)
    # 100 steps: 216,847 tokens do not pay for three of the whole split, so three run on a third of them each.
    assert fixed(max_steps=100, tokens=4096, valid=217_646) == Plan(100, 34, 72_282)
    # Three steps: 1,024 tokens ten times are always free.
    assert fixed(max_steps=3, tokens=700, valid=217_646) == Plan(3, 1, 3413)


def test_what_was_said_about_validation_goes_before_its_bound() -> None:
    assert fixed(max_steps=3, tokens=700, valid=217_646, validation_tokens=50_000) == Plan(3, 3, 50_000)
    assert fixed(max_steps=3, tokens=700, valid=217_646, evaluate_every=1) == Plan(3, 1, None)


@pytest.mark.parametrize(
    ("tokens", "rows", "bptt"),
    [(4096, 64, 64), (4095, 15, 64), (2700, 10, 64), (180, 4, 11), (20, 1, 8), (5, 1, 5), (1, 1, 1)],
)
def test_batches_fit_a_short_text(tokens: int, rows: int, bptt: int) -> None:
    config = RunConfig(
        corpus=CorpusConfig(source="x"), tokenizer=Section(type="char"), model=Section(type="gru"),
        training=TrainingConfig(batch_size=64),
    )  # fmt: skip
    fitted = fit_to_text(config, tokens)
    assert (fitted.training.batch_size, fitted.row_length) == (rows, bptt)
    assert rows * bptt <= tokens
    assert (fitted is config) == (tokens == 4096)
