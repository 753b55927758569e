"""The profile of a training: it measures what really runs, and its parts add up."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lm.config import RunConfig
from lm.corpora import PreparedCorpus
from lm.profiling.phases import PHASES, REST, Times, Watch
from lm.profiling.profile import Profile, count_flops, profile_training
from lm.profiling.profile_html import page
from lm.profiling.trial import make_trial

Options = Callable[..., RunConfig]
FLOAT = 4
ROWS, TIME, EMBEDDING, HIDDEN = 4, 16, 8, 12

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "gru": ("gru", {}),
    "two layers of lstm": ("lstm", {}),
    "tied, adaptive, penalised": (
        "gru",
        {"model.tie_weights": True, "model.adaptive_cutoffs": "5,9", "model.activation_penalty": 1.0},
    ),
    "tables": ("gru", {"model.table_orders": "2,3"}),
    "locked dropout in bf16": ("lstm", {"model.locked_dropout": True, "model.dropout": 0.1, "precision": "bf16"}),
    "transformer": ("transformer", {}),
    "transformer in bf16": ("transformer", {"precision": "bf16", "model.dropout": 0.1}),
    "master weights": ("gru", {"precision": "bf16", "amp": "O2"}),
    "accumulating": ("gru", {"gradient_accumulation": 3, "average_share": 0.5}),
}


@pytest.fixture(scope="module")
def profiles() -> dict[str, Profile]:
    return {}


@pytest.fixture
def profile(profiles: dict[str, Profile], options: Options, prepared: PreparedCorpus) -> Callable[[str], Profile]:
    def measured(variant: str) -> Profile:
        if variant not in profiles:
            model, changes = VARIANTS[variant]
            profiles[variant] = profile_training(options(model, **changes), prepared, seconds=0.05)
        return profiles[variant]

    return measured


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_watched_step_leaves_the_weights_of_an_unwatched_one(
    variant: str, options: Options, prepared: PreparedCorpus
) -> None:
    model, changes = VARIANTS[variant]
    weights = []
    for watches in (False, True):
        trial = make_trial(options(model, **changes), prepared, learns=True)
        torch.manual_seed(0)
        if watches:
            with Watch(trial, Times(trial.step.device), backward=True).on() as watch:
                for _ in range(3):
                    watch.step()
        else:
            for _ in range(3):
                trial.run_step()
        weights.append(trial.step.model.arrays())
    for name, array in weights[0].items():
        assert (array == weights[1][name]).all(), name


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_time_and_memory_of_the_layers_add_up(variant: str, profile: Callable[[str], Profile]) -> None:
    found = profile(variant)
    assert sum(layer.parameters for layer in found.layers) == found.parameters
    assert found.layers[-1].name == REST
    spent = sum(layer.forward_seconds + layer.backward_seconds for layer in found.layers)
    phases = found.speed.phase_seconds
    assert set(phases) == set(PHASES)
    # Each a median over the same steps.
    assert spent == pytest.approx(phases["forward"] + phases["loss"] + phases["backward"], rel=0.02)
    memory = {phase.name: phase for phase in found.memory}
    assert list(memory)[0] == "start" and {"forward", "backward", "optimizer", "evaluation"} <= memory.keys()
    assert all(phase.peak_bytes >= phase.held_bytes for phase in found.memory)
    # Where backward begins, all that is kept is held.
    kept = sum(layer.kept_bytes for layer in found.layers)
    assert 0 < kept <= memory["loss"].peak_bytes
    assert max(sum(held.values()) for _, held in found.timeline) >= sum(found.peak_kinds.values())


@pytest.mark.parametrize("variant", ["gru", "transformer"])
def test_memory_is_flat_over_batches_of_validation_and_from_step_to_step(
    variant: str, profile: Callable[[str], Profile]
) -> None:
    found = profile(variant)
    memory = {phase.name: phase for phase in found.memory}
    # But for the batch, the first step's last and the second one's.
    assert abs(memory["optimizer"].held_bytes - memory["start"].held_bytes) <= 4 * ROWS * TIME * 8
    assert found.evaluation.growth_bytes == 0
    assert found.evaluation.held_bytes[-1] <= max(found.evaluation.held_bytes[:-1] or found.evaluation.held_bytes)


def test_what_a_native_layer_keeps_is_its_outputs_and_its_gates(profile: Callable[[str], Profile]) -> None:
    found = profile("gru")
    (cell,) = (layer for layer in found.layers if layer.name == "cell.l0")
    outputs, gates = ROWS * TIME * HIDDEN * FLOAT, ROWS * TIME * 4 * 16 * FLOAT
    assert cell.kept_bytes == pytest.approx(outputs + gates, abs=2 * ROWS * HIDDEN * FLOAT)
    assert (cell.shape, cell.runs_on) == ((ROWS, TIME, HIDDEN), "native")
    assert found.runs_on.startswith("native kernels")


def test_without_the_kernels_torch_is_said_to_do_the_work(
    options: Options, prepared: PreparedCorpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INKLING_NATIVE", "0")
    found = profile_training(options("gru"), prepared, seconds=0.02)
    assert found.runs_on == "torch"
    assert {layer.runs_on for layer in found.layers} == {"torch"}
    assert "cell" in {layer.name for layer in found.layers}


# -- arithmetic, by hand ------------------------------------------------------------------------------------


def counted(options: Options, prepared: PreparedCorpus, model: str, **changes: Any) -> int:
    return count_flops(make_trial(options(model, **changes), prepared))


@pytest.mark.parametrize(("model", "gates", "layers"), [("gru", 3, 1), ("lstm", 4, 2)])
def test_operations_of_recurrent_models(
    model: str, gates: int, layers: int, options: Options, prepared: PreparedCorpus
) -> None:
    vocabulary = prepared.tokenizer.vocab_size
    inputs = EMBEDDING + HIDDEN * (layers - 1)
    a_token = 2 * gates * HIDDEN * (inputs + HIDDEN * layers) + 2 * HIDDEN * vocabulary
    # Backward takes twice as much, but for the state before the first step, which needs no gradient.
    whole, first = 3 * ROWS * TIME * a_token, ROWS * 2 * gates * HIDDEN * HIDDEN * layers
    assert counted(options, prepared, model) == pytest.approx(whole - first, rel=0.01)


def test_operations_of_a_transformer(options: Options, prepared: PreparedCorpus) -> None:
    size, inner, vocabulary = 16, 64, prepared.tokenizer.vocab_size
    a_token = 2 * (4 * size * size + 3 * size * inner + size * vocabulary)
    # Scores, and their products with the values: all, those of the future too.
    attention = 2 * 2 * ROWS * TIME * TIME * size
    assert counted(options, prepared, "transformer") == 3 * (ROWS * TIME * a_token + attention)


def test_counting_leaves_weights_and_gradients_alone(options: Options, prepared: PreparedCorpus) -> None:
    trial = make_trial(options("gru"), prepared)
    before = trial.step.model.arrays()
    count_flops(trial, 2)
    assert all(parameter.grad is None for parameter in trial.step.model.parameters())
    assert all((before[name] == array).all() for name, array in trial.step.model.arrays().items())


# -- what it says -------------------------------------------------------------------------------------------


def test_costs_of_logging_fall_with_the_steps_between_lines(profile: Callable[[str], Profile]) -> None:
    logging = profile("gru").logging
    assert logging.line_seconds > 0
    assert logging.share_of_time[1] > logging.share_of_time[10] > logging.share_of_time[100] > 0


def test_json_and_page_hold_every_layer_and_fetch_nothing(profile: Callable[[str], Profile]) -> None:
    found = profile("transformer")
    content = json.loads(json.dumps(found.to_json()))
    assert [layer["name"] for layer in content["layers"]] == [layer.name for layer in found.layers]
    assert content["arithmetic"]["share_of_peak"] > 0 and math.isfinite(content["speed"]["tokens_per_second"])
    html = page(found)
    assert html.count("<polygon") == 5 and html.count("<svg") == 1
    assert "http" not in html and "src=" not in html and "@import" not in html
    for layer in found.layers:
        assert f"<td>{layer.name}</td>" in html
    for phase in found.memory:
        assert f"<td>{phase.name}</td>" in html
