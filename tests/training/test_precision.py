"""Precision levels: what each computes in which format, the loss scale, and steps that are skipped."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lm.config import Section, TrainingConfig, compose
from lm.errors import ConfigError, DeviceError, NonFiniteLossError
from lm.kernels import dispatch
from lm.models.base import build_model
from lm.profiling.trial import Trial
from lm.training.callbacks import Row
from lm.training.last_checkpoint import with_saved_format
from lm.training.plan import Plan
from lm.training.precision import Format, LossScale, MixedPrecision, choose_format, formats
from lm.training.tensorboard import TensorBoard
from lm.training.trainer import Trainer
from lm.training.validation import validate

Make = Callable[..., Trainer]
MakeTrial = Callable[..., Trial]
CPU = torch.device("cpu")
LOW = [(precision, level) for precision in ("bf16", "fp16") for level in ("O1", "O2", "O3")]


def weights(trainer: Trainer | Trial) -> dict[str, Any]:
    return trainer.step.mixed.arrays()


def config(**training: Any) -> TrainingConfig:
    return compose(
        "x", preset="gru-char", overrides={f"training.{name}": each for name, each in training.items()}
    ).training


def distance(one: dict[str, Any], two: dict[str, Any]) -> float:
    return math.sqrt(sum(float(np.square(one[name] - two[name], dtype=np.float64).sum()) for name in one))


# -- choosing -----------------------------------------------------------------------------------------


@pytest.fixture
def cpu_without_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_best_bf16_isa", lambda: None)


@pytest.fixture
def cpu_with_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "bf16_isa", "amx_emulated")


@pytest.mark.usefixtures("cpu_without_bf16")
@pytest.mark.parametrize(
    ("options", "chosen"),
    [
        ({}, Format("fp32", "O0")),
        ({"precision": "auto"}, Format("fp32", "O0")),
        ({"precision": None}, Format("fp32", "O0")),
        ({"precision": "fp32"}, Format("fp32", "O0")),
        ({"precision": "bf16"}, Format("bf16", "O1")),
        ({"precision": "fp16"}, Format("fp16", "O1")),
        ({"amp": "O0"}, Format("fp32", "O0")),
        ({"amp": "O2"}, Format("bf16", "O2")),
        ({"amp": "O3", "precision": "fp16"}, Format("fp16", "O3")),
    ],
)
def test_what_is_left_out_follows_from_what_is_given(options: dict[str, Any], chosen: Format) -> None:
    assert choose_format(config(**options), CPU) == chosen


@pytest.mark.usefixtures("cpu_with_bf16")
@pytest.mark.parametrize(
    ("options", "chosen"),
    [
        ({}, Format("bf16", "O1")),
        ({"precision": "auto"}, Format("bf16", "O1")),
        ({"precision": "fp32"}, Format("fp32", "O0")),
        ({"amp": "O0"}, Format("fp32", "O0")),
        # The compiled step does not use the kernels.
        ({"compile": "on"}, Format("fp32", "O0")),
    ],
)
def test_auto_is_bf16_on_a_cpu_whose_kernels_have_it(options: dict[str, Any], chosen: Format) -> None:
    assert choose_format(config(**options), CPU) == chosen


@pytest.mark.usefixtures("cpu_with_bf16")
@pytest.mark.parametrize(
    ("model", "chosen"),
    [
        ({"type": "gru"}, "bf16 O1"),
        ({"type": "lstm"}, "bf16 O1"),
        ({"type": "transformer"}, "bf16 O1"),
        ({"type": "hybrid"}, "bf16 O1"),
        ({"type": "rnn"}, "fp32"),
        ({"type": "hybrid", "cell": "rnn"}, "fp32"),
    ],
)
def test_auto_is_fp32_for_a_model_that_the_kernels_do_not_train(model: dict[str, Any], chosen: str) -> None:
    built = build_model(Section.model_validate(model), 20)
    assert str(MixedPrecision(built, config(), CPU).format) == chosen


def test_a_run_resumes_in_the_format_that_auto_began_in(make_trainer: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    auto = config()
    with monkeypatch.context() as older:
        older.setattr(dispatch, "_best_bf16_isa", lambda: None)
        begun = make_trainer("gru", precision="auto")
        begun.train(Plan(2, 2))
    monkeypatch.setattr(dispatch, "bf16_isa", "amx_emulated")
    assert str(choose_format(with_saved_format(auto, begun.folder), CPU)) == "fp32"
    low = make_trainer("gru", precision="auto")
    low.train(Plan(2, 2))
    assert str(choose_format(with_saved_format(auto, low.folder), CPU)) == "bf16 O1"


def test_a_run_in_bf16_continues_in_fp32_on_a_cpu_without_it_with_a_warning(
    make_trainer: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(dispatch, "bf16_isa", "amx_emulated")
    begun = make_trainer("gru", precision="auto")
    begun.train(Plan(4, 2), stop_after=2)
    monkeypatch.setattr(dispatch, "bf16_isa", None)
    monkeypatch.setattr(dispatch, "_best_bf16_isa", lambda: None)
    resumed = make_trainer("gru", run=begun.folder, precision="auto")
    resumed.load()
    assert "precision 'bf16' then, 'fp32' now" in caplog.text and "kernels 'amx_emulated' then" in caplog.text
    assert resumed.train(Plan(4, 2)).reason == "finished"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"precision": "fp32", "amp": "O1"}, r"amp = 'O1'.*contradicts precision=fp32; use amp=O1 with .*bf16 or fp16"),
        ({"precision": "tf32", "amp": "O3"}, r"contradicts precision=tf32.*or amp=O0 with tf32"),
        ({"precision": "bf16", "amp": "O0"}, r"contradicts precision=bf16; use amp=O1, O2 or O3 with bf16, or amp=O0"),
        ({"amp": "O4"}, r"training.amp = 'O4': use 'O0', 'O1', 'O2' or 'O3'"),
        ({"precision": "fp8"}, r"use 'auto', 'fp32', 'tf32', 'bf16' or 'fp16'"),
        ({"loss_scale": "dynamik"}, r"use dynamic, none, or a number above 0"),
        ({"loss_scale": -2}, r"use dynamic, none, or a number above 0"),
    ],
)
def test_a_contradiction_is_refused_with_what_would_work(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        config(**options)


def test_tf32_is_refused_where_no_gpu_has_it_with_the_formats_that_are_there() -> None:
    with pytest.raises(
        DeviceError, match=r"tf32: only NVIDIA GPUs from Ampere on.*device cpu; use fp32, bf16 or fp16\."
    ):
        choose_format(config(precision="tf32"), CPU)


def test_a_loss_scale_over_fp32_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--loss-scale 1024 is for low precision.*--precision fp16 or bf16"):
        choose_format(config(loss_scale=1024, precision="fp32"), CPU)


def test_the_formats_of_a_cpu_are_fp32_and_three_levels_of_each_low_one() -> None:
    assert [str(each) for each in formats(CPU)] == [
        "fp32", "bf16 O1", "bf16 O2", "bf16 O3", "fp16 O1", "fp16 O2", "fp16 O3",
    ]  # fmt: skip


def test_an_unknown_module_is_answered_with_the_nearest_one(make_trainer: Make) -> None:
    with pytest.raises(
        ConfigError, match=r"the gru model has no module 'outputs'\. Did you mean 'output'\?.*embedding"
    ):
        make_trainer("gru", precision="bf16", fp32_modules=["outputs"])


def test_parts_of_a_model_in_a_model_can_be_named_and_a_whole_one_cannot() -> None:
    overrides = {"model.order": 2, "training.precision": "bf16", "training.amp": "O2"}
    options = compose("x", preset="hybrid-char", overrides=overrides)
    named = options.training.model_copy(update={"fp32_modules": ("network.cell",)})
    mixed = MixedPrecision(build_model(options.model, 20), named, CPU)
    formats = {name: tensor.dtype for name, tensor in mixed._model.named_parameters()}
    assert formats["network.cell.weight_hh_l0"] == torch.float32
    assert formats["network.embedding.weight"] == torch.bfloat16
    whole = options.training.model_copy(update={"fp32_modules": ("network",)})
    with pytest.raises(ConfigError, match=r"no module 'network'.*Modules: network.embedding.*--precision fp32"):
        MixedPrecision(build_model(options.model, 20), whole, CPU)


# -- what is in which format ----------------------------------------------------------------------------


def dtypes(trainer: Trainer | Trial) -> dict[str, str]:
    return {name: str(own.dtype).removeprefix("torch.") for name, own in trainer.step.model.named_parameters()}


def outputs(trainer: Trial) -> dict[str, torch.dtype]:
    """The format of what each module gives in a step."""
    found: dict[str, torch.dtype] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            found[name] = tensor.dtype

        return hook

    for name, module in trainer.step.model.named_modules():
        if not name.endswith(("dropout", "tables")):
            module.register_forward_hook(note(name))
    trainer.run_step()
    return found


@pytest.mark.usefixtures("cpu_without_bf16")
def test_o1_keeps_fp32_weights_and_computes_products_in_low_precision(make_trial: MakeTrial) -> None:
    trainer = make_trial("transformer", precision="bf16")
    assert set(dtypes(trainer).values()) == {"float32"}
    seen = outputs(trainer)
    assert seen["layers.0.mlp.down_proj"] == torch.bfloat16 and seen["embed_tokens"] == torch.float32


@pytest.mark.parametrize(("precision", "name"), [("bf16", "bfloat16"), ("fp16", "float16")])
def test_o2_has_low_weights_with_norms_masters_moments_and_loss_in_fp32(
    make_trial: MakeTrial, precision: str, name: str
) -> None:
    trainer = make_trial("transformer", precision=precision, amp="O2", **{"model.table_orders": (2,)})
    low = {key for key, dtype in dtypes(trainer).items() if dtype == name}
    assert {"embed_tokens.weight", "layers.0.self_attn.q_proj.weight", "lm_head.weight"} <= low
    kept = dtypes(trainer).keys() - low
    assert kept == {key for key in dtypes(trainer) if "norm" in key or key.startswith("tables")}
    seen = outputs(trainer)
    assert seen["norm"] == seen["layers.0.mlp.down_proj"] == seen["embed_tokens"] == getattr(torch, name)
    for optimizer in trainer.step.optimizers:
        for group in optimizer.param_groups:
            assert {weight.dtype for weight in group["params"]} == {torch.float32}
        assert {each.dtype for kept in optimizer.state.values() for each in kept.values()} == {torch.float32}
    assert trainer.step.model.loss_dtype == torch.float32


def test_a_norm_at_o2_adds_up_squares_that_are_beyond_fp16(make_trainer: Make) -> None:
    exact, low = make_trainer("transformer"), make_trainer("transformer", precision="fp16", amp="O2")
    large = torch.linspace(100, 3000, 16)
    normed = low.step.model.get_submodule("norm")(large.half())
    assert normed.dtype == torch.float16
    torch.testing.assert_close(normed.float(), exact.step.model.get_submodule("norm")(large), atol=2e-3, rtol=0)


def test_o3_is_low_everywhere_but_in_context_tables(make_trial: MakeTrial) -> None:
    trainer = make_trial("transformer", precision="bf16", amp="O3", **{"model.table_orders": (2,)})
    trainer.run_step()
    assert {key for key, dtype in dtypes(trainer).items() if dtype != "bfloat16"} == {"tables.2.weight"}
    assert trainer.step.model.loss_dtype == torch.bfloat16
    moments = trainer.step.optimizers[0].state.values()
    assert {kept["exp_avg_sq"].dtype for kept in moments} == {torch.bfloat16}


def test_the_models_weights_are_the_rounded_masters_after_every_step(make_trial: MakeTrial) -> None:
    trainer = make_trial("gru", precision="bf16", amp="O2")
    for _ in range(3):
        trainer.run_step()
        for parameter, master in trainer.step.mixed.masters.items():
            assert torch.equal(parameter, master.to(torch.bfloat16))
            assert not torch.equal(parameter.float(), master)


@pytest.mark.parametrize("level", ["O1", "O2", "O3"])
@pytest.mark.parametrize(
    ("model", "names", "settings"),
    [
        ("gru", ["cell", "output"], {}),
        ("lstm", ["cell"], {"model.locked_dropout": True, "model.dropout": 0.1, "model.weight_dropout": 0.1}),
        ("gru", ["embedding"], {"model.tie_weights": True}),
        ("gru", ["embedding", "cell"], {"model.embedding_dropout": 0.1}),
        ("lstm", ["embedding", "tails"], {"model.tie_weights": True, "model.adaptive_cutoffs": (5, 12)}),
        ("transformer", ["layers"], {}),
        ("transformer", ["layers.0.mlp", "layers.0.mlp.up_proj", "lm_head"], {}),
        ("transformer", ["layers.0.self_attn.q_proj", "norm"], {"model.dropout": 0.1}),
    ],
)
def test_named_modules_stay_in_fp32_and_the_rest_keeps_its_level(
    make_trial: MakeTrial, model: str, names: list[str], settings: dict[str, Any], level: str
) -> None:
    trainer = make_trial(model, precision="bf16", amp=level, fp32_modules=names, **settings)
    found = dtypes(trainer)
    inside = {key for key in found if key.startswith(tuple(f"{name}." for name in names))}
    assert inside and {found[key] for key in inside} == {"float32"}
    if level != "O1":
        assert "bfloat16" in found.values()
    begun = weights(trainer)
    losses = [trainer.run_step().loss for _ in range(3)]
    assert all(map(math.isfinite, losses)) and math.isfinite(
        validate(trainer.step, trainer.corpus.splits["valid"].ids[:99]).loss
    )
    assert all(not np.array_equal(begun[name], array) for name, array in weights(trainer).items() if name in inside)


def test_o1_multiplies_natively_in_bf16_where_the_cpu_can(
    make_trial: MakeTrial, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "bf16_isa", "amx_emulated")
    trainer = make_trial("transformer", precision="bf16")
    assert trainer.step.environment()["kernels"] == "amx_emulated"
    assert set(outputs(trainer).values()) == {torch.float32}
    assert make_trial("transformer").step.environment()["kernels"] != "amx_emulated"


@pytest.mark.usefixtures("cpu_without_bf16")
@pytest.mark.parametrize("level", ["O1", "O2"])
def test_logits_of_an_output_layer_kept_in_fp32_are_not_rounded(make_trainer: Make, level: str) -> None:
    rounded, kept = (
        make_trainer("gru", precision="bf16", amp=level, fp32_modules=names) for names in ((), ("output",))
    )
    ids = torch.from_numpy(kept.batches.batch(0).inputs)

    def logits(trainer: Trainer) -> torch.Tensor:
        with torch.no_grad(), trainer.step.mixed.computing():
            return trainer.step.model(ids)[0].float()

    assert torch.equal(logits(rounded), logits(rounded).bfloat16().float())
    assert not torch.equal(logits(kept), logits(kept).bfloat16().float())


def test_a_frequent_tokens_gradient_is_not_lost_in_a_low_embedding(make_trainer: Make) -> None:
    exact, low = make_trainer("gru"), make_trainer("gru", precision="bf16", amp="O2")
    ids = torch.zeros(40, 100, dtype=torch.int64)
    for trainer in (exact, low):
        trainer.step.model.get_submodule("embedding")(ids).sum().backward()
    # Added up one by one in bf16, 4,000 ones are 256.
    for trainer in (exact, low):
        gradient = trainer.step.model.get_parameter("embedding.weight").grad
        assert gradient is not None and float(gradient[0, 0]) == 4000


# -- how exact it is --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("model", ["gru", "transformer"])
def test_master_weights_follow_fp32_where_o3_stands_still(make_trial: MakeTrial, model: str) -> None:
    # Steps of 1e-4 are far below the distance of two bf16 numbers near most weights.
    options = {"learning_rate": 1e-4, "schedule": "constant"}
    moved: dict[str, dict[str, Any]] = {}
    for level in ("O0", "O2", "O3"):
        trainer = make_trial(model, amp=level, **options)
        begun = weights(trainer)
        for _ in range(40):
            trainer.run_step()
        after = weights(trainer)
        moved[level] = {name: after[name] - begun[name] for name in after}
    nothing = {name: np.zeros_like(array) for name, array in moved["O0"].items()}
    whole = distance(moved["O0"], nothing)
    assert distance(moved["O2"], moved["O0"]) < 0.03 * whole
    assert distance(moved["O3"], moved["O0"]) > 0.3 * whole


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "level"), [("bf16", "O1"), ("bf16", "O2"), ("fp16", "O1"), ("fp16", "O2")])
@pytest.mark.parametrize("model", ["gru", "lstm", "transformer"])
def test_half_precision_trains_as_fp32_does_to_two_digits(
    make_trial: MakeTrial, model: str, precision: str, level: str
) -> None:
    options = {"schedule": "constant", "learning_rate": 0.01}
    exact, rounded = make_trial(model, **options), make_trial(model, precision=precision, amp=level, **options)
    reference = [exact.run_step().loss for _ in range(10)][-1]
    assert [rounded.run_step().loss for _ in range(10)][-1] == pytest.approx(reference, abs=0.02)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "muon"])
@pytest.mark.parametrize(("precision", "level"), LOW)
def test_every_optimizer_learns_at_every_level(
    make_trial: MakeTrial, precision: str, level: str, optimizer: str
) -> None:
    rates = {"adamw": 0.01, "sgd": 0.3, "muon": 0.01}
    trainer = make_trial(
        "gru", precision=precision, amp=level, optimizer=optimizer, learning_rate=rates[optimizer], schedule="constant",
        muon_learning_rate=0.01, loss_scale_init=1024, average_share=0.5, **{"model.table_orders": (2,)},
    )  # fmt: skip
    losses = [trainer.run_step().loss for _ in range(12)]
    assert losses[-1] < losses[0] - 0.1
    averaged, fresh = trainer.step.weights(), weights(make_trial("gru", **{"model.table_orders": (2,)}))
    assert {array.dtype for array in averaged.values()} == {np.dtype("float32")}
    assert 0 < distance(averaged, weights(trainer)) < distance(fresh, weights(trainer))


def test_accumulated_gradients_are_added_up_in_fp32(make_trial: MakeTrial) -> None:
    options = {
        "batching": "shuffled",
        "learning_rate": 1.0,
        "optimizer": "sgd",
        "momentum": 0.0,
        "schedule": "constant",
    }
    options |= {"gradient_accumulation": 8, "weight_decay": 0.0, "grad_clip": None}
    exact, low = make_trial("gru", **options), make_trial("gru", precision="bf16", amp="O2", **options)
    begun = weights(exact)
    exact.run_step(), low.run_step()
    moved = [{name: array - begun[name] for name, array in weights(trainer).items()} for trainer in (exact, low)]
    assert distance(*moved) < 0.01 * distance(weights(exact), begun)


def test_kept_weights_hold_the_masters_and_a_new_run_can_start_from_them(make_trainer: Make) -> None:
    trainer = make_trainer("gru", precision="bf16", amp="O2")
    trainer.train(Plan(4, 4))
    best, _ = trainer.folder.read_weights("best")
    name = "cell.weight_hh_l0"
    assert best[name].dtype == np.float32
    assert not np.array_equal(best[name], torch.from_numpy(best[name]).bfloat16().float().numpy())
    assert np.array_equal(best[name], weights(trainer)[name])
    state, _ = trainer.folder.read_last()
    assert (state["environment"]["precision"], state["environment"]["amp"]) == ("bf16", "O2")


# -- the loss scale ---------------------------------------------------------------------------------------


def test_the_scale_halves_at_an_overflow_and_grows_after_the_window() -> None:
    scale = LossScale(TrainingConfig(loss_scale_init=1024, loss_scale_window=3), "fp16")
    seen = []
    for good in (True, True, False, True, True, True, True, True, True):
        scale.note_good() if good else scale.note_overflow()
        seen.append(scale.value)
    assert seen == [1024, 1024, 512, 512, 512, 1024, 1024, 1024, 2048]


def test_growth_and_backoff_are_options() -> None:
    options = TrainingConfig(loss_scale_init=100, loss_scale_window=1, loss_scale_growth=3, loss_scale_backoff=0.1)
    scale = LossScale(options, "fp16")
    scale.note_good()
    assert scale.value == 300
    scale.note_overflow()
    assert scale.value == pytest.approx(30)


@pytest.mark.parametrize(
    ("wanted", "precision", "begins", "on"),
    [
        ("auto", "fp16", 65_536.0, True),
        ("auto", "bf16", 1.0, False),
        ("dynamic", "bf16", 65_536.0, True),
        (None, "fp16", 1.0, False),
        (128.0, "fp16", 128.0, True),
    ],
)
def test_fp16_has_a_scale_unless_it_is_turned_off(wanted: Any, precision: Any, begins: float, on: bool) -> None:
    scale = LossScale(TrainingConfig(loss_scale=wanted), precision)
    assert (scale.value, scale.enabled) == (begins, on)


def test_a_scale_saved_by_torchs_scaler_is_gone_on_from() -> None:
    scale = LossScale(TrainingConfig(loss_scale_window=3), "fp16")
    scale.load_state({"scale": 4096.0, "growth_factor": 2.0, "growth_interval": 3, "_growth_tracker": 2})
    scale.note_good()
    assert scale.value == 8192


@pytest.mark.parametrize(("precision", "level"), [("fp16", "O1"), ("fp16", "O2"), ("bf16", "O3")])
def test_the_loss_scale_does_not_change_the_step(make_trial: MakeTrial, precision: str, level: str) -> None:
    options = {"optimizer": "sgd", "learning_rate": 0.1, "grad_clip": 0.01, "precision": precision, "amp": level}
    scaled, plain = make_trial("gru", loss_scale=256, **options), make_trial("gru", loss_scale=None, **options)
    begun = weights(plain)
    norms = [trial.run_step().grad_norm for trial in (scaled, plain)]
    # Clipping used the true gradients: the norm is the same.
    assert norms[0] == pytest.approx(norms[1], rel=1e-2) and norms[1] > 0.1
    assert distance(weights(scaled), weights(plain)) <= 0.02 * distance(weights(plain), begun)


def overflowing(make: MakeTrial, model: str = "gru", **options: Any) -> Trial:
    """Steps, of which the first one's scaled gradients are too large for fp16."""
    return make(model, precision="fp16", loss_scale_init=2.0**28, **options)


