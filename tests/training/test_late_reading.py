"""Steps whose numbers are read late, as on a GPU; here with real numbers on the CPU.

`tests/pretended_gpu` counts the waits of such steps on a device that is not the CPU.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from lm.config import TrainingConfig
from lm.errors import NonFiniteLossError
from lm.profiling.trial import Trial
from lm.training.optimizers import FP16_EPSILON, optimizer_arrays
from lm.training.plan import Plan
from lm.training.precision import LossScale
from lm.training.trainer import Trainer

Make = Callable[..., Trainer]
MakeTrial = Callable[..., Trial]


def late(made: Any) -> Any:
    """The trainer or trial, which then updates and reads as on a GPU."""
    made.step.mixed.updates_on_device = made.step.reads_late = True
    return made


def tensors(made: Any) -> dict[str, Any]:
    """Weights, moments and average."""
    step = made.step
    average = {} if step.average is None else step.average.arrays()
    moments = optimizer_arrays(step.optimizers)
    return {**step.mixed.arrays(), **moments, **{f"average {name}": array for name, array in average.items()}}


def assert_close(one: dict[str, Any], two: dict[str, Any], tolerance: float = 2e-5) -> None:
    assert one.keys() == two.keys()
    for name, array in one.items():
        np.testing.assert_allclose(array, two[name], atol=tolerance, rtol=1e-3, err_msg=name)


# -- the same training --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ("gru", {"average_share": 0.4}),
        (
            "gru",
            {"grad_clip": 0.01, "gradient_accumulation": 2, "model.table_orders": (2, 3), "model.table_dropout": 0},
        ),
        ("gru", {"optimizer": "sgd", "learning_rate": 0.3, "grad_clip": None}),
        ("transformer", {"optimizer": "muon", "average_share": 1.0}),
        ("transformer", {"precision": "bf16", "amp": "O2"}),
    ],
)
def test_a_late_step_makes_the_update_of_a_step_that_is_read_at_once(
    make_trial: MakeTrial, model: str, settings: dict[str, Any]
) -> None:
    plain, on_device = make_trial(model, **settings), late(make_trial(model, **settings))
    for _ in range(4):
        expected, found = plain.run_step(with_metrics=True), on_device.run_step(with_metrics=True)
        assert found.loss == pytest.approx(expected.loss, rel=1e-4)
        assert found.grad_norm == pytest.approx(expected.grad_norm, rel=1e-3)
        assert (found.is_updated, found.is_clipped) == (expected.is_updated, expected.is_clipped)
        assert found.accuracy == pytest.approx(expected.accuracy, abs=0.04)
    # Low weights, and the bf16 products of Muon, differ by their rounding.
    rounds = settings.keys() & {"precision", "optimizer"}
    assert_close(tensors(plain), tensors(on_device), 1e-3 if rounds else 2e-5)


def test_lines_of_metrics_have_the_same_steps_and_losses(make_trainer: Make) -> None:
    options = {"log_every": 3, "average_share": 0.5, "checkpoint_every": 2}
    plain, on_device = make_trainer("gru", **options), late(make_trainer("gru", **options))
    for trainer in (plain, on_device):
        trainer.train(Plan(8, 4))
    exact = ("step", "tokens", "epoch", "clip_rate", "skipped_steps", "learning_rate")
    for one, two in zip(plain.folder.read_metrics(), on_device.folder.read_metrics(), strict=True):
        assert {name: one[name] for name in exact} == {name: two[name] for name in exact}
        assert one["train_loss"] == pytest.approx(two["train_loss"], rel=1e-4)
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-3)
    assert plain.folder.kept_checkpoints() == on_device.folder.kept_checkpoints()


def test_a_run_that_is_read_late_resumes_bit_for_bit(make_trainer: Make) -> None:
    options = {"log_every": 5, "average_share": 0.5, "precision": "fp16", "loss_scale_init": 2.0**26}
    straight, broken = late(make_trainer("gru", **options)), late(make_trainer("gru", **options))
    straight.train(Plan(12, 6))
    broken.train(Plan(12, 6), stop_after=7)
    again = late(make_trainer("gru", run=broken.folder, **options))
    again.load()
    again.train(Plan(12, 6))
    assert straight.progress.skipped_steps == again.progress.skipped_steps > 0
    different = [name for name, array in tensors(straight).items() if not np.array_equal(array, tensors(again)[name])]
    assert not different


# -- numbers that are not finite ------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "muon"])
@pytest.mark.parametrize("level", ["O1", "O2", "O3"])
def test_an_overflow_changes_nothing_before_the_host_reads_it(
    make_trial: MakeTrial, level: str, optimizer: str
) -> None:
    options = {"optimizer": optimizer, "average_share": 0.5, "model.table_orders": (2,), "amp": level}
    trial = late(make_trial("gru", precision="fp16", loss_scale=None, **options))
    for _ in range(2):
        trial.run_step()
    trial.step.mixed.scale = LossScale(TrainingConfig(loss_scale_init=2.0**28), "fp16")
    before = tensors(trial)
    started = trial.start_step()
    after = tensors(trial)
    assert all(np.array_equal(array, after[name]) for name, array in before.items())
    result = started()
    assert not result.is_updated and math.isfinite(result.loss)
    assert result.first_nonfinite.startswith("the gradient of ")
    assert (trial.step.updates, trial.step.mixed.scale.value) == (2, 2.0**27)


def test_the_first_moment_of_a_forbidden_step_is_zero(make_trial: MakeTrial) -> None:
    trial = late(make_trial("gru", precision="fp16", loss_scale_init=2.0**28, optimizer="muon"))
    trial.run_step()
    assert all(not array.any() for array in optimizer_arrays(trial.step.optimizers).values())


def test_the_loss_scale_on_the_device_is_that_of_the_host() -> None:
    options = TrainingConfig(loss_scale_init=64, loss_scale_window=2, loss_scale_backoff=0.25)
    host, device = LossScale(options, "fp16"), LossScale(options, "fp16")
    good, bad, unknown = (torch.tensor(1.0), torch.tensor(1.0)), (torch.tensor(math.inf), torch.tensor(1.0)), None
    for event in (good, good, bad, good, unknown, good, bad, bad, bad, bad, good, good):
        norm, loss = event or (torch.tensor(math.nan), torch.tensor(math.nan))
        value = float(device.advance(norm, loss))
        if event is good:
            host.note_good()
            device.follow(value, is_good=True)
        elif event is bad:
            assert device.follow(value, is_good=False) == host.note_overflow()
        assert device.value == host.value and device.state() == host.state()


def test_a_run_skips_overflows_and_its_scale_is_as_high_as_if_they_were_known_at_once(make_trainer: Make) -> None:
    options = {"precision": "fp16", "loss_scale_init": 2.0**28, "log_every": 4}
    plain, on_device = make_trainer("gru", **options), late(make_trainer("gru", **options))
    for trainer in (plain, on_device):
        trainer.train(Plan(12, 12))
    rows = [trainer.folder.read_metrics() for trainer in (plain, on_device)]
    for name in ("loss_scale", "skipped_steps", "first_nonfinite"):
        assert [row.get(name) for row in rows[0]] == [row.get(name) for row in rows[1]]
    assert rows[0][-1]["skipped_steps"] > 2


def test_a_loss_that_is_not_finite_ends_the_run_one_step_later_with_its_number(make_trainer: Make) -> None:
    trainer = late(make_trainer("gru", log_every=100))
    trainer.train(Plan(20, 20), stop_after=3)
    again = late(make_trainer("gru", run=trainer.folder, log_every=100))
    again.load()
    start, numbers = again.step.start, iter(range(4, 20))

    def broken(*args: Any, **kwargs: Any) -> Any:
        if next(numbers) == 5:
            with torch.no_grad():
                again.step.model.get_parameter("output.bias")[0] = math.nan
        return start(*args, **kwargs)

    again.step.start = broken
    with pytest.raises(NonFiniteLossError, match=r"Step 5: the loss is nan \(first in the weight output.bias\)"):
        again.train(Plan(20, 20))
    assert again.progress.step == 6
    kept, _ = trainer.folder.read_last()
    assert kept["train_state"]["step"] == 3


def test_a_skipped_step_is_logged_and_the_next_ones_train(make_trainer: Make, caplog: pytest.LogCaptureFixture) -> None:
    trainer = late(make_trainer("gru", on_nonfinite="skip", log_every=100))
    calls = iter(range(1, 100))
    bias = trainer.step.model.get_parameter("output.bias")
    bias.register_hook(lambda grad: grad * math.nan if next(calls) == 2 else grad)
    with caplog.at_level(logging.WARNING, logger="lm"):
        trainer.train(Plan(6, 6))
    assert caplog.messages == [
        "Step 2: the gradient norm is nan (first in the gradient of output.bias); the step was skipped."
    ]
    assert (trainer.progress.skipped_steps, trainer.progress.updates, trainer.step.updates) == (1, 5, 5)


# -- fp16 without fp32 weights ---------------------------------------------------------------------------


def test_o3_in_fp16_keeps_gradients_that_would_be_zero_after_a_division_in_fp16(make_trial: MakeTrial) -> None:
    # Gradients of about 1e-9 are 0 in fp16. AdamW's first step of such a small one is rate · gradient / epsilon.
    rate = 2.0**20
    options = {"weight_decay": 0.0, "grad_clip": None, "momentum": 0.0}
    exact = make_trial("gru", optimizer="sgd", learning_rate=rate, **options)
    low = make_trial("gru", amp="O3", precision="fp16", learning_rate=rate * FP16_EPSILON, **options)
    moved = []
    for trial in (exact, low):
        trial.step.loss_function = scaled(trial.step.loss_function, 2.0**-20)
        before = trial.step.mixed.arrays()
        result = trial.run_step()
        assert result.is_updated and 1e-8 < result.grad_norm < 1e-5
        moved.append({name: array - before[name] for name, array in trial.step.mixed.arrays().items()})
    for name in ("output.weight", "output.bias"):
        one, two = (each[name] for each in moved)
        assert np.abs(one - two).max() < 0.03 * np.abs(one).max()


def scaled(loss_function: Callable[..., Any], factor: float) -> Callable[..., Any]:
    """A loss function with a smaller objective."""

    def compute(*args: Any, **kwargs: Any) -> Any:
        found = loss_function(*args, **kwargs)
        return replace(found, objective=found.objective * factor)

    return compute
