"""The hybrid: a network and counts, which leave out each target's own occurrence in training."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lm
from lm.config import Section
from lm.models.base import LanguageModel, build_model
from lm.models.kneser_ney import count_text
from lm.models.ngram import NGram
from lm.runs import run_folder

pytestmark = pytest.mark.slow

SMALL: dict[str, Any] = {
    "model.embedding_size": 8,
    "model.hidden_size": 16,
    "training.batch_size": 4,
    "training.bptt": 16,
    "training.max_steps": 8,
    "training.warmup_steps": 0,
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = random.Random(3)
    words = ("the cat", "sat on", "a mat", "and", "saw", "one red", "hen", "run by", "its", "den", "in fog")
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("".join(" ".join(source.choice(words) for _ in range(8)) + ".\n" for _ in range(150)), "utf-8")
    return path


@pytest.fixture(autouse=True)
def no_shipped_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "shipped_folder", lambda: tmp_path / "shipped")


def train(text: Path, runs_dir: Path, name: str = "a", **overrides: Any) -> lm.Run:
    stop_after = overrides.pop("stop_after", None)
    config = lm.compose(str(text), preset="hybrid-char", overrides={**SMALL, **overrides})
    return lm.train(text, config, name=name, runs_dir=runs_dir, stop_after=stop_after)


def fitted(**options: Any) -> tuple[LanguageModel, NGram, np.ndarray]:
    """A hybrid, the n-gram model of the same text, and the text."""
    ids = np.random.default_rng(1).integers(5, size=300)
    section = Section(type="hybrid", hidden_size=16, embedding_size=8, order=4, **options)
    model, ngram = build_model(section, 5, seed=1), build_model(Section(type="ngram", order=4), 5)
    model.fit(ids)
    ngram.fit(ids)
    assert isinstance(ngram, NGram)
    return model, ngram, ids


def trust(model: Any, bias: float) -> None:
    """Set the gate to the same log-odds at all positions."""
    with torch.no_grad():
        model.network.gate.weight.zero_()
        model.network.gate.bias.fill_(bias)


def text_of(text: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(text[None, :-1]), torch.from_numpy(text[None, 1:])


@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
def test_the_gate_weighs_the_network_and_the_counts(cell: str) -> None:
    model, ngram, _ = fitted(cell=cell)
    ids = torch.from_numpy(np.random.default_rng(2).integers(5, size=(2, 30)))
    found = {}
    for bias in (-40.0, 0.0, 40.0):
        trust(model, bias)
        found[bias] = model.eval()(ids)[0].exp()
    torch.testing.assert_close(found[40.0], ngram(ids)[0].exp())
    torch.testing.assert_close(found[0.0], (found[-40.0] + found[40.0]) / 2)
    assert (found[-40.0] - found[40.0]).abs().max() > 0.1
    torch.testing.assert_close(found[-40.0].sum(dim=-1), torch.ones(2, 30))


def test_the_counts_have_most_of_the_weight_at_first() -> None:
    model, ngram, _ = fitted()
    ids = torch.from_numpy(np.random.default_rng(2).integers(5, size=(2, 30)))
    ours, theirs = (each.eval()(ids)[0].exp() for each in (model, ngram))
    assert (ours - theirs).abs().max() < 0.12


def test_the_gate_depends_on_the_entropy_of_the_counts() -> None:
    model: Any
    model, ngram, _ = fitted()
    ids = torch.from_numpy(np.random.default_rng(2).integers(5, size=(1, 30)))
    logs = ngram(ids)[0]
    with torch.no_grad():
        model.network.gate.weight[0, -1] = -1
        model.network.gate.bias.fill_(1)
    entropy = -(logs.exp() * logs).sum(dim=-1, keepdim=True)
    share = torch.sigmoid(1 - entropy)
    mixed = model.eval()(ids)[0].exp()
    trust(model, -40)
    torch.testing.assert_close(mixed, (1 - share) * model(ids)[0].exp() + share * logs.exp())


def test_in_training_each_token_is_left_out_of_the_counts() -> None:
    model, ngram, text = fitted()
    trust(model, 40)
    ids, targets = text_of(text)
    loss = model.training_loss(ids, targets)
    logs, _ = ngram.log_probabilities(ids, None, targets)
    assert float(loss.nats) == pytest.approx(-float(logs.gather(2, targets[..., None]).mean()), rel=1e-5)
    # Random text: it can only be predicted from its own counts.
    seen = torch.nn.functional.cross_entropy(model.eval()(ids)[0][0].detach(), targets[0])
    assert float(seen) < 1.4 < np.log(5) < float(loss.nats)


def test_the_network_learns_as_it_would_alone_and_the_gate_from_the_mixture() -> None:
    model: Any
    model, _, text = fitted()
    alone: Any = build_model(Section(type="gru", hidden_size=16, embedding_size=8), 5, seed=1)
    ids, targets = text_of(text)
    model.training_loss(ids, targets).objective.backward()
    alone.training_loss(ids, targets).objective.backward()
    for name, parameter in alone.named_parameters():
        torch.testing.assert_close(model.network.get_parameter(name).grad, parameter.grad, msg=name)
    # On this text, leave-one-out counts are worse than the uniform distribution.
    assert model.network.gate.bias.grad > 0


def test_a_carried_state_gives_training_the_counts_of_one_pass() -> None:
    model, _, text = fitted()
    ids, targets = text_of(text)
    whole = model.training_loss(ids[:, :80], targets[:, :80])
    first = model.training_loss(ids[:, :30], targets[:, :30])
    rest = model.training_loss(ids[:, 30:80], targets[:, 30:80], first.state.detach())
    assert float(whole.nats) * 80 == pytest.approx(float(first.nats) * 30 + float(rest.nats) * 50, rel=1e-5)


def test_parameters_are_those_of_the_network_and_counts_are_separate() -> None:
    model, ngram, _ = fitted()
    assert model.num_parameters() == sum(parameter.numel() for parameter in model.parameters())
    assert model.num_counts() == ngram.num_counts() > 200


def test_a_run_is_labelled_wherever_its_score_is_shown(text: Path, tmp_path: Path) -> None:
    run = train(text, tmp_path)
    report = run.reports()["valid"]
    assert report["kind"] == "hybrid: n-gram counts and a network"
    assert run.summary()["model_name"] == "hybrid-char"
    assert "It is hybrid: n-gram counts and a network." in run.card()
    assert f"{run.record['parameters']:,} parameters and {run.record['counts']:,} counts" in run.card()
    assert run.sample("the ", seed=1, max_tokens=20) == lm.load("a", runs_dir=tmp_path).sample(
        "the ", seed=1, max_tokens=20
    )
    config = lm.compose(str(text), preset="gru-char", overrides={**SMALL, "model.type": "hybrid"})
    named = lm.train(text, config, name="b", runs_dir=tmp_path)
    assert named.summary()["model_name"] == "hybrid-char"


def test_a_resumed_run_has_the_bits_of_one_that_was_not_stopped(text: Path, tmp_path: Path) -> None:
    straight = train(text, tmp_path, "straight")
    train(text, tmp_path, "halves", stop_after=4)
    halves, went_on = lm.resume("halves", runs_dir=tmp_path)
    assert went_on
    (ours, _), (theirs, _) = straight.folder.read_weights("last"), halves.folder.read_weights("last")
    assert ours.keys() == theirs.keys() >= {"ngram.packed", "network.gate.weight"}
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs[name], err_msg=name)


def test_a_run_whose_file_has_raw_counts_resumes_with_the_same_bits_and_keeps_them(text: Path, tmp_path: Path) -> None:
    straight = train(text, tmp_path, "straight")
    halves = train(text, tmp_path, "halves", stop_after=4)
    counts = count_text(halves.own_text().splits["train"].ids, order=8, vocab_size=halves.tokenizer.vocab_size)
    raw = {f"ngram.{name}": array for name, array in counts.arrays().items()}
    state, tensors = halves.folder.read_last()
    network = {name: array for name, array in tensors["model"].items() if not name.startswith("ngram.")}
    files = {
        f"{name}.safetensors": halves.folder.pack_weights({**network, **raw} if name == "model" else arrays, step=4)
        for name, arrays in tensors.items()
    }
    halves.folder.write_last({**files, "state.json": halves.folder.pack_state(state)})
    halves, _ = lm.resume("halves", runs_dir=tmp_path)
    (ours, _), (theirs, _) = straight.folder.read_weights("last"), halves.folder.read_weights("last")
    assert theirs.keys() == network.keys() | raw.keys()
    for name in network:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    assert halves.evaluate("valid").loss > 0


def test_the_text_is_counted_once_for_all_trainers_of_a_job(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fits: list[int] = []
    fit = NGram.fit

    def counted(self: NGram, ids: Any) -> None:
        fits.append(len(ids))
        fit(self, ids)

    monkeypatch.setattr(NGram, "fit", counted)
    # The speed is measured on another trainer.
    train(text, tmp_path, **{"training.max_steps": 2, "training.minutes": 0.02})
    assert len(fits) == 1
    # A file has what evaluation needs, so a resumed run counts again.
    lm.resume("a", runs_dir=tmp_path, max_steps=4)
    assert len(fits) == 2


def test_a_run_that_starts_from_another_counts_its_own_text(text: Path, tmp_path: Path) -> None:
    first = train(text, tmp_path)
    other = tmp_path / "other.txt"
    other.write_text("one red hen sat on a mat.\n" * 60, "utf-8")
    second = lm.train(other, init=first, name="b", runs_dir=tmp_path, stop_after=1)
    ours, theirs = (run.folder.read_weights("last")[0]["ngram.packed"] for run in (first, second))
    assert not np.array_equal(ours, theirs)