def skipped(trial: Trial) -> int:
    return trial.steps_done - trial.step.updates


def moments(trainer: Trial) -> dict[str, Any]:
    from lm.training.optimizers import optimizer_arrays

    return optimizer_arrays(trainer.step.optimizers)


@pytest.mark.parametrize("level", ["O1", "O2", "O3"])
@pytest.mark.parametrize("tables", [(), (2, 3)])
def test_an_overflow_changes_neither_weights_nor_schedule_nor_moments_nor_average(
    make_trial: MakeTrial, level: str, tables: tuple[int, ...]
) -> None:
    options = {"warmup_steps": 10, "average_share": 0.5, "model.table_orders": tables}
    trainer = overflowing(make_trial, amp=level, loss_scale=None, **options)
    for _ in range(2):
        trainer.run_step()
    trainer.step.mixed.scale = LossScale(TrainingConfig(loss_scale_init=2.0**28), "fp16")
    before, kept, average = weights(trainer), moments(trainer), trainer.step.average
    assert average is not None and kept
    averaged = average.arrays()
    assert math.isfinite(trainer.run_step().loss)
    assert trainer.step.mixed.scale.value == 2.0**27
    assert (trainer.steps_done, skipped(trainer), trainer.step.updates) == (3, 1, 2)
    for old, new in ((before, weights(trainer)), (kept, moments(trainer)), (averaged, average.arrays())):
        assert all(np.array_equal(old[name], array) for name, array in new.items())
    rate = trainer.step.learning_rate
    trainer.run_step()
    assert trainer.step.learning_rate == rate
    while trainer.step.updates == 2:
        trainer.run_step()
    assert not np.array_equal(before["output.weight"], weights(trainer)["output.weight"])


