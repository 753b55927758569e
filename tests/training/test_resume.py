"""Exact resume: N steps straight and N/2 + N/2 leave the same bytes, whatever stops the first half."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lm.errors import CorruptRunError, RunError, VocabMismatchError
from lm.files import write_synced
from lm.runs.run_folder import MODEL
from lm.training.callbacks import Callback, Tick
from lm.training.plan import Plan
from lm.training.trainer import Trainer
from lm.training.validation import validate

pytestmark = pytest.mark.slow

Make = Callable[..., Trainer]
PLAN = Plan(16, 4)
RICH: dict[str, Any] = {
    "model.dropout": 0.2,
    "schedule": "plateau",
    "learning_rate": 0.05,
    "decay_factor": 0.5,
    "gradient_accumulation": 2,
    "warmup_steps": 2,
    "patience": 50,
    "log_every": 3,
}


# The first steps overflow, and the scale grows again every third good step: halving and growth, both stored.
OVERFLOWS: dict[str, Any] = {"precision": "fp16", "loss_scale_init": 2.0**30, "loss_scale_window": 3}
FORMATS: dict[str, dict[str, Any]] = {"fp32": {"precision": "fp32"}, "fp16": OVERFLOWS}


def run_to_end(make: Make, model: str, settings: dict[str, Any], *, stop: int | None) -> Trainer:
    trainer = make(model, **settings)
    trainer.train(PLAN, stop_after=stop)
    if stop is not None:
        torch.manual_seed(999)
        trainer = make(model, run=trainer.folder, **settings)
        trainer.load()
        assert trainer.progress.step == stop
        trainer.train(PLAN)
    return trainer


def assert_same(one: Trainer, two: Trainer) -> None:
    state_one, tensors_one = one.folder.read_last()
    state_two, tensors_two = two.folder.read_last()
    assert tensors_one.keys() == tensors_two.keys()
    for file, arrays in tensors_one.items():
        assert arrays.keys() == tensors_two[file].keys()
        for name, array in arrays.items():
            np.testing.assert_array_equal(array, tensors_two[file][name], err_msg=f"{file}: {name}")
    assert state_one["scaler"] == state_two["scaler"]
    assert without_time(state_one["train_state"]) == without_time(state_two["train_state"])
    best_one, facts_one = one.folder.read_weights("best")
    best_two, facts_two = two.folder.read_weights("best")
    assert facts_one == facts_two
    for name, array in best_one.items():
        np.testing.assert_array_equal(array, best_two[name], err_msg=f"best: {name}")
    rows = [list(map(without_time, trainer.folder.read_metrics())) for trainer in (one, two)]
    for straight in rows[0]:
        # A stop in between may add a line of its own, never lose or change one of the plan's.
        again = next(row for row in rows[1] if row["step"] == straight["step"])
        assert again["valid_loss"] == straight["valid_loss"]
        assert again["learning_rate"] == straight["learning_rate"]
        for name in ("skipped_steps", "loss_scale"):
            assert again.get(name) == straight.get(name)


def without_time(row: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value for name, value in row.items() if name not in ("seconds", "validation_seconds", "tokens_per_second")
    }


WAYS = [
    # Each family and batching once; the other precision in `make soak`.
    pytest.param(model, batching, precision, marks=() if (i + j + k) % 2 == 0 else pytest.mark.soak)
    for i, model in enumerate(("gru", "lstm", "transformer"))
    for j, batching in enumerate(("streams", "rotated", "random", "shuffled"))
    for k, precision in enumerate(("fp32", "fp16"))
]


@pytest.mark.parametrize(("model", "batching", "precision"), WAYS)
def test_half_and_half_equals_straight(make_trainer: Make, model: str, batching: str, precision: str) -> None:
    settings = {**RICH, "batching": batching, **FORMATS[precision]}
    straight, halves = (run_to_end(make_trainer, model, settings, stop=stop) for stop in (None, 7))
    assert_same(straight, halves)
    assert (straight.progress.skipped_steps > 0) == (precision == "fp16")


LEVELS = [
    ("gru", "bf16", "O2"),
    ("gru", "fp16", "O3"),
    ("lstm", "fp16", "O2"),
    ("transformer", "bf16", "O1"),
    # The others in `make soak`.
    ("gru", "bf16", "O1"),
    ("gru", "fp16", "O1"),
    ("lstm", "bf16", "O3"),
    ("transformer", "bf16", "O2"),
    ("transformer", "fp16", "O2"),
]


@pytest.mark.parametrize(
    ("model", "precision", "level"),
    [pytest.param(*case, marks=pytest.mark.soak if place > 3 else ()) for place, case in enumerate(LEVELS)],
)
def test_half_and_half_equals_straight_at_every_level(
    make_trainer: Make, model: str, precision: str, level: str
) -> None:
    settings = {**RICH, "schedule": "cosine", "average_share": 0.3, "optimizer": "muon", "model.table_orders": (2,)}
    settings |= {"precision": precision, "amp": level, "fp32_modules": ["output" if model == "lstm" else "tables"]}
    if precision == "fp16":
        settings |= {"loss_scale_init": 2.0**24, "loss_scale_window": 3}
    straight, halves = (run_to_end(make_trainer, model, settings, stop=stop) for stop in (None, 7))
    assert_same(straight, halves)
    assert straight.progress.updates + straight.progress.skipped_steps == 16
    if precision == "fp16":
        scales = [row["loss_scale"] for row in straight.folder.read_metrics()]
        assert any(later > earlier for earlier, later in pairwise(scales)) and min(scales) < 2.0**24


@pytest.mark.parametrize(("optimizer", "schedule"), [("sgd", "cosine"), ("muon", "step")])
def test_half_and_half_equals_straight_for_every_optimizer(make_trainer: Make, optimizer: str, schedule: str) -> None:
    settings = {**RICH, "optimizer": optimizer, "schedule": schedule, "decay_every": 5, "learning_rate": 0.02}
    assert_same(*(run_to_end(make_trainer, "transformer", settings, stop=stop) for stop in (None, 7)))


@pytest.mark.parametrize("model", ["gru", "transformer"])
def test_half_and_half_equals_straight_with_averaged_weights(make_trainer: Make, model: str) -> None:
    settings = {**RICH, "average_share": 0.3}
    assert_same(*(run_to_end(make_trainer, model, settings, stop=stop) for stop in (None, 7)))


@pytest.mark.parametrize(("model", "precision"), [("gru", "fp16"), ("transformer", "fp32")])
def test_half_and_half_equals_straight_with_context_tables(make_trainer: Make, model: str, precision: str) -> None:
    settings = {**RICH, "model.table_orders": (2, 3, 4), "model.table_buckets": 300, **FORMATS[precision]}
    assert_same(*(run_to_end(make_trainer, model, settings, stop=stop) for stop in (None, 7)))


@pytest.mark.parametrize(("model", "precision"), [("lstm", "fp32"), ("transformer", "bf16")])
def test_half_and_half_equals_straight_with_an_adaptive_softmax(make_trainer: Make, model: str, precision: str) -> None:
    settings = {**RICH, "model.adaptive_cutoffs": (5, 12), "model.tie_weights": True, "precision": precision}
    if model == "lstm":
        settings |= {"model.locked_dropout": True, "model.embedding_dropout": 0.1, "model.weight_dropout": 0.3}
        settings |= {"model.activation_penalty": 2.0, "model.change_penalty": 1.0}
    assert_same(*(run_to_end(make_trainer, model, settings, stop=stop) for stop in (None, 7)))


@pytest.mark.parametrize("stop", [4, 8])
def test_a_plateau_is_remembered_wherever_the_run_was_stopped(
    make_trainer: Make, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    settings = {**RICH, "decay_patience": 2}
    # The best at step 4, stalls at 8 and 12: the rate is divided there, and not again at 16.
    losses = {4: 2.0, 8: 3.0, 12: 3.0, 16: 3.0}

    def scripted(step: Any, ids: Any, **options: Any) -> Any:
        found = validate(step, ids)
        return replace(found, nats=losses[step.updates] * found.tokens)

    monkeypatch.setattr("lm.training.trainer.validate", scripted)
    straight, halves = (run_to_end(make_trainer, "gru", settings, stop=at) for at in (None, stop))
    assert_same(straight, halves)
    assert halves.progress.rate_scale == 0.5 and halves.progress.best_step == 4
    assert halves.folder.read_metrics()[-1]["learning_rate"] == pytest.approx(0.025)


def test_a_run_stopped_where_its_patience_ends_does_not_continue(
    make_trainer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**RICH, "patience": 1, "learning_rate": 1e-30}
    straight = make_trainer("gru", **settings)
    assert straight.train(PLAN).reason == "no_progress"
    stopped = make_trainer("gru", **settings)
    assert stopped.train(PLAN, stop_after=straight.progress.step).reason == "no_progress"


class Kill(Callback):
    """Ends the process, as far as the trainer can tell, after a step or in the middle of a save."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_step(self, tick: Tick) -> None:
        if tick.step == self._step:
            raise SystemExit


