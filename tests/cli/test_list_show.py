"""lm list and lm show."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lm.runs.run_folder import RunFolder
from tests.cli.conftest import SMALL

Lm = Callable[..., Any]


def test_a_line_a_run_with_model_corpus_step_bits_size_and_date(lm: Lm, runs: Path) -> None:
    done = lm("list")
    assert done.code == 0
    heading, line = done.out.splitlines()
    assert heading.split() == ["run", "model", "corpus", "step", "bits/byte", "size", "date"]
    bits = json.loads((runs / "a" / "report.json").read_text())["valid"]["bits_per_byte"]
    assert line.split()[:5] == ["a", "gru-char", "words", "12", f"{bits:.4f}"]
    assert line.split()[6] == "kB"


def test_json_rows_hold_the_named_fields(lm: Lm, runs: Path) -> None:
    (row,) = json.loads(lm("list", "--json").out)
    assert {
        "name",
        "model",
        "corpus",
        "step",
        "bits_per_byte",
        "size_bytes",
        "created",
        "shipped",
        "problem",
    } <= row.keys()
    size = sum(path.stat().st_size for path in (runs / "a").rglob("*") if path.is_file())
    assert (row["name"], row["step"], row["size_bytes"], row["problem"]) == ("a", 12, size, None)
    assert (row["model"], row["tokenizer"], row["preset"]) == ("gru", "char", "gru-char-small")


def test_a_run_is_named_and_listed_as_what_it_is_whatever_its_preset_was_called(lm: Lm, text: Path) -> None:
    assert (
        lm("train", str(text), "--preset", "gru-char", "--set", "model.type=rnn", "--max-steps", "1", *SMALL).code == 0
    )
    (row,) = json.loads(lm("list", "--json").out)
    assert row["name"] == "words-rnn-char"
    assert (row["model"], row["tokenizer"], row["preset"]) == ("rnn", "char", "gru-char")
    assert lm("list").out.splitlines()[1].split()[1] == "rnn-char"


def test_runs_are_ranked_with_what_unknown_words_and_white_space_cost(lm: Lm, runs: Path, text: Path) -> None:
    for name, size in (("few", 3), ("many", 1000)):
        done = lm("train", str(text), "--preset", "ngram-word", "--name", name, "--set", f"tokenizer.max_size={size}")
        assert done.code == 0, done.err
    rows = {row["name"]: row for row in json.loads(lm("list", "--json").out)}
    # As is customary, the model that knows one word seems to be the better one.
    assert rows["few"]["token_bits_per_byte"] < rows["many"]["token_bits_per_byte"]
    assert rows["few"]["bits_per_byte"] > 4 > rows["many"]["bits_per_byte"] > rows["many"]["token_bits_per_byte"]
    done = lm("list", "--sort", "bits")
    heading, *lines = done.out.splitlines()
    assert heading.split()[4:7] == ["bits/byte", "tokens", "alone"]
    assert [line.split()[0] for line in lines] == sorted(rows, key=lambda name: rows[name]["bits_per_byte"])
    assert lines[-1].split()[4:6] == [
        f"{rows['few']['bits_per_byte']:.4f}", f"{rows['few']['token_bits_per_byte']:.4f}"
    ] and lines[-1].startswith("few")  # fmt: skip
    # An older Inkling's report of words is not ranked, and says how to be.
    path = runs / "few" / "report.json"
    reports = json.loads(path.read_text())
    del reports["valid"]["spelling_nats"]
    path.write_text(json.dumps(reports))
    done = lm("list")
    line = next(line for line in done.out.splitlines() if line.startswith("few"))
    assert line.split()[4] == "–" and "lm eval few --split valid" in done.err
    assert lm("eval", "few", "--split", "valid").code == 0
    assert rows == {row["name"]: row | {"size_bytes": rows[row["name"]]["size_bytes"]}
                    for row in json.loads(lm("list", "--json").out)}  # fmt: skip
    assert "--sort 'size': use date or bits" in lm("list", "--sort", "size").err


def test_the_newest_is_first_and_a_broken_one_says_what_is_wrong(lm: Lm, runs: Path) -> None:
    shutil.copytree(runs / "a", runs / "b")
    (runs / "b" / "model.safetensors").touch()
    shutil.copytree(runs / "a", runs / "c")
    (runs / "c" / "config.json").write_text("{")
    (runs / "d").mkdir()
    done = lm("list")
    assert done.code == 0
    names = [line.split()[0] for line in done.out.splitlines()[1:]]
    assert set(names) == {"a", "b", "c"} and names.index("b") < names.index("a")
    assert "cannot be read" in done.out and "config.json is damaged" in done.out.replace("\n", "")
    problems = {row["name"]: row["problem"] for row in json.loads(lm("list", "--json").out)}
    assert problems["a"] is None and "config.json" in problems["c"]


def test_a_shipped_run_is_marked_and_last(lm: Lm, runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "a", tmp_path / "shipped" / "poet")
    poet = RunFolder(tmp_path / "shipped" / "poet")
    poet.write_record({**poet.read_record(), "shipped": True})
    assert [row["name"] for row in json.loads(lm("list", "--json").out)] == ["a", "poet"]
    assert lm("list").out.splitlines()[-1].split()[-1] == "shipped"
    # It can be sampled and evaluated, and is left as it is.
    before = {path: path.read_bytes() for path in (tmp_path / "shipped").rglob("*") if path.is_file()}
    assert lm("sample", "poet", "--max-tokens", "3").code == 0
    assert lm("eval", "poet", "--split", "valid").code == 0
    assert "--init poet" in lm("train", "--resume", "poet", "--max-steps", "99").err
    assert {path: path.read_bytes() for path in (tmp_path / "shipped").rglob("*") if path.is_file()} == before


def test_no_run_at_all_is_no_failure(lm: Lm) -> None:
    done = lm("list")
    assert (done.code, done.out) == (0, "") and "Train one: lm train FILE" in done.err
    assert json.loads(lm("list", "--json").out) == []


def test_the_card_shows_options_parameters_metrics_and_files(lm: Lm, runs: Path) -> None:
    done = lm("show", "a")
    assert done.code == 0
    for part in (
        "gru", "1,798 parameters", "hidden_size", "learning_rate", "bits per byte",
        "model.safetensors", "last/state.json",
        "best, last, step-4, step-8, step-12", "4,500", "created",
    ):  # fmt: skip
        assert part in done.out, part
    assert "\x1b" not in done.out


def test_the_card_as_json(lm: Lm, runs: Path) -> None:
    shown = json.loads(lm("show", "a", "--json").out, parse_constant=pytest.fail)
    assert (shown["name"], shown["parameters"], shown["plan"]["steps"]) == ("a", 1798, 12)
    assert shown["options"]["model"]["hidden_size"] == 16
    assert shown["states"] == ["best", "last", "step-4", "step-8", "step-12"]
    assert shown["reports"]["valid"]["tokens"] == 250
    assert [row["step"] for row in shown["metrics"]][-1] == 12


def test_the_newest_run_is_shown_where_none_is_named(lm: Lm, runs: Path) -> None:
    assert json.loads(lm("show", "--json").out)["name"] == "a"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", "{"),
        ("config.json", '{"format_version": 7}'),
        ("report.json", '{"valid": {"loss": 1}}'),
        ("report.json", ""),
    ],
)
def test_a_damaged_file_is_one_sentence(lm: Lm, runs: Path, name: str, content: str) -> None:
    (runs / "a" / name).write_text(content)
    done = lm("show", "a")
    assert (done.code, done.out) == (1, "")
    assert len(done.err.splitlines()) == 1 and done.err.startswith("error: ") and name in done.err


def test_an_unknown_run_is_one_sentence(lm: Lm, runs: Path) -> None:
    done = lm("show", "aa")
    assert done.code == 1 and "No run 'aa' in checkpoints. Did you mean 'a'? Runs: a." in done.err
