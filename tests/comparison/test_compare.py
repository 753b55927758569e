"""Whole comparisons of small runs: figures equal to the reports', families, seeds, lost texts, the program."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import lm
from lm.comparison.comparison_html import page
from lm.errors import ConfigError, CorpusError
from lm.runs import run_folder
from tests.cli import conftest as cli_conftest
from tests.cli.conftest import Lm
from tests.test_jobs import SMALL, make_text

pytestmark = pytest.mark.slow

program = cli_conftest.lm
"""The fixture, under a name that leaves `lm` to the library."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text, and small runs on it under checkpoints/."""
    folder = tmp_path_factory.mktemp("compared")
    text = folder / "words.txt"
    text.write_text(make_text(30_000), "utf-8")

    def train(name: str, preset: str, **changes: Any) -> None:
        given = {**SMALL, **{key.replace("__", "."): value for key, value in changes.items()}}
        if preset.startswith("ngram"):
            given = {key: value for key, value in given.items() if key.startswith(("tokenizer", "corpus"))}
        if preset.startswith("transformer"):
            given |= {"model.num_heads": 2, "model.num_layers": 1, "model.context_length": 32}
            given.pop("model.embedding_size")
        config = lm.compose(str(text), preset=preset, overrides=given)
        lm.train(text, config, name=name, runs_dir=folder / "checkpoints")

    train("gru-s1", "gru-char", training__seed=1)
    train("gru-s2", "gru-char", training__seed=2)
    train("words", "gru-word", tokenizer__min_count=40)
    train("counts", "ngram-char")
    train("looking", "transformer-char")
    # A run that learned from the text that tests the others.
    text.write_text(make_text(6_000, seed=8) + make_text(30_000)[24_000:] + make_text(3_000, seed=9), "utf-8")
    train("learned", "ngram-char")
    text.write_text(make_text(30_000), "utf-8")
    return folder


@pytest.fixture(autouse=True)
def no_shipped_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "shipped_folder", lambda: tmp_path / "shipped")


@pytest.fixture(scope="module")
def compared(folder: Path) -> lm.Comparison:
    """All of them on the test split."""
    names = ["gru-s1", "gru-s2", "words", "counts", "looking"]
    return lm.compare(names, runs_dir=folder / "checkpoints", resamples=500)


def test_the_figures_are_those_of_lm_eval(folder: Path, compared: lm.Comparison) -> None:
    for candidate in compared.candidates:
        for name, bits in zip(candidate.runs, candidate.run_bits_per_byte, strict=True):
            report = lm.load(name, runs_dir=folder / "checkpoints").evaluate("test")
            assert bits == pytest.approx(report.bits_per_byte, rel=1e-12)
            assert compared.text_sha256 == report.text_sha256 and compared.bytes == report.bytes
    ranked = [candidate.bits_per_byte or 9 for candidate in compared.candidates]
    assert ranked == sorted(ranked)


def test_families_and_tokenizers_are_compared_in_bits_per_byte(compared: lm.Comparison) -> None:
    assert compared.verdict.comparable and "spelling" in compared.figure
    assert {"tokenizer", "context", "spelling"} <= {finding.kind for finding in compared.verdict.cautions}
    names = {candidate.name for candidate in compared.candidates}
    assert names == {"gru (2 seeds)", "words", "counts", "looking"}
    # n-gram counts are far better than six steps of training; each other one is compared with the best.
    assert [difference.a for difference in compared.differences] == ["counts"] * 3
    assert all(difference.better == "counts" for difference in compared.differences)
    assert "is better than" in compared.differences[0].sentence and "not chance" in compared.differences[0].sentence


def test_the_parts_of_a_division_add_up_to_the_whole(compared: lm.Comparison) -> None:
    difference = compared.differences[0]
    for group in ("part of a word", "place in the line", "place in the text"):
        parts = [place for place in difference.places if place.group == group]
        assert sum(place.bytes for place in parts) == compared.bytes
        total = sum(place.bytes * place.difference for place in parts) / compared.bytes
        assert total == pytest.approx(difference.bits_per_byte)
    assert 0 < len(difference.passages_a) <= 10 and difference.passages_a[0].winner == "counts"