def test_a_kill_costs_the_steps_since_the_last_save_and_nothing_else(make_trainer: Make) -> None:
    straight = run_to_end(make_trainer, "gru", RICH, stop=None)
    killed = make_trainer("gru", **RICH)
    killed.callbacks = [Kill(11)]
    with pytest.raises(SystemExit):
        killed.train(PLAN)
    assert [row["step"] for row in killed.folder.read_metrics()][-1] == 9
    again = make_trainer("gru", run=killed.folder, **RICH)
    again.load()
    assert again.progress.step == 8
    assert [row["step"] for row in killed.folder.read_metrics()] == [3, 4, 6, 8]
    again.train(PLAN)
    assert_same(straight, again)


def test_a_kill_between_best_and_last_changes_nothing(make_trainer: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    straight = run_to_end(make_trainer, "gru", RICH, stop=None)
    killed = make_trainer("gru", **RICH)

    def die() -> None:
        if killed.progress.step == 8:
            raise SystemExit
        Trainer.save(killed)

    monkeypatch.setattr(killed, "save", die)
    with pytest.raises(SystemExit):
        killed.train(PLAN)
    assert killed.folder.read_weights("best")[1]["step"] == 8
    again = make_trainer("gru", run=killed.folder, **RICH)
    again.load()
    assert (again.progress.step, again.progress.best_step) == (4, 8)
    again.train(PLAN)
    assert_same(straight, again)


def test_a_resume_on_another_machine_says_that_the_last_bits_may_differ(
    make_trainer: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer("gru")
    trainer.train(PLAN, stop_after=2)
    monkeypatch.setenv("MKL_CBWR", "AVX2")
    again = make_trainer("gru", run=trainer.folder)
    with caplog.at_level(logging.WARNING, logger="lm"):
        again.load()
    assert "last bits may differ" in caplog.text and "MKL_CBWR '' then, 'AVX2' now" in caplog.text


def test_last_of_another_model_is_refused(make_trainer: Make) -> None:
    gru, lstm = make_trainer("gru"), make_trainer("lstm")
    for trainer in (gru, lstm):
        trainer.train(PLAN, stop_after=2)
    (gru.folder.path / "last" / MODEL).write_bytes((lstm.folder.path / "last" / MODEL).read_bytes())
    before = asdict(gru.progress)
    with pytest.raises(VocabMismatchError, match="not trained with the model options in this folder"):
        make_trainer("gru", run=gru.folder).load()
    assert asdict(gru.progress) == before


def test_an_optimizer_state_that_does_not_fit_is_refused(make_trainer: Make) -> None:
    trainer = make_trainer("gru", optimizer="sgd")
    trainer.train(PLAN, stop_after=2)
    with pytest.raises(CorruptRunError, match="last does not fit this run"):
        other = make_trainer("gru", optimizer="adamw", run=trainer.folder)
        other.load()
        other.train(PLAN)


def test_a_full_disk_while_saving_ends_the_run_and_leaves_a_state_to_resume(
    make_trainer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = run_to_end(make_trainer, "gru", RICH, stop=None)
    trainer = make_trainer("gru", **RICH)
    monkeypatch.setattr("lm.runs.run_folder.write_synced", FullDisk(after="state.json", times=3))
    with pytest.raises(RunError, match="No space left"):
        trainer.train(PLAN)
    monkeypatch.undo()
    again = make_trainer("gru", run=trainer.folder, **RICH)
    again.load()
    assert again.progress.step == 8
    again.train(PLAN)
    assert_same(straight, again)


class FullDisk:
    """Writes files until one of a name was written so many times; from then on there is room for half a file."""

    def __init__(self, *, after: str, times: int) -> None:
        self._after, self._left = after, times

    def __call__(self, path: Path, content: bytes) -> None:
        if not self._left:
            path.write_bytes(content[: len(content) // 2])
            raise OSError(28, "No space left on device")
        write_synced(path, content)
        self._left -= path.name == self._after
