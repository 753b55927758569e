"""lm eval --copy and lm sample --mark-copies."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cli import copies as copies_module
from lm.runs.run import load

Lm = Callable[..., Any]

pytestmark = pytest.mark.usefixtures("runs")


def test_eval_copy_prints_samples_next_to_held_out_text_and_a_sentence(lm: Lm) -> None:
    done = lm("eval", "a", "--copy", "--samples", "3", "--max-tokens", "40", "--seed", "2")
    assert done.code == 0
    table = done.out.partition("Copies from the training text")[2].partition("bpb:")[0]
    assert re.search(r"samples +3  120 characters; 120 of valid", table)
    assert re.search(r"longest verbatim run +\d+  characters; \d+ in held-out text", table)
    assert re.search(r"in runs of 20 or more +\d+\.\d%", table) and "The samples copy" in table
    assert max(map(len, table.splitlines())) <= 80


def test_eval_copy_adds_one_key_to_the_json(lm: Lm) -> None:
    flags = ("--copy", "--samples", "2", "--max-tokens", "30", "--temperature", "0.5", "--json")
    report = json.loads(lm("eval", "a", *flags).out)
    copies = report.pop("copies")
    plain = json.loads(lm("eval", "a", "--json").out)
    assert report.keys() == plain.keys() and report["loss"] == plain["loss"]
    assert copies["samples"]["texts"] == copies["held_out"]["texts"] == 2
    assert copies["samples"]["characters"] == copies["held_out"]["characters"] == 60
    assert copies["options"] == {"n": 2, "max_tokens": 30, "temperature": 0.5, "seed": 1}
    assert copies["copies_more"] is False and copies["sentence"]


def test_flags_of_copies_belong_to_copies(lm: Lm) -> None:
    for arguments, sentence in (
        (("eval", "a", "--samples", "3"), "--samples is for the samples of --copy"),
        (("sample", "a", "--min-copy", "5"), "--min-copy is for --mark-copies"),
        (("sample", "a", "--mark-copies", "--detokenize"), "leave --detokenize out"),
        (("sample", "--mark-copies", "--server", "http://127.0.0.1:9"), "--mark-copies is for local runs"),
    ):
        done = lm(*arguments)
        assert done.code == 1 and sentence in done.err and done.out == ""


def test_marks_of_a_pipe_are_brackets_and_the_text_is_the_same(lm: Lm) -> None:
    flags = ("--prompt", "the cat sat on a mat", "--max-tokens", "30", "--seed", "4")
    plain = lm("sample", "a", *flags).out
    done = lm("sample", "a", *flags, "--mark-copies", "--min-copy", "4")
    assert done.out.replace("[[", "").replace("]]", "") == plain and done.out.startswith("[[the cat")
    train = (load("a").own_text()).splits["train"]
    text = load("a").tokenizer.decode(train.ids[1:])
    share = re.search(r"([\d.]+)% of the characters stand in verbatim runs of 4 or more .* has (\d+)\n", done.err)
    assert share is not None
    own = plain.removesuffix("\n")[20:]
    whole = plain.removesuffix("\n")
    copied = [
        any(whole[at : at + 4] in text for at in range(max(place - 3, 0), place + 1) if at + 4 <= len(whole))
        for place in range(20, len(whole))
    ]
    assert float(share[1]) == pytest.approx(100 * sum(copied) / len(own), abs=0.06)


def test_the_json_has_the_places_of_the_copies(lm: Lm) -> None:
    flags = ("--prompt", "the cat", "--max-tokens", "30", "--seed", "4", "--mark-copies", "--min-copy", "3", "--json")
    sample = json.loads(lm("sample", "a", *flags).out)
    copies = sample["copies"]
    assert copies["min_copy"] == 3
    assert copies["share"] == pytest.approx(sum(end - start for start, end in copies["spans"]) / len(sample["text"]))
    assert all(0 <= start < end <= len(sample["text"]) for start, end in copies["spans"])


def test_a_terminal_underlines_and_no_color_does_not(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = load("a", runs_dir=runs)
    underline, brackets = "\x1b[4m…\x1b[24m", "[[…]]"
    for terminal, no_color, marks in ((True, False, underline), (True, True, brackets), (False, False, brackets)):
        monkeypatch.setattr("sys.stdout.isatty", lambda terminal=terminal: terminal)
        monkeypatch.setenv("NO_COLOR", "1" if no_color else "")
        marker = copies_module.CopyMarker(run, 7)
        text = "the cat\x1b#"
        marker.print_text(marker.find("", text), "", text, echo=True)
        left, right = marks.split("…")
        rest = "\\x1b#" if terminal else "\x1b#"
        assert capsys.readouterr().out == f"{left}the cat{right}{rest}\n"


def test_training_warns_of_a_leak_and_the_card_has_it(lm: Lm, tmp_path: Path) -> None:
    line = "one two three four five six seven eight nine ten eleven twelve {:05d}\n"
    text = "".join(line.format(number) for number in range(40))
    (tmp_path / "again.txt").write_text(text * 3, "utf-8")
    small = ("--preset", "ngram-char", "--set", "model.order=2")
    done = lm("train", "again.txt", "--name", "leak", *small)
    assert done.code == 0, done.err
    assert "% of valid also stands in the training text, so its figures are too good. Examples: '" in done.err
    assert "in train too: 100.0% of valid" in (tmp_path / "checkpoints" / "leak" / "README.md").read_text()
    assert "in train too: 100.0%" in " ".join(lm("show", "leak").out.split())
    again = lm("train", "again.txt", "--name", "line", "--split-by", "line", *small)
    assert again.code == 0 and "in train too: 0.0% of valid" not in again.err
    record = json.loads((tmp_path / "checkpoints" / "line" / "config.json").read_text())
    assert record["config"]["corpus"]["split_by"] == "line" and record["config"]["corpus"]["dedupe"] is False
