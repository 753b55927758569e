"""Jobs with a teacher: the student is an ordinary run."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

import lm
from lm.errors import ConfigError, RunError, RunNotFoundError
from lm.jobs.ensemble_config import member_config, student_config, teacher_config
from lm.training.callbacks import Callback, Tick
from tests.test_ensembles import Events, assert_same_weights, config, make_text, untimed

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(make_text(5000), "utf-8")
    return path


@pytest.fixture(scope="module")
def trained(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs folder of an ensemble `two`, of its student `student`, and of `alone`, which has no teacher."""
    folder = tmp_path_factory.mktemp("runs")
    two = lm.train(text, config(text), ensemble=2, name="two", runs_dir=folder)
    lm.train(text, config(text), distill=two, name="student", runs_dir=folder)
    lm.train(text, config(text), name="alone", runs_dir=folder)
    return folder


def student_of(text: Path, runs_dir: Path, **job: Any) -> lm.Run:
    return lm.train(text, config(text, training__distill="two"), name="student", runs_dir=runs_dir, **job)


@pytest.fixture
def runs(trained: Path, tmp_path: Path) -> Path:
    """A copy of `trained`, without the student."""
    shutil.copytree(trained, tmp_path / "runs", ignore=shutil.ignore_patterns("student"))
    return tmp_path / "runs"


def test_a_student_is_an_ordinary_run_that_records_its_teacher(trained: Path) -> None:
    run = lm.load("student", runs_dir=trained)
    assert (run.config.model.type, run.record["kind"], run.config.training.distill) == ("gru", None, "two")
    assert run.record["teacher"]["run"] == "two@best"
    assert run.decoder().name.startswith("native")
    assert run.folder.read_weights()[0].keys() == lm.load("alone", runs_dir=trained).folder.read_weights()[0].keys()
    assert "learned from two@best as well" in run.card()


def test_the_teacher_changes_what_a_model_learns_from_the_same_batches(trained: Path) -> None:
    student, alone = (lm.load(name, runs_dir=trained).folder for name in ("student", "alone"))
    assert [row["train_loss"] for row in untimed(student)] != [row["train_loss"] for row in untimed(alone)]


def test_an_interrupted_and_resumed_student_has_the_weights_of_an_uninterrupted_one(
    text: Path, trained: Path, runs: Path
) -> None:
    student_of(text, runs, stop_after=4)
    run, _ = lm.resume("student", runs_dir=runs)
    assert_same_weights(run.folder, lm.load("student", runs_dir=trained).folder)


def test_a_teacher_with_counts_leaves_out_what_it_teaches_also_from_a_file(text: Path, tmp_path: Path) -> None:
    options = config(text, model__type="hybrid", model__order=3, training__max_steps=2)
    teacher = lm.train(text, options, ensemble=2, name="two", runs_dir=tmp_path)
    # Its files have compact counts, from which nothing can be left out.
    assert any(name.endswith("ngram.packed") for name in teacher.folder.read_weights()[0])
    straight = student_of(text, tmp_path)
    lm.train(text, config(text, training__distill="two"), name="halves", runs_dir=tmp_path, stop_after=2)
    halves, _ = lm.resume("halves", runs_dir=tmp_path)
    assert_same_weights(halves.folder, straight.folder)


def test_a_student_does_not_resume_without_its_teacher_or_with_another_one(text: Path, runs: Path) -> None:
    student_of(text, runs, stop_after=3)
    (runs / "two").rename(runs / "elsewhere")
    with pytest.raises(RunError, match="'student' learns from the run two, which is missing: restore it"):
        lm.resume("student", runs_dir=runs)
    (runs / "alone").rename(runs / "two")
    with pytest.raises(RunError, match="'student' learns from the run two, which has other weights now"):
        lm.resume("student", runs_dir=runs)


def test_a_teacher_with_another_tokenizer_or_without_weights_is_refused(text: Path, runs: Path) -> None:
    with pytest.raises(ConfigError, match=r"--distill two: it has another tokenizer \(char, .* \(byte, 256 tokens\)"):
        lm.train(text, config(text, tokenizer__type="byte"), distill="two", runs_dir=runs, name="x")
    with pytest.raises(RunNotFoundError, match="No run 'tow'.*'two'"):
        lm.train(text, config(text), distill="tow", runs_dir=runs, name="x")
    lm.train(text, config(text), ensemble=2, name="half", runs_dir=runs, stop_after=2)
    with pytest.raises(RunNotFoundError, match="'half' has no weights yet"):
        lm.train(text, config(text), distill="half", runs_dir=runs, name="x")


