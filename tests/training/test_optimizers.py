"""Optimizers: who decays, who learns, and that their state survives as arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from lm.profiling.trial import Trial
from lm.training.callbacks import Callback, Tick
from lm.training.optimizers import load_optimizer_arrays, make_optimizers, optimizer_arrays
from lm.training.plan import Plan
from lm.training.trainer import Trainer

Make = Callable[..., Trainer]
MakeTrial = Callable[..., Trial]


def decay_by_name(trainer: Trial) -> dict[str, float]:
    names = {id(parameter): name for name, parameter in trainer.step.model.named_parameters()}
    return {
        names[id(parameter)]: group["weight_decay"]
        for optimizer in trainer.step.optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "muon"])
@pytest.mark.parametrize("model", ["gru", "transformer"])
def test_matrices_decay_and_embeddings_biases_and_gains_are_spared(
    make_trial: MakeTrial, model: str, optimizer: str
) -> None:
    trainer = make_trial(model, optimizer=optimizer, weight_decay=0.3)
    decay = decay_by_name(trainer)
    assert decay.keys() == dict(trainer.step.model.named_parameters()).keys()
    for name, parameter in trainer.step.model.named_parameters():
        spared = parameter.ndim < 2 or "embed" in name
        assert decay[name] == (0.0 if spared else 0.3), name


def test_a_tied_output_layer_is_an_embedding_and_does_not_decay(make_trial: MakeTrial) -> None:
    trainer = make_trial("transformer", weight_decay=0.3, **{"model.tie_weights": True})
    assert decay_by_name(trainer)["embed_tokens.weight"] == 0.0


def test_muon_takes_the_hidden_matrices_alone(make_trial: MakeTrial) -> None:
    trainer = make_trial("transformer", optimizer="muon", muon_learning_rate=0.07, learning_rate=0.01)
    adam, muon = trainer.step.optimizers
    names = {id(parameter): name for name, parameter in trainer.step.model.named_parameters()}
    taken = {names[id(parameter)] for group in muon.param_groups for parameter in group["params"]}
    hidden = {name for name, parameter in trainer.step.model.named_parameters() if parameter.ndim == 2}
    assert taken == hidden - {"embed_tokens.weight", "lm_head.weight"}
    assert {group["peak_learning_rate"] for group in muon.param_groups} == {0.07}
    assert {group["peak_learning_rate"] for group in adam.param_groups} == {0.01}


def test_muon_leaves_the_tails_of_an_adaptive_softmax_to_adamw(make_trial: MakeTrial) -> None:
    trainer = make_trial("gru", optimizer="muon", **{"model.adaptive_cutoffs": (5,)})
    names = {id(parameter): name for name, parameter in trainer.step.model.named_parameters()}
    taken = {names[id(parameter)] for group in trainer.step.optimizers[1].param_groups for parameter in group["params"]}
    assert taken == {"cell.weight_ih_l0", "cell.weight_hh_l0"}


@pytest.mark.parametrize(
    ("optimizer", "settings"),
    [
        ("adamw", {"learning_rate": 0.02}),
        ("sgd", {"learning_rate": 0.5}),
        ("muon", {"learning_rate": 0.02, "muon_learning_rate": 0.02}),
    ],
)
@pytest.mark.parametrize("model", ["gru", "transformer"])
def test_thirty_steps_lower_the_loss(
    make_trial: MakeTrial, model: str, optimizer: str, settings: dict[str, Any]
) -> None:
    trainer = make_trial(model, optimizer=optimizer, schedule="constant", **settings)
    losses = [trainer.run_step().loss for _ in range(30)]
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.3


def test_the_learning_rate_of_every_group_follows_the_schedule(make_trainer: Make) -> None:
    trainer = make_trainer("gru", optimizer="muon", schedule="linear", learning_rate_floor=0.0, learning_rate=0.1)
    shares: list[set[float]] = []

    class Look(Callback):
        def on_step(self, tick: Tick) -> None:
            groups = [group for optimizer in trainer.step.optimizers for group in optimizer.param_groups]
            shares.append({round(group["lr"] / group["peak_learning_rate"], 6) for group in groups})

    trainer.callbacks = [Look()]
    trainer.train(Plan(steps=5, evaluate_every=5))
    assert shares == [{1.0}, {0.75}, {0.5}, {0.25}, {0.0}]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "muon"])
def test_state_survives_as_arrays(make_trial: MakeTrial, optimizer: str) -> None:
    trainer = make_trial("gru", optimizer=optimizer)
    for _ in range(3):
        trainer.run_step()
    arrays = optimizer_arrays(trainer.step.optimizers)
    fresh = make_optimizers(trainer.step.model, trainer.step.config, fused=True)
    load_optimizer_arrays(fresh, arrays)
    again = optimizer_arrays(fresh)
    assert arrays.keys() == again.keys() and arrays
    for name, array in arrays.items():
        assert array.dtype == again[name].dtype
        np.testing.assert_array_equal(array, again[name])


def test_saved_state_is_a_copy_that_later_steps_leave_alone(make_trial: MakeTrial) -> None:
    trainer = make_trial("gru")
    trainer.run_step()
    arrays = optimizer_arrays(trainer.step.optimizers)
    before = {name: array.copy() for name, array in arrays.items()}
    weights = trainer.step.model.arrays()
    kept = {name: array.copy() for name, array in weights.items()}
    trainer.run_step()
    assert all(np.array_equal(arrays[name], before[name]) for name in arrays)
    assert all(np.array_equal(weights[name], kept[name]) for name in weights)
    assert not torch.equal(
        torch.from_numpy(kept["embedding.weight"]), trainer.step.model.state_dict()["embedding.weight"]
    )
