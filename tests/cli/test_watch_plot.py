"""lm watch and lm plot, and lm train --verify-resume: what a user sees of a run, and may believe of it."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lm.jobs.verify_resume import compare
from tests import forked
from tests.cli.conftest import SMALL, spawn

Lm = Callable[..., Any]
ROOT = Path(__file__).parents[2]


def test_a_finished_run_is_shown_as_training_showed_it(lm: Lm, runs: Path, first: tuple[Path, Any]) -> None:
    done = lm("watch", "a")
    assert done.code == 0 and done.out == ""
    # Line by line, but for what training says before and after.
    lines = [line for line in first[1].stderr.splitlines() if "epoch" in line or "Finished" in line]
    assert [line for line in done.err.splitlines() if "epoch" in line or "Finished" in line] == lines
    assert "a starts: gru, " in done.err and "12 steps of 64 tokens" in done.err


def test_watch_gives_a_script_one_event_a_line(lm: Lm, runs: Path) -> None:
    events = [json.loads(line) for line in lm("watch", "a", "--json").out.splitlines()]
    assert [event["event"] for event in events][:2] == ["start", "row"]
    assert events[0]["plan_steps"] == 12 and events[-1]["event"] == "end" and events[-1]["reason"] == "finished"
    assert [event["step"] for event in events[1:-1]][-1] == 12


def test_watch_of_what_is_no_run_is_a_sentence(lm: Lm, runs: Path) -> None:
    assert re.search(r"^error: No run 'ghost'", lm("watch", "ghost").err, re.MULTILINE)


def test_watch_says_how_to_continue_a_run_that_no_process_trains(
    lm: Lm, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lm.jobs.follow.GRACE_SECONDS", 0.0)
    assert lm("train", "--resume", "a", "--max-steps", "20", "--stop-after", "14").code == 0
    state = runs / "a" / "last" / "state.json"
    content = json.loads(state.read_text())
    from lm.runs.run_folder import RunFolder

    content["train_state"]["stop_reason"] = None
    content.pop("sha256")
    state.write_bytes(RunFolder(runs / "a").pack_state(content))
    done = lm("watch", "a")
    assert done.code == 0
    assert "a is not finished, and no process trains it.\nContinue with: lm train --resume a\n" in done.err


@pytest.mark.slow
def test_a_job_is_watched_from_another_terminal_until_it_ends(tmp_path: Path, text: Path) -> None:
    training = forked.Popen(
        ["train", str(text), "--name", "b", "--max-steps", "600", *SMALL], cwd=tmp_path, text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert training.stderr is not None
    said = next(line for line in training.stderr if " starts: " in line)
    watched = spawn("watch", "b", "--json", cwd=tmp_path)
    assert watched.returncode == 0, watched.stderr
    training.communicate()
    events = [json.loads(line) for line in watched.stdout.splitlines()]
    assert said.startswith("b starts") and events[0]["run"] == "b"
    steps = [event["step"] for event in events if event["event"] == "row"]
    assert steps == [*range(10, 601, 10)]
    assert events[-1]["event"] == "end" and events[-1]["reason"] == "finished"


# -- plot -----------------------------------------------------------------------------------------------


def test_curves_of_runs_become_the_requested_picture_or_curves_png(lm: Lm, runs: Path) -> None:
    done = lm("plot", "a", "--by", "tokens", "-o", "x.svg")
    assert done.code == 0 and done.out == "" and "Wrote x.svg." in done.err
    assert "tokens of training" in Path("x.svg").read_text()
    assert lm("plot").code == 0 and Path("curves.png").read_bytes().startswith(b"\x89PNG")


def test_plot_in_the_terminal_writes_no_file(lm: Lm, runs: Path) -> None:
    done = lm("plot", "a", "--terminal", "--metric", "bits_per_byte")
    assert done.code == 0 and "bits per byte, by step" in done.out and "a valid" in done.out
    assert "\x1b" not in done.out and not list(Path().glob("*.png"))


def test_plot_gives_a_script_the_points(lm: Lm, runs: Path) -> None:
    train, valid = json.loads(lm("plot", "a", "--json").out)
    assert (train["run"], train["split"], valid["split"]) == ("a", "train", "valid")
    assert valid["x"][-1] == 12 and len(valid["x"]) == len(valid["y"])


def test_a_plot_that_cannot_be_is_a_sentence(lm: Lm, runs: Path) -> None:
    for arguments, sentence in (
        (("ghost",), "No run 'ghost'"), (("a", "-o", "x.gif"), "a picture's name ends with .png, .svg or .pdf"),
        (("a", "--by", "hours"), "use step, tokens, time"), (("a", "--metric", "looss"), "Did you mean 'loss'?"),
    ):  # fmt: skip
        done = lm("plot", *arguments)
        assert done.code == 1 and sentence in done.err and done.out == ""


# -- train --verify-resume --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "length",
    [pytest.param((), id="by time"), pytest.param(("--max-steps", "1000"), id="in steps", marks=pytest.mark.soak)],
)
def test_a_kill_and_a_resume_are_proved_to_cost_nothing_and_nothing_is_left(
    lm: Lm, text: Path, length: tuple[str, ...]
) -> None:
    done = lm("train", str(text), "--verify-resume", "--json", "--set", "model.dropout=0.2", *SMALL, *length)
    assert done.code == 0, done.err
    verdict = json.loads(done.out)
    assert verdict["same"] and verdict["different"] == [] and verdict["numbers"] > 1000
    # The validation that is nearest to the middle, in a plan by time.
    assert verdict["resumed_from"] / verdict["steps"] == pytest.approx(0.5, abs=0 if length else 0.3)
    assert verdict["killed_at"] == verdict["resumed_from"] + 1
    assert verdict["sentence"].startswith("The same: ") and "bit for bit" in verdict["sentence"]
    assert list(Path("checkpoints").iterdir()) == []


BROKEN = """
# A resume that forgets the random generator.
import sys
if sys.argv[0] == "-m":
    import importlib.abc
    class Forget(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path, target=None):
            if name == "lm.training.trainer":
                sys.meta_path.remove(self)
                import torch
                torch.set_rng_state = lambda state: None
    sys.meta_path.insert(0, Forget())
