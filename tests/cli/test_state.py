"""lm state, and lm sample --state."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lm.runs.run_folder import RunFolder

Lm = Callable[..., Any]

pytestmark = pytest.mark.usefixtures("runs")

FLAGS = ("--seed", "3", "--max-tokens", "30", "--no-echo")


@pytest.fixture
def chapter(tmp_path: Path) -> Path:
    path = tmp_path / "chapter.txt"
    path.write_text("the cat sat on a mat and saw one red hen.\n" * 3, "utf-8")
    return path


def test_a_text_continues_from_a_named_snapshot(lm: Lm, chapter: Path) -> None:
    saved = lm("state", "save", "a", "--text", "chapter.txt", "one")
    assert saved.code == 0 and "127 tokens" in saved.err and "lm sample a --state one" in saved.err
    whole = chapter.read_text("utf-8")
    assert lm("sample", "a", "--state", "one", *FLAGS).out == lm("sample", "a", "--prompt", whole, *FLAGS).out
    assert lm("sample", "a", "--state", "one", "--prompt", "the ", *FLAGS).out == (
        lm("sample", "a", "--prompt", whole + "the ", *FLAGS).out
    )
    told = ("--logprobs", "1", "--json", *FLAGS)
    assert lm("sample", "a", *told).out != lm("sample", "a", "--state", "one", *told).out


def test_the_state_of_a_gru_takes_a_few_kilobytes(lm: Lm, chapter: Path, runs: Path) -> None:
    chapter.write_text(chapter.read_text("utf-8") * 20, "utf-8")
    lm("state", "save", "a", "--text", "chapter.txt", "one")
    assert (runs / "a" / "states" / "one.safetensors").stat().st_size < 4096


def test_a_text_may_come_from_stdin_and_be_empty(lm: Lm) -> None:
    assert lm("state", "save", "a", "--text", "-", "piped", text="the cat").code == 0
    assert lm("sample", "a", "--state", "piped", *FLAGS).out == lm("sample", "a", "--prompt", "the cat", *FLAGS).out
    assert lm("state", "save", "a", "--text", "-", "empty").code == 0
    assert lm("sample", "a", "--state", "empty", *FLAGS).out == lm("sample", "a", *FLAGS).out


def test_states_are_listed_and_deleted(lm: Lm, chapter: Path) -> None:
    nothing = lm("state", "list", "a")
    assert (nothing.code, nothing.out) == (0, "") and "no snapshots yet" in nothing.err
    for name in ("two", "one"):
        lm("state", "save", "a", "--text", str(chapter), name)
    listed = lm("state", "list", "a").out
    assert listed.index("one") < listed.index("two") and "127" in listed and "chapter.txt" in listed
    rows = json.loads(lm("state", "list", "a", "--json").out)
    assert [(row["name"], row["tokens"], row["text"], row["usable"]) for row in rows] == [
        ("one", 127, "chapter.txt", True), ("two", 127, "chapter.txt", True),
    ]  # fmt: skip
    assert lm("state", "delete", "a", "one").code == 0
    assert [row["name"] for row in json.loads(lm("state", "list", "a", "--json").out)] == ["two"]


def test_a_state_of_other_weights_is_refused_and_marked(lm: Lm, chapter: Path) -> None:
    lm("state", "save", "a@step-4", "--text", str(chapter), "early")
    done = lm("sample", "a", "--state", "early")
    assert done.code == 1 and done.out == ""
    assert "error: Snapshot 'early' was made with other weights than those of run 'a'" in done.err
    assert lm("sample", "a@step-4", "--state", "early", *FLAGS).code == 0
    assert "of other weights" in lm("state", "list", "a").out


def test_states_of_a_shipped_run_leave_it_as_it_is(
    lm: Lm, chapter: Path, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INKLING_CACHE", str(tmp_path / "cache"))
    folder = RunFolder(runs / "a")
    folder.write_record({**folder.read_record(), "shipped": True})
    before = sorted(runs.rglob("*"))
    assert lm("state", "save", "a", "--text", str(chapter), "one").code == 0
    assert sorted(runs.rglob("*")) == before
    assert (tmp_path / "cache" / "states" / "a" / "one.safetensors").is_file()
    assert lm("sample", "a", "--state", "one", *FLAGS).code == 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["save", "a", "--text", "missing.txt", "one"], "There is no file 'missing.txt'"),
        (["save", "a", "--text", ".", "one"], ". is a folder: give a file"),
        (["save", "a", "--text", "latin.txt", "one"], "latin.txt is not UTF-8: byte 1 (line 1)"),
        (["save", "a", "--text", "chapter.txt", "../one"], "Snapshot '../one': use letters"),
        (["save", "b", "--text", "chapter.txt", "one"], "No run 'b'"),
        (["delete", "a", "one"], "Run 'a' has no snapshot 'one'"),
        (["delete", "a", "../../config"], "use letters"),
    ],
)
def test_bad_input_is_one_sentence(lm: Lm, chapter: Path, arguments: list[str], sentence: str) -> None:
    chapter.with_name("latin.txt").write_bytes(b"a\xe9")
    done = lm("state", *arguments)
    assert (done.code, done.out) == (1, ""), done
    assert len(done.err.splitlines()) == 1 and done.err.startswith("error: ") and sentence in done.err, done.err
