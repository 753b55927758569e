"""The commands of README.md and of docs/ work.

The info string of a fenced `sh` or `console` block of README.md says who runs it:

    ```sh run         here, in `make test`: all such blocks of a file in order, in one new folder with an input.txt
    ```sh soak        the same, in `make soak`: for what takes minutes (blocks marked `run` are run too, in order)
    ```sh ci          .ci/run, which holds each of its lines: make demo, make test
    ```sh norun       nobody: only for lines that begin with git clone, cd or pip install, which need a network

In a `console` block the lines after "$ " are commands; the others are their output, which is not compared. Blocks of
docs/ may have the same words; those without are not run. A ```python run block is a Python program.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").rglob("*.md"))
FENCE = re.compile(r"^(?P<ticks>```+)(?P<info>[^\n`]*)\n(?P<body>.*?)^(?P=ticks)\s*$", re.MULTILINE | re.DOTALL)
MARKS = ("run", "soak", "ci", "norun")
TIMEOUT_SECONDS = 300
SHOWN_CHARACTERS = 40


class Block(NamedTuple):
    line: int
    mark: str
    commands: str


def blocks(path: Path) -> list[Block]:
    text = path.read_text("utf-8")
    found = []
    for fence in FENCE.finditer(text):
        language, *marks = fence["info"].split() or [""]
        if language not in ("sh", "console") and (language, *marks) != ("python", "run"):
            continue
        body = fence["body"]
        if language == "python":
            body = f"python - <<'PYTHON'\n{body}PYTHON\n"
        if language == "console":
            body = "".join(f"{line[2:]}\n" for line in body.splitlines() if line.startswith("$ "))
        found.append(Block(text.count("\n", 0, fence.start()) + 1, " ".join(marks), body))
    return found


def files_with(mark: str) -> list[Path]:
    """README.md, and the pages of docs/ with this mark."""
    return [README, *(path for path in DOCS if any(block.mark == mark for block in blocks(path)))]


def run(path: Path, folder: Path, *marks: str) -> None:
    sentences = [f"{text.strip()}\n\n" for _, text in sorted(topics.items())]
    (folder / "input.txt").write_text("".join(sentences)[:200_000], "utf-8")
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "INKLING_CACHE": str(folder / ".cache"),
    }
    for block in blocks(path):
        if block.mark in marks:
            ran = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", block.commands], cwd=folder, env=environment,
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                timeout=TIMEOUT_SECONDS, check=False,
            )  # fmt: skip
            assert ran.returncode == 0, f"{path.name}, line {block.line}:\n{block.commands}\n{ran.stdout}"


def test_each_block_of_the_readme_says_who_runs_it():
    found = blocks(README)
    assert {"run", "ci"} <= {block.mark for block in found}, "README.md has no ```sh run or no ```sh ci block"
    unmarked = [f"line {block.line}: {block.mark!r}" for block in found if block.mark not in MARKS]
    assert not unmarked, f"write one of {MARKS} behind ```sh"


def test_what_the_readme_leaves_to_ci_is_in_ci():
    script = (ROOT / ".ci" / "run").read_text("utf-8")
    for block in blocks(README):
        for line in block.commands.splitlines():
            command = line.partition("#")[0].strip()
            if block.mark == "ci" and command:
                assert re.search(rf"^{re.escape(command)}( |$)", script, re.MULTILINE), command
            if block.mark == "norun" and command:
                assert command.startswith(("git clone ", "cd ", "pip install ")), command


@pytest.mark.slow
def test_the_shipped_run_writes_what_the_readme_shows(tmp_path):
    text = README.read_text("utf-8")
    (command,) = re.findall(r"^lm (sample shakespeare-gru --prompt .*--top-k .*--seed 7)$", text, re.MULTILINE)
    shown = text.partition("\nprints\n\n```text\n")[2].partition("\n```\n")[0]
    ran = subprocess.run(
        [sys.executable, "-m", "cli.main", *shlex.split(command), "--device", "cpu"],
        cwd=ROOT, env={**os.environ, "INKLING_CACHE": str(tmp_path)}, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    # No more: draws far into a text may differ in the last bits between builds of torch.
    assert ran.stdout[:SHOWN_CHARACTERS] == shown[:SHOWN_CHARACTERS]
    assert len(shown) > SHOWN_CHARACTERS


@pytest.mark.slow
@pytest.mark.parametrize("path", files_with("run"), ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_work_as_they_stand(path, tmp_path):
    run(path, tmp_path, "run")


@pytest.mark.soak
@pytest.mark.parametrize("path", files_with("soak"), ids=lambda path: str(path.relative_to(ROOT)))
def test_long_commands_work_as_they_stand(path, tmp_path):
    run(path, tmp_path, "run", "soak")


def test_blocks_are_found_with_their_marks_and_commands(tmp_path):
    (tmp_path / "a.md").write_text(
        "```sh run\nlm list\n```\n\n```console soak\n$ lm train a\nstep 1\n$ lm list\n```\n"
        "```python\nx\n```\n```sh\ny\n```\n```python run\nz\n```\n"
    )
    assert blocks(tmp_path / "a.md") == [
        Block(1, "run", "lm list\n"), Block(5, "soak", "lm train a\nlm list\n"), Block(13, "", "y\n"),
        Block(16, "run", "python - <<'PYTHON'\nz\nPYTHON\n"),
    ]  # fmt: skip