def test_a_run_with_skipped_steps_learns_as_one_that_began_with_the_right_scale(make_trial: MakeTrial) -> None:
    # The batches of the skipped steps are the only difference: with one batch for all there is none.
    options = {"learning_rate": 0.01, "average_share": 0.3}
    low = make_trial("gru", precision="fp16", loss_scale_init=1024, **options)
    high = overflowing(make_trial, **options)
    skips = {low: 0, high: 0}
    for trial in skips:
        # A fresh batch uses no carried state.
        batch = replace(trial.batches.batch(0), fresh=True)
        while trial.step.updates < 6:
            skips[trial] += not trial.step.run([batch], 1 - trial.step.updates / 40).is_updated
    assert skips[high] > 2 and skips[low] == 0
    assert distance(weights(low), weights(high)) < 1e-3 * distance(weights(low), weights(make_trial("gru")))


def test_an_overflow_skips_the_step_for_both_of_muons_optimizers(make_trial: MakeTrial) -> None:
    trainer = make_trial("transformer", precision="fp16", optimizer="muon")
    before = weights(trainer)
    # Only a matrix of Muon's overflows; AdamW's gradients are well.
    trainer.step.model.get_parameter("layers.0.mlp.down_proj.weight").register_hook(lambda grad: grad * math.inf)
    assert not trainer.run_step().is_updated
    assert all(np.array_equal(before[name], array) for name, array in weights(trainer).items())


