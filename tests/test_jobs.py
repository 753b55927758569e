"""Whole jobs through the public API: train, resume, start from another run, sample, evaluate, show."""

from __future__ import annotations

import json
import logging
import math
import pickle
import random
import shutil
import sys
import time
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import pytest
import torch
from pydantic import Field
from torch import Tensor

import lm
from lm.errors import (
    ConfigError,
    CorpusError,
    CorruptRunError,
    DeviceError,
    NonFiniteLossError,
    RunError,
    RunExistsError,
    RunLockedError,
    RunNotFoundError,
    VocabMismatchError,
)
from lm.files import digest
from lm.jobs.prepare import prepare_job
from lm.jobs.resolve import TrainRequest, resolve
from lm.jobs.train import init_config
from lm.models.base import LanguageModel, ModelOptions, State
from lm.profiling.trial import Speed, Trial
from lm.registry import MODELS
from lm.runs import run_folder
from lm.runs.run_folder import RunFolder, list_runs
from lm.training.callbacks import Callback, End, Start

pytestmark = pytest.mark.slow

SMALL: dict[str, Any] = {
    "model.embedding_size": 8,
    "model.hidden_size": 16,
    "training.batch_size": 4,
    "training.bptt": 16,
    "training.max_steps": 6,
    "training.warmup_steps": 0,
}


