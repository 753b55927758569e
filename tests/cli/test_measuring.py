"""lm profile, lm bench, lm devices and lm train --dry-run: what they print, and what they refuse."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lm.corpora import load_prepared
from lm.profiling import bench
from lm.profiling.bench import Setting
from lm.runs.run import load

SMALL = (
    "--set", "model.hidden_size=16", "--set", "model.embedding_size=8", "--set", "training.batch_size=4",
    "--set", "training.bptt=16", "--set", "model.table_orders=[]",
)  # fmt: skip
Lm = Callable[..., Any]


@pytest.fixture
def briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Profiles that measure for a moment only."""
    from lm.profiling import profile

    whole = profile.profile_training
    monkeypatch.setattr(profile, "profile_training", lambda config, corpus: whole(config, corpus, seconds=0.05))


@pytest.mark.usefixtures("briefly")
def test_a_profile_is_tables_json_and_a_page(lm: Lm, text: Path, tmp_path: Path) -> None:
    done = lm("profile", str(text), "--preset", "gru-char", *SMALL, "--html", "page.html")
    assert done.code == 0, done.err
    for line in ("layers", "cell.l0", "forward", "backward", "evaluation", "tokens/s", "share of peak", "every 100"):
        assert line in done.out
    assert re.search(r"gru with [\d,]+ parameters on words: batches of 4 × 16 tokens\n(fp32|bf16 O1) on ", done.out)
    assert "\x1b" not in done.out
    assert (tmp_path / "page.html").read_text("utf-8").startswith("<!doctype html>")
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.usefixtures("briefly")
def test_a_run_is_profiled_with_its_own_options_and_text(lm: Lm, runs: Path) -> None:
    done = lm("profile", "a", "--set", "training.batch_size=2", "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert (found["batch_size"], found["bptt"], found["corpus"]) == (2, 16, "words")
    assert {layer["name"] for layer in found["layers"]} >= {"cell.l0", "output", "loss"}
    assert [phase["name"] for phase in found["memory"]][0] == "start"
    assert found["arithmetic"]["share_of_peak"] > 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((), "Which text, or which run?"),
        (("nothing-here",), "nothing-here"),
        (("a", "--preset", "gru-char"), "leave --preset out"),
        (("a", "--set", "tokenizer.unknown=skip"), "keeps its text and its tokenizer"),
        (("a", "--set", "training.batch_sise=3"), "Did you mean"),
        (("a", "--html", "checkpoints/a/README.md/x"), "README.md: Not a directory"),
        (("a", "--device", "cuda:9"), "Device 'cuda:9' is not available"),
        (("TEXT", "--preset", "ngram-char"), "trained by counting"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_a_sentence(
    lm: Lm, runs: Path, text: Path, arguments: tuple[str, ...], sentence: str
) -> None:
    for command in ("profile", "bench"):
        if command == "bench" and "--html" in arguments:
            continue
        done = lm(command, *(str(text) if each == "TEXT" else each for each in arguments))
        assert done.code == 1 and sentence in done.err, (command, done.err)
        assert done.out == ""


def test_options_are_those_of_lm_train(lm: Lm) -> None:
    def flags(command: str) -> set[str]:
        return set(re.findall(r"^ +(--[\w-]+)", lm(command, "--help").out, re.MULTILINE))

    # What is measured is one process; of several, `lm bench` has rows of its own.
    not_options = {
        "--name",
        "--stop-after",
        "--resume",
        "--corpus",
        "--init",
        "--overwrite",
        "--dry-run",
        "--verify-resume",
        "--explain",
        "--ensemble",
        "--distill",
        "--student",
    }
    not_options |= {"--devices", "--shard", "--compile", "--lora", "--log-to"}
    for command in ("profile", "bench"):
        assert flags("train") - not_options <= flags(command), command


@pytest.mark.soak
def test_a_row_of_two_processes_makes_the_same_steps_as_one(runs: Path) -> None:
    run = load("a", runs_dir=runs)
    corpus = load_prepared(run.record["corpus"]["key"])
    assert corpus is not None
    chosen = [Setting("cpu", count, 1, "fp32", "O0") for count in (1, 2)]
    one, two = bench.run(run.config, corpus, chosen)
    assert one.problem is two.problem is None
    assert one.speed_up == 1 and two.speed_up is not None and two.speed_up > 0
    assert one.steps == two.steps and two.loss == pytest.approx(one.loss, rel=1e-4)


@pytest.mark.slow
def test_bench_measures_each_setting_in_a_separate_process(lm: Lm, runs: Path) -> None:
    done = lm("bench", "a", "--device", "cpu", "--precision", "fp32", "--json")
    assert done.code == 0, done.err
    rows = json.loads(done.out)
    assert {(row["device"], row["precision"]) for row in rows} == {("cpu", "fp32")}
    assert rows[0]["threads"] == 1 and rows[0]["speed_up"] == 1
    assert len({row["loss"] for row in rows}) == 1, "the same steps, whatever the threads"
    for row in rows:
        assert row["problem"] is None and row["steps"] == bench.STEPS
        assert row["tokens_per_second"] > 0 and row["peak_bytes"] > 50e6
        assert row["speed_up"] == pytest.approx(row["tokens_per_second"] / rows[0]["tokens_per_second"])


def test_devices_are_described_with_what_is_chosen_by_default(lm: Lm) -> None:
    known = json.loads(lm("devices", "--json").out)
    assert known["software"]["torch"] == torch.__version__
    assert (
        known["cpu"]["usable_threads"] >= 1
        and "bf16 O2" in known["cpu"]["formats"]
        and known["memory"]["total"] > known["memory"]["available"] > 0
    )
    assert len(known["gpus"]) == torch.cuda.device_count()
    assert known["defaults"]["device"] == ("cuda" if known["gpus"] else "cpu")
    shown = lm("devices").out
    assert torch.__version__ in shown and known["cpu"]["model"] in shown and "chosen by default" in shown


def test_a_dry_run_says_that_it_fits_and_trains_nothing(lm: Lm, text: Path, tmp_path: Path) -> None:
    done = lm("train", str(text), "--preset", "gru-char", *SMALL, "--dry-run")
    assert done.code == 0, done.err
    assert "it fits" in done.out and "with 4 rows" in done.out
    assert not (tmp_path / "checkpoints").exists()
    found = json.loads(lm("train", str(text), "--preset", "gru-char", *SMALL, "--dry-run", "--json").out)
    assert found["fits"] and found["needed_bytes"] < found["available_bytes"]


def test_what_does_not_fit_is_refused_dry_or_not(lm: Lm, text: Path, tmp_path: Path) -> None:
    large = ("train", str(text), "--preset", "gru-char", *SMALL, "--set", "model.hidden_size=200000")
    for arguments in (large, (*large, "--dry-run")):
        done = lm(*arguments)
        assert done.code == 1
        assert "GB on cpu, where" in done.err and "Lower model.hidden_size" in done.err
    assert not list(tmp_path.glob("checkpoints/*/model.safetensors"))
