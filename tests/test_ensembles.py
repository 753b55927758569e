"""Jobs of ensembles: members one after another, one run at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lm
from lm.config import RunConfig
from lm.errors import ConfigError, RunNotFoundError
from lm.jobs.ensemble_config import member_config, unwrapped
from lm.jobs.follow import Follower
from lm.runs import run_folder
from lm.runs.run_folder import RunFolder, list_runs
from lm.training.callbacks import Callback, End, Row, Start
from tests.test_jobs import SMALL, make_text

pytestmark = pytest.mark.slow

STEPS = {**SMALL, "training.log_every": 2, "training.evaluate_every": 3, "model.dropout": 0.2}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(make_text(5000), "utf-8")
    return path


@pytest.fixture(autouse=True)
def no_shipped_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "shipped_folder", lambda: tmp_path / "shipped")


def config(text: Path, **overrides: Any) -> RunConfig:
    changes = {name.replace("__", "."): value for name, value in overrides.items()}
    return lm.compose(str(text), preset="gru-char", overrides={**STEPS, **changes})


@pytest.fixture(scope="module")
def trained(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs folder of a finished ensemble of two, `two`."""
    folder = tmp_path_factory.mktemp("runs")
    lm.train(text, config(text), ensemble=2, name="two", runs_dir=folder)
    return folder


class Events(Callback):
    def __init__(self) -> None:
        self.starts: list[Start] = []
        self.rows: list[Row] = []
        self.ends: list[End] = []

    def on_start(self, start: Start) -> None:
        self.starts.append(start)

    def on_log(self, row: Row) -> None:
        self.rows.append(row)

    def on_end(self, end: End) -> None:
        self.ends.append(end)


def assert_same_weights(one: RunFolder, two: RunFolder) -> None:
    (first, facts), (second, other_facts) = one.read_weights(), two.read_weights()
    assert first.keys() == second.keys() and facts == other_facts
    for name, array in first.items():
        np.testing.assert_array_equal(array, second[name], err_msg=name)


def untimed(folder: RunFolder) -> list[Row]:
    timed = ("seconds", "validation_seconds", "tokens_per_second", "memory_bytes")
    return [{name: value for name, value in row.items() if name not in timed} for row in folder.read_metrics()]


def test_its_members_have_the_weights_of_runs_trained_alone_with_rising_seeds(
    text: Path, trained: Path, tmp_path: Path
) -> None:
    arrays, _ = RunFolder(trained / "two").read_weights()
    for number in range(2):
        alone = lm.train(text, config(text, training__seed=1 + number), name=f"s{number}", runs_dir=tmp_path)
        for name, array in alone.folder.read_weights()[0].items():
            np.testing.assert_array_equal(arrays[f"members.{number}.{name}"], array, err_msg=name)


def test_a_finished_ensemble_is_one_run_with_report_card_and_sample(trained: Path) -> None:
    assert [run.name for run in list_runs(trained)] == ["two"]
    names = {path.name for path in (trained / "two").iterdir()}
    assert names == {
        ".lock", "README.md", "config.json", "events", "metrics.jsonl", "model.safetensors", "report.json", "samples",
        "tokenizer.json",
    }  # fmt: skip
    run = lm.load("two", runs_dir=trained)
    report = run.reports()["valid"]
    assert report["kind"] == "ensemble of 2 gru models"
    assert report["loss"] == pytest.approx(run.evaluate("valid").loss)
    assert run.record["plan"]["steps"] == run.step == 12
    assert run.record["precision"] and f"It was trained in {run.record['precision']}." in run.card()
    assert len(run.sample("the cat", max_tokens=20, seed=1)) == 20
    assert run.decoder().name.startswith("native")
    assert "ensemble of 2 gru models" in run.card()


def test_metrics_have_the_rows_of_all_members_and_last_the_loss_of_their_mean(trained: Path) -> None:
    rows = RunFolder(trained / "two").read_metrics()
    assert [(row["step"], row["member"]) for row in rows] == [
        *((step, 1) for step in (2, 3, 4, 6)), *((step, 2) for step in (8, 9, 10, 12)), (12, None)
    ]  # fmt: skip
    losses = [rows[3]["valid_loss"], rows[7]["valid_loss"]]
    assert rows[-1]["valid_loss"] == lm.load("two", runs_dir=trained).reports()["valid"]["loss"]
    assert rows[-1]["valid_loss"] < sum(losses) / 2
    for name in ("tokens", "epoch", "seconds"):
        assert sorted(row[name] for row in rows) == [row[name] for row in rows]
    assert rows[5]["best_step"] == 9


