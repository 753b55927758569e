"""Dynamic evaluation and the cache: each token is scored before it is learned."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from lm.config import Section
from lm.errors import ConfigError
from lm.evaluation import adaptation
from lm.evaluation.adaptation import (
    AdaptationOptions,
    Learner,
    adapted_nats,
    check_adaptable,
    gradient_sizes,
    static_nats,
    tune,
)
from lm.evaluation.cache_model import CacheOptions, best_weight, cache_probabilities, cached_nats, tune_cache
from lm.evaluation.perplexity import score
from lm.models.base import LanguageModel, build_model

GRU = Section(type="gru", hidden_size=8, embedding_size=4)
TABLES = Section(type="gru", hidden_size=8, embedding_size=4, table_orders=(2, 3))
TRANSFORMER = Section(type="transformer", context_length=8, hidden_size=16, num_heads=2, num_layers=1)
HYBRID = Section(type="hybrid", hidden_size=8, embedding_size=4, order=3)
ENSEMBLE = Section(type="ensemble", size=2, member=GRU.model_dump())
FAMILIES = {"gru": GRU, "tables": TABLES, "transformer": TRANSFORMER, "hybrid": HYBRID, "ensemble": ENSEMBLE}
OPTIONS = AdaptationOptions(rate=0.05, decay=0.001, segment=4)
SHORT = replace(OPTIONS, rate=0.002)
"""The gradients of a fresh Transformer are small at first, and grow."""
TEXT = np.array([0, *([1, 2, 3, 1, 4, 5] * 12)], np.uint8)
"""72 tokens that repeat six."""


def made(section: Section) -> tuple[LanguageModel, list[Any]]:
    model = build_model(section, 7, seed=3)
    if model.trained_by == "both":
        model.fit(np.random.default_rng(1).integers(7, size=200))
    return model, gradient_sizes(model, np.random.default_rng(2).integers(7, size=100), segment=4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_that_learns_predicts_a_repeating_text_better_and_is_unchanged_afterwards(family: str) -> None:
    model, sizes = made(FAMILIES[family])
    before, options = model.arrays(), SHORT if family == "transformer" else OPTIONS
    static, adapted = static_nats(model, TEXT, options), adapted_nats(model, TEXT, sizes, options)
    assert len(adapted) == len(static) == 72
    first = 8 if model.context_length else 4
    assert adapted[:first] == pytest.approx(static[:first], abs=1e-5)
    assert adapted[36:].mean() < static[36:].mean() - 0.1
    after = model.arrays()
    assert all(np.array_equal(after[name], array) for name, array in before.items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_what_comes_later_does_not_change_the_figures_before_it(family: str) -> None:
    model, sizes = made(FAMILIES[family])
    place, options = 36, SHORT if family == "transformer" else OPTIONS
    shuffled = TEXT.copy()
    np.random.default_rng(0).shuffle(shuffled[place + 1 :])
    nats, others = (adapted_nats(model, ids, sizes, options) for ids in (TEXT, shuffled))
    assert np.array_equal(nats[:place], others[:place]) and not np.array_equal(nats, others)
    # The same call gives the same bits.
    assert np.array_equal(adapted_nats(model, TEXT, sizes, options), nats)


@pytest.mark.parametrize("family", ["tables", "transformer"])
def test_without_a_rate_the_figures_are_the_static_ones(family: str) -> None:
    model, sizes = made(FAMILIES[family])
    nats = adapted_nats(model, TEXT, sizes, AdaptationOptions(rate=0.0, decay=0.5, segment=4))
    assert nats == pytest.approx(static_nats(model, TEXT, OPTIONS), abs=1e-6)
    assert nats.sum() == pytest.approx(score(model, TEXT, stride=4).nats, rel=1e-5)


def test_a_step_is_the_one_worked_out_by_hand() -> None:
    # All weights are 0, so that only the bias of the output has a gradient: (p - 1, p) = (-1/2, 1/2).
    model = build_model(GRU, 2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    sizes = [torch.full_like(parameter, 0.5) for parameter in model.parameters()]
    options = AdaptationOptions(rate=math.log(3), decay=0.5, segment=1)
    nats = adapted_nats(model, np.array([0, 0, 0]), sizes, options)
    # The step to (log 3, -log 3), then half of the way back: odds of 3.
    assert nats == pytest.approx([math.log(2), math.log(4 / 3)], rel=1e-6)


def test_sizes_are_the_root_of_the_mean_square_of_the_gradients_of_segments() -> None:
    model = build_model(GRU, 2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    # Of one-token segments the gradient of the bias is ±1/2; of others of two different tokens 0.
    names = [name for name, _ in model.named_parameters()]
    ones = gradient_sizes(model, np.array([0, 0, 1]), segment=1)[names.index("output.bias")]
    assert ones.tolist() == pytest.approx([0.55, 0.55])
    assert gradient_sizes(model, np.array([0, 0, 1]), segment=2)[names.index("output.bias")].max() < 1e-6


@pytest.mark.parametrize("family", ["gru", "transformer"])
def test_a_text_that_grows_is_learned_as_a_whole_one(family: str) -> None:
    model, sizes = made(FAMILIES[family])
    text, options = TEXT.tolist(), SHORT if family == "transformer" else OPTIONS
    with Learner(model, sizes, options) as learner:
        assert len(learner.read_on(text[:1])) == 0
        parts = [learner.read_on(text[begin : begin + 4]) for begin in range(1, 41, 4)]
        learner.restore()
        learner.read_on(text[:1])
        again = learner.read_on(text[1:5])
    assert np.array_equal(again, parts[0])
    if family == "gru":
        assert np.array_equal(np.concatenate(parts), adapted_nats(model, TEXT[:41], sizes, OPTIONS))
    assert np.concatenate(parts)[20:].mean() < static_nats(model, TEXT[:41], OPTIONS)[20:].mean()


def test_the_options_with_the_lowest_loss_on_validation_text_are_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adaptation, "RATES", (1e-6, 0.05))
    monkeypatch.setattr(adaptation, "DECAYS", (0.0, 0.9))
    model, sizes = made(GRU)
    found = tune(model, TEXT, sizes, segment=4)
    assert found.options == AdaptationOptions(0.05, 0.0, 4)
    assert found.loss == adapted_nats(model, TEXT, sizes, found.options).mean() < found.static_loss
    assert found.tokens == 72


def test_a_model_of_counts_alone_is_refused() -> None:
    with pytest.raises(ConfigError, match="has no weights that learn from a text: use --cache"):
        check_adaptable(build_model(Section(type="ngram"), 7), "--cache")


def test_the_probabilities_of_a_cache_are_those_worked_out_by_hand() -> None:
    ids = np.array([9, 1, 2, 1, 2])
    assert cache_probabilities(ids, 1, None) == pytest.approx([math.nan, 0, 1 / 2, 1 / 3], nan_ok=True)
    # Only the last token is counted.
    assert cache_probabilities(ids, 1, 1) == pytest.approx([math.nan, 0, 0, 0], nan_ok=True)
    # After the start token, after 1, after 2: new; then 2 after 1 once more.
    assert cache_probabilities(ids, 2, None) == pytest.approx([*[math.nan] * 3, 1], nan_ok=True)
    # Within the last 2 tokens, no earlier token stands after 1 but the one that has just left the window.
    assert cache_probabilities(ids, 2, 2) == pytest.approx([*[math.nan] * 3, 1], nan_ok=True)
    assert np.isnan(cache_probabilities(ids, 2, 1)).all()


def test_a_cache_is_mixed_with_the_model_where_it_has_the_context() -> None:
    ids, nats = np.array([9, 1, 2, 1, 2]), np.full(4, math.log(4))
    found = np.exp(-cached_nats(ids, nats, CacheOptions(order=1, window=None, weight=0.5)))
    assert found == pytest.approx([1 / 4, 1 / 8, 1 / 8 + 1 / 4, 1 / 8 + 1 / 6])
    assert cached_nats(ids, nats, CacheOptions(1, None, 0.0)) == pytest.approx(nats)


def test_the_weight_of_a_cache_is_the_one_worked_out_by_hand() -> None:
    # log((1 - w)/4 + w) + log((1 - w)/2) is largest at w = 1/3; a token that the cache does not know does not count.
    nats, cache = np.array([math.log(4), math.log(2), 7.0]), np.array([1.0, 0.0, math.nan])
    assert best_weight(nats, cache) == pytest.approx(1 / 3, abs=1e-4)
    assert best_weight(nats[2:], cache[2:]) == 0


def test_a_cache_does_not_see_what_comes_later() -> None:
    shuffled = TEXT.copy()
    np.random.default_rng(0).shuffle(shuffled[37:])
    for order, window in ((1, None), (3, 20)):
        probabilities, others = (cache_probabilities(ids, order, window) for ids in (TEXT, shuffled))
        assert np.array_equal(probabilities[:36], others[:36], equal_nan=True)
        assert not np.array_equal(probabilities, others, equal_nan=True)


def test_the_best_cache_of_a_repeating_text_is_found() -> None:
    found = tune_cache(TEXT, np.full(72, math.log(7)))
    # The token before decides, except after 1: two tokens decide always.
    assert (found.options.order, found.options.window) == (3, None)
    assert found.loss < 0.3 < found.static_loss == pytest.approx(math.log(7))
