"""lm eval: the report as a table and as JSON."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Lm = Callable[..., Any]
PROMISED = {
    "loss", "perplexity", "word_perplexity", "bits_per_char", "bits_per_byte", "tokens", "words", "characters", "bytes",
    "unknown_tokens", "standard_error", "context",
}  # fmt: skip

pytestmark = pytest.mark.usefixtures("runs")


def test_json_is_one_object_with_the_promised_fields_that_agree(lm: Lm, text: Path) -> None:
    done = lm("eval", "a", "--json")
    assert done.code == 0 and done.out.count("\n") == 1
    report = json.loads(done.out)
    assert report.keys() >= PROMISED
    tail = text.read_text()[4750:]
    assert (report["split"], report["tokens"], report["characters"], report["bytes"]) == ("test", 250, 250, 250)
    assert report["words"] == len(tail.split())
    nats = report["loss"] * report["tokens"]
    assert report["perplexity"] == pytest.approx(math.exp(report["loss"]))
    assert report["word_perplexity"] == pytest.approx(math.exp(nats / report["words"]))
    assert report["bits_per_byte"] == pytest.approx(nats / math.log(2) / report["bytes"])
    assert report["context"] == "state carried over the whole split"


def test_the_table_names_run_split_context_and_denominators(lm: Lm) -> None:
    done = lm("eval", "a")
    assert done.out.startswith("a (best, step 12) on words, split test\n")
    for part in ("bits per byte", "over 250 bytes", "state carried over the whole split", "sha256"):
        assert part in done.out
    assert "\x1b" not in done.out + done.err


def test_the_floor_of_counting_is_shown_with_the_score(lm: Lm) -> None:
    report = json.loads(lm("eval", "a", "--json").out)
    assert report["floor"] == "7-gram counts of the training text, without a network"
    bits = report["floor_loss"] * report["tokens"] / math.log(2) / report["bytes"]
    assert report["floor_bits_per_byte"] == pytest.approx(bits)
    # A dozen steps are no match for it.
    done = lm("eval", "a")
    assert re.search(rf"floor +{bits:.4f} +7-gram counts alone", done.out)
    assert "note: The model does not beat the floor" in done.out


@pytest.mark.parametrize("arguments", [("--split", "train"), ("--text", "all.txt")])
def test_a_text_that_was_trained_on_is_not_compared_with_counts_that_have_read_it(
    lm: Lm, text: Path, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    (tmp_path / "all.txt").write_bytes(text.read_bytes())
    done = lm("eval", "a", *arguments)
    (note,) = re.findall("note: (.*)", done.out)
    assert re.match(r"About (8\d|9\d|100) % of this text is in the training text: the figures show how well", note)
    assert json.loads(lm("eval", "a", *arguments, "--json").out)["floor"] is None


def test_what_int8_costs_can_be_read_off(lm: Lm) -> None:
    exact, rounded = (json.loads(lm("eval", "a", "--precision", name, "--json").out) for name in ("fp32", "int8"))
    assert rounded["precision"] == "int8"
    assert rounded["bits_per_byte"] == pytest.approx(exact["bits_per_byte"], rel=0.005)
    assert rounded["bits_per_byte"] != exact["bits_per_byte"]


def test_a_split_can_be_chosen(lm: Lm) -> None:
    reports = {
        split: json.loads(lm("eval", "a", "--split", split, "--json").out) for split in ("train", "valid", "test")
    }
    assert [report["tokens"] for report in reports.values()] == [4500, 250, 250]
    assert len({report["loss"] for report in reports.values()}) == 3


def test_the_report_is_kept_with_the_run(lm: Lm, runs: Path) -> None:
    report = json.loads(lm("eval", "a", "--json").out)
    saved = json.loads((runs / "a" / "report.json").read_text())
    assert saved["test"]["loss"] == report["loss"] and "valid" in saved
    assert f"{report['bits_per_byte']:.4f}" in (runs / "a" / "README.md").read_text()


def test_a_run_that_cannot_be_written_is_scored_all_the_same(
    lm: Lm, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(descriptor: int) -> None:
        raise OSError(30, "Read-only file system")

    before = (runs / "a" / "report.json").read_bytes()
    monkeypatch.setattr(os, "fsync", read_only)
    done = lm("eval", "a", "--json")
    assert done.code == 0 and json.loads(done.out)["tokens"] == 250
    assert "note: The report was not saved with the run. Cannot write" in done.err and "Read-only" in done.err
    assert (runs / "a" / "report.json").read_bytes() == before


def test_any_text_can_be_scored_and_is_not_kept(lm: Lm, runs: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("the cat sat.\n" * 10)
    (tmp_path / "rows.csv").write_text("n;body\n" + '1;"the cat sat."\n' * 10)
    (tmp_path / "wide.txt").write_bytes(("the cat sat.\n" * 10).encode("utf-16-be"))
    before = (runs / "a" / "report.json").read_bytes()
    report = json.loads(lm("eval", "a", "--text", "mine.txt", "--json").out)
    assert (report["corpus"], report["tokens"], report["words"]) == ("mine.txt", 130, 30)
    piped = json.loads(lm("eval", "a", "--text", "-", "--json", text="the cat sat.\n" * 10).out)
    assert (piped["corpus"], piped["loss"]) == ("stdin", report["loss"])
    wide = json.loads(lm("eval", "a", "--text", "wide.txt", "--encoding", "utf-16-be", "--json").out)
    assert (wide["text_sha256"], wide["loss"]) == (report["text_sha256"], report["loss"])
    # Documents of a table are joined by a newline: the last one has none.
    table = json.loads(lm("eval", "a", "--text", "rows.csv", "--text-column", "body", "--json").out)
    assert table["characters"] == 129
    assert (runs / "a" / "report.json").read_bytes() == before
    assert lm("eval", "a", "--text", "mine.txt").out.startswith("a (best, step 12) on mine.txt\n")


def test_figures_that_are_infinite_are_null_in_json(lm: Lm, tmp_path: Path) -> None:
    (tmp_path / "one-word.txt").write_text("thecatsat" * 200)
    done = lm("eval", "a", "--text", "one-word.txt", "--json")
    assert json.loads(done.out, parse_constant=pytest.fail)["word_perplexity"] is None


def test_unknown_characters_are_counted_and_noted(lm: Lm, tmp_path: Path) -> None:
    (tmp_path / "snow.txt").write_text("the ☃ sat ☃", "utf-8")
    done = lm("eval", "a", "--text", "snow.txt", "--json")
    report = json.loads(done.out)
    assert (report["unknown_tokens"], report["tokens"], report["bytes"]) == (2, 11, 15)
    assert "'☃' (2×)" in done.err and report["notes"]
    # Three bytes each, at 8 bits.
    nats = report["loss"] * 11
    assert report["bits_per_byte"] == pytest.approx((nats / math.log(2) + 48) / 15)
    assert report["token_bits_per_byte"] == pytest.approx(nats / math.log(2) / 15)


def test_figures_in_another_precision_do_not_replace_the_reference(lm: Lm, runs: Path) -> None:
    before = (runs / "a" / "report.json").read_bytes()
    report = json.loads(lm("eval", "a", "--split", "valid", "--precision", "bf16", "--json").out)
    assert report["precision"] == "bf16"
    assert (runs / "a" / "report.json").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["b"], "No run 'b' in checkpoints."),
        (["a", "--split", "final"], "has no 'final' split: its corpus has train, valid, test"),
        (["a", "--split", "test", "--text", "x.txt"], "two different texts"),
        (["a", "--text", "missing.txt"], "missing.txt"),
        (["a", "--text", "empty.txt"], "empty"),
        (["a", "--text", "binary.txt"], "binary.txt"),
        (["a", "--text", "."], "error: "),
        (["a", "--text", "rows.jsonl", "--text-column", "body"], "rows.jsonl has no column 'body'. Columns: text"),
        (["a", "--text-column", "body"], "--text-column is for --text"),
        (["a", "--text", "empty.txt", "--encoding", "klingon"], "corpus.encoding = 'klingon'"),
        (["a", "--precision", "fp64"], "--precision 'fp64': use fp32, bf16, fp16, int8 or int4"),
        (["a", "--device", "tpu"], "Device 'tpu' is not available"),
    ],
)
def test_bad_input_is_one_sentence(lm: Lm, tmp_path: Path, arguments: list[str], sentence: str) -> None:
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)))
    (tmp_path / "rows.jsonl").write_text('{"text": "the cat"}\n')
    done = lm("eval", *arguments)
    assert (done.code, done.out) == (1, ""), done
    assert len(done.err.splitlines()) == 1 and done.err.startswith("error: ") and sentence in done.err, done.err


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", "Standard input is empty"),
        (b"ab\xff", "Standard input is not UTF-8: byte 2 (line 1)"),
        (b"ab\n\0", "Standard input looks like a binary file: byte 3 (line 2)"),
    ],
)
def test_bad_text_on_stdin_is_one_sentence(lm: Lm, data: bytes, sentence: str) -> None:
    done = lm("eval", "a", "--text", "-", text=data)
    assert (done.code, done.out) == (1, "") and sentence in done.err


@pytest.mark.slow
def test_a_corpus_that_has_changed_is_not_scored_as_the_old_one(
    lm: Lm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: Path
) -> None:
    (tmp_path / "own.txt").write_bytes(text.read_bytes())
    small = ("--set", "training.batch_size=4", "--set", "training.bptt=16", "--set", "model.hidden_size=8")
    assert lm("train", "own.txt", "--name", "own", "--max-steps", "1", *small).code == 0
    (tmp_path / "own.txt").write_text(text.read_text().replace("cat", "dog"))
    monkeypatch.setenv("INKLING_CACHE", str(tmp_path / "cache"))
    done = lm("eval", "own")
    assert done.code == 1 and "is not the text that run 'own' was trained on" in done.err


def test_tokens_that_an_older_inkling_prepared_are_measured_again_where_the_text_is_there(
    lm: Lm, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INKLING_CACHE", str(tmp_path / "cache"))
    own = tmp_path / "own.txt"
    own.write_bytes(text.read_bytes())
    assert lm("train", "own.txt", "--preset", "ngram-word", "--name", "own").code == 0
    first = json.loads(lm("eval", "own", "--json").out)
    (path,) = (tmp_path / "cache" / "tokens").glob("*/meta.json")
    meta = json.loads(path.read_text())
    for split in meta["splits"].values():
        del split["counts"]["spelling_nats"]
    path.write_text(json.dumps(meta))
    own.rename(tmp_path / "away.txt")
    done = lm("eval", "own")
    assert re.search(r"^bits per byte +– ", done.out, re.MULTILINE) and "To measure it" in done.out
    assert re.search(rf"tokens alone +{first['token_bits_per_byte']:.4f} ", done.out)
    (tmp_path / "away.txt").rename(own)
    assert json.loads(lm("eval", "own", "--json").out)["bits_per_byte"] == first["bits_per_byte"]
