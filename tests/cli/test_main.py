"""The program itself: help, version, what it imports, and how it meets terminals."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cli import main as program
from cli.terminal import Shown
from lm.corpora.text import FileText
from lm.version import __version__
from tests import forked
from tests.cli.conftest import spawn

pytestmark = pytest.mark.slow

Lm = Callable[..., Any]
ROOT = str(Path(program.__file__).parents[1])
COMMANDS = [
    "train", "sample", "eval", "compare", "chat", "page", "serve", "list", "show", "report", "export", "import",
    "push", "sweep",
    "watch", "film", "plot", "state", "inspect", "profile", "bench", "devices", "prepare", "demo",
]  # fmt: skip
VIEWS = "gradients", "attention", "neurons", "why", "shapes"
"""Of lm inspect."""


def test_help_names_every_command_in_order(lm: Lm) -> None:
    done = lm("--help")
    assert done.code == 0
    assert re.findall(r"^  (\w+) ", done.out.partition("Commands:")[2], re.MULTILINE)[: len(COMMANDS)] == COMMANDS


@pytest.mark.parametrize(
    "command",
    [
        *(name for name in COMMANDS if name not in ("state", "inspect", "devices", "prepare")),
        "state save",
        "state list",
        "state delete",
        *(f"inspect {view}" for view in VIEWS),
    ],
)
def test_every_command_explains_itself(lm: Lm, command: str) -> None:
    for flag in ("--help", "-h"):
        done = lm(*command.split(), flag)
        assert done.code == 0 and "--runs-dir" in done.out


@pytest.mark.parametrize(
    "command",
    ["", *COMMANDS, "state save", "state list", "state delete", *(f"inspect {view}" for view in VIEWS)],
)
def test_help_fits_a_terminal_of_80_columns(lm: Lm, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert [line for line in lm(*command.split(), "--help").out.splitlines() if len(line) > 80] == []


def test_the_version(lm: Lm) -> None:
    assert lm("--version").out == f"inkling {__version__}\n"


def test_no_command_shows_the_help(lm: Lm) -> None:
    done = lm()
    assert done.code == 2 and "Usage" in done.out + done.err


def test_a_mistyped_command_is_exit_code_2(lm: Lm) -> None:
    done = lm("trian")
    assert done.code == 2 and "No such command 'trian'" in done.err


def test_the_names_that_later_work_relies_on_are_there(lm: Lm) -> None:
    shown = lm("train", "--help").out
    for flag in (
        "--preset", "--name", "--minutes", "--max-steps", "--stop-after", "--seed", "--device",
        "--precision", "--runs-dir",
        "--set", "--resume", "--init", "--split-fractions", "--text-column", "--data-dir",
    ):  # fmt: skip
        assert flag in shown, flag


def test_help_imports_no_torch() -> None:
    code = (
        "import sys; sys.argv = ['lm', '--help']\nfrom cli.main import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "print([name for name in ('torch', 'numpy', 'datasets', 'sentencepiece') if name in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": ROOT}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.splitlines()[-1] == "[]"


def on_a_terminal(*arguments: str, cwd: Path, **environment: str) -> tuple[int, str]:
    """The program with a terminal for stdin, stdout and stderr; its exit code and all that it wrote."""
    leader, follower = pty.openpty()
    keep = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
    process = forked.Popen(
        arguments, strict=True, cwd=cwd, stdin=follower, stdout=follower, stderr=follower,
        env={**keep, "TERM": "xterm-256color", "COLUMNS": "100", **environment},
    )  # fmt: skip
    os.close(follower)
    parts = []
    while True:
        try:
            part = os.read(leader, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        parts.append(part)
    os.close(leader)
    return process.wait(timeout=60), b"".join(parts).decode("utf-8", "replace")


COLOURS = re.compile(r"\x1b\[[\d;]*m")


@pytest.mark.slow
def test_a_terminal_gets_a_live_view_and_its_cursor_back(text: Path, tmp_path: Path) -> None:
    small = ("--set", "model.hidden_size=8", "--set", "training.batch_size=4", "--set", "training.bptt=16")
    code, shown = on_a_terminal("train", str(text), "--name", "a", "--max-steps", "150", *small, cwd=tmp_path)
    assert code == 0, shown
    assert re.search(r"step \d+ of 150", shown) and " left" in shown and COLOURS.search(shown)
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") > 0
    wild = ("--set", "training.learning_rate=1e30", "--set", "training.grad_clip=none")
    code, shown = on_a_terminal("train", str(text), "--name", "b", "--max-steps", "150", *small, *wild, cwd=tmp_path)
    assert code == 1 and "error: " in shown
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") > 0


@pytest.mark.parametrize("arguments", [["list"], ["sample", "a", "--max-tokens", "3", "--seed", "1"], ["show", "b"]])
def test_no_color_means_none(runs: Path, arguments: list[str]) -> None:
    _, coloured = on_a_terminal(*arguments, cwd=runs.parent)
    _, plain = on_a_terminal(*arguments, cwd=runs.parent, NO_COLOR="1")
    assert COLOURS.search(coloured)
    assert "\x1b" not in plain


def test_control_characters_of_a_model_are_shown_on_a_terminal_and_raw_in_a_pipe(lm: Lm, tmp_path: Path) -> None:
    line = "\x1b[31mred\x07 bell\b\x9b end\r\n"
    (tmp_path / "text.txt").write_bytes(200 * line.encode())
    done = lm("train", "text.txt", "--preset", "ngram-char", "--name", "a")
    assert line.replace("\r\n", "\n") in done.out
    flags = ("a", "--prompt", "\x1b[31m", "--temperature", "0", "--max-tokens", "30")
    raw = lm("sample", *flags).out
    assert raw.startswith(line)
    code, shown = on_a_terminal("sample", *flags, cwd=tmp_path, NO_COLOR="1")
    # The terminal itself writes a newline as \r\n.
    assert code == 0 and shown.startswith("\\x1b[31mred\\x07 bell\\x08\\x9b end\r\r\n")
    assert not re.search(r"[\x00-\x08\x0b-\x0c\x0e-\x1f\x7f-\x9f]", shown)
    code, shown = on_a_terminal(
        "train", "text.txt", "--preset", "ngram-char", "--name", "a", "--overwrite", cwd=tmp_path, NO_COLOR="1"
    )
    assert code == 0 and "\\x1b[31mred\\x07 bell" in shown
    assert "\x07" not in shown and "\x9b" not in shown and "\x1b[31m" not in shown


def test_a_carriage_return_is_kept_before_a_newline_alone_wherever_the_pieces_are_cut() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    text = "a\r\nb\rc\t\x85\r"
    for cut in range(len(text) + 1):
        shown = Shown(Terminal())
        assert shown.feed(text[:cut]) + shown.feed(text[cut:]) + shown.end() == "a\r\nb\\x0dc\t\\x85\\x0d"
    assert Shown(io.StringIO()).feed(text) == text


def test_a_terminal_of_ascii_alone_is_no_trouble(runs: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "cli.main",
        "sample", "a", "--prompt", "☃", "--seed", "1", "--max-tokens", "3"],
        cwd=runs.parent, capture_output=True, text=True, encoding="utf-8",
        env={**os.environ, "PYTHONPATH": ROOT, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(done.stdout) == 5 and "Traceback" not in done.stderr


def test_a_locale_of_plain_ascii_still_names_every_text_and_file(runs: Path, text: Path) -> None:
    (runs.parent / "tëxt.txt").write_bytes(text.read_bytes())
    environment = {**os.environ, "PYTHONPATH": ROOT, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for arguments in (
        ["sample", "a", "--prompt", "é", "--seed", "1", "--max-tokens", "3"],
        ["train", "tëxt.txt", "--preset", "ngram-char", "--json"],
    ):
        done = subprocess.run(
            [sys.executable, "-W", "error", "-m", "cli.main", *arguments], cwd=runs.parent, capture_output=True,
            encoding="utf-8", env=environment,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert ("never saw, read as unknown: 'é'" in done.stderr) == done.stdout.startswith("é")
    assert json.loads(done.stdout)["run"] == "tëxt-ngram-char"


def test_a_corpus_whose_name_is_not_utf8_is_refused_in_a_sentence(lm: Lm, tmp_path: Path) -> None:
    (tmp_path / "t\udcff.txt").write_text("abc")
    done = lm("train", "t\udcff.txt")
    assert done.code == 1 and "the name is not UTF-8, so no run can record it: rename the file." in done.err


def test_a_tilde_is_the_users_folder_in_every_path(
    lm: Lm, runs: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = runs.parent / "home"
    home.mkdir()
    runs.rename(home / "runs")
    (home / "text.txt").write_text(text.read_text()[:200])
    monkeypatch.setenv("HOME", str(home))
    assert lm("sample", "a", "--runs-dir=~/runs", "--out=~/new/s.txt", "--max-tokens", "3").code == 0
    assert (home / "new" / "s.txt").is_file()
    assert lm("eval", "~/runs/a", "--text=~/text.txt").code == 0
    monkeypatch.setenv("INKLING_RUNS", "~/runs")
    assert [row["name"] for row in json.loads(lm("list", "--json").out)] == ["a"]
    done = lm("state", "save", "a", "there", "--text=~/text.txt")
    assert f"Next: lm sample a --runs-dir {home}/runs --state there" in done.err
    assert not (home.parent / "~").exists()


def test_names_with_spaces_are_quoted_in_printed_commands(lm: Lm, runs: Path) -> None:
    (runs / "a").rename(runs / "my run")
    runs.rename(runs.parent / "my runs")
    done = lm("train", "--resume", "my run", "--runs-dir", "my runs")
    assert "A longer plan: lm train --resume 'my run' --runs-dir 'my runs' --max-steps N" in done.err


@pytest.mark.parametrize("module", ["pydantic", "lm.corpora", "torch"])
def test_an_interrupt_while_a_module_is_imported_is_exit_code_130_and_no_traceback(runs: Path, module: str) -> None:
    code = (
        "import os, signal, sys\n"
        # Where this test runs in a shell's background, the signal is ignored.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == {module!r}: os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder())\n"
        "sys.argv = ['lm', 'eval', 'a']\n"
        "from cli.main import main; main()"
    )
    environment = {**os.environ, "PYTHONPATH": ROOT}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=runs.parent, capture_output=True, text=True, env=environment
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_a_text_too_large_for_the_memory_is_one_sentence(
    lm: Lm, runs: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def chunks(self: FileText) -> Iterator[str]:
        raise MemoryError

    monkeypatch.setattr(FileText, "chunks", chunks)
    done = lm("eval", "a", "--text", str(text))
    assert (done.code, done.out) == (1, "") and done.err.startswith("error: The memory is not enough")


def test_the_runs_folder_can_be_named_by_the_environment(lm: Lm, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs.rename(runs.parent / "elsewhere")
    monkeypatch.setenv("INKLING_RUNS", "elsewhere")
    assert [row["name"] for row in json.loads(lm("list", "--json").out)] == ["a"]


@pytest.mark.slow
def test_the_demo_trains_reports_and_leaves_a_run_to_sample(tmp_path: Path) -> None:
    done = spawn("demo", "--minutes", "0.05", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "bits per byte" in done.stdout and " sample " in done.stdout and "Next: lm sample " in done.stdout
    done = spawn("sample", "--max-tokens", "20", cwd=tmp_path)
    assert done.returncode == 0 and len(done.stdout) == 21