def test_seeds_alone_are_grouped_and_their_spread_is_shown(folder: Path, compared: lm.Comparison) -> None:
    group = next(candidate for candidate in compared.candidates if len(candidate.runs) == 2)
    assert group.seeds == (1, 2) and group.seed_spread is not None and group.seed_spread > 0
    difference = next(each for each in compared.differences if each.b == group.name)
    assert difference.beyond_seeds and difference.seed_standard_error is not None
    # Two runs that differ by their seed alone are compared with each other.
    pair = lm.compare(["gru-s1", "gru-s2"], runs_dir=folder / "checkpoints", resamples=200)
    assert [candidate.name for candidate in pair.candidates] in (["gru-s1", "gru-s2"], ["gru-s2", "gru-s1"])
    assert "differ by their seed alone" in pair.notes[0]
    assert pair.differences[0].a == "gru-s1" and pair.verdict.sentence.startswith("Comparable: the same text")


def test_a_missing_run_and_an_unknown_format_of_export_are_one_sentence(program: Lm, folder: Path) -> None:
    runs = ("--runs-dir", str(folder / "checkpoints"))
    done = program("compare", "gru-s1", "nosuch", *runs)
    assert done.code == 1 and done.err.startswith("error: No run 'nosuch'") and done.err.count("\n") == 1
    done = program("export", "looking", "--to", "pt", *runs)
    assert done.code == 1 and done.err == "error: --to 'pt': use hf, peft, gguf, onnx or html.\n"


def test_a_seeded_comparison_repeats(folder: Path) -> None:
    first, again, other = (
        lm.compare(["gru-s1", "counts"], runs_dir=folder / "checkpoints", seed=seed, resamples=200)
        for seed in (1, 1, 2)
    )
    drop = {"seconds"}
    assert first.model_dump(exclude=drop) == again.model_dump(exclude=drop)
    assert (first.differences[0].low, first.differences[0].bits_per_byte) != (
        other.differences[0].low, other.differences[0].bits_per_byte
    )  # fmt: skip
    assert first.differences[0].bits_per_byte == other.differences[0].bits_per_byte


def test_a_text_of_training_is_no_test(folder: Path) -> None:
    runs = folder / "checkpoints"
    seen = (folder / "words.txt").read_text("utf-8")[:6000]
    found = lm.compare(["gru-s1", "counts"], text=seen, name="seen", runs_dir=runs, resamples=200)
    assert found.verdict.comparable and [each.kind for each in found.verdict.cautions] == ["training text"]
    assert (found.text, found.split) == ("seen", "text")


def test_a_run_that_learned_the_test_text_is_not_comparable(folder: Path) -> None:
    found = lm.compare(["counts", "learned"], runs_dir=folder / "checkpoints", resamples=200)
    assert not found.verdict.comparable and found.verdict.sentence.startswith("Not comparable: About")
    assert [each.kind for each in found.verdict.problems] == ["training text"]
    assert "own text" in {each.kind for each in found.verdict.cautions}
    assert found.differences[0].better is None and found.differences[0].sentence.startswith("No conclusion")


def test_a_ranking_of_different_texts_or_tokens_says_so(program: Lm, folder: Path) -> None:
    runs = "--runs-dir", str(folder / "checkpoints")
    assert "different validation texts" in program("list", "--sort", "bits", *runs).err
    done = program("plot", "gru-s1", "words", "--json", *runs)
    assert "The tokenizers differ: bits per byte" in done.err
    words = next(curve for curve in json.loads(done.out) if (curve["run"], curve["split"]) == ("words", "valid"))
    rows = lm.load("words", runs_dir=folder / "checkpoints").folder.read_metrics()
    assert words["y"] == [row["valid_bits_per_byte"] for row in rows if row["valid_loss"] is not None]
    assert "loss is per token" in program("plot", "gru-s1", "words", "--metric", "loss", "--json", *runs).err
    assert not program("plot", "gru-s1", "counts", "--metric", "loss", "--json", *runs).err


