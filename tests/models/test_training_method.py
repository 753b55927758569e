"""How models are trained, and what that means for a job."""

from __future__ import annotations

import numpy as np
import pytest

from lm.config import Section
from lm.models.base import LanguageModel, build_model
from lm.models.training_method import TrainingMethod
from lm.registry import MODELS

METHODS = {"hybrid": "both", "ngram": "counting", "ensemble": "members"}


@pytest.mark.parametrize("name", MODELS.names())
def test_each_model_has_the_capabilities_of_its_method(name: str) -> None:
    method = MODELS.resolve(name).training_method()
    assert method == METHODS.get(name, "gradient")
    assert method.has_steps == (method in ("gradient", "both"))
    assert method.counts == (method in ("counting", "both"))
    assert method.in_one_pass == (method == "counting")
    assert method.of_members == (method == "members")
    assert method.takes_adapters == (method == "gradient")


def test_an_unknown_method_is_refused_by_name() -> None:
    class Dreaming(LanguageModel):
        trained_by = "dreams"  # type: ignore[assignment]

    with pytest.raises(ValueError, match="'dreams' is not a valid TrainingMethod"):
        Dreaming.training_method()
    assert [*TrainingMethod] == ["gradient", "counting", "both", "members"]


def test_a_network_has_nothing_to_count_alone_or_in_an_ensemble() -> None:
    text = np.arange(20) % 5
    network = build_model(Section(type="gru", hidden_size=4), 5, seed=1)
    ensemble = build_model(Section(type="ensemble", member={"type": "gru", "hidden_size": 4}), 5, seed=1)
    for model in (network, ensemble):
        before = model.arrays()
        model.fit(text)
        assert model.num_counts() == 0
        assert all(np.array_equal(array, before[name]) for name, array in model.arrays().items())
