"""The learning film: which moments it has, what it costs, and that it changes nothing."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lm
from lm.config import compose
from lm.training import film as film_module
from lm.training import preview
from lm.training.callbacks import Tick
from lm.training.film import FRAMES, SHARE, Film
from lm.training.plan import Plan
from lm.training.trainer import Trainer
from tests.training.conftest import MODELS, SMALL

Make = Callable[..., Trainer]


@pytest.fixture
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples that cost nothing by the film's clock, and are short."""
    monkeypatch.setattr(film_module, "TOKENS", 8)
    monkeypatch.setattr(film_module, "SAMPLE_SECONDS", 1e-6)


def filmed(trainer: Trainer, **settings: Any) -> Trainer:
    settings = {"clock": lambda: 0.0, **settings}
    trainer.callbacks.append(Film(trainer.folder, trainer.step, trainer.corpus.tokenizer, **settings))
    return trainer


def rows_without_times(trainer: Trainer) -> list[dict[str, Any]]:
    timed = ("seconds", "validation_seconds", "tokens_per_second", "memory_bytes")
    return [{key: value for key, value in row.items() if key not in timed} for row in trainer.folder.read_metrics()]


@pytest.mark.parametrize("model", ["gru", "transformer"])
@pytest.mark.usefixtures("cheap")
def test_a_film_begins_with_noise_grows_in_distance_and_changes_no_bit(make_trainer: Make, model: str) -> None:
    plan = Plan(60, 20)
    # Each is made just before it trains: a trainer seeds the random generators.
    plain = make_trainer(model, **{"model.dropout": 0.1})
    plain.train(plan)
    with_film = filmed(make_trainer(model, **{"model.dropout": 0.1}))
    with_film.train(plan)
    assert rows_without_times(plain) == rows_without_times(with_film)
    frames = with_film.folder.read_film()
    steps = [row["step"] for row in frames]
    assert steps[0] == 0 and steps[-1] == 60 and 10 < len(steps) <= FRAMES
    # Early steps follow each other; late ones are several steps apart.
    assert steps[1] == 1 and steps[-1] - steps[-2] > 3
    assert frames[0]["valid_loss"] is None
    assert frames[-1]["valid_loss"] == plain.folder.read_metrics()[-1]["valid_loss"]
    assert frames[0]["text"] != frames[-1]["text"] and {len(row["text"]) for row in frames} == {8}


@pytest.mark.usefixtures("cheap")
def test_a_resumed_film_has_each_moment_once(make_trainer: Make) -> None:
    plan = Plan(60, 20)
    whole, cut = filmed(make_trainer("gru")), filmed(make_trainer("gru"))
    whole.train(plan)
    cut.train(plan, stop_after=30)
    # A kill later than the last save: its frames are written again.
    cut.folder.append_film({**cut.folder.read_film()[-1], "step": 31})
    rest = filmed(make_trainer("gru", run=cut.folder))
    rest.load()
    rest.train(plan)
    steps = [row["step"] for row in cut.folder.read_film()]
    assert steps == sorted(set(steps)) and 31 not in steps[: steps.index(30) + 1]
    texts = {row["step"]: row["text"] for row in cut.folder.read_film()}
    both = [row for row in whole.folder.read_film() if row["step"] in texts]
    assert len(both) > 10 and all(texts[row["step"]] == row["text"] for row in both)


def test_frames_fit_the_time_that_they_may_take(make_trainer: Make) -> None:
    trainer = filmed(make_trainer("gru"))
    (film,) = trainer.callbacks
    assert isinstance(film, Film)

    def frames_of(sample_seconds: float, plan_seconds: float) -> int:
        film._sample_seconds, film._plan_seconds, film._last_step = sample_seconds, plan_seconds, 0
        count = 1
        for step in range(1, 1000):
            if film._is_due(Tick(step, 1.0, step * plan_seconds / 1000, step / 1000, 1000)):
                film._last_step = step
                count += 1
        return count + 1

    assert frames_of(0.01, 300) in range(FRAMES - 3, FRAMES + 1)
    # 1 % of 60 seconds has room for 6 samples of 0.1 seconds.
    assert frames_of(0.1, 60) == round(60 * SHARE / 0.1)
    # No room for two frames: only those that are always there.
    assert frames_of(0.5, 60) == 2


def test_a_short_training_has_no_film_and_a_prompt_begins_every_frame(
    make_trainer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = filmed(make_trainer("gru"), clock=time.perf_counter)
    short.train(Plan(3, 3))
    assert short.folder.read_film() == []
    monkeypatch.setattr(film_module, "SAMPLE_SECONDS", 1e-6)
    trainer = filmed(make_trainer("gru"), prompt="the ☃ cat")
    trainer.train(Plan(3, 3))
    assert [row["step"] for row in trainer.folder.read_film()] == [0, 1, 2, 3]
    assert all(row["text"].startswith("the ☃ cat") for row in trainer.folder.read_film())


@pytest.mark.usefixtures("cheap")
def test_a_large_model_writes_short_samples_and_a_film_only_in_a_long_training(
    make_trainer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preview, "USUAL_PARAMETERS", 1e-6)
    monkeypatch.setattr(preview, "MAX_WORK", 1)
    trainer = filmed(make_trainer("gru", sample_tokens=20))
    trainer.train(Plan(3, 3))
    assert trainer.folder.read_film() == []
    (sample,) = [row["sample"] for row in trainer.folder.read_metrics() if row["valid_loss"] is not None]
    assert len(sample) == 1


def test_a_film_that_cannot_be_written_ends_and_training_continues(
    make_trainer: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(film_module, "SAMPLE_SECONDS", 1e-6)
    trainer = filmed(make_trainer("gru"))
    (trainer.folder.path / "film.jsonl").mkdir()
    monkeypatch.setattr(type(trainer.folder), "read_film", lambda self: [])
    assert trainer.train(Plan(5, 5)).reason == "finished"
    assert caplog.text.count("The film of the run ends at step -1") == 1


@pytest.mark.usefixtures("cheap")
def test_a_run_gives_its_film_unless_the_option_is_off(prepared: Any, tmp_path: Path) -> None:
    for name, is_on in (("on", True), ("off", False)):
        overrides = {**SMALL, **MODELS["gru"], "training.max_steps": 5, "training.film": is_on}
        run = lm.train(
            prepared.source, compose(prepared.source, preset="gru-char", overrides=overrides), name=name,
            runs_dir=tmp_path,
        )  # fmt: skip
        frames = run.film()
        assert bool(frames) is is_on
    frames = lm.load("on", runs_dir=tmp_path).film()
    assert frames[-1].step == 5 and frames[-1].progress == 1 and frames[-1].text
    assert json.loads(json.dumps(dataclasses.asdict(frames[0])))["step"] == 0
