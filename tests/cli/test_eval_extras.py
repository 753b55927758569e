"""lm eval with --per-token, --calibration, --convention, --adapt and --cache; lm chat --learn."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Lm = Callable[..., Any]

pytestmark = pytest.mark.usefixtures("runs")


def fingerprint(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ("report.json", "README.md")
    }


def test_one_pass_gives_report_rows_calibration_and_conventions_that_agree(lm: Lm, tmp_path: Path) -> None:
    flags = ("--per-token", "rows.jsonl", "--calibration", "-o", "reliability.svg", "--convention", "kenlm")
    plain, done = lm("eval", "a", "--json"), lm("eval", "a", *flags, "--json")
    report, plain = json.loads(done.out), json.loads(plain.out)
    assert {name: report[name] for name in plain if name != "tokens_per_second"} == {
        name: plain[name] for name in plain if name != "tokens_per_second"
    }
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text("utf-8").splitlines()]
    assert math.fsum(row["nats"] for row in rows) == pytest.approx(report["loss"] * report["tokens"], rel=1e-12)
    found = report["calibration"]
    assert (found["loss"], found["tokens"]) == (pytest.approx(report["loss"], rel=1e-9), 250)
    assert found["expected_loss"] == pytest.approx(sum(row["entropy"] for row in rows) / 250, rel=1e-5)
    hits = sum(each["tokens"] * each["accuracy"] for each in found["equal_mass"]["bins"])
    assert hits / 250 == pytest.approx(report["accuracy"], rel=1e-9)
    # The temperature is fitted on the validation split, and this is the test split.
    fitted = found["temperature"]
    valid = json.loads(lm("eval", "a", "--split", "valid", "--json").out)
    assert (fitted["text"], fitted["tokens"], report["split"]) == ("valid", 250, "test")
    assert fitted["loss_before"] == pytest.approx(valid["loss"], rel=1e-6) and fitted["loss_after"] < valid["loss"]
    assert found["samples"]["samples"] == 8 and found["samples"]["tokens"] == 4000
    assert report["conventions"]["kenlm"]["tokens"] == report["words"] + report["lines"]
    assert (tmp_path / "reliability.svg").read_bytes().startswith(b"<?xml")
    assert "Wrote rows.jsonl." in done.err and "Wrote reliability.svg." in done.err


def test_the_tables_come_after_the_report_in_80_columns(lm: Lm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cli.output.WIDE", 80)
    out = lm("eval", "a", "--calibration", "--convention", "srilm").out
    assert out.startswith("a (best, step 12) on words, split test\n")
    assert re.search(r"\ncalibration: is the first choice .*\nprobability +tokens +mean +right +gap ", out)
    assert re.search(r"\ntemperature +\d\.\d{3}  lowest loss on valid, 250 tokens: ", out)
    assert re.search(r"\nsrilm: as SRILM's .*\nsentences +\d+ ", out) and re.search(r"\nppl1 +[\d,.]+ ", out)
    # Notes are whole lines; so are the signatures, which are the last.
    *tables, own, signature = out[out.index("\ncalibration") :].splitlines()
    assert all(len(line) <= 80 for line in tables if not line.startswith("note: "))
    assert signature == json.loads(lm("eval", "a", "--json").out)["signature"]
    assert own.startswith("ppl:") and "|conv:srilm|" in own
    # The signature names the convention, so the check needs no flag.
    again = json.loads(lm("eval", "a", "--check", own, "--json").out)
    assert again["check"]["reproduces"] and again["conventions"]["srilm"]["signature"] == own
    other = lm("eval", "a", "--check", own, "--convention", "kenlm", "--json")
    assert other.code == 1 and "The convention is kenlm; the signature has srilm." in other.out


def test_figures_of_a_model_that_changes_are_labelled_and_never_saved(lm: Lm, runs: Path) -> None:
    before = fingerprint(runs / "a")
    flags = ("--adapt", "--cache", "--json")
    report, again = (json.loads(lm("eval", "a", *flags).out) for _ in range(2))
    assert (report["adapted"], report["cached"]) == (again["adapted"], again["cached"])
    for key, method in (("adapted", "dynamic evaluation"), ("cached", "cache")):
        found = report[key]
        assert (found["method"], found["tuned_on"]) == (method, "valid")
        assert (found["static_loss"], found["static_bits_per_byte"]) == (report["loss"], report["bits_per_byte"])
        assert found["bits_per_byte"] == pytest.approx(found["loss"] / math.log(2), rel=1e-9)
    # A model of twelve steps has much to learn from a text that repeats itself.
    assert report["adapted"]["loss"] < report["loss"] and report["cached"]["loss"] < report["loss"]
    saved = json.loads((runs / "a" / "report.json").read_text())
    assert saved["test"]["loss"] == report["loss"] and not {"adapted", "cached"} & saved["test"].keys()
    assert fingerprint(runs / "a") == before
    table = lm("eval", "a", "--adapt", "--cache").out
    assert "\ndynamic evaluation: the model learns from each segment after it is scored\nloss" in table
    assert table.count("note: Compare these figures only with figures of the same method.") == 2


def test_what_is_chosen_on_the_text_that_is_scored_has_a_note(lm: Lm) -> None:
    flags = ("--calibration", "--cache", "--json")
    on_test, on_valid = (json.loads(lm("eval", "a", "--split", split, *flags).out) for split in ("test", "valid"))
    for key in ("calibration", "cached"):
        assert on_test[key]["notes"] == []
        assert on_valid[key]["notes"] == [
            "What is chosen on valid is measured on valid here, and looks better than on new text."
        ]


def test_the_harness_reads_a_window_without_overlap(lm: Lm, tmp_path: Path) -> None:
    small = ("--set", "model.hidden_size=16", "--set", "model.num_heads=2", "--set", "model.num_layers=1")
    sizes = ("--set", "model.context_length=32", "--set", "training.batch_size=4")
    (tmp_path / "own.txt").write_text("the cat sat on a mat.\n" * 200)
    done = lm("train", "own.txt", "--name", "t", "--preset", "transformer-char", "--max-steps", "1", *small, *sizes)
    assert done.code == 0, done.err
    plain, report = (json.loads(lm("eval", "t", "--json", *more).out) for more in ((), ("--convention", "lm-eval")))
    assert plain["context"].endswith("stride 16") and report["context"].endswith("stride 32")
    figures = report["conventions"]["lm-eval"]
    assert figures["word_perplexity"] == pytest.approx(report["lm_eval_word_perplexity"])
    assert figures["bits_per_byte"] == pytest.approx(report["token_bits_per_byte"])
    again = lm("eval", "t", "--check", figures["signature"])
    assert again.code == 0 and "The figure reproduces" in again.out
    # The card has the figures of the default rule.
    saved = json.loads((tmp_path / "checkpoints" / "t" / "report.json").read_text())
    assert saved[report["split"]]["context"] == plain["context"]
    adapted = json.loads(lm("eval", "t", "--json", "--adapt").out)["adapted"]
    assert adapted["static_loss"] != plain["loss"] and adapted["options"]["segment"] == 32


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--per-token", "rows.csv"], "rows.csv: the name of a file of tokens ends with .parquet or .jsonl"),
        (["--out", "x.png"], "--out is the picture of --calibration: give both"),
        (["--calibration", "--out", "x.pdf"], "x.pdf: the name of a view's file ends with .png, .svg or .html"),
        (["--convention", "nltk"], "--convention 'nltk': use inkling, lm-eval, kenlm or srilm"),
        (["--adapt", "--precision", "int8"], "--adapt is measured in fp32: leave --precision int8 out"),
    ],
)
def test_bad_input_is_one_sentence(lm: Lm, flags: list[str], sentence: str) -> None:
    done = lm("eval", "a", *flags)
    assert (done.code, done.out) == (1, "") and len(done.err.splitlines()) == 1 and sentence in done.err, done


def test_counts_alone_do_not_adapt_but_have_a_cache_and_a_calibration(lm: Lm, text: Path, tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_bytes(text.read_bytes())
    assert lm("train", "own.txt", "--preset", "ngram-char", "--name", "n").code == 0
    done = lm("eval", "n", "--adapt")
    assert done.code == 1 and "has no weights that learn from a text: use --cache instead of --adapt" in done.err
    report = json.loads(lm("eval", "n", "--cache", "--calibration", "--json").out)
    assert report["cached"]["tuned_loss"] < report["cached"]["tuned_static_loss"]
    assert report["calibration"]["temperature"]["loss_after"] <= report["calibration"]["temperature"]["loss_before"]


def test_without_the_validation_text_there_is_a_calibration_but_no_temperature_and_no_adaptation(
    lm: Lm, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own.txt").write_bytes(text.read_bytes())
    assert lm("train", "own.txt", "--preset", "ngram-char", "--name", "n").code == 0
    (tmp_path / "own.txt").rename(tmp_path / "away.txt")
    monkeypatch.setenv("INKLING_CACHE", str(tmp_path / "cache"))
    found = json.loads(lm("eval", "n", "--text", "away.txt", "--calibration", "--json").out)["calibration"]
    assert found["temperature"] is None and found["notes"][0].startswith("There is no temperature without")
    done = lm("eval", "n", "--text", "away.txt", "--cache")
    assert done.code == 1 and len(done.err.splitlines()) == 1 and "own.txt" in done.err


# -- chat ----------------------------------------------------------------------------------------------

FLAGS = ("--seed", "3", "--max-tokens", "20", "--temperature", "0", "--stop", ".", "--banned-token", "0")


def learned(err: str) -> list[float]:
    return [float(nats) for nats in re.findall(r"^Learned from [\d,]+ tokens of ([\d.]+) nats\.$", err, re.MULTILINE)]


def test_a_chat_that_learns_says_so_and_predicts_repeated_turns_better(lm: Lm, runs: Path) -> None:
    before = fingerprint(runs / "a")
    done = lm("chat", "a", "--learn", *FLAGS, text="a red hen\n" * 9)
    assert done.err.startswith("a@best · seed 3 · learns from each turn, in memory · /help lists the commands\n")
    nats = learned(done.err)
    # The last turn is not accepted yet.
    assert len(nats) == 8 and nats[-1] < nats[0] - 0.02
    assert fingerprint(runs / "a") == before
    # Nothing is learned before the first reply.
    plain = lm("chat", "a", *FLAGS, text="a red hen\n").out
    assert done.out.startswith(plain)


def test_undone_turns_are_not_learned_and_reset_forgets(lm: Lm) -> None:
    done = lm("chat", "a", "--learn", *FLAGS, text="a red hen\n/undo\na red hen\na mat\n/reset\na red hen\na mat\n")
    first, again = learned(done.err)
    assert first == again
    late = lm("chat", "a", "--learn", *FLAGS, text="a red hen\na mat\n/undo\n/undo\n")
    assert late.err.count("What the model has learned stays; /reset forgets it.") == 1


def test_learning_needs_fp32_weights(lm: Lm) -> None:
    done = lm("chat", "a", "--learn", "--precision", "int8")
    assert done.code == 1 and "--learn changes fp32 weights: leave --precision int8 out." in done.err


@pytest.mark.parametrize("flag", ["--calibration", "--adapt", "--cache"])
def test_what_reads_a_text_as_one_whole_refuses_conversations(lm: Lm, tmp_path: Path, flag: str) -> None:
    rows = [{"prompt": "a", "completion": str(number)} for number in range(3)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = lm("eval", "a", "--text", "chats.jsonl", flag)
    assert done.code == 1
    assert f"{flag} reads a text as one whole, and chats.jsonl holds conversations" in done.err.replace("\n", " ")
