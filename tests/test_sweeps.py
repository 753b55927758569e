"""Sweeps: a queue of ordinary runs, and the choice among them."""

from __future__ import annotations

import errno
import json
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

import lm
from lm.errors import ConfigError, CorpusError, RunError, RunExistsError, RunNotFoundError
from lm.jobs import sweep as sweeps
from lm.jobs.sweep import SweepRequest, SweepResult, notes, prepare_sweep, resume_sweep, run_sweep
from lm.jobs.sweep_choice import ConfigurationResult, Spread, choose, options_toml, read_results
from lm.jobs.sweep_process import is_disk_full
from lm.jobs.sweep_queue import RunProgress, threads_of
from lm.jobs.sweep_record import SweepFolder, open_sweep
from lm.runs.run import Run
from tests import forked
from tests.cli import conftest
from tests.cli.conftest import make_text

SMALL: dict[str, Any] = {
    "model.embedding_size": 8, "model.hidden_size": 16, "model.table_orders": [], "training.batch_size": 4,
    "training.bptt": 16, "training.warmup_steps": 0, "training.sample_tokens": "none",
}  # fmt: skip
run_lm = conftest.lm
"""The program in this process, in a folder of its own."""
OVER = {"training.learning_rate": [0.01, 1e9]}
"""The second one diverges."""


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(make_text(5000), "utf-8")
    return path


def a_sweep(text: Path, runs_dir: Path, over: Any = OVER, **options: Any) -> SweepFolder:
    overrides = {**SMALL, "training.max_steps": 12, **options.pop("overrides", {})}
    request = SweepRequest(
        corpus=str(text), over=over, preset=None if "preset" in over else "gru-char-small", overrides=overrides,
        runs_dir=runs_dir, **{"seeds": 2, **options},
    )  # fmt: skip
    return prepare_sweep(request)


@pytest.fixture(scope="module")
def done(text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[SweepResult, list[list[str]]]:
    """A finished sweep, and the stages of its runs at each update."""
    seen: list[list[str]] = []

    def watch(runs: Any) -> None:
        seen.append([run.stage for run in runs])

    folder = a_sweep(text, tmp_path_factory.mktemp("runs"), name="s")
    return run_sweep(folder, jobs=2, on_update=watch), seen


@pytest.fixture
def copied(done: tuple[SweepResult, Any], tmp_path: Path) -> SweepFolder:
    """A copy of the finished sweep with its runs."""
    shutil.copytree(done[0].folder.runs_dir, tmp_path / "runs")
    return open_sweep("s", tmp_path / "runs")


# -- the queue --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_that_fails_is_recorded_with_its_reason_and_the_sweep_continues(
    done: tuple[SweepResult, list[list[str]]],
) -> None:
    runs = {run.run: run for run in done[0].folder.record.runs}
    # All configurations with the first seed come first.
    assert list(runs) == ["s-01-s1", "s-02-s1", "s-01-s2", "s-02-s2"]
    assert [run.status for run in runs.values()] == ["finished", "failed", "finished", "failed"]
    assert "lower training.learning_rate" in (runs["s-02-s1"].sentence or "") and runs["s-01-s1"].sentence is None


@pytest.mark.slow
def test_two_jobs_train_at_the_same_time_and_never_more(done: tuple[SweepResult, list[list[str]]]) -> None:
    active = [sum(stage in ("preparing", "training", "measuring") for stage in stages) for stages in done[1]]
    assert max(active) == 2
    assert done[1][-1] == ["finished", "failed", "finished", "failed"]


@pytest.mark.slow
def test_the_runs_are_ordinary_runs_that_differ_by_their_seed_alone(done: tuple[SweepResult, Any]) -> None:
    folder = done[0].folder
    one, two = (Run(folder.run_folder(folder.record.runs[place])) for place in (0, 2))
    assert {run.summary()["name"] for run in (one, two)} == {"s-01-s1", "s-01-s2"} and one.sample(max_tokens=5)
    same = two.config.training.model_copy(update={"seed": 1})
    assert one.config == two.config.model_copy(update={"training": same}) and two.config.training.seed == 2


@pytest.mark.slow
def test_the_same_request_finds_the_sweep_and_trains_nothing(copied: SweepFolder, text: Path) -> None:
    again = a_sweep(text, copied.runs_dir)
    assert again.path == copied.path
    before = (copied.runs_dir / "s-01-s1" / "config.json").stat().st_mtime_ns
    assert run_sweep(again).to_json() | {"path": ""} == run_sweep(copied).to_json() | {"path": ""}
    assert (copied.runs_dir / "s-01-s1" / "config.json").stat().st_mtime_ns == before
    other = a_sweep(text, copied.runs_dir, seeds=1)
    assert other.record.name == "words-sweep"
    with pytest.raises(RunExistsError, match="There is a sweep 's' of other options"):
        a_sweep(text, copied.runs_dir, seeds=1, overrides={"training.max_steps": 3}, name="s")


