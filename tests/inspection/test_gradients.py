"""Gradients through time: what is known of them by theory, and what is asked for wrongly."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from lm.config import Section
from lm.errors import ConfigError, CorpusError, UnsupportedPartError
from lm.inspection.drawing import gradients as drawing
from lm.inspection.gradients import Gradients, LagNorms, gradients, recurrent_jacobians
from lm.inspection.subject import Subject, fresh, subject, untrained
from lm.models.base import LanguageModel, State, build_model
from lm.runs.run import load

VOTES = 20
"""Votes before each result."""
TEXT = "It is a truth universally acknowledged, that a single man in possession of a good fortune. " * 12


def election(rows: int, generator: torch.Generator) -> torch.Tensor:
    """(rows, 22): 20 votes 0 or 1, the question 2, and the result 3 or 4, which is more probable the more votes it has.

    Each vote is as important as any other, so a model that predicts the result remembers all 20.
    """
    votes = torch.randint(2, (rows, VOTES), generator=generator)
    odds = torch.sigmoid(0.5 * (2 * votes - 1).sum(dim=1, keepdim=True).float())
    results = (torch.rand(rows, 1, generator=generator) < odds).long() + 3
    return torch.cat([votes, torch.full((rows, 1), 2), results], dim=1)


def election_model(kind: str, steps: int = 0) -> LanguageModel:
    model = build_model(Section(type=kind, embedding_size=8, hidden_size=32), 5, seed=1)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        rows = election(32, generator)
        cross_entropy(model(rows[:, :-1])[0][:, -1], rows[:, -1]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model


def at_results(*models: LanguageModel, elections: int = 20) -> Gradients:
    """The gradients of the losses of results alone, by the state after each vote."""
    ids = election(elections, torch.Generator().manual_seed(9)).flatten().numpy()
    # The last position is the last question: its target is the last result. The others are 22 tokens apart.
    subjects = [Subject(f"{model.options.type}", model, ids) for model in models]
    return gradients(subjects, steps=VOTES, positions=elections)


def per_step(norms: np.ndarray, first: int, last: int) -> float:
    return float((norms[last] / norms[first]) ** (1 / (last - first)))


def test_gradients_vanish_exponentially_in_a_fresh_rnn_and_not_in_a_trained_lstm_or_gru() -> None:
    models = election_model("rnn"), election_model("lstm", 300), election_model("gru", 300)
    rnn, lstm, gru = (model.main for model in at_results(*models).models)
    assert (rnn.part, lstm.part, gru.part) == ("hidden", "cells", "hidden")
    logs = np.log(rnn.median)
    line = np.polyval(np.polyfit(range(VOTES + 1), logs, 1), range(VOTES + 1))
    # Exponential: a straight line on a logarithmic axis, by the same factor in each half.
    assert np.abs(logs - line).max() < 0.1 * np.ptp(logs)
    assert per_step(rnn.median, 0, 10) < 0.75
    assert per_step(rnn.median, 10, 20) < 0.75
    assert per_step(gru.median, 0, 20) > 0.95
    assert per_step(lstm.median, 0, 20) > 0.9
    assert per_step(lstm.median, 10, 20) > 0.9


def test_an_lstm_keeps_more_after_training_than_before() -> None:
    before, after = (model.main for model in at_results(election_model("lstm"), election_model("lstm", 300)).models)
    assert after.median[VOTES] / after.median[0] > 5 * before.median[VOTES] / before.median[0]


def test_the_factor_a_step_is_the_mean_from_lag_1_on() -> None:
    def factor(*median: float) -> float:
        return LagNorms("hidden", 0, *[np.array(median)] * 3).factor_per_step

    assert factor(9.0, 8.0, 4.0, 2.0) == pytest.approx(0.5)
    assert factor(8.0, 2.0) == pytest.approx(0.25)
    assert factor(8.0, 2.0, 0.0) == 0


def test_positions_are_spread_evenly_and_end_with_the_text() -> None:
    (found,) = at_results(election_model("rnn")).models
    assert (found.tokens, found.positions) == (20 * 22 - 1, 20)


def test_norms_are_those_of_one_backward_pass_over_the_whole_text() -> None:
    """The windows and their carried states change nothing, and small gradients lose no bits."""
    model = build_model(Section(type="lstm", embedding_size=6, hidden_size=10, num_layers=2), 9, seed=2)
    ids = torch.randint(9, (40,), generator=torch.Generator().manual_seed(5))
    found = gradients([Subject("lstm", model, ids.numpy())], steps=6, positions=1000).models[0]
    seen = model.inspect(ids[None, :-1], parts=["hidden", "cells"])
    losses = cross_entropy(seen.logits[0], ids[1:], reduction="none")
    for part, layer in (("hidden", 0), ("hidden", 1), ("cells", 1)):
        expected = []
        for position in range(6, 39):
            nodes = seen.steps[part][layer][position - 6 : position + 1][::-1]
            grads = torch.autograd.grad(losses[position], nodes, retain_graph=True, allow_unused=True)
            expected.append([float(grad.norm()) for grad in grads if grad is not None])
        (norms,) = (each for each in found.norms if (each.part, each.layer) == (part, layer))
        assert np.allclose(norms.median, np.median(expected, axis=0), rtol=1e-4, atol=0)
        assert np.allclose(norms.upper, np.quantile(expected, 0.75, axis=0), rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", ["rnn", "gru", "lstm"])
def test_the_recurrent_jacobian_equals_finite_differences(kind: str) -> None:
    model = build_model(Section(type=kind, embedding_size=4, hidden_size=5, num_layers=2), 7, seed=3).double()
    _, state = model(torch.tensor([[1, 2, 3]]))
    token = torch.tensor([[4]])
    names = model.recurrent_tensors
    for layer, jacobian in enumerate(recurrent_jacobians(model, token, state)):
        for column, (name, unit) in enumerate((name, unit) for name in names for unit in range(5)):

            @torch.no_grad()
            def after(change: float, name: str = name, unit: int = unit, layer: int = layer) -> torch.Tensor:
                tensors = {key: tensor.detach().clone() for key, tensor in state.tensors.items()}
                tensors[name][0, layer, unit] += change
                tensors = model(token, State(tensors))[1].tensors
                return torch.cat([tensors[key][0, layer] for key in names])

            difference = (after(1e-6) - after(-1e-6)) / 2e-6
            assert torch.allclose(jacobian[0, :, column], difference, atol=1e-8)


def test_gates_and_tanh_are_summed_up_at_the_positions() -> None:
    model = election_model("lstm")
    with torch.no_grad():
        # The gates and candidates do not depend on the inputs: forget gates are 0.88, candidates tanh(3) = 0.995.
        for name, weight in model.named_parameters():
            if name.startswith("cell."):
                weight.zero_()
        model.get_parameter("cell.bias_ih_l0")[32:64] = 2
        model.get_parameter("cell.bias_ih_l0")[64:80] = 3
    (found,) = at_results(model).models
    means = {each.gate: each.mean for each in found.gates}
    assert means == pytest.approx({"input": 0.5, "forget": 0.8808, "output": 0.5}, abs=1e-4)
    assert [each.share for each in found.saturated] == [0.5]
    # Without recurrent weights only the forget gate carries: the cell's derivative is 0.8808, the hidden state's lower.
    assert found.jacobians[0].largest.shape == (16, 5)
    assert np.allclose(found.norms[0].median[11] / found.norms[0].median[10], 0.8808, atol=1e-4)


def test_models_of_a_run_before_and_after_training_use_the_same_tokens() -> None:
    run = load("shakespeare-gru")
    before, after = untrained(run, TEXT), subject(run, TEXT)
    assert np.array_equal(before.ids, after.ids)
    found = gradients([before, after], steps=8, positions=8)
    assert [model.name for model in found.models] == ["shakespeare-gru, untrained", "shakespeare-gru"]
    plain = json.loads(json.dumps(found.to_json()))
    assert plain["models"][1]["main"] == {"part": "hidden", "layer": 0}
    assert len(plain["models"][1]["norms"][0]["median"]) == 9
    assert 0 < plain["models"][1]["norms"][0]["factor_per_step"] < 1


def test_a_fresh_preset_takes_its_characters_from_the_text() -> None:
    model = fresh("gru-char-small", TEXT, overrides={"model.hidden_size": 8})
    assert model.model.vocab_size <= len(set(TEXT)) + 2
    assert len(model.ids) == len(TEXT) + 1
    assert len(fresh("gru-char-small", overrides={"model.hidden_size": 8}).ids) > 1000


def test_the_picture_has_a_line_and_a_band_a_model_on_a_logarithmic_axis() -> None:
    view = at_results(election_model("rnn"), election_model("lstm"))
    (axes,) = drawing.figure(view).axes
    assert axes.get_yscale() == "log"
    assert [len(line.get_xdata()) for line in axes.lines] == [VOTES + 1] * 2
    assert np.array_equal(axes.lines[0].get_ydata(), view.models[0].main.median)
    assert len(axes.collections) == 2
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels[0].startswith("rnn, hidden state of layer 0: ×")
    assert labels[1].startswith("lstm, cell state of layer 0: ×")


def test_the_default_number_of_steps_fits_the_shortest_context() -> None:
    options = {"model.context_length": 16, "model.num_layers": 1}
    models = [fresh("gru-char", TEXT), fresh("transformer-char", TEXT, overrides=options)]
    assert gradients(models[:1], positions=2).steps == 64
    assert gradients(models, positions=2).steps == 15


def test_bad_requests_are_refused_in_a_sentence() -> None:
    short = fresh("lstm-char", "abc" * 5)
    with pytest.raises(CorpusError, match="15 tokens.*16 steps need 17 or more"):
        gradients([short], steps=16)
    with pytest.raises(ConfigError, match="from 1 to"):
        gradients([short], steps=0)
    with pytest.raises(UnsupportedPartError, match="A model of type ngram has no hidden"):
        gradients([fresh("ngram-char", TEXT)])
    with pytest.raises(ConfigError, match="Unknown preset"):
        fresh("gru-chr", TEXT)
