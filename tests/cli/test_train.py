"""lm train: from a text to a run, its end, and all the ways it can be refused."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cli.report_tables import ways_to_beat_floor
from lm.files import digest
from lm.runs.run import load
from lm.runs.run_folder import RunFolder
from tests import forked
from tests.cli.conftest import spawn

pytestmark = pytest.mark.slow

SMALL = (
    "--set", "model.hidden_size=16", "--set", "model.embedding_size=8", "--set", "training.batch_size=4",
    "--set", "training.bptt=16", "--set", "training.warmup_steps=0", "--set", "model.table_orders=[]",
)  # fmt: skip
TWO_THREADS = {"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"}
Lm = Callable[..., Any]


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_training_ends_with_the_score_a_sample_and_the_next_command(first: tuple[Path, Any]) -> None:
    folder, done = first
    assert re.search(r"^bits per byte +\d\.\d{4} ", done.stdout, re.MULTILINE)
    assert " sample " in done.stdout
    sample = (folder / "checkpoints" / "a" / "samples").glob("*.txt")
    text = next(sample).read_text("utf-8").partition("# sample 1 of 1\n\n")[2]
    assert text.strip() in done.stdout
    *_, longer, hybrid, sample_it, eval_it = done.stdout.strip().splitlines()
    # Twelve steps know less than counts do.
    assert re.match(r"- train longer \(1\d\.\d% of an epoch, and the validation loss was still falling\)", longer)
    assert hybrid == "- use the default model (without --preset and --neural), which starts from such counts"
    assert [sample_it, eval_it] == ['Next: lm sample a --prompt "…"', "or:   lm eval a --split test"]


@pytest.mark.parametrize(
    ("losses", "epochs", "advice"),
    [
        ([2.0, 1.9], 0.1, "train longer (10.0% of an epoch, and the validation loss was still falling)"),
        ([2.0, 1.9], 40.0, "train longer (40.0 epochs, and the validation loss was still falling)"),
        ([1.9, 1.91], 1.2, "train longer (1.2 epochs)"),
        ([1.9, 2.5], 1.2, "lower training.learning_rate (1.2 epochs, and the validation loss rose)"),
        (
            [1.8, 1.9],
            20.0,
            "use more text (20.0 epochs; the validation loss was lowest after 10",
        ),
    ],
)
def test_what_would_beat_the_floor_follows_from_how_the_training_went(
    runs: Path, losses: list[float], epochs: float, advice: str
) -> None:
    rows = [
        {"step": 1, "epoch": epochs / 2, "valid_loss": losses[0]},
        {"step": 2, "epoch": epochs, "valid_loss": losses[1]},
    ]
    (runs / "a" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert ways_to_beat_floor(load("a", runs_dir=runs))[0].startswith(advice)


def test_progress_goes_to_stderr_in_plain_lines_where_there_is_no_terminal(first: tuple[Path, Any]) -> None:
    _, done = first
    assert "a starts: gru, " in done.stderr and "12 steps of 64 tokens" in done.stderr
    assert re.search(r"step +12  epoch +0\.17  train \d\.\d{4}  valid \d\.\d{4} +\S+ tokens/s  0:0\d", done.stderr)
    assert "Finished the plan after 0:0" in done.stderr
    assert "\x1b" not in done.stderr + done.stdout and "\r" not in done.stderr
    assert "valid" not in done.stdout.partition(" sample ")[0].replace("split valid", "")


def test_progress_and_report_fit_80_columns(first: tuple[Path, Any]) -> None:
    _, done = first
    report = done.stdout.partition("─")[0]
    lines = [line.rstrip() for line in (done.stderr + report).splitlines() if not line.startswith("note: ")]
    assert [line for line in lines if len(line) > 80] == []
    assert any(line.startswith("step ") for line in lines) and any(line.startswith("bits per byte") for line in lines)


def test_a_folder_with_splits_is_trained_on(lm: Lm, tmp_path: Path, text: Path) -> None:
    (tmp_path / "mine").mkdir()
    for split, part in (("train", text.read_text()[:3000]), ("valid", text.read_text()[3000:4000])):
        (tmp_path / "mine" / f"{split}.txt").write_text(part)
    done = lm("train", "mine", "--max-steps", "2", *SMALL)
    assert done.code == 0, done.err
    assert "lm eval mine-hybrid\n" in done.out  # no test split, so none is named
    assert RunFolder(tmp_path / "checkpoints" / "mine-hybrid").read_record()["corpus"]["name"] == "mine"


def test_a_text_from_stdin_is_trained_on_and_can_be_evaluated_later(lm: Lm, tmp_path: Path, text: Path) -> None:
    done = lm("train", "-", "--name", "piped", "--max-steps", "2", *SMALL, text=text.read_bytes())
    assert done.code == 0, done.err
    assert lm("eval", "piped").code == 0
    assert lm("train", "--resume", "piped", "--max-steps", "3").code == 0


def test_json_is_one_object_with_run_and_report(lm: Lm, text: Path) -> None:
    done = lm("train", str(text), "--name", "b", "--max-steps", "2", *SMALL, "--json")
    result = json.loads(done.out)
    assert (done.code, result["run"]) == (0, "b")
    assert result["report"]["split"] == "valid" and result["report"]["bits_per_byte"] > 0
    again = lm("train", "--resume", "b", "--json")
    assert json.loads(again.out) == result


def test_every_flag_reaches_the_configuration(lm: Lm, tmp_path: Path, text: Path) -> None:
    (tmp_path / "run.toml").write_text("[training]\nlearning_rate = 0.01\nseed = 3\n[model]\ndropout = 0.3\n")
    done = lm(
        "train", str(text), "--preset", "lstm-char", "--name", "b", "--max-steps", "3", "--epochs", "9", "--seed", "4",
        "--precision", "bf16", "--device", "cpu", "--split-fractions", "0.8,0.2", "--config", "run.toml", *SMALL,
        "--runs-dir", "elsewhere",
    )  # fmt: skip
    assert done.code == 0, done.err
    config = RunFolder(tmp_path / "elsewhere" / "b").read_record()["config"]
    training = config["training"]
    assert (config["preset"], config["model"]["type"], config["model"]["dropout"]) == ("lstm-char", "lstm", 0.3)
    assert (training["max_steps"], training["epochs"], training["seed"]) == (3, 9, 4)
    assert (training["precision"], training["device"], training["learning_rate"]) == ("bf16", "cpu", 0.01)
    assert config["corpus"]["split_fractions"] == [0.8, 0.2]
    assert not (tmp_path / "checkpoints").exists()


# -- stopping and resuming --------------------------------------------------------------------------------


def test_a_run_stopped_early_says_how_to_continue_and_does(lm: Lm, tmp_path: Path, runs: Path, text: Path) -> None:
    kept = ("--set", "training.checkpoint_every=4")
    preset = "--preset", "gru-char-small"
    done = lm("train", str(text), "--name", "b", "--max-steps", "12", "--stop-after", "5", *preset, *kept, *SMALL)
    assert done.code == 0
    assert "Stopped early at step 5 of 12" in done.err
    assert "Finish the plan with: lm train --resume b\n" in done.err
    done = lm("train", "--resume", "b")
    assert done.code == 0 and "b resumes at step 5" in done.err
    one, two = RunFolder(runs / "a"), RunFolder(runs / "b")
    for state in ("best", "last", "step-8"):
        for name, array in one.read_weights(state)[0].items():
            np.testing.assert_array_equal(array, two.read_weights(state)[0][name], err_msg=f"{state} {name}")


@pytest.mark.slow
def test_a_resume_in_a_new_process_is_exact_too(lm: Lm, runs: Path, text: Path, tmp_path: Path) -> None:
    kept = ("--set", "training.checkpoint_every=4")
    length = "--preset", "gru-char-small", "--max-steps", "12", "--stop-after", "7"
    assert lm("train", str(text), "--name", "b", *length, *kept, *SMALL).code == 0
    done = spawn("train", "--resume", "b", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "last bits may differ" not in done.stderr
    one, two = RunFolder(runs / "a").read_last()[1], RunFolder(runs / "b").read_last()[1]
    assert one.keys() == two.keys() == {"model", "optimizer", "hidden", "random"}
    for file, arrays in one.items():
        for name, array in arrays.items():
            np.testing.assert_array_equal(array, two[file][name], err_msg=f"{file} {name}")


@pytest.mark.soak
def test_a_resume_on_two_threads_is_exact_too(text: Path, tmp_path: Path) -> None:
    flags = ("--max-steps", "8", *SMALL, "--set", "model.hidden_size=96", "--set", "training.batch_size=16")
    for name, stop in (("whole", ()), ("halves", ("--stop-after", "4"))):
        done = spawn("train", str(text), "--name", name, *stop, *flags, cwd=tmp_path, **TWO_THREADS)
        assert done.returncode == 0, done.stderr
    done = spawn("train", "--resume", "halves", cwd=tmp_path, **TWO_THREADS)
    assert done.returncode == 0, done.stderr
    one, two = (RunFolder(tmp_path / "checkpoints" / name).read_last() for name in ("whole", "halves"))
    assert one[0]["environment"]["threads"] == "2"
    for file, arrays in one[1].items():
        for name, array in arrays.items():
            np.testing.assert_array_equal(array, two[1][file][name], err_msg=f"{file} {name}")


def test_resuming_a_finished_run_says_so_and_is_no_failure(lm: Lm, runs: Path) -> None:
    before = content(runs)
    done = lm("train", "--resume", "a")
    assert (done.code, done.out) == (0, "")
    assert "a is finished already. A longer plan: lm train --resume a --max-steps N" in done.err
    assert content(runs) == before
    assert lm("train", "--resume", "a", "--max-steps", "14").code == 0
    assert RunFolder(runs / "a").read_last()[0]["train_state"]["step"] == 14


@pytest.mark.parametrize(
    "flags",
    [
        ["--preset", "gru-char"], ["--name", "b"], ["--init", "a"], ["--seed", "0"],
        ["--minutes", "1"], ["--epochs", "2"],
        ["--precision", "fp32"], ["--amp", "O0"], ["--loss-scale", "none"], ["--set", "training.learning_rate=1"],
        ["--overwrite"], ["--split-fractions", "0.9,0.1"],
        ["--text-column", "x"],
    ],
)  # fmt: skip
def test_a_resume_refuses_what_it_could_not_keep(lm: Lm, runs: Path, flags: list[str]) -> None:
    before = content(runs)
    done = lm("train", "--resume", "a", *flags)
    assert done.code == 1
    assert done.err.startswith(f"error: --resume a continues the run as planned, so {flags[0]} cannot change it")
    assert content(runs) == before


def test_the_level_is_reported_and_stays_after_a_resume_and_the_view_shows_the_diary(
    lm: Lm, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cli.progress.PLAIN_SECONDS", 0.0)
    options = ["--precision", "fp16", "--amp", "O2", "--max-steps", "24", *SMALL]
    for option in ("loss_scale_init=2e9", "log_every=1", "evaluate_every=24", "log_activations=true"):
        options += ["--set", f"training.{option}"]
    done = lm("train", str(text), "--name", "h", "--stop-after", "3", *options)
    assert done.code == 0 and "cpu, fp16 O2" in done.err
    last = done.err.partition("step      3")[2]
    assert re.search(r"scale 250,000,000 · 3 skipped\n +not finite: the gradient of ", last)
    assert re.search(r"\n +largest [\d.]+ in \w+", last)
    done = lm("train", "--resume", "h")
    assert done.code == 0 and "resumes at step 3" in done.err and "cpu, fp16 O2" in done.err
    assert "may differ" not in done.err
    rows = RunFolder(tmp_path / "checkpoints" / "h").read_metrics()
    assert [row["loss_scale"] for row in rows[2:5]] == [2.5e8, 1.25e8, 6.25e7]
    assert rows[-1]["loss_scale"] == rows[-2]["loss_scale"] and 3 < rows[-1]["skipped_steps"] < 24


def test_training_continues_from_a_run_on_other_text(lm: Lm, runs: Path, tmp_path: Path) -> None:
    (tmp_path / "new.txt").write_text("The hen sat in the fog and saw the cat by its den.\n" * 60)
    done = lm("train", "new.txt", "--init", "a@last", "--max-steps", "2", "--set", "model.dropout=0.1")
    assert done.code == 0, done.err
    record = RunFolder(runs / "new-gru-char-small").read_record()
    assert record["init"] == "a@last"
    assert record["tokenizer_sha256"] == RunFolder(runs / "a").read_record()["tokenizer_sha256"]
    # "T" is in the new text alone.
    assert "note: new: symbols outside the vocabulary were found" in done.err


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--preset", "lstm-char"], "leave --preset out"),
        (["--config", "run.toml"], "leave --config out"),
        (["--set", "tokenizer.unknown=skip"], "keeps that run's tokenizer"),
        (["--set", "model.hidden_size=17"], "leave options that change the model's shape out"),
        (["--set", "model.type=lstm"], "leave options that change the model's shape out"),
    ],
)
def test_a_start_from_a_run_refuses_what_does_not_fit_it(
    lm: Lm, runs: Path, text: Path, tmp_path: Path, flags: list[str], sentence: str
) -> None:
    (tmp_path / "run.toml").write_text("[training]\nseed = 3\n")
    done = lm("train", str(text), "--init", "a", "--max-steps", "2", *flags)
    assert done.code == 1 and "error: --init a" in done.err and sentence in done.err
    assert [path.name for path in runs.iterdir()] == ["a"]


# -- signals ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_and_says_how_to_resume(
    lm: Lm, tmp_path: Path, text: Path, number: signal.Signals
) -> None:
    command = [
        "train", str(text), "--name", "b", "--max-steps", "100000", *SMALL,
        "--set", "training.evaluate_every=5", "--set", "training.schedule=constant",
    ]  # fmt: skip
    with forked.Popen(
        command, strict=True, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8"
    ) as training:
        assert training.stderr is not None
        for line in training.stderr:
            if "epoch" in line:
                break
        training.send_signal(number)
        out, err = training.communicate(timeout=60)
    assert training.returncode == 128 + number
    assert out == "" and "Traceback" not in err
    said = re.search(r"Interrupted, saved at step ([\d,]+) of 100,000", err)
    assert said is not None and "Finish the plan with: lm train --resume b" in err
    step = int(said[1].replace(",", ""))
    run = RunFolder(tmp_path / "checkpoints" / "b")
    assert run.read_last()[0]["train_state"]["step"] == step
    resumed = lm("train", "--resume", "b", "--stop-after", str(step + 3))
    assert resumed.code == 0, resumed.err
    assert run.read_last()[0]["train_state"]["step"] == step + 3


@pytest.mark.slow
def test_kill_9_leaves_a_run_that_resumes_samples_and_is_listed(tmp_path: Path, text: Path) -> None:
    command = [
        "train", str(text), "--name", "b", "--max-steps", "100000", *SMALL,
        "--set", "training.evaluate_every=2", "--set", "training.validation_tokens=20",
    ]  # fmt: skip
    with forked.Popen(
        command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, encoding="utf-8"
    ) as training:
        assert training.stderr is not None
        for line in training.stderr:
            if "epoch" in line:
                break
        time.sleep(0.4)
        training.kill()
    step = RunFolder(tmp_path / "checkpoints" / "b").read_last()[0]["train_state"]["step"]
    resumed = spawn("train", "--resume", "b", "--stop-after", str(step + 2), cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    steps = [row["step"] for row in RunFolder(tmp_path / "checkpoints" / "b").read_metrics()]
    assert steps == sorted(set(steps)) and steps[-1] == step + 2


# -- what is refused ----------------------------------------------------------------------------------------


def refused(done: Any, sentence: str) -> None:
    """One sentence on stderr, exit code 1, nothing on stdout."""
    lines = [line for line in done.err.splitlines() if not line.startswith("note: ")]
    assert done.code == 1 and done.out == ""
    assert lines[-1].startswith("error: ") and sentence in lines[-1], done.err
    assert len([line for line in lines if line.startswith("error: ")]) == 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "Which text? Write: lm train FILE"),
        (["missing.txt"], "There is no file or folder 'missing.txt'"),
        (["empty.txt"], "empty"),
        (["binary.txt"], "binary.txt"),
        (["."], ""),
        (["words.txt", "--preset", "gru-chars"], "Unknown preset 'gru-chars'. Did you mean 'gru-char'?"),
        (["words.txt", "--set", "model.hidden=3"], "Unknown option model.hidden. Did you mean 'hidden_size'?"),
        (["words.txt", "--set", "hidden_size=3"], "write SECTION.FIELD=VALUE"),
        (["words.txt", "--set", "training.batch_size=0"], "training.batch_size = 0"),
        (["words.txt", "--max-steps", "0"], "training.max_steps = 0: give a number of at least 1"),
        (["words.txt", "--minutes", "-1"], "training.minutes = -1.0"),
        (["words.txt", "--minutes", "inf"], "training.minutes = inf: give a finite number"),
        (
            ["words.txt", "--precision", "fp64"],
            "training.precision = 'fp64': use 'auto', 'fp32', 'tf32', 'bf16'",
        ),
        (["words.txt", "--amp", "O4"], "training.amp = 'O4': use 'O0', 'O1', 'O2' or 'O3'"),
        (["words.txt", "--amp", "O1", "--precision", "fp32"], "use amp=O1 with precision=bf16 or fp16, or amp=O0 with"),
        # Before the text is read: there is none.
        (["-", "--precision", "tf32", "--device", "cpu"], "this is the device cpu; use fp32, bf16 or fp16"),
        (["words.txt", "--loss-scale", "8", "--precision", "fp32"], "--loss-scale 8 is for low precision"),
        (["words.txt", "--loss-scale", "big"], "use dynamic, none, or a number above 0"),
        (
            ["words.txt", "--amp", "O2", "--set", "training.fp32_modules=outputt", "--max-steps", "1", *SMALL],
            "model has no module 'outputt'. Did you mean 'network.output'?",
        ),
        (["words.txt", "--device", "tpu"], "Device 'tpu' is not available: use "),
        (["words.txt", "--seed", "-1"], "training.seed = -1"),
        (
            ["words.txt", "--set", "corpus.source=x.txt"],
            "corpus.source is not an option to set: give the text as CORPUS",
        ),
        (["words.txt", "--encoding", "klingon"], "corpus.encoding = 'klingon'"),
        (["words.txt", "--split-fractions", "0.5"], "give two or three positive numbers that add up to 1"),
        (["words.txt", "--config", "none.toml"], "--config none.toml: No such file"),
        (["words.txt", "--name", "a/b"], "a run's name is a folder's name"),
        (["words.txt", "--init", "ghost"], "No run 'ghost' in checkpoints"),
        (["--resume", "ghost"], "No run 'ghost' in checkpoints. There are none yet"),
        (["--resume", ""], "run"),
        (["words.txt", "--set", "model.hidden_size=10000000000", "--max-steps", "1"], "The memory is not enough"),
        (["words.txt", "--runs-dir", "words.txt/x", "--max-steps", "1", *SMALL], "words.txt/x"),
    ],
)
def test_bad_input_is_one_sentence(lm: Lm, tmp_path: Path, text: Path, arguments: list[str], sentence: str) -> None:
    (tmp_path / "words.txt").write_bytes(text.read_bytes())
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)) * 20)
    (tmp_path / "short.txt").write_text("to be or not to be\n")
    if arguments == ["."]:
        (tmp_path / "words.txt").unlink()
        (tmp_path / "short.txt").unlink()
    refused(lm("train", *arguments), sentence)
    assert not list(tmp_path.glob("checkpoints/*"))


@pytest.mark.parametrize(
    "arguments", [["--max-steps", "many"], ["--stop-after", "0"], ["--what"], ["--resume"], ["a", "b"]]
)
def test_a_slip_in_the_usage_is_exit_code_2(lm: Lm, arguments: list[str]) -> None:
    done = lm("train", *arguments)
    assert done.code == 2 and done.out == "" and ("Usage" in done.err or "requires an arg" in done.err)


def test_a_taken_name_is_refused_and_overwritten_on_request(lm: Lm, runs: Path, text: Path) -> None:
    before = content(runs)
    refused(lm("train", str(text), "--name", "a", "--max-steps", "2", *SMALL), "exists already")
    assert content(runs) == before
    assert lm("train", str(text), "--name", "a", "--max-steps", "2", *SMALL, "--overwrite").code == 0
    assert RunFolder(runs / "a").read_record()["plan"]["steps"] == 2


def test_a_second_trainer_is_refused(lm: Lm, runs: Path) -> None:
    with RunFolder(runs / "a").lock():
        refused(lm("train", "--resume", "a", "--max-steps", "20"), "is being trained by another process")


def test_a_run_that_diverges_says_where_and_what_to_do(lm: Lm, runs: Path, text: Path) -> None:
    wild = ("--set", "training.learning_rate=1e38", "--set", "training.grad_clip=none")
    done = lm("train", str(text), "--name", "wild", "--max-steps", "50", *SMALL, *wild)
    assert done.code == 1
    assert re.search(r"^error: Step \d+: the .* is (nan|inf) \(first in the .*--init wild@last", done.err, re.MULTILINE)
    done = lm(
        "train", str(text), "--name", "skips", "--max-steps", "9", *SMALL, *wild, "--set", "training.on_nonfinite=skip"
    )
    # Weights that are not finite are no run to sample from.
    assert done.code == 1 and "predicts nothing. The training probably diverged" in done.err
    assert len(re.findall(r"note: Step \d+: the .* the step was skipped\.", done.err)) >= 6


def test_a_full_disk_is_a_sentence_and_the_run_continues_later(
    lm: Lm, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    done = lm("train", "--resume", "a", "--max-steps", "20")
    assert done.code == 1 and "error: Cannot write " in done.err and "No space left on device" in done.err
    monkeypatch.undo()
    assert RunFolder(runs / "a").read_last()[0]["train_state"]["step"] == 12


# -- names with brackets -------------------------------------------------------------------------------------


def test_brackets_in_names_are_printed_as_they_are(lm: Lm, tmp_path: Path, text: Path) -> None:
    (tmp_path / "notes[draft] :smile:.txt").write_bytes(text.read_bytes())
    done = lm("train", "notes[draft] :smile:.txt", "--max-steps", "2", *SMALL)
    assert done.code == 0, done.err
    # The run is named in signs that need no quoting where its name is typed.
    name = "notes-draft-smile-hybrid"
    assert f"{name} starts: hybrid" in done.err and "on notes[draft] :smile:\n" in done.err
    assert f"{name} (best, step 2) on notes[draft] :smile:, split valid" in done.out
    assert "notes[draft] :smile:" in lm("list").out
    assert "notes[draft] :smile:" in lm("show", name).out


@pytest.mark.parametrize("name", ["-rf", "x y", "new\nline", "hf:x", "a/b", "a@last", "..", ""])
def test_a_name_that_could_not_be_typed_is_refused(lm: Lm, runs: Path, text: Path, name: str) -> None:
    done = lm("train", str(text), f"--name={name}", "--max-steps", "2", *SMALL)
    assert done.code == 1 and "a run's name is a folder's name of letters" in done.err
    assert not (runs / name).exists() or name in ("", "..")


def test_how_the_text_is_split_may_stand_in_a_file_of_options(lm: Lm, runs: Path, text: Path) -> None:
    Path("run.toml").write_text("[corpus]\nsplit_fractions = [0.8, 0.2]\n")
    assert lm("train", str(text), "--config", "run.toml", "--name", "f", "--max-steps", "2", *SMALL).code == 0
    record = json.loads((runs / "f" / "config.json").read_text())
    assert list(record["corpus"]["splits"]) == ["train", "valid"]
    assert record["config"]["corpus"]["split_fractions"] == [0.8, 0.2]
    shutil.rmtree(Path(os.environ["INKLING_CACHE"]) / "tokens")
    assert lm("eval", "f").code == 0


def test_the_text_is_said_and_recorded_with_its_encoding_and_line_ends(lm: Lm, runs: Path, text: Path) -> None:
    content = text.read_text().replace("\n", "\r\n").replace("a", "é")
    Path("latin.txt").write_bytes(content.encode("cp1252"))
    done = lm("train", "latin.txt", "--encoding", "latin-1", "--name", "e", "--max-steps", "2", *SMALL)
    assert f"Text: 1 file, {len(content):,} characters; split by position 0.9,0.05,0.05.\n" in done.err
    record = json.loads((runs / "e" / "config.json").read_text())
    assert record["corpus"]["newline"] == "\r\n"
    assert record["corpus"]["notes"][0] == f"1 file, {len(content):,} characters"
    assert (record["config"]["corpus"]["encoding"], record["config"]["corpus"]["split_at"]) == ("iso8859-1", "word")
    # Another text is read as the run's own is, unless something else is said.
    report = json.loads(lm("eval", "e", "--text", "latin.txt", "--json").out)
    assert report["characters"] == len(content) and report["unknown_tokens"] == 0
    assert "latin.txt is not UTF-8: byte" in lm("eval", "e", "--text", "latin.txt", "--encoding", "utf-8").err


def test_a_run_recorded_before_texts_were_cut_at_words_has_its_own_text_still(lm: Lm, runs: Path) -> None:
    path = runs / "a" / "config.json"
    record = json.loads(path.read_text())
    for field in ("split_at", "encoding"):
        del record["config"]["corpus"][field]
    record.pop("sha256")
    path.write_text(json.dumps({**record, "sha256": digest(record)}))
    shutil.rmtree(Path(os.environ["INKLING_CACHE"]) / "tokens")
    assert lm("eval", "a").code == 0
    assert lm("train", "--resume", "a", "--max-steps", "13").code == 0
    assert json.loads(path.read_text())["config"]["corpus"]["split_at"] == "character"


def test_options_of_a_tokenizer_alone_choose_it(lm: Lm, runs: Path) -> None:
    letters = "".join(chr(0x4E00 + number) for number in range(1500))
    Path("zh.txt").write_text("".join(f"{letters[n * 7 % 1400 : n * 7 % 1400 + 30]}\n" for n in range(400)), "utf-8")
    size = ("--set", "tokenizer.size=2500", "--set", "model.hidden_size=16", "--set", "model.embedding_size=8")
    done = lm("train", "zh.txt", "--name", "zh", "--max-steps", "1", "--set", "training.batch_size=4", *size)
    assert done.code == 0, done.err
    assert json.loads((runs / "zh" / "config.json").read_text())["config"]["tokenizer"]["type"] == "subword"


def test_commands_to_type_next_name_the_folder_of_the_runs(lm: Lm, text: Path) -> None:
    flags = ("--name", "n", "--max-steps", "4", "--stop-after", "2", "--runs-dir", "my runs", *SMALL)
    done = lm("train", str(text), *flags)
    assert "lm train --resume n --runs-dir 'my runs'" in done.err
    assert "lm sample n --runs-dir 'my runs' --prompt" in done.out


def test_counts_are_trained_without_steps_and_need_no_length(lm: Lm, text: Path) -> None:
    done = lm("train", str(text), "--preset", "ngram-char", "--name", "counts")
    assert done.code == 0
    assert "counts of words, in one pass over 4,501 tokens" in done.err
    assert "steps" not in done.err and "No length" not in done.err
    assert done.out.startswith("counts (best, step 1) on words, split valid \N{EN DASH} n-gram counts, no network\n")
    again = lm("train", "--resume", "counts")
    assert (again.code, "finished already" in again.err) == (0, True)
    assert lm("sample", "counts", "--max-tokens", "20", "--seed", "1").code == 0
    assert "n-gram counts, no network" in lm("show", "counts").out


def test_a_hybrid_is_called_one(lm: Lm, text: Path) -> None:
    done = lm("train", str(text), "--preset", "hybrid-char", "--name", "both", "--max-steps", "2", *SMALL)
    assert done.code == 0
    assert re.search(r"both starts: hybrid, [\d,]+ parameters and [\d,]+ counts, on words", done.err)
    assert "hybrid: n-gram counts and a network" in done.out
    assert "hybrid-char" in lm("list").out