@pytest.mark.slow
def test_failed_runs_are_trained_again_only_on_request(copied: SweepFolder) -> None:
    assert [run.status for run in resume_sweep("s", copied.runs_dir).record.runs].count("failed") == 2
    retried = resume_sweep("s", copied.runs_dir, retry=True).record
    assert [run.status for run in retried.runs] == ["finished", "stopped", "finished", "stopped"]


@pytest.mark.slow
def test_a_sweep_that_is_killed_or_stopped_continues_its_interrupted_run(text: Path, tmp_path: Path) -> None:
    over = {"training.learning_rate": [0.01, 0.02]}
    longer = {"training.max_steps": 200, "training.evaluate_every": 20}
    folder = a_sweep(text, tmp_path, over, seeds=1, overrides=longer)
    name = folder.record.name
    program = "sweep", "--resume", name, "--runs-dir", str(tmp_path)
    process = forked.Popen(program, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    first, second = (folder.run_folder(run) for run in folder.record.runs)
    while not first.has_last() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    created = first.read_record()["created"]
    killed = open_sweep(name, tmp_path)
    assert [run.status for run in killed.record.runs] == ["running", "waiting"]

    def stop(runs: Any) -> None:
        if runs[1].stage == "training":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_sweep(killed, on_update=stop)
    stopped = open_sweep(name, tmp_path)
    assert [run.status for run in stopped.record.runs] == ["finished", "stopped"]
    assert second.has_last() and not second.is_training
    # Resumed, not begun again; and the same as without the kill.
    assert first.read_record()["created"] == created and first.read_metrics()[-1]["step"] == 200
    straight = lm.train(text, stopped.record.config_of(stopped.record.runs[0]), name="straight", runs_dir=tmp_path)
    assert straight.reports()["valid"]["loss"] == Run(first).reports()["valid"]["loss"]
    result = run_sweep(stopped)
    assert [run.status for run in open_sweep(name, tmp_path).record.runs] == ["finished", "finished"]
    assert result.best is not None and result.comparison is not None
    assert [each.runs for each in result.comparison.candidates][0] == result.best.runs


def test_the_threads_are_divided_among_the_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lm.jobs.sweep_queue.usable_threads", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert [threads_of(jobs) for jobs in (1, 3, 8, 20)] == [8, 2, 1, 1]
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert threads_of(4) == 5


def test_a_full_disk_is_known_by_the_error_that_it_comes_from() -> None:
    def failed(number: int) -> RunError:
        try:
            try:
                raise OSError(number, "no")
            except OSError as error:
                raise RunError("Cannot write.") from error
        except RunError as error:
            return error

    assert is_disk_full(failed(errno.ENOSPC)) and is_disk_full(failed(errno.EDQUOT))
    assert not is_disk_full(failed(errno.EACCES)) and not is_disk_full(ConfigError("x"))


def test_the_progress_of_a_run_has_its_lowest_validation() -> None:
    progress = RunProgress(run=None)  # type: ignore[arg-type]
    for bits in (2.0, None, 1.5, 1.7):
        progress.on_log({"step": 1, "seconds": 1.0, "train_loss": 1.0, "valid_bits_per_byte": bits})
    assert progress.bits_per_byte == 1.5 and progress.train_loss == 1.0


# -- before anything starts -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("over", "options", "sentence"),
    [
        ({"preset": "gru-chr"}, {}, r"With gru-chr: Unknown preset 'gru-chr'\. Did you mean 'gru-char'"),
        ({"training.learning_rat": [1]}, {}, "With learning_rat=1: .*Did you mean 'learning_rate'"),
        ({"training.learning_rate": [0.1, 0]}, {}, "With learning_rate=0: .*give a number above 0"),
        ({"model.dropout": "0..1.5"}, {"random": 2}, "With dropout=1.5: .*below 1"),
        ({"training.batch_size": [4, 8]}, {}, "varies what another option sets"),
        ({}, {}, "What varies"),
        (OVER, {"seeds": 0}, "--seeds 0: give 1 to 100"),
        (OVER, {"random": 0}, "--random 0"),
        (OVER, {"overrides": {"training.ensemble": 2}}, "the seeds of ensembles would overlap"),
    ],
)
def test_wrong_options_are_a_sentence_and_nothing_is_written(
    text: Path, tmp_path: Path, over: Any, options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        a_sweep(text, tmp_path, over, **options)
    assert not list(tmp_path.iterdir())


def test_a_text_that_is_missing_is_found_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="There is no file"):
        a_sweep(tmp_path / "words.txt", tmp_path)
    with pytest.raises(RunNotFoundError, match=r"No sweep 'x'.*There are none yet"):
        resume_sweep("x", tmp_path)