def test_an_overflow_in_a_context_table_skips_the_step(make_trial: MakeTrial) -> None:
    trainer = make_trial("gru", precision="fp16", **{"model.table_orders": (2,)})
    before = weights(trainer)
    table: Any = trainer.step.model.get_submodule("tables.2")

    def overflow(own: torch.Tensor) -> None:
        assert own.grad is not None and own.grad.is_sparse
        own.grad._values().fill_(math.inf)

    table.weight.register_post_accumulate_grad_hook(overflow)
    result = trainer.run_step()
    assert not result.is_updated and result.first_nonfinite == "the gradient of tables.2.weight"
    assert all(np.array_equal(before[name], array) for name, array in weights(trainer).items())


@pytest.mark.parametrize("scale", ["dynamic", 64, None])
def test_gradients_that_no_loss_scale_can_save_stop_the_run(make_trial: MakeTrial, scale: Any) -> None:
    trainer = make_trial("gru", precision="fp16", loss_scale=scale)
    trainer.step.model.get_parameter("output.bias").register_hook(lambda grad: grad * math.nan)
    with pytest.raises(NonFiniteLossError, match=r"gradient norm is nan \(first in the gradient of output.bias\)"):
        for _ in range(30):
            trainer.run_step()
    assert skipped(trainer) == {"dynamic": 17, 64: 20, None: 0}[scale]


