"""An average of the last weights."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from lm.evaluation.perplexity import score
from lm.training.plan import Plan
from lm.training.trainer import Trainer
from lm.training.weight_average import WeightAverage

Make = Callable[..., Trainer]


def follow(share: float, values: list[float]) -> float:
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    average = WeightAverage(model, share)
    for step, value in enumerate(values, start=1):
        nn.init.constant_(model.weight, value)
        average.update(step)
    return float(average.arrays()["weight"].item())


def test_the_average_over_all_steps_is_their_mean_with_the_first_weights() -> None:
    assert follow(1.0, [3.0, 6.0, 9.0]) == pytest.approx((0 + 3 + 6 + 9) / 4)


def test_a_smaller_share_follows_more_closely() -> None:
    # 0 + (4 - 0) / 1.5 = 2.6667, then + (8 - 2.6667) / 2 = 5.3333
    assert follow(0.5, [4.0, 8.0]) == pytest.approx(16 / 3)


def test_the_average_is_in_the_model_only_inside() -> None:
    model = nn.Linear(2, 2)
    average = WeightAverage(model, 0.5)
    with torch.no_grad():
        model.weight.add_(1.0)
    own, kept = model.weight.detach().clone(), average.arrays()["weight"]
    with pytest.raises(KeyError), average.in_place():
        assert torch.equal(model.weight, torch.from_numpy(kept))
        raise KeyError
    assert torch.equal(model.weight, own)


def test_the_best_weights_are_the_average_that_was_validated(make_trainer: Make) -> None:
    trainer = make_trainer(average_share=0.3)
    trainer.train(Plan(12, 12))
    arrays, facts = trainer.folder.read_weights("best")
    assert trainer.step.average is not None
    for name, array in trainer.step.average.arrays().items():
        np.testing.assert_array_equal(arrays[name], array)
        assert not np.array_equal(array, trainer.model.arrays()[name])
    trainer.model.load_arrays(arrays)
    ids = trainer.corpus.splits["valid"].ids
    assert facts["valid_loss"] == score(trainer.model, ids, rows=64, warm_up=256).loss


def test_training_goes_the_same_way_with_and_without_an_average(make_trainer: Make) -> None:
    plain, averaged = make_trainer(), make_trainer(average_share=0.3)
    for trainer in (plain, averaged):
        trainer.train(Plan(6, 3))
    for name, array in plain.model.arrays().items():
        np.testing.assert_array_equal(array, averaged.model.arrays()[name])