def test_a_run_that_starts_from_a_student_has_no_teacher(text: Path, trained: Path, tmp_path: Path) -> None:
    run = lm.train(text, init=lm.load("student", runs_dir=trained), max_steps=2, runs_dir=tmp_path)
    assert run.config.training.distill is None and "teacher" not in run.record


@pytest.mark.parametrize("size", [None, 2])
def test_a_hybrid_teaches_the_text_that_it_has_counted(text: Path, tmp_path: Path, size: int | None) -> None:
    counting = config(text, model__type="hybrid", model__order=3, training__max_steps=2)
    lm.train(text, counting, ensemble=size, name="two", runs_dir=tmp_path)
    run = student_of(text, tmp_path, max_steps=2)
    assert run.step == 2 and run.record["kind"] is None


def test_members_of_an_ensemble_can_have_a_teacher_too(text: Path, runs: Path) -> None:
    job = {"ensemble": 2, "distill": "two", "runs_dir": runs}
    whole = lm.train(text, config(text), name="whole", **job)
    lm.train(text, config(text), name="parts", stop_after=8, **job)
    parts, _ = lm.resume("parts", runs_dir=runs)
    assert_same_weights(parts.folder, whole.folder)


# -- the teacher and the student in one command ------------------------------------------------------------


def test_one_command_trains_the_ensemble_and_the_student_that_becomes_the_run(
    text: Path, trained: Path, tmp_path: Path
) -> None:
    events = Events()
    run = lm.train(
        text, config(text, training__student=True), ensemble=2, name="one", runs_dir=tmp_path, callbacks=[events]
    )
    assert_same_weights(run.folder, lm.load("student", runs_dir=trained).folder)
    assert "It learned from an ensemble of 2 gru models as well." in run.card()
    assert not (run.folder.path / "teacher").exists()
    assert {start.run for start in events.starts} == {"one"}
    assert [start.member for start in events.starts] == [(1, 2), (2, 2), None]
    assert [(end.reason, end.step) for end in events.ends] == [("finished", 6)]
    with pytest.raises(RunError, match="learned from an ensemble that was removed .* use it as a start with --init"):
        lm.resume("one", runs_dir=tmp_path, max_steps=9)


@pytest.mark.parametrize("killed_at", [8, 15])
def test_a_resume_continues_after_a_kill_during_the_teacher_or_the_student(
    text: Path, trained: Path, tmp_path: Path, killed_at: int
) -> None:
    ticks: list[Tick] = []

    class Killed(Callback):
        def on_step(self, tick: Tick) -> None:
            ticks.append(tick)
            if len(ticks) == killed_at:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lm.train(
            text, config(text, training__student=True), ensemble=2, name="one", runs_dir=tmp_path, callbacks=[Killed()]
        )
    # The two members make six steps each.
    if killed_at <= 12:
        with pytest.raises(RunNotFoundError, match="some members of the ensemble are not trained"):
            lm.load("one", runs_dir=tmp_path).sample()
    run, went_on = lm.resume("one", runs_dir=tmp_path)
    assert went_on
    assert_same_weights(run.folder, lm.load("student", runs_dir=trained).folder)
    assert run.config.training.student and not (run.folder.path / "teacher").exists()


def test_half_of_the_minutes_are_for_the_teacher(text: Path) -> None:
    options = config(text, training__minutes=8, training__max_steps=None, training__ensemble=2, training__student=True)
    teacher = teacher_config(options)
    assert (teacher.model.type, teacher.training.minutes) == ("ensemble", 4)
    assert member_config(teacher, 1).training.minutes == 2
    assert student_config(options).training.minutes == 4


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({}, "--student needs a teacher: add --ensemble K"),
        ({"ensemble": 2, "distill": "two"}, "--student has the ensemble as its teacher: leave --distill out"),
        ({"ensemble": 2, "stop_after": 3}, "--stop-after .* leave --student out"),
    ],
)
def test_options_that_contradict_a_student_are_refused_in_a_sentence(
    text: Path, trained: Path, options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        lm.train(text, config(text, training__student=True), runs_dir=trained, name="x", **options)
