"""The program in this process, and a tiny run that it trained in another."""

from __future__ import annotations

import io
import logging
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from cli import main as entry
from cli import program
from lm.runs import run_folder
from tests import forked

SMALL = (
    "--set", "model.hidden_size=16", "--set", "model.embedding_size=8", "--set", "training.batch_size=4",
    "--set", "training.bptt=16", "--set", "training.warmup_steps=0", "--set", "model.table_orders=[]",
)  # fmt: skip
Lm = Callable[..., "Done"]


@dataclass
class Done:
    """What a command left: exit code, stdout, stderr."""

    code: int
    out: str
    err: str


def make_text(characters: int, seed: int = 5) -> str:
    source = random.Random(seed)
    words = ("the cat", "sat on", "a mat", "and", "saw", "one red", "hen", "run by", "its", "den", "in fog")
    lines = "".join(" ".join(source.choice(words) for _ in range(8)) + ".\n" for _ in range(characters // 30))
    return lines[:characters]


def spawn(*arguments: str, cwd: Path, text: str | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """`lm` in a process of its own; every warning is an error."""
    return forked.run(
        arguments, strict=True, cwd=cwd, input=text, capture_output=True, text=True, timeout=120, encoding="utf-8",
        env={**os.environ, **environment},
    )  # fmt: skip


@pytest.fixture
def lm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Lm:
    """lm("sample", "a", "--seed", "1", text="prompt"): the program in this process, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_folder, "shipped_folder", lambda: tmp_path / "shipped")
    monkeypatch.setattr(program.app, "registered_commands", [])
    logger = logging.getLogger("lm")
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(logger, "propagate", True)

    def run(*arguments: str, text: str | bytes = b"") -> Done:
        data = text.encode("utf-8") if isinstance(text, str) else text
        program.app.registered_commands.clear()
        program.app.registered_groups.clear()
        logger.handlers.clear()
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
            patch.setattr(sys, "argv", ["lm", *arguments])
            patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))
            capsys.readouterr()
            entry.main()
        code = ended.value.code
        assert code is None or isinstance(code, int)
        out, err = capsys.readouterr()
        assert "Traceback" not in err + out
        return Done(code or 0, out, err)

    return run


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(make_text(5000), "utf-8")
    return path


@pytest.fixture(scope="session")
def first(text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A folder with checkpoints/a, and what `lm train` said when it made it."""
    folder = tmp_path_factory.mktemp("first")
    kept = ("--set", "training.checkpoint_every=4", "--set", "corpus.split_at=character")
    preset = "--preset", "gru-char-small"
    done = spawn("train", str(text), "--name", "a", "--max-steps", "12", *preset, *kept, *SMALL, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder, done


@pytest.fixture
def runs(first: tuple[Path, object], tmp_path: Path) -> Path:
    """A copy of the runs folder, where the program looks by itself."""
    return Path(shutil.copytree(first[0] / "checkpoints", tmp_path / "checkpoints"))