"""


@pytest.mark.soak
def test_a_resume_that_loses_something_is_reported_with_exit_code_1(
    lm: Lm, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "sitecustomize.py").write_text(BROKEN)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'broken'}{os.pathsep}{ROOT}")
    done = lm("train", str(text), "--verify-resume", "--set", "model.dropout=0.2", *SMALL)
    assert done.code == 1, done.out + done.err
    assert re.match(
        r"Different: \d+ steps without interruption, and .* do not give the same bit for bit: .*: .*", done.out
    )


def test_tensors_are_compared_by_every_bit_or_to_a_tolerance() -> None:
    one = {"model": {"w": np.array([1.0, 100.0], np.float32)}, "random": {"cpu": np.array([1, 2], np.uint8)}}
    near = {**one, "model": {"w": np.array([1.5, 100.0], np.float32)}}
    assert compare(one, one) == (4, [])
    assert compare(one, near) == (4, ["model: w"])
    assert compare(one, near, tolerance=1e-2) == (4, [])
    assert compare(one, near, tolerance=1e-3) == (4, ["model: w"])
    assert compare(one, {**one, "random": {"cpu": np.array([1, 3], np.uint8)}}, tolerance=1.0)[1] == ["random: cpu"]
    assert compare(one, {"model": {}, "random": one["random"]})[1] == ["model: w"]
    signed = ({"m": {"w": np.array([0.0])}}, {"m": {"w": np.array([-0.0])}})
    assert compare(*signed)[1] == ["m: w"], "a bit is a bit"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--resume", "a", "--verify-resume"), "so --verify-resume cannot change it"),
        (("words.txt", "--verify-resume", "--preset", "ngram-char"), "models count in one pass"),
        (("missing.txt", "--verify-resume"), "There is no file or folder 'missing.txt'"),
    ],
)
def test_what_cannot_be_verified_is_a_sentence(
    lm: Lm, runs: Path, text: Path, arguments: tuple[str, ...], sentence: str
) -> None:
    Path("words.txt").write_bytes(text.read_bytes())
    done = lm("train", *arguments)
    assert done.code == 1 and sentence in done.err and done.out == ""
