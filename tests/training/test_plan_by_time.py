"""Plans by time with a simulated clock: they land, whatever the machine does, and can be repeated bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch

from lm.config import TrainingConfig
from lm.training import trainer as trainer_module
from lm.training.callbacks import Callback, Start, Tick, TimeLeft
from lm.training.last_checkpoint import TrainProgress
from lm.training.plan import Plan, Segment, timed_plan
from lm.training.schedule import Pace, TimedSchedule, typical_seconds
from lm.training.train_step import StepResult
from lm.training.trainer import Trainer

pytestmark = pytest.mark.slow

Make = Callable[..., Trainer]
Seconds = Callable[[float], float]
"""The time of something that begins at a time of the plan."""


def constant(seconds: float) -> Seconds:
    return lambda now: seconds


@dataclass
class Machine:
    """A clock, and the times that steps, validations and saves take by it."""

    step: Seconds
    validation: Seconds = constant(0.0)
    save: Seconds = constant(0.0)
    pauses: dict[float, float] = field(default_factory=dict)
    """Time of the plan → length of a pause in the next step."""
    now: float = 0.0

    def __call__(self) -> float:
        return self.now

    def spend(self, seconds: Seconds) -> None:
        for begins in [begins for begins in self.pauses if begins <= self.now]:
            self.now += self.pauses.pop(begins)
        self.now += seconds(self.now)


class Watcher(Callback):
    def __init__(self) -> None:
        self.ticks: list[Tick] = []
        self.starts: list[Start] = []

    def on_start(self, start: Start) -> None:
        self.starts.append(start)

    def on_step(self, tick: Tick) -> None:
        self.ticks.append(tick)


@pytest.fixture
def on_machine(make_trainer: Make, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Trainer]:
    """on_machine(machine, …): a trainer whose steps, validations and saves take the machine's time."""
    validate = trainer_module.validate

    def make(machine: Machine, **options: Any) -> Trainer:
        trainer = make_trainer("gru", clock=machine, log_every=1000, **options)
        start, checkpoint = trainer.step.start, trainer.step.checkpoint

        def timed_start(*args: Any, **kwargs: Any) -> Callable[[], StepResult]:
            machine.spend(machine.step)
            return start(*args, **kwargs)

        def timed_checkpoint() -> Any:
            machine.spend(machine.save)
            return checkpoint()

        def timed_validate(*args: Any, **kwargs: Any) -> Any:
            machine.spend(machine.validation)
            return validate(*args, **kwargs)

        trainer.step.start = timed_start  # type: ignore[method-assign]
        trainer.step.checkpoint = timed_checkpoint  # type: ignore[method-assign]
        monkeypatch.setattr(trainer_module, "validate", timed_validate)
        trainer.callbacks = [Watcher()]
        return trainer

    return make


def plan_of(trainer: Trainer, seconds: float, *, step: float, validation: float = 0.0) -> Plan:
    """A plan by time from these measured times."""
    tokens = len(trainer.corpus.splits["valid"].ids) - 1
    config = trainer.config.model_copy(update={"minutes": seconds / 60})
    return timed_plan(config, trainer.steps_per_epoch, step, max(validation, 1e-9) / tokens, tokens)


def rates_down(trainer: Trainer) -> bool:
    return trainer.progress.learning_rate_share == pytest.approx(trainer.config.learning_rate_floor)