def test_a_default_model_is_chosen_once_for_all_seeds(text: Path, tmp_path: Path) -> None:
    request = SweepRequest(
        corpus=str(text), over={"family": ["gru", "lstm"]}, overrides={"training.minutes": 0.1}, runs_dir=tmp_path
    )
    record = prepare_sweep(request).record
    widths = {run.configuration: record.config_of(run).model.model_dump()["hidden_size"] for run in record.runs}
    assert len(record.runs) == 6 and sorted(widths) == [1, 2]
    assert [record.configuration(number).config.model.model_dump()["cell"] for number in (1, 2)] == ["gru", "lstm"]


def test_what_makes_runs_less_comparable_is_said(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeps, "usable_threads", lambda: 2)
    timed = {"training.minutes": 1, "training.max_steps": "none"}
    folder = a_sweep(text, tmp_path, overrides=timed, name="timed")
    assert notes(folder, 1) == [] and "equal minutes are not equal work" in notes(folder, 3)[0]
    assert "compare their minutes with each other only" in notes(folder, 2)[0]
    sizes = {name: value for name, value in SMALL.items() if name != "training.batch_size"}
    request = SweepRequest(
        corpus=str(text), over={"training.batch_size": [4, 8]}, preset="gru-char", runs_dir=tmp_path,
        overrides={**sizes, "training.max_steps": 5},
    )  # fmt: skip
    assert "A step has 64 to 128 tokens" in notes(prepare_sweep(request), 1)[0]


# -- the choice -------------------------------------------------------------------------------------------


def result(number: int, *figures: float, seeds: int = 2) -> ConfigurationResult:
    runs = tuple(f"r{number}-s{seed}" for seed in range(len(figures)))
    return ConfigurationResult(number, {}, runs, seeds, Spread(figures) if figures else None)


def test_the_lowest_mean_of_a_configuration_with_every_seed_is_chosen() -> None:
    results = [result(1, 2.0, 2.4), result(2, 2.3, 1.9), result(3, 1.0), result(4)]
    best = choose(results)
    assert best is not None and best.number == 2 and best.valid is not None and best.valid.mean == pytest.approx(2.1)
    assert best.valid.deviation == pytest.approx(0.2828427, abs=1e-6)
    assert choose(results[2:]) is None