def test_without_the_training_text_what_needs_it_is_left_out(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = ["gru-s1", "counts"], folder / "checkpoints"
    monkeypatch.setenv("INKLING_CACHE", str(tmp_path / "empty"))
    text = (folder / "words.txt").rename(folder / "moved.txt")
    try:
        found = lm.compare(runs[0], text=make_text(3000, seed=9), runs_dir=runs[1], resamples=100)
        with pytest.raises(CorpusError, match=r"no file or folder .*words\.txt"):
            lm.compare(runs[0], runs_dir=runs[1])
        moved = lm.compare(["gru-s1", "words"], runs_dir=runs[1], resamples=100, corpus=folder / "moved.txt")
    finally:
        text.rename(folder / "words.txt")
    assert moved.training_text == "gru-s1" and moved.verdict.comparable
    assert "unknown overlap" not in [each.kind for each in moved.verdict.cautions]
    assert found.training_text is None and "No training text is here" in found.notes[0]
    assert [each.kind for each in found.verdict.cautions] == ["unknown overlap"]
    assert not {"names", "frequency in training"} & {place.group for place in found.differences[0].places}


def test_bad_requests_get_one_sentence(folder: Path) -> None:
    runs = folder / "checkpoints"
    with pytest.raises(ConfigError, match="needs two runs or more"):
        lm.compare(["gru-s1"], runs_dir=runs)
    with pytest.raises(ConfigError, match="gru-s1 is given twice"):
        lm.compare(["gru-s1", "gru-s1"], runs_dir=runs)
    with pytest.raises(ConfigError, match="give only one"):
        lm.compare(["gru-s1", "counts"], text="a", split="valid", runs_dir=runs)
    with pytest.raises(CorpusError, match="has no 'dev' split"):
        lm.compare(["gru-s1", "counts"], split="dev", runs_dir=runs)
    with pytest.raises(CorpusError, match="has no token"):
        lm.compare(["gru-s1", "counts"], text="", runs_dir=runs)


def test_a_text_of_few_words_gives_no_interval(folder: Path) -> None:
    found = lm.compare(["gru-s1", "words"], text="the cat sat\n", runs_dir=folder / "checkpoints")
    assert found.differences[0].low is None and "too short for an interval" in found.differences[0].sentence


def test_the_page_is_one_file_without_links_and_escapes_the_text(folder: Path) -> None:
    text = make_text(3000, seed=9) + "<script>alert(1)</script> & <b>\n" * 4
    html = page(lm.compare(["gru-s1", "counts", "words"], text=text, runs_dir=folder / "checkpoints", resamples=99))
    assert "<script>alert" not in html and "&lt;script&gt;" in html
    assert "http://" not in html and "https://" not in html and "prefers-color-scheme: dark" in html
    assert html.count("<details") == 2 and "Where they differ" in html


def test_the_program_prints_verdict_table_difference_places_and_passages(
    program: Lm, folder: Path, tmp_path: Path
) -> None:
    runs = "--runs-dir", str(folder / "checkpoints")
    done = program("compare", "gru-s1", "gru-s2", "counts", *runs, "--html", "page.html", "--resamples", "200")
    assert done.code == 0 and done.out.startswith("Comparable:")
    order = [
        "bits/byte",
        "spread of seeds",
        "counts is better than",
        "where they differ",
        "first letter",
        "wins most on:",
    ]
    places = [done.out.index(part) for part in order]
    assert places == sorted(places)
    assert max(len(line.rstrip()) for line in done.out.splitlines()) <= 80
    assert (tmp_path / "page.html").read_text("utf-8").startswith("<!doctype html>")
    done = program("compare", "gru-s1", "counts", *runs, "--json", "--resamples", "200", "--against", "best")
    found = json.loads(done.out)
    assert found["verdict"]["comparable"] and found["differences"][0]["a"] == "counts"
    assert "give only one" in program("compare", "gru-s1", "counts", *runs, "--text", "a", "--split", "valid").err


def test_a_figure_reproduces_by_its_signature(program: Lm, folder: Path) -> None:
    runs = "--runs-dir", str(folder / "checkpoints")
    printed = program("eval", "looking", "--stride", "8", *runs)
    signature = printed.out.splitlines()[-1]
    assert signature.startswith("bpb:") and "|ctx:window-32-8|" in signature
    done = program("eval", "looking", "--check", signature, *runs)
    assert done.code == 0 and "The figure reproduces" in done.out
    value = signature.partition("|")[0]
    done = program("eval", "looking", "--check", signature.replace(value, "bpb:1.0000"), "--json", *runs)
    found = json.loads(done.out)
    assert done.code == 1 and not found["check"]["reproduces"] and "The value is" in found["check"]["sentence"]
    assert found["signature"] == found["check"]["measured"] == signature
    # Another run has another value, of the same text and context.
    done = program("eval", "words", "--check", signature, *runs)
    assert done.code == 1 and "The tokenizer is another one" in done.out and "The context is carried" in done.out
    done = program("eval", "words", "--check", "bpb", *runs)
    assert done.code == 1 and "is not NAME:VALUE" in done.err


def test_the_signature_is_kept_with_the_report_and_on_the_card(program: Lm, folder: Path) -> None:
    assert program("eval", "counts", "--split", "valid", "--runs-dir", str(folder / "checkpoints")).code == 0
    run = folder / "checkpoints" / "counts"
    signature = json.loads((run / "report.json").read_text("utf-8"))["valid"]["signature"]
    assert f"Signature: `{signature}`" in (run / "README.md").read_text("utf-8")