@pytest.mark.parametrize("stop_after", [6, 10])
def test_an_interrupted_and_resumed_ensemble_has_the_weights_of_an_uninterrupted_one(
    text: Path, trained: Path, tmp_path: Path, stop_after: int
) -> None:
    events = Events()
    stopped = lm.train(
        text, config(text), ensemble=2, name="two", runs_dir=tmp_path, stop_after=stop_after, callbacks=[events]
    )
    assert [(end.reason, end.step, end.plan_steps) for end in events.ends] == [("stop_after", stop_after, 12)]
    with pytest.raises(RunNotFoundError, match="some members of the ensemble are not trained: .* lm train --resume"):
        stopped.sample()
    events = Events()
    run, went_on = lm.resume("two", runs_dir=tmp_path, callbacks=[events])
    assert went_on
    assert_same_weights(run.folder, RunFolder(trained / "two"))
    assert untimed(run.folder) == untimed(RunFolder(trained / "two"))
    assert events.starts[0].step == stop_after
    assert [(end.reason, end.step) for end in events.ends] == [("finished", 12)]
    assert not (run.folder.path / "members").exists()
    assert not lm.resume("two", runs_dir=tmp_path)[1]


def test_a_job_that_fails_after_the_members_are_joined_is_finished_by_a_resume(
    text: Path, trained: Path, tmp_path: Path
) -> None:
    class Fails(Callback):
        def on_log(self, row: Row) -> None:
            if row["member"] is None:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lm.train(text, config(text), ensemble=2, name="two", runs_dir=tmp_path, callbacks=[Fails()])
    run, went_on = lm.resume("two", runs_dir=tmp_path)
    assert went_on
    assert untimed(run.folder) == untimed(RunFolder(trained / "two"))
    assert not (run.folder.path / "members").exists()


def test_training_again_with_the_recorded_options_gives_the_same_ensemble(
    text: Path, trained: Path, tmp_path: Path
) -> None:
    recorded = lm.load("two", runs_dir=trained).config
    assert (recorded.model.type, recorded.training.ensemble) == ("ensemble", None)
    again = lm.train(text, recorded, name="again", runs_dir=tmp_path)
    assert_same_weights(again.folder, RunFolder(trained / "two"))


def test_an_ensemble_of_hybrids_stores_the_counts_once_and_is_labelled(text: Path, tmp_path: Path) -> None:
    options = config(text, model__type="hybrid", model__order=3, training__max_steps=2)
    run = lm.train(text, options, ensemble=2, runs_dir=tmp_path)
    assert run.name == "words-hybrid-char-ensemble"
    arrays, _ = run.folder.read_weights()
    assert any(name.startswith("shared.") for name in arrays)
    assert run.record["counts"] == run.model.num_counts() > 0
    assert run.record["kind"] == "ensemble of 2 hybrid models (hybrid: n-gram counts and a network)"


def test_members_share_the_minutes_and_each_has_its_own_seed(text: Path) -> None:
    options = config(text, training__minutes=6, training__max_steps=None, training__ensemble=3, training__seed=5)
    members = [member_config(options, number) for number in range(3)]
    assert [member.training.minutes for member in members] == [2, 2, 2]
    assert [member.training.seed for member in members] == [5, 6, 7]
    assert all(member.training.ensemble is None and member.model == options.model for member in members)
    steps = config(text, training__ensemble=3)
    assert member_config(steps, 2).training.max_steps == 6
    assert unwrapped(steps) is steps


def test_a_plan_by_time_gives_each_member_its_share(text: Path, tmp_path: Path) -> None:
    options = config(text, training__max_steps=None, training__evaluate_every=None)
    run = lm.train(text, options, ensemble=2, minutes=0.04, runs_dir=tmp_path, name="two", stop_after=1)
    member = lm.load(str(run.folder.path / "members" / "1"))
    assert (run.config.training.minutes, member.config.training.minutes) == (0.04, 0.02)
    assert member.record["plan"]["measured_step_seconds"] > 0


def test_following_an_ensemble_shows_all_members_and_its_end(trained: Path) -> None:
    events = Events()
    end = Follower(RunFolder(trained / "two"), events).follow(wait=lambda seconds: None)
    assert end is not None and (end.reason, end.step) == ("finished", 12)
    assert [row["step"] for row in events.rows] == [2, 3, 4, 6, 8, 9, 10, 12, 12]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"ensemble": 1}, r"training\.ensemble = 1: give a number of at least 2"),
        ({"ensemble": 2, "overrides": {"training.devices": 2}}, "--ensemble 2 trains .* leave --devices out"),
        ({"ensemble": 2, "preset": "ngram-char"}, "--ensemble 2: ngram models are counts, the same for every seed"),
        ({"ensemble": 2, "overrides": {"model.type": "ensemble"}}, "the model is an ensemble already"),
    ],
)
def test_options_that_contradict_an_ensemble_are_refused_in_a_sentence(
    text: Path, tmp_path: Path, options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        lm.train(text, runs_dir=tmp_path, **options)
    assert not list(tmp_path.iterdir())


def test_training_does_not_start_from_an_ensemble_or_give_it_a_longer_plan(text: Path, trained: Path) -> None:
    two = lm.load("two", runs_dir=trained)
    with pytest.raises(ConfigError, match=r"--init two is an ensemble, .* --distill two"):
        lm.train(text, init=two, runs_dir=trained)
    with pytest.raises(ConfigError, match="'two' is an ensemble, and its members keep their plan"):
        lm.resume("two", runs_dir=trained, max_steps=50)
