"""Optimizers: who decays, who learns, and that their state survives as arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from lm.profiling.trial import Trial
from lm.training.callbacks import Callback, Tick
from lm.training.optimizers import Muon, load_optimizer_arrays, make_optimizers, optimizer_arrays
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


def matrices(seed: int = 0) -> list[torch.nn.Parameter]:
    """Six of three shapes: square, wide and tall."""
    torch.manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(size)) for size in [(8, 8), (8, 20), (20, 8)] * 2]


def muon_steps(weights: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer, steps: int = 4) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=generator)
        optimizer.step()


MUON = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1}


def test_batched_muon_updates_as_torchs_does() -> None:
    ours, theirs, start = matrices(), matrices(), matrices()
    own, torchs = Muon(ours, batched=True, **MUON), torch.optim.Muon(theirs, **MUON)
    muon_steps(ours, own)
    muon_steps(theirs, torchs)
    for one, other, first in zip(ours, theirs, start, strict=True):
        moved = float((other - first).detach().norm())
        # The products are in bf16, whose rounding is 0.4 %.
        assert float((one - other).detach().norm()) < 0.01 * moved
        moments = own.state[one]["momentum_buffer"], torchs.state[other]["momentum_buffer"]
        torch.testing.assert_close(*moments, atol=1e-6, rtol=1e-6)


def test_muon_on_the_cpu_is_torchs_bit_for_bit() -> None:
    ours, theirs = matrices(), matrices()
    muon_steps(ours, Muon(ours, batched=False, **MUON))
    muon_steps(theirs, torch.optim.Muon(theirs, **MUON))
    assert all(torch.equal(*pair) for pair in zip(ours, theirs, strict=True))


def test_batched_muon_is_unchanged_if_the_device_found_an_overflow() -> None:
    weights, expected = matrices(), matrices()
    optimizer, other = Muon(weights, batched=True, **MUON), Muon(expected, batched=True, **MUON)
    muon_steps(weights, optimizer)
    muon_steps(expected, other)
    for weight in weights:
        weight.grad = torch.full(weight.shape, torch.nan)
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    for weight, same in zip(weights, expected, strict=True):
        assert torch.equal(weight, same)
        assert torch.equal(optimizer.state[weight]["momentum_buffer"], other.state[same]["momentum_buffer"])


def test_batched_muon_skips_matrices_without_a_gradient_and_takes_a_tensor_as_its_rate() -> None:
    weights, expected = matrices(), matrices()
    optimizer, other = Muon(weights, batched=True, **MUON), Muon(expected, batched=True, **MUON)
    optimizer.param_groups[0]["lr"] = torch.tensor(0.05)
    for seed, (weight, same) in enumerate(zip(weights, expected, strict=True)):
        weight.grad = same.grad = torch.full(weight.shape, float(seed + 1)) if seed else None
    optimizer.step()
    other.step()
    torch.testing.assert_close(weights, expected)
    assert torch.equal(weights[0], matrices()[0])
