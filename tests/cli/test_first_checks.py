"""What can be refused at once is refused before a text is read or a model is loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Lm = Callable[..., Any]
IN_A_FILE = "checkpoints/a/README.md/x"
"""A place that no file can have."""


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["train", "-", "--name", "a/b"], "a run's name is a folder's name"),
        (["train", "-", "--name", "a"], "checkpoints/a exists already"),
        (["train", "-", "--name", "a", "--preset", "gru-char"], "checkpoints/a exists already"),
        (["train", "-", "--name", "a", "--init", "a"], "checkpoints/a exists already"),
        (["train", "-", "--seed", "-1"], "training.seed = -1: give a number of at least 0."),
        (["train", "-", "--runs-dir", IN_A_FILE], f"{IN_A_FILE}: "),
        (["train", "-", "--runs-dir", "/proc/no"], "Cannot write to /proc/no: "),
        (["train", "-", "--preset", "gru"], "Did you mean 'gru-char', 'gru-char-gpu'"),
        (["train", "-", "--dry-run", "--verify-resume"], "are two different checks: give one of them"),
        (["profile", "-", "--html", IN_A_FILE], f"{IN_A_FILE.rpartition('/')[0]}: "),
        (["profile", "-", "--seed", "-1"], "training.seed = -1"),
        (["bench", "-", "--seed", "-1"], "training.seed = -1"),
        (["prepare", "checkpoints/*", IN_A_FILE], f"{IN_A_FILE}: "),
        # The weights are damaged: whoever loads them says that.
        (["sample", "a", "--out", IN_A_FILE], f"{IN_A_FILE.rpartition('/')[0]}: "),
        (["sample", "a", "--seed", "-1"], "sampling.seed = -1: give a number of at least 0."),
        (["chat", "a", "--seed", "-1"], "sampling.seed = -1"),
        (["state", "save", "a", "a/b", "--text", "none.txt"], "Snapshot 'a/b': use letters"),
        (["eval", "a", "--split", "tset"], "Run 'a' has no 'tset' split"),
        (["eval", "a", "--text", "none.txt"], "There is no file 'none.txt'"),
        (["plot", "a", "--output", IN_A_FILE], f"{IN_A_FILE.rpartition('/')[0]}: "),
        (["list", "--runs-dir", "nowhere"], "There is no folder nowhere with runs: check --runs-dir"),
        (["sample", "--runs-dir", "nowhere"], "There is no folder nowhere with runs: check --runs-dir"),
    ],
)
def test_it_is_refused_before_text_or_weights_are_read(lm: Lm, runs: Path, arguments: list[str], sentence: str) -> None:
    (runs / "a" / "model.safetensors").write_bytes(b"damaged")
    before = sorted(runs.parent.rglob("*"))
    done = lm(*arguments)
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("error: ") and sentence in done.err and done.err.count("\n") == 1
    assert sorted(runs.parent.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["train", "x", "--lr", "0.1"], "--lr. This option has no flag: use --set training.learning_rate=0.1"),
        (["train", "x", "--batch-size=8"], "--set training.batch_size=8"),
        (["train", "x", "--layers", "3"], "--set model.num_layers=3"),
        (["profile", "x", "--dropout"], "--set model.dropout=VALUE"),
        (["train", "x", "--max-steps", "many"], "'--max-steps': 'many': give a whole number"),
        (["train", "x", "--stop-after", "0"], "'--stop-after': '0': give a number of at least 1"),
    ],
)
def test_a_flag_that_is_none_or_has_no_such_value_is_answered_with_what_to_write(
    lm: Lm, arguments: list[str], hint: str
) -> None:
    done = lm(*arguments)
    assert done.code == 2 and hint in done.err
    assert "--set" not in lm("sample", "--lr", "0.1").err


def test_a_stride_is_refused_where_no_window_slides(lm: Lm, runs: Path) -> None:
    done = lm("eval", "a", "--stride", "4")
    assert done.code == 1 and done.err.startswith("error: --stride 4: gru models carry their state")