def make_text(characters: int, seed: int = 5) -> str:
    source = random.Random(seed)
    words = ("the cat", "sat on", "a mat", "and", "saw", "one red", "hen", "run by", "its", "den", "in fog")
    lines = "".join(" ".join(source.choice(words) for _ in range(8)) + ".\n" for _ in range(characters // 30))
    return lines[:characters]


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(make_text(5000), "utf-8")
    return path


def train(
    text: Path, runs_dir: Path, *, name: str | None = "a", overrides: dict[str, Any] | None = None, **job: Any
) -> lm.Run:
    config = lm.compose(str(text), preset="gru-char", overrides={**SMALL, **(overrides or {})})
    return lm.train(text, config, name=name, runs_dir=runs_dir, **job)


@pytest.fixture(scope="session")
def trained(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs folder of one finished run, `a`; copy it before changing it."""
    folder = tmp_path_factory.mktemp("runs")
    train(text, folder, overrides={"training.checkpoint_every": 2})
    return folder


@pytest.fixture
def runs(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "runs"))


@pytest.fixture(autouse=True)
def no_shipped_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "shipped_folder", lambda: tmp_path / "shipped")


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def assert_same_weights(one: RunFolder, two: RunFolder, *states: str) -> None:
    for state in states:
        (first, facts), (second, other_facts) = one.read_weights(state), two.read_weights(state)
        assert first.keys() == second.keys() and facts == other_facts
        for name, array in first.items():
            np.testing.assert_array_equal(array, second[name], err_msg=name)


def edit(path: Path, **changes: Any) -> None:
    config = json.loads(path.read_text("utf-8"))
    for place, value in changes.items():
        *parents, last = place.split("__")
        part = config
        for name in parents:
            part = part[name]
        part[last] = value
    # Signed anew, as one would who knows of the hash: what is refused is refused for another reason.
    config["sha256"] = digest({key: value for key, value in config.items() if key != "sha256"})
    path.write_text(json.dumps(config), "utf-8")


class Heard(Callback):
    def __init__(self) -> None:
        self.start: Start | None = None
        self.end: End | None = None

    def on_start(self, start: Start) -> None:
        self.start = start

    def on_end(self, end: End) -> None:
        self.end = end


# -- training -------------------------------------------------------------------------------------------


def test_a_finished_run_holds_all_that_the_design_names(trained: Path) -> None:
    names = set(content(trained / "a"))
    assert {
        "config.json", "model.safetensors", "tokenizer.json", "metrics.jsonl", "report.json", "README.md",
        "last/state.json", "last/model.safetensors", "last/optimizer.safetensors", "last/hidden.safetensors",
        "last/random.safetensors", "steps/step-2/model.safetensors",
    } <= names  # fmt: skip
    assert any(name.startswith("events/") for name in names)
    assert [name for name in names if name.startswith("samples/")] == ["samples/best-step-6-seed-1.txt"]
    assert not [name for name in names if "partial" in name or "old" in name]


def test_the_record_repeats_the_run(trained: Path, text: Path, tmp_path: Path) -> None:
    run = lm.load("a", runs_dir=trained)
    assert run.record["plan"]["steps"] == 6
    assert run.record["init"] is None and run.record["corpus"]["name"] == "words"
    again = lm.train(text, run.config, name="b", runs_dir=tmp_path)
    assert_same_weights(again.folder, run.folder, "best", "last")


def test_another_seed_is_another_run(trained: Path, text: Path, tmp_path: Path) -> None:
    other = train(text, tmp_path, overrides={"training.seed": 2})
    first = lm.load("a", runs_dir=trained)
    assert other.reports()["valid"]["loss"] != first.reports()["valid"]["loss"]


def test_the_saved_report_is_of_the_best_weights(trained: Path) -> None:
    run = lm.load("a", runs_dir=trained)
    assert run.reports()["valid"]["loss"] == pytest.approx(run.evaluate("valid").loss, abs=1e-6)
    assert run.reports()["valid"]["step"] == run.step


def test_the_closing_sample_is_saved_with_what_reproduces_it(trained: Path) -> None:
    run = lm.load("a", runs_dir=trained)
    saved = (run.folder.path / "samples" / "best-step-6-seed-1.txt").read_text("utf-8")
    facts = json.loads(saved.splitlines()[0].removeprefix("# "))
    assert (facts["step"], facts["state"], facts["prompt"]) == (6, "best", "")
    assert saved.partition("# sample 1 of 1\n\n")[2] == run.sample(facts["prompt"], **facts["options"]) + "\n"


def test_runs_are_named_after_corpus_and_preset_and_never_twice(text: Path, tmp_path: Path) -> None:
    names = [train(text, tmp_path, name=None, overrides={"training.max_steps": 1}).name for _ in range(3)]
    assert names == ["words-gru-char", "words-gru-char-2", "words-gru-char-3"]


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../a", "a@last", "a\\b"])
def test_a_name_that_is_no_folders_name_is_refused(text: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="a run's name is a folder's name"):
        train(text, tmp_path / "runs", name=name)
    assert not (tmp_path / "runs").exists()


def test_a_taken_name_is_refused_before_anything_else(runs: Path, text: Path) -> None:
    before = content(runs)
    with pytest.raises(RunExistsError, match=r"--overwrite.*lm train --resume .*/a"):
        train(text, runs)
    assert content(runs) == before
    run = train(text, runs, overwrite=True, overrides={"training.max_steps": 2})
    assert run.record["plan"]["steps"] == 2
    assert run.folder.kept_checkpoints() == []


def test_a_run_in_training_is_neither_overwritten_nor_resumed(runs: Path, text: Path) -> None:
    with RunFolder(runs / "a").lock():
        before = content(runs)
        with pytest.raises(RunLockedError):
            train(text, runs, overwrite=True)
        with pytest.raises(RunLockedError):
            lm.resume("a", runs_dir=runs, max_steps=20)
        assert content(runs) == before


@pytest.mark.parametrize(
    ("overrides", "job", "error"),
    [
        ({"training.device": "cuda:77"}, {}, DeviceError),
        ({}, {"stop_after": 0}, ConfigError),
        ({"corpus.split_fractions": (0.9, 0.1), "model.hidden_size": 10**9}, {}, DeviceError),
    ],
)
def test_a_refused_job_leaves_no_folder(
    text: Path, tmp_path: Path, overrides: dict[str, Any], job: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        train(text, tmp_path / "runs", overrides=overrides, **job)
    assert not list((tmp_path / "runs").glob("*"))


def test_a_corpus_without_a_validation_split_is_refused(tmp_path: Path) -> None:
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "train.txt").write_text(make_text(3000), "utf-8")
    with pytest.raises(CorpusError, match="valid"):
        train(tmp_path / "only", tmp_path / "runs")


def test_a_diverging_run_names_a_way_on(text: Path, tmp_path: Path) -> None:
    wild = {"training.learning_rate": 1e30, "training.grad_clip": None, "training.max_steps": 50}
    with pytest.raises(NonFiniteLossError, match=r"Step \d+.*--init a@last.*learning_rate"):
        train(text, tmp_path, overrides=wild)
    # What the sentence says to do works.
    base = lm.load("a@last", runs_dir=tmp_path)
    options = init_config(
        base, lm.CorpusConfig(source=str(text)), {"training.learning_rate": 1e-3, "training.max_steps": 2}
    )
    assert lm.train(text, options, name="b", runs_dir=tmp_path, init=base).reports()["valid"]["loss"] < 10


@pytest.mark.slow
def test_minutes_are_planned_kept_and_spent(text: Path, tmp_path: Path) -> None:
    heard, begun = Heard(), time.monotonic()
    run = train(text, tmp_path, overrides={"training.max_steps": None, "training.minutes": 0.03}, callbacks=[heard])
    plan = run.record["plan"]
    assert heard.end is not None and heard.end.reason == "finished"
    assert plan["seconds"] == pytest.approx(1.8) and plan["steps"] > 5 and heard.end.plan_steps == heard.end.step > 5
    assert 0.6 < heard.end.seconds < 2.2
    assert heard.end.learning_rate_share == pytest.approx(run.config.training.learning_rate_floor)
    assert plan["measured_step_seconds"] > 0
    assert time.monotonic() - begun < 20
    assert lm.resume("a", runs_dir=tmp_path)[1] is False


def test_a_plan_by_time_lands_on_a_machine_that_is_far_slower_than_measured(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trial, "measure", lambda self, seconds: Speed(1e-6, 1e-9))
    heard = Heard()
    timed = {"training.max_steps": 4000, "training.minutes": 0.01}
    run = train(text, tmp_path, overrides=timed, callbacks=[heard])
    assert heard.end is not None and heard.end.reason == "finished" and heard.end.step < 4000
    assert heard.end.learning_rate_share == pytest.approx(run.config.training.learning_rate_floor)
    assert "valid" in run.reports()
    # More steps than its time had, as a plan in steps.
    more = heard.end.step + 3
    _, went_on = lm.resume("a", runs_dir=tmp_path, max_steps=more, callbacks=[heard])
    assert went_on and (heard.end.reason, heard.end.step, heard.end.plan_steps) == ("finished", more, more)


def test_an_older_run_that_its_minutes_cut_short_is_resumed_to_the_end_of_its_plan(text: Path, tmp_path: Path) -> None:
    heard = Heard()
    train(text, tmp_path, overrides={"training.max_steps": 12}, stop_after=6)
    # What an older version left: a limit of time in a plan in steps, and its reason to stop.
    folder = RunFolder(tmp_path / "a")
    record = folder.read_record()
    old = {name: value for name, value in record["plan"].items() if name in ("steps", "evaluate_every")}
    folder.write_record({**record, "plan": {**old, "seconds": 0.01}})
    state, tensors = folder.read_last()
    state["train_state"]["stop_reason"] = "out_of_time"
    del state["train_state"]["segments"], state["train_state"]["pace"]
    files = {f"{name}.safetensors": folder.pack_weights(arrays) for name, arrays in tensors.items()}
    folder.write_last({**files, "state.json": folder.pack_state(state)})
    again, went_on = lm.resume("a", runs_dir=tmp_path, callbacks=[heard])
    assert heard.end is not None
    assert went_on and (heard.end.reason, heard.end.step) == ("finished", 12)
    assert heard.end.learning_rate_share == pytest.approx(again.config.training.learning_rate_floor)
    assert lm.resume("a", runs_dir=tmp_path)[1] is False


def test_no_length_at_all_is_five_minutes(text: Path) -> None:
    def minutes(overrides: dict[str, Any], preset: str = "gru-char") -> float | None:
        request = TrainRequest(corpus=str(text), preset=preset, overrides=overrides)
        return prepare_job(resolve(request)).config.training.minutes

    assert minutes({}) == 5
    assert minutes({"training.epochs": 3}) is None
    assert minutes({}, "ngram-char") is None


def test_options_are_composed_once_and_a_text_is_read_and_encoded_once(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm.jobs import prepare, resolve

    calls: list[tuple[str, str]] = []

    def counted(module: Any, name: str, label: Any) -> None:
        whole = getattr(module, name)

        def call(*args: Any, **options: Any) -> Any:
            calls.append((name, label(*args, **options)))
            return whole(*args, **options)

        monkeypatch.setattr(module, name, call)

    counted(resolve, "compose", lambda source, *, preset, **options: json.dumps(preset))
    counted(prepare, "open_corpus", lambda where, **options: where.source)
    counted(prepare, "encode", lambda corpus, tokenizer, **options: tokenizer.type)
    lm.train(text, max_steps=1, overrides={"model.table_orders": [], "model.hidden_size": 8}, runs_dir=tmp_path)
    assert len(calls) == len(set(calls)), calls
    assert [name for name, _ in calls].count("encode") == 1


# -- resuming -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["gru", "transformer"])
def test_two_halves_make_the_run_that_one_job_makes(text: Path, tmp_path: Path, model: str) -> None:
    own: dict[str, Any] = {"training.log_every": 2, "training.evaluate_every": 2}
    if model == "transformer":
        own |= {"model.type": model, "model.num_heads": 2, "model.num_layers": 1, "model.context_length": 16}
        own |= {"model.dropout": 0.1}
        saved = {name: SMALL[name] for name in SMALL if name != "model.embedding_size"}
    else:
        saved = SMALL
    config = lm.compose(str(text), preset="gru-char", overrides={**saved, **own})
    straight = lm.train(text, config, name="straight", runs_dir=tmp_path)
    half = lm.train(text, config, name="halves", runs_dir=tmp_path, stop_after=3)
    assert half.record["plan"]["steps"] == 6
    halves, went_on = lm.resume("halves", runs_dir=tmp_path)
    assert went_on
    assert_same_weights(straight.folder, halves.folder, "best", "last")
    one, two = straight.folder.read_last()[1], halves.folder.read_last()[1]
    for name, array in one["optimizer"].items():
        np.testing.assert_array_equal(array, two["optimizer"][name], err_msg=name)
    figures = ("loss", "bits_per_byte", "tokens", "accuracy")
    assert [straight.reports()["valid"][name] for name in figures] == [
        halves.reports()["valid"][name] for name in figures
    ]


def test_resuming_a_finished_run_changes_nothing(runs: Path) -> None:
    before = content(runs)
    run, went_on = lm.resume("a", runs_dir=runs)
    assert (run.name, went_on) == ("a", False)
    assert content(runs) == before


def test_a_finished_run_continues_with_a_longer_plan(runs: Path) -> None:
    heard = Heard()
    run, went_on = lm.resume("a", runs_dir=runs, max_steps=9, callbacks=[heard])
    assert went_on and heard.start is not None and heard.end is not None
    assert (heard.start.step, heard.end.step, heard.end.reason) == (6, 9, "finished")
    assert run.record["plan"]["steps"] == 9
    assert run.folder.read_metrics()[-1]["step"] == 9
    assert run.reports()["valid"]["step"] == run.step


@pytest.mark.parametrize(("max_steps", "stop_after"), [(3, None), (9, 6), (9, 2), (0, None)])
def test_a_plan_that_ends_before_what_is_done_is_refused(runs: Path, max_steps: int, stop_after: int | None) -> None:
    before = content(runs)
    with pytest.raises(ConfigError, match="is at step 6 already"):
        lm.resume("a", runs_dir=runs, max_steps=max_steps, stop_after=stop_after)
    assert content(runs) == before


def test_a_kept_state_is_not_what_a_run_is_resumed_from(runs: Path) -> None:
    with pytest.raises(ConfigError, match=r"resumes from its last step\. To start from step-2, use --init a@step-2"):
        lm.resume("a@step-2", runs_dir=runs)
    assert lm.resume("a@last", runs_dir=runs)[1] is False


def test_a_longer_plan_resets_the_patience_of_a_run_that_ran_out_of_it(text: Path, tmp_path: Path) -> None:
    heard = Heard()
    stuck = {
        "training.learning_rate": 1e-30,
        "training.table_learning_rate": 1e-30,
        "training.patience": 2,
        "training.evaluate_every": 1,
        "training.max_steps": 20,
    }
    train(text, tmp_path, overrides=stuck, callbacks=[heard])
    assert heard.end is not None and (heard.end.reason, heard.end.step) == ("no_progress", 3)
    assert lm.resume("a", runs_dir=tmp_path)[1] is False
    lm.resume("a", runs_dir=tmp_path, max_steps=30, callbacks=[heard])
    assert (heard.end.reason, heard.end.step) == ("no_progress", 5)


def test_a_run_whose_text_has_moved_is_resumed_from_the_new_place_which_is_recorded(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = tmp_path / "old.txt", tmp_path / "new.txt"
    old.write_bytes(text.read_bytes())
    train(old, tmp_path / "runs", stop_after=2)
    train(text, tmp_path / "runs", name="whole")
    old.rename(new)
    monkeypatch.setenv("INKLING_CACHE", str(tmp_path / "cache"))
    with pytest.raises(CorpusError, match=r"There is no file .*is elsewhere now: lm eval .*/runs/a --corpus PATH$"):
        lm.resume("a", runs_dir=tmp_path / "runs")
    other = tmp_path / "other.txt"
    other.write_text(make_text(5000, seed=6), "utf-8")
    before = content(tmp_path / "runs")
    with pytest.raises(CorpusError, match=r"other.txt is not the text that run 'a' was trained on"):
        lm.resume("a", runs_dir=tmp_path / "runs", corpus=other)
    assert content(tmp_path / "runs") == before
    run, went_on = lm.resume("a", runs_dir=tmp_path / "runs", corpus=new)
    assert went_on and run.config.corpus.source == str(new)
    assert_same_weights(run.folder, RunFolder(tmp_path / "runs" / "whole"), "best", "last")
    assert lm.resume("a", runs_dir=tmp_path / "runs", max_steps=7)[1]


def test_a_run_whose_text_has_changed_is_not_resumed(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "own.txt"
    own.write_text(text.read_text("utf-8"), "utf-8")
    train(own, tmp_path / "runs", stop_after=2)
    own.write_text(make_text(5000, seed=6), "utf-8")
    # The prepared tokens still lie in the cache, so the text itself is not needed.
    assert lm.resume("a", runs_dir=tmp_path / "runs", stop_after=3)[1]
    monkeypatch.setenv("INKLING_CACHE", str(tmp_path / "cache"))
    before = content(tmp_path / "runs")
    with pytest.raises(CorpusError, match=r"is not the text that run 'a' was trained on"):
        lm.resume("a", runs_dir=tmp_path / "runs")
    with pytest.raises(CorpusError, match=r"is not the text that run 'a' was trained on.*--text"):
        lm.load("a", runs_dir=tmp_path / "runs").evaluate("valid")
    assert content(tmp_path / "runs") == before
    own.write_text(text.read_text("utf-8"), "utf-8")
    assert lm.resume("a", runs_dir=tmp_path / "runs")[1]


def test_a_cache_made_by_another_tokenizer_is_not_believed(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tokenizer trained anew under the same key, as another version might, must not score the run."""
    from lm.corpora import load_prepared
    from lm.tokenizers.char import CharOptions, CharTokenizer

    run = lm.load("a", runs_dir=trained)
    honest = run.evaluate("valid").loss
    from dataclasses import replace

    foreign = CharTokenizer.train([make_text(500)], CharOptions(type="char", unknown="skip"))
    cached = load_prepared(run.record["corpus"]["key"])
    assert cached is not None
    monkeypatch.setattr("lm.corpora.prepared.load_prepared", lambda key: replace(cached, tokenizer=foreign))
    assert lm.load("a", runs_dir=trained).evaluate("valid").loss == honest


def test_a_shipped_run_is_not_resumed(runs: Path) -> None:
    edit(runs / "a" / "config.json", shipped=True)
    with pytest.raises(RunError, match=r"shipped and read-only\. To train from its weights, use --init a"):
        lm.resume("a", runs_dir=runs, max_steps=20)


@pytest.mark.parametrize(
    ("place", "value", "error"),
    [
        ("plan__steps", "many", CorruptRunError),
        ("plan", None, CorruptRunError),
        ("plan", {"what": 1}, CorruptRunError),
        ("config__model__hidden_size", 17, VocabMismatchError),
        ("config__model__type", "quantum", ConfigError),
        ("config__training__learning_rate", "fast", ConfigError),
        ("config__training__what", 1, ConfigError),
        ("corpus__key", "../../elsewhere", None),
        ("corpus__sha256", "0", CorpusError),
        ("vocab_size", None, CorruptRunError),
    ],
)
def test_an_edited_configuration_is_refused_and_nothing_changes(
    runs: Path, place: str, value: Any, error: type[Exception] | None
) -> None:
    edit(runs / "a" / "config.json", **{place: value})
    before = content(runs)
    if error is None:
        assert lm.resume("a", runs_dir=runs, max_steps=8)[1]
        return
    with pytest.raises(error):
        lm.resume("a", runs_dir=runs, max_steps=8)
    assert content(runs) == before


def test_a_shorter_last_of_the_same_kind_is_refused(runs: Path) -> None:
    other = RunFolder(runs / "a")
    arrays, _ = other.read_weights("last")
    arrays.pop(next(iter(arrays)))
    (runs / "a" / "last" / "model.safetensors").write_bytes(other.pack_weights(arrays, step=6))
    with pytest.raises(CorruptRunError, match="does not fit this run"):
        lm.resume("a", runs_dir=runs, max_steps=8)


# -- starting from another run -----------------------------------------------------------------------------


def test_a_run_starts_from_another_runs_weights_on_other_text(runs: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text(make_text(4000, seed=9), "utf-8")
    base = lm.load("a", runs_dir=runs)
    still = {
        "training.max_steps": 1,
        "training.learning_rate": 1e-30,
        "training.table_learning_rate": 1e-30,
        "training.weight_decay": 0,
    }
    options = init_config(base, lm.CorpusConfig(source=str(other)), still)
    run = lm.train(other, options, name="b", runs_dir=runs, init=base)
    assert run.tokenizer.sha256 == base.tokenizer.sha256
    assert run.record["init"] == "a@best"
    # It began with that run's weights, and a rate of nothing left them there.
    began, _ = run.folder.read_weights("last")
    for name, array in base.folder.read_weights()[0].items():
        np.testing.assert_allclose(began[name], array, rtol=0, atol=1e-25, err_msg=name)
    assert run.evaluate("valid").corpus == "other"


def test_starting_from_a_run_keeps_what_its_weights_were_made_for(runs: Path, text: Path) -> None:
    base, where = lm.load("a", runs_dir=runs), lm.CorpusConfig(source=str(text))
    with pytest.raises(ConfigError, match="keeps that run's tokenizer"):
        init_config(base, where, {"tokenizer.unknown": "skip"})
    larger = init_config(base, where, {"model.hidden_size": 32, "training.max_steps": 2})
    before = content(runs)
    with pytest.raises(ConfigError, match=r"--init a: .* leave options that change the model's shape out"):
        lm.train(text, larger, name="b", runs_dir=runs, init=base)
    assert content(runs) == before
    assert init_config(base, where, {"model.dropout": 0.5}).model.model_dump()["dropout"] == 0.5


# -- interruptions are quiet -----------------------------------------------------------------------------


def test_an_interrupted_run_is_saved_at_once_without_a_report(text: Path, tmp_path: Path) -> None:
    import signal

    heard = Heard()

    class CtrlC(Callback):
        def on_step(self, tick: Any) -> None:
            if tick.step == 3:
                signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    run = train(text, tmp_path, callbacks=[CtrlC(), heard])
    assert signal.getsignal(signal.SIGINT) is before
    assert heard.end is not None
    assert (heard.end.reason, heard.end.step, heard.end.signal) == ("interrupted", 3, signal.SIGINT)
    assert run.reports() == {}
    run, went_on = lm.resume("a", runs_dir=tmp_path)
    assert went_on and run.reports()["valid"]["step"] == 6


# -- reports -----------------------------------------------------------------------------------------------


def test_a_report_of_weights_that_training_replaced_is_not_shown(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = lm.load("a", runs_dir=runs)
    run.save_report(run.evaluate("test"))
    assert run.reports().keys() == {"valid", "test"}
    RunFolder(runs / "a").write_best(run.model.arrays(), step=7, valid_loss=1.0)
    assert lm.load("a", runs_dir=runs).reports() == {}
    assert lm.load("a", runs_dir=runs).summary()["bits_per_byte"] is None


def test_reports_of_other_checkpoints_are_stored_next_to_the_best(runs: Path) -> None:
    kept = lm.load("a@step-2", runs_dir=runs)
    kept.save_report(kept.evaluate("valid"))
    reports = lm.load("a", runs_dir=runs).reports()
    assert reports.keys() == {"valid", "valid@step-2"}
    assert reports["valid@step-2"]["step"] == 2
    assert reports["valid@step-2"]["loss"] > reports["valid"]["loss"]


@pytest.mark.parametrize("text_", ["[]", "3", '{"valid": 3}', '{"valid": {"loss": "low"}}', "{"])
def test_a_damaged_report_is_refused_by_name(runs: Path, text_: str) -> None:
    (runs / "a" / "report.json").write_text(text_)
    run = lm.load("a", runs_dir=runs)
    with pytest.raises(CorruptRunError, match=r"report\.json"):
        run.reports()
    assert "report.json" in str(run.summary()["problem"])


def test_the_card_says_what_the_run_is_and_how_good(trained: Path) -> None:
    text_ = (trained / "a" / "README.md").read_text("utf-8")
    report = lm.load("a", runs_dir=trained).reports()["valid"]
    assert text_.startswith("# a\n")
    assert f"| bits per byte (comparable across tokenizers) | {report['bits_per_byte']:.4f} |" in text_
    assert "| hidden_size | 16 |" in text_ and "| batch_size | 4 |" in text_
    assert "lm sample a" in text_


def test_the_summary_of_a_run_that_vanishes_while_it_is_read_survives(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stat = Path.stat

    def vanish(path: Path, **options: Any) -> Any:
        if path.name == "state.json":
            raise FileNotFoundError(2, "No such file", str(path))
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", vanish)
    assert lm.load("a", runs_dir=runs).summary()["problem"] is None


@pytest.mark.parametrize("damage", ["{", '{"format_version": 99}', '{"format_version": 1}'])
def test_a_broken_run_is_listed_with_its_problem(runs: Path, damage: str) -> None:
    shutil.copytree(runs / "a", runs / "b")
    (runs / "b" / "config.json").write_text(damage)
    rows = {run.name: lm.load(run.name, runs_dir=runs).summary() for run in list_runs(runs)}
    assert rows["a"]["problem"] is None
    assert "config.json" in rows["b"]["problem"]


# -- a loaded run ------------------------------------------------------------------------------------------


def test_the_newest_run_is_loaded_without_a_name(runs: Path) -> None:
    shutil.copytree(runs / "a", runs / "b")
    (runs / "b" / "model.safetensors").touch()
    assert lm.load(runs_dir=runs).name == "b"


def test_checkpoints_of_a_run_are_distinguished(trained: Path) -> None:
    losses = {
        state: lm.load(f"a@{state}", runs_dir=trained).evaluate("valid").loss for state in ("step-2", "step-4", "last")
    }
    assert losses["step-2"] > losses["step-4"] > losses["last"]
    assert lm.load("a@last", runs_dir=trained).step == 6


def test_an_unknown_checkpoint_is_refused_at_its_request(trained: Path) -> None:
    with pytest.raises(RunNotFoundError, match=r"has no checkpoint 'step-3'\. Did you mean 'step-"):
        lm.load("a@step-3", runs_dir=trained)


def test_a_split_that_is_not_there_is_refused(trained: Path) -> None:
    with pytest.raises(CorpusError, match="has no 'final' split: its corpus has train, valid, test"):
        lm.load("a", runs_dir=trained).evaluate("final")


def test_unknown_characters_in_a_prompt_are_reported_and_read(trained: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="lm"):
        lm.load("a", runs_dir=trained).sample("Привет \udcff ☃", max_tokens=3)
    assert "'П'" in caplog.text and "read as unknown" in caplog.text


def test_the_score_of_a_text_is_its_tokens_nats_and_their_mean_the_loss(trained: Path) -> None:
    run, text = lm.load("a", runs_dir=trained), "the cat sat on\none hen é"
    scores = run.score(text)
    assert "".join(score.text for score in scores[:-1]) == text[:-1]
    assert [score.id for score in scores] == run.tokenizer.encode(text).tolist()
    assert np.mean([score.nats for score in scores]) == pytest.approx(run.evaluate(text=text).loss, rel=1e-12)
    # The first token is predicted from the start token, the second from that and the first.
    logits = torch.from_numpy(run.logits("th"))
    assert logits.shape == (3, run.tokenizer.vocab_size)
    for place in (0, 1):
        assert scores[place].nats == pytest.approx(-float(logits[place].log_softmax(0)[scores[place].id]), abs=1e-5)


def test_scores_of_a_window_that_slides_are_in_the_order_of_the_text(text: Path, tmp_path: Path) -> None:
    small = {"model.hidden_size": 32, "model.num_layers": 1, "model.num_heads": 2, "model.context_length": 16}
    run = lm.train(text, preset="transformer-char", max_steps=1, overrides=small, runs_dir=tmp_path)
    content = text.read_text()[:203]
    scores, alone = run.score(content), run.score(content[:16])
    assert [score.text for score in scores] == list(content)
    assert [score.nats for score in scores[:16]] == pytest.approx([score.nats for score in alone], abs=1e-5)
    assert np.mean([score.nats for score in scores]) == pytest.approx(run.evaluate(text=content).loss, rel=1e-12)
    with pytest.raises(
        ConfigError, match="text and the start token are 17 tokens, but the model's context length is 16"
    ):
        run.logits(content[:16])


def test_several_samples_are_a_list_and_what_is_no_text_is_refused_with_the_right_method(trained: Path) -> None:
    run = lm.load("a", runs_dir=trained)
    texts = run.samples("the ", n=3, seed=4, max_tokens=9)
    assert len({*texts}) == 3 and all(len(text) == 9 for text in texts)
    assert texts[0] == run.sample("the ", seed=4, max_tokens=9)
    with pytest.raises(ConfigError, match=r"gives one text, and n is 3: run\.samples\(prompt, n=3\) gives all"):
        run.sample("the ", n=3)
    for draw in (run.sample, run.samples):
        with pytest.raises(ConfigError, match=r"run\.events\(run\.request\(prompt, options\)\).*run\.score\(text\)"):
            draw("the ", logprobs=3)


def test_a_model_that_is_given_other_ids_says_which_it_reads(trained: Path) -> None:
    run = lm.load("a", runs_dir=trained)
    with pytest.raises(TypeError, match=r"int64 tensor \(B, T\).* ndarray of shape \(3,\).*run\.score\(text\)"):
        run.model(run.tokenizer.encode("the"))


def test_runs_and_reports_show_what_they_are(runs: Path) -> None:
    run = lm.load("a", runs_dir=runs)
    report = lm.Report.model_validate(run.reports()["valid"])
    assert repr(run) == (
        f"<Run 'a', checkpoint 'best': gru-char, {run.record['parameters']:,} parameters, trained on words, "
        f"{report.bits_per_byte:.4f} bits per byte on valid>"
    )
    assert repr(report).startswith("Report(run='a', state='best', corpus='words', split='valid', loss=")
    assert len(repr(report)) < 250
    (runs / "a" / "config.json").write_bytes(b"{}")
    assert repr(lm.load(str(runs / "a"))).startswith("<Run 'a': ")


def test_the_environment_names_the_runs_folder(
    runs: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("INKLING_RUNS", str(runs))
    assert lm.load().folder.path == runs / "a"
    assert lm.resume("a")[1] is False
    assert lm.train(text, preset="ngram-char", name="b").folder.path == runs / "b"
    with pytest.raises(RunNotFoundError, match="train one"):
        lm.load(runs_dir=tmp_path / "none")


def test_a_length_and_options_alone_train_the_default_model(text: Path, tmp_path: Path) -> None:
    small = {"training.batch_size": 4, "training.bptt": 16, "model.hidden_size": 16}
    run = lm.train(text, max_steps=2, overrides=small, runs_dir=tmp_path)
    assert (run.name, run.config.preset, run.config.training.max_steps) == ("words-hybrid", None, 2)
    assert run.config.model.model_dump()["hidden_size"] == 16
    # Over a whole configuration too.
    config = lm.compose(str(text), preset="gru-char", overrides=SMALL)
    assert lm.train(text, config, max_steps=1, runs_dir=tmp_path).record["plan"]["steps"] == 1


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"minutes": -1}, "training.minutes = -1: give a number above 0."),
        ({"overrides": {"training.batchsize": 1}}, "Unknown option training.batchsize. Did you mean 'batch_size'?"),
        ({"preset": "gru"}, "Unknown preset 'gru'. Did you mean 'gru-char'"),
        ({"preset": "gru-char", "config": lm.compose("x", preset="gru-char")}, "leave preset out"),
        ({"name": "a/b"}, "--name 'a/b'"),
    ],
)
def test_wrong_options_are_refused_before_the_text_is_read(
    tmp_path: Path, options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        lm.train(tmp_path / "missing.txt", runs_dir=tmp_path, **options)
    assert sentence in str(caught.value)


def test_a_corrupt_run_is_refused_when_it_is_used(runs: Path) -> None:
    path = runs / "a" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CorruptRunError, match=r"model\.safetensors is damaged"):
        lm.load("a", runs_dir=runs).sample("x")


def test_reading_a_runs_card_loads_no_torch(trained: Path) -> None:
    import subprocess

    code = (
        "import sys; from pathlib import Path; import lm; "
        "run = lm.load('a', runs_dir=Path(sys.argv[1])); assert run.summary()['bits_per_byte'] > 0; run.facts(); "
        "run.config, run.tokenizer; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(trained)], check=True)


def test_nothing_is_ever_unpickled(runs: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> Any:
        raise AssertionError("something was unpickled")

    class Refusing(pickle.Unpickler):
        __init__ = refuse

    for name in ("load", "loads", "_load", "_loads"):
        monkeypatch.setattr(pickle, name, refuse)
    for name in ("Unpickler", "_Unpickler"):
        monkeypatch.setattr(pickle, name, Refusing)
    monkeypatch.setattr(torch, "load", refuse)
    with pytest.raises(AssertionError):
        pickle.loads(b"\x80\x04K\x01.")  # noqa: S301 (the point of the test)
    run = lm.load("a", runs_dir=runs)
    assert len(run.sample("the ", max_tokens=5)) == 5
    run.save_report(run.evaluate("test"))
    assert lm.resume("a", runs_dir=runs, max_steps=8)[1]
    train(text, runs, name="b", stop_after=2)
    assert lm.resume("b", runs_dir=runs)[1]


# -- a model trained by counting ------------------------------------------------------------------------------


class BigramOptions(ModelOptions):
    type: Literal["bigram-counts"] = Field("bigram-counts", description="Counts of pairs.")
    smoothing: float = Field(0.5, gt=0, description="Added to every count.")


class Bigram(LanguageModel):
    """How often each token followed each other: no gradients, no parameters, one buffer."""

    Options = BigramOptions
    trained_by: ClassVar[Literal["gradient", "counting"]] = "counting"
    options: BigramOptions
    logs: Tensor

    def __init__(self, options: BigramOptions, vocab_size: int) -> None:
        super().__init__(options, vocab_size)
        self.register_buffer("logs", torch.zeros(vocab_size, vocab_size))

    def fit(self, ids: npt.NDArray[Any]) -> None:
        counts = np.full((self.vocab_size, self.vocab_size), self.options.smoothing)
        np.add.at(counts, (ids[:-1].astype(np.int64), ids[1:].astype(np.int64)), 1)
        self.logs.copy_(torch.from_numpy(np.log(counts / counts.sum(axis=1, keepdims=True))))

    def forward(self, ids: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        return self.logs[ids], State({"last": ids[:, -1:]})

    def num_parameters(self) -> int:
        return self.logs.numel()


@pytest.fixture
def bigram(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bigram_of_this_test", sys.modules[__name__])
    monkeypatch.setitem(MODELS._added, "bigram-counts", "bigram_of_this_test:Bigram")
    monkeypatch.setattr(sys.modules[__name__], "Bigram", Bigram, raising=False)


@pytest.mark.usefixtures("bigram")
def test_a_model_of_counts_is_trained_scored_sampled_saved_and_loaded(text: Path, tmp_path: Path) -> None:
    config = lm.compose(str(text), preset="gru-char", overrides={"model.type": "bigram-counts"})
    run = lm.train(text, config, name="counts", runs_dir=tmp_path)
    loss = run.reports()["valid"]["loss"]
    # By hand: the smoothed pair frequencies of the training split, on the validation split.
    ids = {part: np.asarray(split.ids, np.int64) for part, split in prepared_splits(run).items()}
    counts = np.full((run.tokenizer.vocab_size,) * 2, 0.5)
    for before, after in zip(ids["train"][:-1], ids["train"][1:], strict=True):
        counts[before, after] += 1
    probabilities = counts / counts.sum(axis=1, keepdims=True)
    by_hand = -np.log(probabilities[ids["valid"][:-1], ids["valid"][1:]]).mean()
    assert loss == pytest.approx(by_hand, abs=1e-5)
    assert loss < math.log(run.tokenizer.vocab_size) - 0.5
    loaded = lm.load("counts", runs_dir=tmp_path)
    assert loaded.sample("the ", seed=3) == run.sample("the ", seed=3)
    assert loaded.evaluate(text="the cat sat").loss == run.evaluate(text="the cat sat").loss
    assert loaded.record["parameters"] == run.tokenizer.vocab_size**2
    assert loaded.summary()["problem"] is None


def prepared_splits(run: lm.Run) -> Any:
    from lm.corpora import load_prepared

    prepared = load_prepared(run.record["corpus"]["key"])
    assert prepared is not None
    return prepared.splits


def test_a_model_of_counts_needs_no_preset(text: Path, tmp_path: Path) -> None:
    run = lm.train(text, overrides={"model.type": "ngram"}, runs_dir=tmp_path)
    assert (run.config.model.type, run.config.training.minutes) == ("ngram", None)


@pytest.mark.usefixtures("bigram")
def test_a_model_of_counts_is_finished_and_starts_empty(text: Path, runs: Path) -> None:
    config = lm.compose(str(text), preset="gru-char", overrides={"model.type": "bigram-counts"})
    lm.train(text, config, name="counts", runs_dir=runs)
    run, went_on = lm.resume("counts", runs_dir=runs)
    assert (run.name, went_on) == ("counts", False)
    with pytest.raises(ConfigError, match="trained by counting and start empty"):
        lm.train(text, config, name="more", runs_dir=runs, init=run)
    assert not (runs / "more").exists()


# -- the public API ------------------------------------------------------------------------------------------


def test_the_public_names_are_there_and_importing_them_loads_no_torch() -> None:
    import subprocess

    assert set(lm.__all__) <= set(dir(lm))
    for name in lm.__all__:
        assert getattr(lm, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        lm.trian  # noqa: B018
    code = "import sys, lm; lm.compose, lm.load, lm.SamplingOptions; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_plan_can_be_cut_at_the_very_step_where_a_run_was_stopped(text: Path, tmp_path: Path) -> None:
    train(text, tmp_path, stop_after=3)
    run, went_on = lm.resume("a", runs_dir=tmp_path, max_steps=3)
    assert not went_on
    assert [row["step"] for row in run.folder.read_metrics()][-1] == 3


def test_a_resume_that_fails_writes_nothing(text: Path, tmp_path: Path) -> None:
    run = train(text, tmp_path, stop_after=3)
    before = (run.folder.path / "config.json").read_bytes()
    with pytest.raises(lm.LMError, match="cuda:7"):
        lm.resume("a", runs_dir=tmp_path, max_steps=9, device="cuda:7")
    assert (run.folder.path / "config.json").read_bytes() == before


def test_a_run_that_starts_from_another_takes_its_options_by_itself(text: Path, tmp_path: Path) -> None:
    first = train(text, tmp_path)
    config = init_config(first, first.config.corpus, {"training.max_steps": 2})
    again = lm.train(str(text), config, init=first, name="b", runs_dir=tmp_path)
    assert again.config.model == first.config.model
    assert again.record["init"] == "a@best"


def test_options_are_taken_from_the_run_that_a_training_starts_from(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = train(text, tmp_path)
    monkeypatch.setattr("lm.jobs.prepare.DEFAULT_MINUTES", 0.02)
    again = lm.train(text, init=first, name="c", runs_dir=tmp_path)
    assert again.config.model == first.config.model
    assert again.tokenizer.sha256 == first.tokenizer.sha256
