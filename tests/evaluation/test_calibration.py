"""Calibration, against figures worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lm.config import Section
from lm.evaluation import calibration
from lm.evaluation.calibration import (
    CalibrationSums,
    equal_mass,
    equal_width,
    fit_temperature,
    minimise,
    sampled_entropy,
)
from lm.evaluation.perplexity import score
from lm.models.base import LanguageModel, build_model


def constant(*probabilities: float) -> LanguageModel:
    """A model that predicts these probabilities whatever comes before."""
    model = build_model(Section(type="gru", hidden_size=4, embedding_size=4), len(probabilities))
    with torch.no_grad():
        model.output.weight.zero_()
        model.output.bias.copy_(torch.tensor(probabilities).log())
    return model


IDS = np.array([0, *([0, 0, 0, 1] * 25)], np.uint8)
"""Three quarters of the 100 tokens are token 0."""


def test_bins_of_equal_mass_and_of_equal_width_have_the_errors_worked_out_by_hand() -> None:
    confidences, hits = np.array([0.9, 0.6, 0.8, 0.7]), np.array([True, True, False, True])
    mass = equal_mass(confidences, hits, bins=2)
    assert [(each.low, each.high, each.tokens) for each in mass.bins] == [(0.6, 0.7, 2), (0.8, 0.9, 2)]
    assert [each.accuracy for each in mass.bins] == [1.0, 0.5]
    # |0.65 - 1| and |0.85 - 0.5|
    assert mass.error == pytest.approx(0.35)
    width = equal_width(confidences, hits, bins=4)
    # (0.5, 0.75] and (0.75, 1]: the two empty bins are left out, and a border belongs to the bin below it.
    assert [(each.low, each.high) for each in width.bins] == [(0.5, 0.75), (0.75, 1.0)]
    assert equal_width(np.array([0.5, 1.0]), hits[:2], bins=2).bins[0].high == 0.5


def test_tokens_of_equal_confidence_share_a_bin() -> None:
    # Else the error would depend on the order of the text.
    found = equal_mass(np.full(100, 0.75), IDS[1:] == 0)
    assert len(found.bins) == 1 and found.error == 0
    few = equal_mass(np.array([0.2, 0.4]), np.array([False, True]))
    assert [each.tokens for each in few.bins] == [1, 1]


@pytest.mark.parametrize("stored", [True, False])
def test_the_temperature_is_the_one_worked_out_by_hand(stored: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not stored:
        monkeypatch.setattr(calibration, "MAX_STORED", 0)
    # 0.9 : 0.1 are odds of 9, the text has odds of 3: half the logit.
    found = fit_temperature(constant(0.9, 0.1), IDS, "valid")
    assert found.value == pytest.approx(2, rel=1e-3)
    assert found.loss_before == pytest.approx(-0.75 * math.log(0.9) - 0.25 * math.log(0.1), rel=1e-6)
    assert found.loss_after == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25), rel=1e-6)
    assert (found.text, found.tokens) == ("valid", 100)


def test_a_model_that_is_calibrated_keeps_its_temperature() -> None:
    found = fit_temperature(constant(0.75, 0.25), IDS, "valid")
    assert found.value == pytest.approx(1, rel=1e-3) and found.loss_after <= found.loss_before


def test_the_fit_stays_within_its_limits() -> None:
    # Always right: the colder, the better. A model of equal probabilities has the same loss at every temperature.
    sure = fit_temperature(constant(0.9, 0.1), np.zeros(50, np.uint8), "valid")
    assert calibration.COLDEST <= sure.value < 0.3 and sure.loss_after < sure.loss_before
    assert fit_temperature(constant(0.5, 0.5), IDS, "valid").value == 1


def test_a_step_outside_the_bracket_is_replaced() -> None:
    # Steep on one side: Newton's step from 1 would be far below 0.
    def evaluate(inverse: float) -> tuple[float, float, float]:
        return inverse**8 - inverse, 8 * inverse**7 - 1, 1e-3

    best, before, lowest = minimise(evaluate, 1)
    assert before == 0 and lowest == min(before, best**8 - best) and 0.5 < best < 1


def test_the_figures_of_a_text_are_those_worked_out_by_hand() -> None:
    model = constant(0.9, 0.1)
    sums = CalibrationSums(fit_temperature(model, IDS, "valid"))
    scores = score(model, IDS, watchers=[sums.add])
    found = sums.result()
    assert found.loss == pytest.approx(scores.loss, rel=1e-12)
    assert found.expected_loss == pytest.approx(-0.9 * math.log(0.9) - 0.1 * math.log(0.1), rel=1e-6)
    assert found.equal_mass.error == found.equal_width.error == pytest.approx(0.15, rel=1e-5)
    assert found.loss_at_temperature == pytest.approx(found.temperature.loss_after, rel=1e-6)
    assert found.error_at_temperature == pytest.approx(0, abs=1e-3)
    assert found.to_json()["temperature"]["tokens"] == 100


def test_the_entropy_of_samples_is_the_mean_over_their_tokens() -> None:
    model = build_model(Section(type="gru", hidden_size=8, embedding_size=4), 5, seed=1)
    samples = [np.random.default_rng(seed).integers(5, size=size) for seed, size in ((0, 11), (1, 31))]
    entropies = []
    for ids in samples:
        with torch.no_grad():
            logs = model(torch.tensor(ids[None, :-1]))[0][0].double().log_softmax(-1)
        entropies.append(-(logs.exp() * logs).sum(-1))
    found = sampled_entropy(model, samples)
    assert (found.samples, found.tokens) == (2, 40)
    assert found.entropy == pytest.approx(float(torch.cat(entropies).mean()), rel=1e-5)
    means = [float(each.mean()) for each in entropies]
    assert found.standard_error == pytest.approx(abs(means[0] - means[1]) / 2, rel=1e-4)
