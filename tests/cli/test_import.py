"""lm import, and the commands over an imported run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.interop.models_elsewhere import make_model, save_gguf

pytestmark = pytest.mark.slow

Lm = Callable[..., Any]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GGUF file of a model that predicts about as well as chance."""
    model = make_model("llama")
    model.model.embed_tokens.weight.data *= 0.1
    return save_gguf(model, tmp_path_factory.mktemp("elsewhere") / "tiny.gguf", "Q8_0")


def test_an_imported_run_is_listed_shown_measured_and_sampled(lm: Lm, source: Path, tmp_path: Path) -> None:
    done = lm("import", str(source))
    assert done.code == 0 and "64  of the 64 positions" in done.out and "Next: lm sample tiny" in done.err
    assert "or: lm chat tiny" in done.err
    (row,) = json.loads(lm("list", "--json").out)
    assert (row["name"], row["corpus"], row["step"], row["problem"]) == ("tiny", "imported", None, None)
    shown = lm("show", "tiny").out
    assert "imported from" in shown and "mit" in shown and "\nplan" not in shown and "\ncorpus" not in shown
    text = tmp_path / "text.txt"
    text.write_text("The cat sat on the mat .\n" * 30, "utf-8")
    report = json.loads(lm("eval", "tiny", "--text", str(text), "--json").out)
    assert report["bits_per_byte"] > 0 and report["corpus"] == str(text)
    assert lm("sample", "tiny", "--prompt", "The", "--max-tokens", "3", "--seed", "1").code == 0
    assert (tmp_path / "checkpoints" / "tiny" / "README.md").is_file()


def test_json_names_the_run_and_its_source(lm: Lm, source: Path) -> None:
    found = json.loads(lm("import", str(source), "--name", "other", "--context", "16", "--json").out)
    assert (found["name"], found["context_length"], found["vocab_size"]) == ("other", 16, 328)
    assert found["imported"]["source"] == str(source) and len(found["imported"]["sha256"]) == 64


@pytest.mark.parametrize("command", [
    ("eval",), ("report",), ("train", "--resume"), ("watch",), ("inspect", "attention"), ("profile",),
    ("eval", "--copy"), ("eval", "--calibration"),
])  # fmt: skip
def test_a_command_that_needs_the_training_says_that_the_run_was_imported(
    command: tuple[str, ...], lm: Lm, source: Path
) -> None:
    lm("import", str(source))
    done = lm(*command, "tiny")
    assert done.code == 1
    assert "'tiny' was imported" in done.err and done.err.count("\n") == 1


def test_training_from_a_source_says_which_run_it_made(lm: Lm, source: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The cat sat on the mat .\n" * 100, "utf-8")
    steps = ("--set", "model.context_length=16", "--set", "training.learning_rate=0.01", "--max-steps", "8")
    done = lm("train", str(text), "--init", str(source), *steps)
    assert done.code == 0 and "is imported as run tiny" in done.err
    again = lm("train", str(text), "--init", str(source), *steps, "--name", "second")
    assert again.code == 0 and "is imported as run tiny." in again.err
    assert len(json.loads(lm("list", "--json").out)) == 3


def test_what_cannot_be_imported_is_one_sentence(lm: Lm, tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF\x03\x00")
    done = lm("import", "bad.gguf")
    assert (done.code, done.out) == (1, "")
    assert done.err == "error: bad.gguf is cut short or damaged: copy or download it again.\n"
    assert not (tmp_path / "checkpoints").exists()
