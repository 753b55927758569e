"""Dropout and penalties of the recurrent family: their effects, and no change of a bit if they are off."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lm.config import Section
from lm.models.base import build_model
from lm.models.recurrent import LockedDropout, Recurrent

CELLS = ["rnn", "gru", "lstm"]


def model_of(name: str, **options: object) -> Recurrent:
    made = build_model(Section(type=name, embedding_size=8, hidden_size=12, num_layers=2, **options), 20, seed=1)
    assert isinstance(made, Recurrent)
    return made


def some_batch(rows: int = 3, time: int = 7) -> tuple[Tensor, Tensor]:
    ids = torch.randint(20, (rows, time + 1), generator=torch.Generator().manual_seed(5))
    return ids[:, :-1], ids[:, 1:]


def test_locked_dropout_drops_the_same_units_at_every_step() -> None:
    torch.manual_seed(0)
    out = LockedDropout(0.5)(torch.ones(4, 9, 16))
    assert set(out.unique().tolist()) == {0.0, 2.0}
    assert torch.equal(out, out[:, :1].expand(4, 9, 16))
    assert not torch.equal(out[0], out[1])


def test_locked_dropout_drops_nothing_in_evaluation_or_at_rate_zero() -> None:
    vectors = torch.randn(2, 3, 4)
    assert LockedDropout(0.5).eval()(vectors) is vectors
    assert LockedDropout(0.0)(vectors) is vectors


@pytest.mark.parametrize("name", CELLS)
def test_layers_run_one_by_one_equal_torchs_stack(name: str) -> None:
    plain, locked = model_of(name), model_of(name, locked_dropout=True)
    ids, targets = some_batch()
    before, after = plain(ids)[1], locked(ids)[1]
    for state in (None, before):
        one, two = plain.training_loss(ids, targets, state), locked.training_loss(ids, targets, state)
        assert torch.allclose(one.objective, two.objective, atol=1e-6)
        for key in one.state.tensors:
            assert torch.allclose(one.state.tensors[key], two.state.tensors[key], atol=1e-6)
    assert after.tensors.keys() == before.tensors.keys()


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize(
    "options",
    [
        {"locked_dropout": True, "dropout": 0.5},
        {"embedding_dropout": 0.5},
        {"weight_dropout": 0.5},
        {"activation_penalty": 2.0, "change_penalty": 1.0},
    ],
)
def test_a_regulariser_changes_training_alone(name: str, options: dict[str, object]) -> None:
    plain, regular = model_of(name), model_of(name, **options)
    assert plain.arrays().keys() == regular.arrays().keys()
    ids, targets = some_batch()
    torch.manual_seed(0)
    assert not torch.equal(plain.training_loss(ids, targets).objective, regular.training_loss(ids, targets).objective)
    assert torch.equal(plain.eval()(ids)[0], regular.eval()(ids)[0])


@pytest.mark.parametrize("name", CELLS)
def test_rates_of_zero_give_the_bits_of_a_model_without_the_options(name: str) -> None:
    ids, targets = some_batch()
    losses = []
    for options in ({}, {"embedding_dropout": 0.0, "weight_dropout": 0.0, "change_penalty": 0.0}):
        model = model_of(name, dropout=0.3, **options)
        torch.manual_seed(3)
        losses.append(model.training_loss(ids, targets).objective)
    assert torch.equal(*losses)


def test_embedding_dropout_drops_a_token_at_all_its_positions() -> None:
    model = model_of("gru", embedding_dropout=0.5)
    torch.manual_seed(0)
    ids = torch.arange(20).repeat(2)[None]
    vectors = model._embed(ids)[0]
    dropped = (vectors == 0).all(dim=1)
    assert 0 < int(dropped.sum()) < 40
    assert torch.equal(dropped[:20], dropped[20:])
    kept = ~dropped
    assert torch.equal(vectors[kept], model.embedding(ids)[0][kept] * 2)


def test_weight_dropout_leaves_the_weights_themselves_alone() -> None:
    model = model_of("lstm", weight_dropout=0.5)
    before = model.arrays()
    found = model.training_loss(*some_batch())
    found.objective.backward()
    assert all((array == model.arrays()[name]).all() for name, array in before.items())
    gradient = model.cell.weight_hh_l0.grad
    # Dropped weights have no gradient: about half of the matrix.
    assert isinstance(gradient, Tensor)
    assert 0.3 < float((gradient == 0).float().mean()) < 0.7


def test_penalties_are_mean_squares_of_outputs_and_of_their_changes() -> None:
    model, (ids, targets) = model_of("gru", activation_penalty=2.0, change_penalty=3.0), some_batch()
    outputs, _ = model._run_cell(ids, None)
    found = model.training_loss(ids, targets)
    expected = 2.0 * (outputs**2).mean() + 3.0 * ((outputs[:, 1:] - outputs[:, :-1]) ** 2).mean()
    assert float((found.objective - found.nats).detach()) == pytest.approx(float(expected.detach()), abs=1e-6)
    assert not found.nats.requires_grad


def test_a_single_step_has_no_change_to_penalise() -> None:
    model = model_of("gru", change_penalty=3.0)
    ids, targets = some_batch(time=1)
    found = model.training_loss(ids, targets)
    assert float(found.objective.detach()) == float(found.nats)
