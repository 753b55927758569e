"""Learning rates, against values computed by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest

from lm.config import TrainingConfig
from lm.training.learning_rate import learning_rate_share, timed_learning_rate_share


def share(step: int, steps: int, **options: Any) -> float:
    return learning_rate_share(step, steps, TrainingConfig(**options))


def test_warm_up_rises_linearly_and_never_starts_at_zero() -> None:
    # 4 steps of warm-up: 1/5, 2/5, 3/5, 4/5, then the peak.
    values = [share(step, 100, warmup_steps=4, schedule="constant") for step in range(6)]
    assert values == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])


def test_warm_up_takes_at_most_a_tenth_of_the_plan() -> None:
    values = [share(step, 20, warmup_steps=100, schedule="constant") for step in range(3)]
    assert values == pytest.approx([1 / 3, 2 / 3, 1.0])


def test_cosine_is_half_way_down_in_the_middle_and_at_the_floor_in_the_last_step() -> None:
    options = {"warmup_steps": 0, "learning_rate_floor": 0.1}
    assert share(0, 101, **options) == pytest.approx(1.0)
    assert share(50, 101, **options) == pytest.approx(0.55)
    assert share(25, 101, **options) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.sqrt(0.5)))
    assert share(100, 101, **options) == pytest.approx(0.1)
    assert share(5000, 101, **options) == pytest.approx(0.1)


def test_cosine_begins_its_fall_where_the_warm_up_ends() -> None:
    options = {"warmup_steps": 2, "learning_rate_floor": 0.0}
    # 22 steps: 2 of warm-up, then 20 from the peak (step 2) to the floor (step 21), the 11th step 10/19 of the way.
    assert share(2, 22, **options) == pytest.approx(1.0)
    assert share(12, 22, **options) == pytest.approx(0.5 * (1 + math.cos(math.pi * 10 / 19)))
    assert share(21, 22, **options) == pytest.approx(0.0)


def test_linear_falls_by_equal_steps_to_the_floor() -> None:
    values = [share(step, 5, schedule="linear", warmup_steps=0, learning_rate_floor=0.2) for step in range(5)]
    assert values == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])


def test_step_decay_multiplies_every_so_many_steps() -> None:
    options = {"schedule": "step", "warmup_steps": 0, "decay_factor": 0.5, "decay_every": 3}
    assert [share(step, 100, **options) for step in range(8)] == [1, 1, 1, 0.5, 0.5, 0.5, 0.25, 0.25]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "step", "plateau"])
def test_a_plan_of_one_step_trains_at_the_peak(schedule: str) -> None:
    assert share(0, 1, schedule=schedule) == 1.0


# -- plans by time --------------------------------------------------------------------------------------


def timed(updates: int, progress: float, per_step: float, **options: Any) -> float:
    return timed_learning_rate_share(updates, progress, per_step, TrainingConfig(**options))


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "step", "plateau"])
def test_equal_steps_of_a_plan_by_time_have_the_rates_of_a_plan_in_steps(schedule: str) -> None:
    options = {"warmup_steps": 0, "schedule": schedule, "decay_every": 3, "decay_factor": 0.5}
    values = [timed(step, step / 40, 1 / 40, **options) for step in range(40)]
    assert values == pytest.approx([share(step, 40, **options) for step in range(40)])


def test_warm_up_of_a_plan_by_time_ends_after_its_steps_or_at_a_tenth_of_the_plan() -> None:
    # 4 steps: 1/5 … 4/5, then the peak, if they end before a tenth.
    values = [timed(step, step / 1000, 1 / 1000, warmup_steps=4, schedule="constant") for step in range(6)]
    assert values == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    # A machine that turns out slower: the plan has 20 steps, so the second one is the last of the warm-up.
    values = [timed(step, step / 20, 1 / 20, warmup_steps=100, schedule="constant") for step in range(3)]
    assert values == pytest.approx([0.5, 1.0, 1.0])


def test_the_step_that_ends_a_plan_by_time_is_at_the_floor_however_long_it_is() -> None:
    for progress in (0.2, 0.9, 0.999):
        assert timed(500, progress, 1 - progress, learning_rate_floor=0.1) == pytest.approx(0.1)
    assert timed(0, 0.0, 1.0) == 1.0


def test_a_new_gradient_of_the_schedule_never_raises_the_rate() -> None:
    options = {"warmup_steps": 0, "schedule": "linear"}
    for progress in (0.1, 0.5, 0.9):
        before = timed(50, progress - 0.02, 0.02, **options)
        assert all(timed(51, progress, slope, **options) <= before for slope in (0.0001, 0.01, 0.02, 0.05))