STEADY = constant(3.0)
PAUSE = {300.0: 60.0}
CASES: dict[str, tuple[Machine, dict[str, float]]] = {
    "steady": (Machine(STEADY), {}),
    "twice as slow half-way": (Machine(lambda now: 3.0 if now < 300 else 6.0), {}),
    "twice as fast half-way": (Machine(lambda now: 6.0 if now < 300 else 3.0), {"step": 6.0}),
    "paused for a minute": (Machine(STEADY, pauses=PAUSE), {}),
    "paused for a minute near the end": (Machine(STEADY, pauses={500.0: 60.0}), {}),
    "five times slower than measured": (Machine(STEADY), {"step": 0.6}),
    "five times faster than measured": (Machine(STEADY), {"step": 15.0}),
    "slow validations and saves": (Machine(STEADY, constant(30.0), constant(5.0)), {"validation": 30.0}),
    "validations slower than measured": (Machine(STEADY, constant(30.0)), {"validation": 6.0}),
    "paused in a validation": (Machine(STEADY, lambda now: 60.0 if 300 < now < 340 else 3.0), {"validation": 3.0}),
    "steps of 2 % of the time": (Machine(constant(12.0)), {"step": 12.0}),
    "a machine that other programs use in turns": (Machine(lambda now: 2.0 if now // 40 % 2 else 5.0), {}),
}


FAST = {"steady", "twice as slow half-way"}


@pytest.mark.parametrize("case", [pytest.param(case, marks=() if case in FAST else pytest.mark.slow) for case in CASES])
def test_a_plan_by_time_lands(on_machine: Callable[..., Trainer], case: str) -> None:
    machine, measured = CASES[case]
    machine = replace(machine, pauses=dict(machine.pauses))
    trainer = on_machine(machine, warmup_steps=10)
    machine.now -= machine.save(0.0)  # The save before the first step, which is not counted.
    end = trainer.train(plan_of(trainer, 600.0, **{"step": 3.0, **measured}))
    assert -0.03 <= machine.now / 600 - 1 <= 0.01
    assert end.reason == "finished" and rates_down(trainer)
    validated = [row for row in trainer.folder.read_metrics() if row["valid_loss"] is not None]
    assert validated[-1]["step"] == end.step == end.plan_steps
    most = 3 if "slow" in case and "validations" in case else 10
    assert (2 if most == 3 else 9) <= len(validated) <= most + 1
    ticks = trainer.callbacks[0].ticks  # type: ignore[attr-defined]
    progress = [tick.progress for tick in ticks]
    assert progress == sorted(progress) and progress[-1] == 1
    # The learning rate never jumps: no step makes more than a few times the progress of the one before.
    gains = np.diff([0.0, *progress])
    assert max(gains[1:-1] / gains[:-2]) < 6


@pytest.mark.parametrize("seconds", [6.0, 30.0, 600.0, 7200.0])
@pytest.mark.parametrize("step", [0.01, 0.05])
def test_plans_of_all_lengths_land_on_a_machine_with_noise(seconds: float, step: float) -> None:
    random = np.random.default_rng(1)
    config = TrainingConfig(minutes=seconds / 60, warmup_steps=100)
    step *= max(1.0, seconds / 600)
    plan = timed_plan(config, 1e9, step, 1e-6 * seconds, 5000)
    end, share, segments = simulate(plan, config, lambda now: step * random.lognormal(0, 0.4), 0.005 * seconds)
    assert -0.03 <= end / seconds - 1 <= 0.01
    assert share == pytest.approx(config.learning_rate_floor)
    assert len(segments) < 100


def simulate(
    plan: Plan, config: TrainingConfig, step: Seconds, validation: float
) -> tuple[float, float, list[Segment]]:
    """Follow a schedule without a trainer: the time at the end, the last learning rate's share, the segments."""
    segments: list[Segment] = []
    schedule = TimedSchedule(plan, config, segments, Pace.of(plan))
    schedule.begin(0, 0.0)
    now, since, done, share = 0.0, 0.0, 0, 0.0
    while not schedule.is_done(done):
        share = schedule.learning_rate_share(done, done)
        now += step(now)
        done += 1
        schedule.add_step(now - since)
        since = now
        if schedule.validates_at(done):
            now += validation
            schedule.add_validation(now - since)
            since = now
        schedule.look(done, now)
    return now, share, segments


def test_steps_and_epochs_bound_a_plan_by_time(on_machine: Callable[..., Trainer]) -> None:
    machine = Machine(constant(1.0))
    trainer = on_machine(machine, max_steps=50)
    end = trainer.train(plan_of(trainer, 600.0, step=30.0))
    assert (end.reason, end.step) == ("finished", 50) and machine.now == 50 and rates_down(trainer)


def test_validations_at_given_steps_are_paid_for(on_machine: Callable[..., Trainer]) -> None:
    machine = Machine(constant(1.0), constant(2.0))
    trainer = on_machine(machine, evaluate_every=10)
    trainer.train(plan_of(trainer, 120.0, step=3.0, validation=2.0))
    steps = [row["step"] for row in trainer.folder.read_metrics() if row["valid_loss"] is not None]
    assert steps[:3] == [10, 20, 30] and all(step % 10 == 0 for step in steps[:-1])
    assert 120 * 0.97 <= machine.now <= 120 * 1.01 and rates_down(trainer)


def test_skipped_steps_take_time_and_no_warm_up(on_machine: Callable[..., Trainer]) -> None:
    machine = Machine(constant(1.0))
    trainer = on_machine(machine, on_nonfinite="skip", learning_rate=1e-3)

    class Break(Callback):
        """Every second step has weights that are not finite."""

        def on_step(self, tick: Tick) -> None:
            bias = trainer.model.get_parameter("output.bias")
            with torch.no_grad():
                bias.fill_(float("nan") if tick.step % 2 else 0.0)

    trainer.callbacks = [Break()]
    end = trainer.train(plan_of(trainer, 60.0, step=1.0), stop_after=40)
    progress = trainer.progress
    assert (end.step, progress.skipped_steps) == (40, 20) and progress.updates == 20
    assert trainer.schedule.progress(40) == pytest.approx(40 / 59, abs=0.01)


LONG: dict[str, tuple[Machine, float]] = {
    "steady": (Machine(constant(4.5), constant(6.0), constant(3.0)), 4.5),
    "a slow first step": (Machine(lambda now: 15.0 if now < 1 else 4.5, constant(6.0), constant(3.0)), 4.5),
    "slower than measured": (Machine(constant(9.0), constant(6.0), constant(3.0)), 4.5),
    "slower at the end": (Machine(lambda now: 4.5 if now < 35 else 9.0, constant(6.0), constant(3.0)), 4.5),
    "a pause": (Machine(constant(4.5), constant(6.0), constant(3.0), pauses={20.0: 12.0}), 4.5),
    "a pause that leaves no time": (Machine(constant(4.5), constant(6.0), constant(3.0), pauses={30.0: 40.0}), 4.5),
}


@pytest.mark.parametrize("case", LONG)
def test_few_long_steps_never_begin_one_that_would_end_too_late(on_machine: Callable[..., Trainer], case: str) -> None:
    machine, measured = LONG[case]
    machine = replace(machine, pauses=dict(machine.pauses))
    trainer = on_machine(machine)
    machine.now -= machine.save(0.0)
    plan = plan_of(trainer, 60.0, step=measured, validation=6.0)
    assert plan.validations == 1
    end = trainer.train(plan)
    assert end.reason == "finished" and end.step == end.plan_steps
    rows = [row for row in trainer.folder.read_metrics() if row["valid_loss"] is not None]
    assert [row["step"] for row in rows] == [end.step] and rows[-1]["progress"] == 1
    step = machine.step(59.0)
    if case == "a pause that leaves no time":
        assert machine.now <= 30 + 40 + 2 * step + 6 + 3
    else:
        assert 60 - 2 * step <= machine.now <= 60.6
    saved = TrainProgress.from_json(trainer.folder.read_state()["train_state"])
    # Repeated, it ends at the same step.
    again = on_machine(Machine(constant(0.1)))
    assert again.train(replace(plan, segments=tuple(saved.segments))).step == end.step


def test_less_time_than_a_step_takes_is_one_step_at_the_peak(on_machine: Callable[..., Trainer]) -> None:
    trainer = on_machine(Machine(constant(10.0)))
    end = trainer.train(plan_of(trainer, 1.0, step=10.0))
    assert (end.reason, end.step, end.learning_rate_share) == ("finished", 1, 1.0)


# -- the record ----------------------------------------------------------------------------------------


def disturbed() -> Machine:
    return Machine(lambda now: 1.0 if now < 20 else 2.5, constant(1.0), constant(0.2), pauses={35.0: 9.0})


def tensors(trainer: Trainer) -> Iterator[tuple[str, Any]]:
    files = {"best": trainer.folder.read_weights("best")[0], **trainer.folder.read_last()[1]}
    return ((f"{file}: {name}", array) for file, arrays in files.items() for name, array in arrays.items())


def test_a_run_that_repeats_a_recorded_plan_equals_it_bit_for_bit_over_an_interruption(
    on_machine: Callable[..., Trainer],
) -> None:
    options = {"model.dropout": 0.2}
    straight = on_machine(disturbed(), **options)
    plan = plan_of(straight, 100.0, step=1.0, validation=1.0)
    end = straight.train(plan)
    segments = tuple(straight.progress.segments)
    assert len(segments) > 3
    saved = TrainProgress.from_json(straight.folder.read_state()["train_state"])
    assert saved.segments == list(segments) and saved.pace == straight.progress.pace
    recorded = Plan.from_json(replace(plan, segments=segments).to_json())
    # Another machine, with other times.
    first = on_machine(Machine(constant(7.0)), **options)
    first.train(recorded, stop_after=end.step // 2)
    torch.manual_seed(5)
    second = on_machine(Machine(constant(0.1)), run=first.folder, **options)
    second.load()
    assert second.train(recorded).step == end.step
    for (name, one), (_, two) in zip(tensors(straight), tensors(second), strict=True):
        np.testing.assert_array_equal(one, two, err_msg=name)
    rows = [
        {row["step"]: (row["valid_loss"], row["learning_rate"], row["progress"]) for row in run.folder.read_metrics()}
        for run in (straight, second)
    ]
    assert rows[0].items() <= rows[1].items()


def test_a_resumed_run_keeps_its_progress_and_fits_the_rest_into_the_time_that_is_left(
    on_machine: Callable[..., Trainer],
) -> None:
    first = on_machine(Machine(constant(1.0)))
    plan = plan_of(first, 100.0, step=1.0)
    first.train(plan, stop_after=40)
    before = first.schedule.progress(40)
    # The machine that resumes is twice as slow, and its clock is another.
    machine = Machine(constant(2.0), now=10_000.0)
    second = on_machine(machine, run=first.folder)
    second.load()
    assert second.progress.segments == first.progress.segments
    end = second.train(plan)
    start, first_tick = second.callbacks[0].starts[0], second.callbacks[0].ticks[0]  # type: ignore[attr-defined]
    assert (start.step, start.plan_steps) == (40, first.schedule.steps)
    assert before < first_tick.progress < before + 0.02
    assert end.reason == "finished" and end.step in (69, 70) and rates_down(second)
    assert 97 <= machine.now - 10_000 + 40 <= 101


def test_a_kill_leaves_the_segments_of_the_steps_that_are_saved(on_machine: Callable[..., Trainer]) -> None:
    class Die(Callback):
        def on_step(self, tick: Tick) -> None:
            if tick.step == 33:
                raise SystemExit

    trainer = on_machine(disturbed())
    trainer.callbacks = [Die()]
    plan = plan_of(trainer, 100.0, step=1.0, validation=1.0)
    with pytest.raises(SystemExit):
        trainer.train(plan)
    machine = Machine(constant(1.0))
    again = on_machine(machine, run=trainer.folder)
    again.load()
    step, spent = again.progress.step, again.progress.seconds
    assert 0 < step < 33
    assert all(segment.step <= step for segment in again.progress.segments)
    assert again.progress.segments == trainer.progress.segments[: len(again.progress.segments)]
    assert again.train(plan).reason == "finished"
    assert 97 <= spent + machine.now <= 101 and rates_down(again)


def test_a_timed_run_of_an_older_version_is_resumed_and_lands(on_machine: Callable[..., Trainer]) -> None:
    old = Plan(40, 10, seconds=50.0)
    first = on_machine(Machine(constant(1.0)))
    first.train(old, stop_after=12)
    state = first.folder.read_state()["train_state"]
    del state["segments"], state["pace"]
    machine = Machine(constant(2.0))
    second = on_machine(machine, run=first.folder)
    second.load()
    second.progress = TrainProgress.from_json({**state, "stop_reason": None})
    assert second.train(old).reason == "finished"
    assert 0.97 * 50 <= 12 + machine.now <= 1.01 * 50 + 1 and rates_down(second)


# -- parts ----------------------------------------------------------------------------------------------


def test_a_pause_is_not_expected_again() -> None:
    assert typical_seconds([1.0, 1.0, 1.0, 61.0, 1.0]) == pytest.approx(7 / 5)
    assert typical_seconds([2.0, 2.0]) == 2.0
    assert typical_seconds([60.0, 1.0]) == pytest.approx(2.0)


def test_a_validation_with_a_pause_does_not_change_the_estimate_for_long() -> None:
    pace = Pace(0.5, [2.0])
    assert pace.validation_seconds == 1.0
    pace.validations = [2.0, 100.0]
    assert pace.validation_seconds == 5.0
    pace.validations = [2.0, 100.0, 3.0]
    assert pace.validation_seconds == 1.5
    assert Pace(0.5).validation_seconds == 0


def test_the_time_left_of_a_plan_by_time_is_that_of_its_minutes() -> None:
    start = Start("a", "gru", 1, "c", 0, 100, 64, 10.0, "cpu", "fp32", validations=4, plan_seconds=30.0)
    assert TimeLeft(start).seconds(10, 20.0) == pytest.approx(10.0)
    # 100 steps at most, of which 90 are left with 0.1 s each; validations are free here.
    assert TimeLeft(replace(start, max_steps=100)).seconds(10, 1.0) == pytest.approx(9.0)
