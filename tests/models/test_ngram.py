"""The n-gram model as a run: trained by counting, then like any other."""

from __future__ import annotations

import random
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

import lm
from lm.config import Section
from lm.errors import DeviceError
from lm.models.base import LanguageModel, build_model
from lm.models.kneser_ney import count_text
from lm.models.ngram import NGram, NGramOptions
from lm.runs import run_folder
from lm.training.callbacks import Callback, End, Row, Start


class Heard(Callback):
    """Events of a training."""

    def __init__(self) -> None:
        self.events: list[Start | End | Row | str] = []

    def on_start(self, start: Start) -> None:
        self.events.append(start)

    def on_log(self, row: Row) -> None:
        self.events.append(row)

    def on_end(self, end: End) -> None:
        self.events.append(end)

    def close(self) -> None:
        self.events.append("closed")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = random.Random(3)
    words = ("the cat", "sat on", "a mat", "and", "saw", "one red", "hen", "run by", "its", "den", "in fog")
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("".join(" ".join(source.choice(words) for _ in range(8)) + ".\n" for _ in range(300)), "utf-8")
    return path


@pytest.fixture(autouse=True)
def no_shipped_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "shipped_folder", lambda: tmp_path / "shipped")


def fitted(order: int = 4) -> tuple[LanguageModel, np.ndarray]:
    ids = np.random.default_rng(1).integers(5, size=300)
    model = build_model(Section(type="ngram", order=order), 5)
    model.fit(ids)
    return model, ids


@pytest.mark.parametrize("order", [1, 2, 4])
def test_logits_are_the_log_probabilities_of_the_counts(order: int) -> None:
    model, ids = fitted(order)
    other = np.random.default_rng(2).integers(5, size=41)
    logits, _ = model(torch.from_numpy(other[None, :-1]))
    assert torch.allclose(logits.double().exp().sum(dim=-1), torch.ones(1, 40, dtype=torch.float64), atol=1e-6)
    own = logits[0, torch.arange(40), torch.from_numpy(other[1:])]
    assert isinstance(model, NGram)
    assert own.numpy() == pytest.approx(model.counts.log_probabilities_of(other), abs=1e-5)
    # They are compact, and near those of the raw counts.
    raw = count_text(ids, order=order, vocab_size=5).log_probabilities_of(other)
    assert own.numpy() == pytest.approx(raw, abs=0.1)


def test_a_model_without_counts_has_a_uniform_distribution() -> None:
    model = build_model(Section(type="ngram"), 5)
    logits, _ = model(torch.zeros(1, 3, dtype=torch.int64))
    assert logits.exp().numpy() == pytest.approx(np.full((1, 3, 5), 0.2), rel=1e-6)


def test_counts_from_a_file_are_not_for_training() -> None:
    model, ids = fitted()
    loaded = build_model(Section(type="ngram", order=4), 5)
    loaded.load_arrays(model.arrays())
    batch = torch.from_numpy(ids[None, :20])
    assert torch.equal(loaded(batch)[0], model(batch)[0])
    assert isinstance(loaded, NGram)
    with pytest.raises(RuntimeError, match="call fit before training"):
        loaded.log_probabilities(batch, None, batch)
    # Those of older files are raw.
    loaded.load_arrays(count_text(ids, order=4, vocab_size=5).arrays())
    assert loaded.log_probabilities(batch, None, batch)[0].shape == (1, 20, 5)


def test_the_state_is_the_last_tokens() -> None:
    model, _ = fitted(order=4)
    _, state = model(torch.tensor([[3, 1]]))
    assert state.tensors["history"].tolist() == [[-1, 3, 1]]
    _, state = model(torch.tensor([[4, 2, 0, 1]]), state)
    assert state.tensors["history"].tolist() == [[2, 0, 1]]