def test_gradients_that_no_loss_scale_can_save_are_skipped_on_request(
    make_trainer: Make, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer("gru", precision="fp16", on_nonfinite="skip")
    trainer.step.model.get_parameter("output.bias").register_hook(lambda grad: grad * math.nan)
    before = weights(trainer)
    with caplog.at_level(logging.WARNING, logger="lm"):
        trainer.train(Plan(30, 30))
    progress = trainer.progress
    assert (progress.step, progress.skipped_steps, progress.updates) == (30, 30, 0)
    # Overflows that a lower scale may prevent give no warning.
    assert len(caplog.messages) == 13
    assert all(np.array_equal(before[name], array) for name, array in weights(trainer).items())


# -- the diary ------------------------------------------------------------------------------------------


def rows(trainer: Trainer, steps: int) -> list[Row]:
    trainer.train(Plan(steps, steps))
    return trainer.folder.read_metrics()


def test_the_diary_has_scale_skips_and_where_a_gradient_overflowed(make_trainer: Make) -> None:
    trainer = make_trainer("gru", precision="fp16", loss_scale_init=2.0**22, loss_scale_window=100)
    found = rows(trainer, 6)
    assert found[0]["loss_scale"] == 2.0**21 and found[0]["skipped_steps"] == 1
    assert found[0]["first_nonfinite"].startswith("the gradient of ") and found[0]["grad_norm"] is None
    assert "first_nonfinite" not in found[-1] and found[-1]["grad_norm"] > 0


def test_tensorboard_has_the_diary_with_its_words(make_trainer: Make, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = make_trainer("gru", precision="fp16", loss_scale_init=2.0**22, log_activations=True)
    trainer.callbacks = [TensorBoard(tmp_path / "events")]
    found = rows(trainer, 4)
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    for name in ("loss_scale", "skipped_steps", "clip_rate", "largest_activation"):
        assert [event.value for event in events.Scalars(f"training/{name}")] == pytest.approx(
            [row[name] for row in found]
        )
    (told,) = events.Tensors("training/first_nonfinite/text_summary")[:1]
    assert told.tensor_proto.string_val[0].decode().strip() == found[0]["first_nonfinite"]


def test_fp32_has_no_loss_scale_in_its_diary(make_trainer: Make) -> None:
    assert "loss_scale" not in rows(make_trainer("gru"), 1)[0]


@pytest.mark.parametrize("model", ["gru", "transformer"])
@pytest.mark.parametrize("amp", ["O0", "O1", "O2"])
def test_the_largest_activation_is_reported_on_request_and_changes_nothing(
    make_trainer: Make, model: str, amp: str
) -> None:
    options = {"amp": amp, "model.dropout": 0.2, "log_every": 2}
    blind, watched = make_trainer(model, **options), make_trainer(model, log_activations=True, **options)
    torch.manual_seed(1)
    without = rows(blind, 4)
    torch.manual_seed(1)
    told = rows(watched, 4)
    assert all("largest_activation" not in row for row in without)
    names = {"logits", *(name for name, _ in watched.model.named_modules())}
    assert all(row["largest_activation"] > 0 and row["largest_activation_in"] in names for row in told)
    assert all(np.array_equal(array, weights(blind)[name]) for name, array in weights(watched).items())


def test_an_activation_that_overflows_fp16_and_not_fp32_is_found_in_the_level_that_is_trained(
    make_trial: MakeTrial,
) -> None:
    def large(**options: Any) -> Trial:
        trainer = make_trial("transformer", **options)
        with torch.no_grad():
            for name, value in {"gate_proj": 1.0, "up_proj": 1.0, "down_proj": 3e4}.items():
                trainer.step.model.get_parameter(f"layers.0.mlp.{name}.weight").fill_(value)
        return trainer

    assert math.isfinite(large().run_step().loss)
    with pytest.raises(NonFiniteLossError, match=r"the loss is nan \(first in the output of layers.0.mlp.down_proj\)"):
        large(precision="fp16").run_step()