@pytest.mark.slow
def test_the_choice_never_reads_the_test_split(copied: SweepFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    class OnlyValid(dict[str, Any]):
        def get(self, name: str, default: Any = None) -> Any:
            assert name == "valid"
            return super().get(name, default)

        __getitem__ = __iter__ = items = values = keys = None  # type: ignore[assignment]

    honest = Run.reports
    monkeypatch.setattr(Run, "reports", lambda run: OnlyValid(honest(run)))
    monkeypatch.setattr(Run, "evaluate", None)
    best = choose(read_results(copied))
    assert best is not None and best.number == 1
    names = {each for fields in (ConfigurationResult, Spread) for each in fields.__dataclass_fields__}
    assert not [name for name in names if "test" in name]


@pytest.mark.slow
def test_the_test_split_is_scored_once_and_for_the_best_alone(
    done: tuple[SweepResult, Any], copied: SweepFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = done[0]
    assert result.best is not None and result.best.number == 1 and result.test is not None
    assert list(result.test.bits_per_byte) == ["s-01-s1", "s-01-s2"]
    reports = {run.run: Run(result.folder.run_folder(run)).reports() for run in result.folder.record.runs}
    assert [name for name, each in reports.items() if "test" in each] == ["s-01-s1", "s-01-s2"]
    assert result.test.bits_per_byte["s-01-s1"] == reports["s-01-s1"]["test"]["bits_per_byte"]
    monkeypatch.setattr(Run, "evaluate", None)
    assert run_sweep(copied).test == result.test


@pytest.mark.slow
def test_runs_of_two_texts_are_not_compared(copied: SweepFolder) -> None:
    path = copied.runs_dir / "s-01-s1" / "report.json"
    content = json.loads(path.read_text())
    content["valid"]["text_sha256"] = "other"
    path.write_text(json.dumps(content))
    with pytest.raises(CorpusError, match="validated on different texts"):
        read_results(copied)


def test_every_kind_of_value_comes_back_from_toml(text: Path, tmp_path: Path) -> None:
    options = {
        "training.grad_clip": "none", "training.fp32_modules": ["héad", 'a"b'], "training.learning_rate": 1e-7,
        "training.student": False, "model.table_orders": [2, 3], "corpus.split_fractions": "0.8,0.2",
    }  # fmt: skip
    config = lm.compose("words.txt", preset="gru-char", overrides=options)
    (tmp_path / "x.toml").write_text(options_toml(config, "A comment."), "utf-8")
    again = lm.compose("words.txt", preset="gru-char", file=tmp_path / "x.toml")
    assert again == config and again.training.grad_clip is None


# -- the program ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_table_says_what_was_chosen_and_how(run_lm: Any, copied: SweepFolder) -> None:
    said = run_lm("sweep", "--resume", "s", "--runs-dir", "runs")
    assert said.code == 0 and "4 runs; 2 are finished" in said.err
    lines = said.out.splitlines()
    assert re.match(r"1: learning_rate=0.01 +2 +\d\.\d{4} +\d\.\d{4}–\d\.\d{4}", lines[1])
    assert re.match(r"2: learning_rate=1e\+09 +0 of 2 +– +–", lines[2])
    assert "s-02-s1 failed: " in said.out and "Best by validation: learning_rate=0.01: " in said.out
    assert re.search(r"Test split, scored once, for the best alone: \d\.\d{4} bits per byte \(", said.out)
    assert Path("runs/sweeps/s/curves.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads(run_lm("sweep", "--resume", "s", "--runs-dir", "runs", "--json").out)
    assert (
        found["best"] == 1 and found["configurations"][0]["valid"]["min"] < found["configurations"][0]["valid"]["max"]
    )


@pytest.mark.slow
def test_the_best_options_train_the_same_model_again(run_lm: Any, copied: SweepFolder, text: Path) -> None:
    best = copied.path / "best.toml"
    assert best.read_text().startswith("# The best of 2 configurations of the sweep s: learning_rate=0.01.")
    done = run_lm("train", str(text), "--config", str(best), "--name", "again", "--runs-dir", "runs", "--json")
    assert done.code == 0, done.err
    again, chosen = lm.load("again", runs_dir="runs"), lm.load("s-01-s1", runs_dir="runs")
    assert again.config == chosen.config.model_copy(update={"preset": None})
    assert again.reports()["valid"]["loss"] == chosen.reports()["valid"]["loss"]


@pytest.mark.slow
def test_plot_draws_seeds_as_a_band(run_lm: Any, copied: SweepFolder) -> None:
    (curve,) = json.loads(run_lm("plot", "--sweep", "s", "--runs-dir", "runs", "--json").out)
    assert curve["run"] == "1: learning_rate=0.01 (2 seeds)" and curve["band"]["kind"] == "min-max"
    names = "s-01-s1", "s-01-s2"
    found = json.loads(run_lm("plot", *names, "--bands", "std", "--runs-dir", "runs", "--json").out)
    assert [(each["run"], each["split"], each["band"]["runs"]) for each in found] == [
        ("s-01 (2 seeds)", "train", list(names)), ("s-01 (2 seeds)", "valid", list(names)),
    ]  # fmt: skip
    plain = json.loads(run_lm("plot", *names, "--runs-dir", "runs", "--json").out)
    assert {each["run"] for each in plain} == set(names)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((), "Which text? Write: lm sweep FILE --over"),
        (("x.txt",), "What varies? Write: lm sweep CORPUS --over"),
        (("x.txt", "--over", "preset=gru-char", "--retry"), "--retry is for --resume"),
        (("--resume", "s", "--over", "preset=gru-char", "--minutes", "1"), "so --over, --minutes cannot change it"),
        (("--resume", "s"), "No sweep 's' in checkpoints. There are none yet."),
        (("x.txt", "--over", "preset=gru-char", "--jobs", "0"), "--jobs 0: give the number of runs at the same time"),
        (("x.txt", "--over", "preset=gru-char", "--bands", "all"), "--bands 'all': use min-max or std"),
    ],
)
def test_what_cannot_be_swept_is_a_sentence(run_lm: Any, arguments: tuple[str, ...], sentence: str) -> None:
    done = run_lm("sweep", *arguments)
    assert done.code == 1 and sentence in done.err and done.out == ""
