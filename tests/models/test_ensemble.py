"""An ensemble: the mean of its members' probabilities."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from lm.config import Section
from lm.errors import ConfigError
from lm.evaluation.perplexity import score
from lm.generation.open_decoder import open_decoder
from lm.models.base import LanguageModel, build_model
from lm.models.ensemble import Ensemble

VOCAB = 7
GRU = {"type": "gru", "hidden_size": 8, "embedding_size": 4}
IDS = torch.from_numpy(np.random.default_rng(0).integers(VOCAB, size=(2, 9)))


def ensemble(member: dict[str, Any], size: int = 3, seed: int = 1) -> Ensemble:
    model = build_model(Section(type="ensemble", size=size, member=member), VOCAB, seed=seed)
    assert isinstance(model, Ensemble)
    return model.eval()


def members(model: Ensemble) -> list[LanguageModel]:
    return list(model.members)  # type: ignore[arg-type]


def test_its_probabilities_are_the_mean_of_those_of_the_members() -> None:
    model = ensemble(GRU)
    each = torch.stack([member(IDS)[0].softmax(dim=-1) for member in members(model)])
    assert not torch.allclose(each[0], each[1], atol=1e-3)
    torch.testing.assert_close(model(IDS)[0].exp(), each.mean(dim=0))


def test_its_loss_is_below_the_mean_of_the_losses_of_the_members() -> None:
    model, ids = ensemble(GRU), np.random.default_rng(1).integers(VOCAB, size=200)
    assert score(model, ids).loss < np.mean([score(member, ids).loss for member in members(model)])


def test_members_that_are_equal_give_the_logits_of_one() -> None:
    model = ensemble(GRU, size=2)
    model.load_members([members(model)[0].arrays()] * 2)
    torch.testing.assert_close(model(IDS)[0], members(model)[0](IDS)[0].log_softmax(dim=-1))


def test_counts_of_hybrid_members_are_stored_and_counted_once() -> None:
    model = ensemble({**GRU, "type": "hybrid", "order": 3}, size=2)
    text = np.random.default_rng(2).integers(VOCAB, size=300)
    model.fit(text)
    own = members(model)[0].arrays()
    counts = [name for name in own if name not in members(model)[0].state_dict()]
    arrays = model.arrays()
    assert counts and all(f"shared.{name}" in arrays for name in counts)
    assert len(arrays) == 2 * len(own) - len(counts)
    assert model.num_counts() == members(model)[0].num_counts() > 0
    again = ensemble({**GRU, "type": "hybrid", "order": 3}, size=2, seed=9)
    again.load_arrays(arrays)
    torch.testing.assert_close(again(IDS)[0], model(IDS)[0])
    decoder = open_decoder(again.options.model_dump(mode="json"), lambda: arrays, lambda: again)
    assert decoder.name.startswith("native")
    logits = decoder.prefill(decoder.open(), IDS[0].tolist())
    torch.testing.assert_close(torch.from_numpy(logits), again(IDS)[0][0].detach(), atol=1e-5, rtol=0)


def test_weights_are_stored_for_each_member_even_if_they_are_equal() -> None:
    model = ensemble({**GRU, "tie_weights": True}, size=2)
    assert torch.equal(*(member.output_bias for member in members(model)))  # type: ignore[arg-type]
    assert {"members.0.output_bias", "members.1.output_bias"} <= model.arrays().keys()


def test_an_ensemble_names_its_members_and_has_their_context() -> None:
    model = ensemble({"type": "transformer", "hidden_size": 8, "num_heads": 2, "context_length": 5})
    assert model.kind == "ensemble of 3 transformer models"
    assert (model.context_length, model.batching) == (5, "random")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"size": 1}, r"model\.size = 1: give a number of at least 2"),
        ({"member": {"type": "ensemble"}}, "an ensemble has no ensembles as members"),
        ({"member": {"type": "gru", "hidden": 3}}, r"Unknown option model\.hidden"),
    ],
)
def test_options_that_no_ensemble_can_have_are_refused_in_a_sentence(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        build_model(Section(type="ensemble", **options), VOCAB)
