"""Following a run by its folder alone: what a callback in another process is told, and when it ends."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lm.jobs.follow import GRACE_SECONDS, POLL_SECONDS, Follower
from lm.runs.run_folder import RunFolder
from lm.training.callbacks import Callback, End, Row, Start
from lm.training.plan import Plan
from lm.training.trainer import Trainer

Make = Callable[..., Trainer]
PLAN = Plan(8, 4)


class Told(Callback):
    def __init__(self) -> None:
        self.events: list[Any] = []

    def on_start(self, start: Start) -> None:
        self.events.append(start)

    def on_log(self, row: Row) -> None:
        self.events.append(row["step"])

    def on_end(self, end: End) -> None:
        self.events.append(end)

    def close(self) -> None:
        self.events.append("closed")

    @property
    def steps(self) -> list[int]:
        return [event for event in self.events if isinstance(event, int)]

    @property
    def starts(self) -> list[int]:
        return [event.step for event in self.events if isinstance(event, Start)]


def finish(trainer: Trainer, **options: Any) -> End:
    """As a job does it: the plan in the folder, the run locked."""
    trainer.folder.write_record({**trainer.folder.read_record(), "plan": PLAN.to_json()})
    with trainer.folder.lock():
        return trainer.train(PLAN, **options)


def without_wait(seconds: float) -> None:
    """Nobody waits for what is there already."""


def test_a_finished_run_is_reported_from_its_start_to_its_end(make_trainer: Make) -> None:
    trainer, told, live = make_trainer("gru", log_every=2), Told(), Told()
    trainer.callbacks = [live]
    end = finish(trainer)
    assert Follower(trainer.folder, told).follow(wait=without_wait) == end
    # But for the device's number format, which is the same here, all that the trainer itself said.
    assert told.events[1:] == live.events[1:] and told.steps == [2, 4, 6, 8]
    assert replace(told.events[0], steps_per_epoch=0) == replace(live.events[0], steps_per_epoch=0)
    assert told.events[0].steps_per_epoch == pytest.approx(live.events[0].steps_per_epoch, rel=0.01)


def test_a_running_job_is_followed_line_by_line_until_it_ends(make_trainer: Make) -> None:
    trainer, told, follower_told = make_trainer("gru", log_every=1), Told(), Told()
    follower, seen = Follower(trainer.folder, follower_told), []

    class Look(Callback):
        def on_log(self, row: Row) -> None:
            assert trainer.folder.is_training
            follower.read()
            seen.append(follower_told.steps[-1])

    trainer.callbacks = [Look(), told]
    finish(trainer)
    assert seen == [1, 2, 3, 4, 5, 6, 7, 8] == follower_told.steps
    assert not trainer.folder.is_training
    assert follower.follow(wait=without_wait) is not None
    assert follower_told.steps == seen, "nothing is told twice"


def test_a_run_that_is_killed_and_resumed_is_followed_over_the_gap(make_trainer: Make) -> None:
    trainer, told = make_trainer("gru", log_every=1), Told()
    follower = Follower(trainer.folder, told)

    class Die(Callback):
        def on_log(self, row: Row) -> None:
            if row["step"] == 6:
                raise SystemExit

    trainer.callbacks = [Die()]
    with pytest.raises(SystemExit):
        finish(trainer)
    waits = itertools.count()

    def wait(seconds: float) -> None:
        if next(waits) == 2:
            again = make_trainer("gru", log_every=1, run=trainer.folder)
            again.load()
            finish(again)

    end = follower.follow(wait=wait)
    assert end is not None and end.reason == "finished"
    # The lines after the last save were cut off, and came again.
    assert told.steps == [1, 2, 3, 4, 5, 6, 5, 6, 7, 8] and told.starts == [0, 4]


def test_a_run_that_was_killed_is_given_up_after_a_while(make_trainer: Make) -> None:
    trainer, told, waited = make_trainer("gru"), Told(), []

    class Die(Callback):
        def on_log(self, row: Row) -> None:
            raise SystemExit

    trainer.callbacks = [Die()]
    with pytest.raises(SystemExit):
        finish(trainer)
    assert Follower(trainer.folder, told).follow(wait=waited.append) is None
    assert sum(waited) == pytest.approx(GRACE_SECONDS, abs=2 * POLL_SECONDS)
    assert told.events[-1] == "closed"


def test_another_run_of_the_same_name_is_followed_from_its_start(make_trainer: Make) -> None:
    trainer, told = make_trainer("gru", log_every=4), Told()
    follower = Follower(trainer.folder, told)
    finish(trainer)
    follower.read()
    other = make_trainer("lstm", log_every=2)
    finish(other)
    record = {**other.folder.read_record(), "created": "2030-01-01T00:00:00+00:00"}
    other.folder.write_record(record)
    trainer.folder.path.rename(trainer.folder.path.with_name("away"))
    other.folder.path.rename(trainer.folder.path)
    assert follower.follow(wait=without_wait) is not None
    assert told.starts == [0, 0] and told.steps == [4, 8, 2, 4, 6, 8]
    assert [event.model for event in told.events if isinstance(event, Start)] == ["gru", "lstm"]


def test_a_check_whether_a_run_is_trained_does_not_block_a_trainer(tmp_path: Path) -> None:
    run, done = RunFolder(tmp_path / "a"), threading.Event()
    (run.path / "last").mkdir(parents=True)
    with run.lock():
        assert run.is_training

    def look() -> None:
        while not done.is_set():
            _ = run.is_training

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        for _ in range(20):
            with run.lock():
                pass
    finally:
        done.set()
        watcher.join()


def test_a_plan_by_time_is_reported_with_the_steps_that_it_came_to(make_trainer: Make) -> None:
    plan = Plan(8, 4, seconds=80.0, measured_step_seconds=10.0, validations=2)
    # Each look at the clock is a second later, so steps take less time than was measured.
    trainer, told, live = make_trainer("gru", log_every=2, clock=itertools.count().__next__), Told(), Told()
    trainer.folder.write_record({**trainer.folder.read_record(), "plan": plan.to_json()})
    trainer.callbacks = [live]
    with trainer.folder.lock():
        end = trainer.train(plan)
    assert end.reason == "finished" and end.step == end.plan_steps != 8
    assert Follower(trainer.folder, told).follow(wait=without_wait) == end
    assert told.events[1:] == live.events[1:]
    assert replace(told.events[0], steps_per_epoch=0) == replace(live.events[0], steps_per_epoch=0)