def test_a_run_is_counted_measured_sampled_and_shown(text: Path, tmp_path: Path) -> None:
    heard = Heard()
    config = lm.compose(str(text), preset="ngram-char")
    run = lm.train(text, config, name="counts", runs_dir=tmp_path, callbacks=[heard])
    start, row, end, closed = heard.events
    assert isinstance(start, Start) and isinstance(end, End) and isinstance(row, dict)
    assert start.parameters == start.counts == run.record["parameters"] > 1000
    assert (row["step"], row["valid_loss"]) == (1, run.reports()["valid"]["loss"])
    assert (end.reason, closed) == ("finished", "closed")
    # The floor of this preset is the model itself, before its counts are made compact.
    report = run.evaluate("valid")
    assert report.loss == pytest.approx(report.floor_loss, abs=3e-3)
    assert report.notes == ()
    assert report.kind == "n-gram counts, no network"
    assert report.bits_per_byte < 1.7
    loaded = lm.load("counts", runs_dir=tmp_path)
    assert loaded.sample("the ", seed=3, max_tokens=50) == run.sample("the ", seed=3, max_tokens=50)
    assert f"with {start.counts:,} counts over" in loaded.card()
    assert loaded.summary()["model_name"] == "ngram-char"
    assert not lm.resume("counts", runs_dir=tmp_path)[1]


def test_a_text_above_max_tokens_is_counted_from_its_start_and_the_report_notes_it(
    text: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ids = np.array([0, 1, 2, 1, 2, 3, 3, 3])
    bounded = NGram(NGramOptions(order=2, max_tokens=4), 4)
    bounded.fit(ids)
    whole = NGram(NGramOptions(order=2), 4)
    whole.fit(ids[:5])
    for name, array in whole.arrays().items():
        np.testing.assert_array_equal(array, bounded.arrays()[name])
    caplog.clear()
    for preset, small in (("ngram-char", {}), ("hybrid-char", {"model.hidden_size": 8, "training.max_steps": 1})):
        overrides = {"model.max_tokens": 1000, "training.batch_size": 4, "training.bptt": 16, **small}
        heard = Heard()
        run = lm.train(text, preset=preset, overrides=overrides, runs_dir=tmp_path, name=preset, callbacks=[heard])
        total = run.record["corpus"]["splits"]["train"]["tokens"]
        noted = f"the counts are of the first 1,000 of its {total:,} tokens (model.max_tokens)"
        assert noted in run.record["corpus"]["notes"] and noted in run.card()
        assert f"The model counts the first 1,000 of {total:,} tokens" in caplog.text
        start = heard.events[0]
        assert isinstance(start, Start) and start.tokens_per_step == {"ngram-char": 1000, "hybrid-char": 64}[preset]


def test_too_little_memory_for_the_counts_is_one_sentence_with_a_remedy() -> None:
    # A text of ten trillion tokens, which needs no memory itself.
    endless = np.broadcast_to(np.int64(0), (10**13,))
    with pytest.raises(DeviceError, match=r"at order 6: lower model\.max_tokens or model\.order\.$"):
        NGram(NGramOptions(max_tokens=None), 4).fit(endless)
    NGram(NGramOptions(max_tokens=100), 4).fit(endless)


@pytest.mark.parametrize(("order", "vocab_size"), [(7, 30), (4, 20_000)])
def test_the_memory_of_counting_is_estimated_from_the_start_of_the_text(order: int, vocab_size: int) -> None:
    model = NGram(NGramOptions(order=order, max_tokens=300_000), vocab_size)
    ids = np.random.default_rng(1).zipf(1.3, size=400_001) % vocab_size
    tracemalloc.start()
    model.fit(ids)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 0.9 * peak < model.fit_bytes(ids) < 2 * peak
    assert model.fit_bytes(ids[:1]) == 0


def test_a_run_of_counts_starts_without_its_preset(text: Path, tmp_path: Path) -> None:
    overrides = {"model.type": "ngram", "model.order": 3}
    run = lm.train(text, lm.compose(str(text), preset="gru-char", overrides=overrides), name="three", runs_dir=tmp_path)
    report = run.evaluate("valid")
    assert report.misses_floor
    assert "does not beat the floor" in report.notes[-1]
    # It has the name of its model, whatever its preset was.
    assert run.summary()["model_name"] == "ngram-char"
