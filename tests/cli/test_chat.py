"""lm chat, with what is typed piped in."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lm.runs.run import load
from tests import forked

Lm = Callable[..., Any]

pytestmark = pytest.mark.usefixtures("runs")

FLAGS = ("--seed", "3", "--max-tokens", "20", "--stop", ".", "--banned-token", "0")
"""Token 0 is the newline, so that replies hold none."""


def replies(lm: Lm, *lines: str, flags: tuple[str, ...] = FLAGS) -> list[str]:
    """The replies to some lines."""
    done = lm("chat", "a", *flags, text="".join(f"{line}\n" for line in lines))
    assert done.code == 0
    assert done.out.endswith("\n\n")
    return [str(reply) for reply in done.out[:-2].split("\n\n")]


def test_a_reply_continues_the_line(lm: Lm) -> None:
    (reply,) = replies(lm, "the cat sat")
    assert lm("sample", "a", "--prompt", "the cat sat\n", "--no-echo", *FLAGS).out == f"{reply}\n"


def test_the_state_is_kept_between_lines(lm: Lm) -> None:
    first, second = replies(lm, "the cat", "and", flags=("--temperature", "0", *FLAGS))
    transcript = f"the cat\n{first}\n\nand\n"
    alone = lm("sample", "a", "--prompt", transcript, "--no-echo", "--temperature", "0", *FLAGS)
    assert alone.out == f"{second}\n"


def test_a_line_that_is_no_text_is_refused_and_the_next_one_is_read(lm: Lm) -> None:
    (reply,) = replies(lm, "the cat sat")
    done = lm("chat", "a", *FLAGS, text=b"\xef\xbb\xbfthe\xff\nthe\0\nthe cat sat\r\n")
    assert (done.code, done.out) == (0, f"{reply}\n\n")
    assert "error: The line is not UTF-8: byte 6 (line 1) is 0xff." in done.err
    assert "error: The line looks like a binary file: byte 3 (line 1) is zero." in done.err


def test_the_same_seed_gives_the_same_replies_and_each_its_own(lm: Lm) -> None:
    lines = ("the", "the", "the")
    assert replies(lm, *lines) == replies(lm, *lines)
    assert len(set(replies(lm, *lines))) == 3
    done = lm("chat", "a", text="/quit\n")
    assert re.fullmatch(r"a@best · seed \d+ · /help lists the commands\n", done.err)


def test_a_model_of_lines_that_end_with_crlf_reads_such_lines_and_stops_at_a_blank_one(lm: Lm, tmp_path: Path) -> None:
    lines = "".join(f"{number % 5}\r\n{number % 5}.\r\n\r\n" for number in range(400))
    (tmp_path / "crlf.txt").write_bytes(lines.encode())
    assert lm("train", "crlf.txt", "--preset", "ngram-char", "--name", "crlf").code == 0
    done = lm("chat", "crlf", "--temperature", "0", "--max-tokens", "100", text="3\n1\n")
    # Stop texts are not part of a reply; a blank line of the terminal's kind follows each.
    assert done.out == "3.\n\n1.\n\n"
    assert load("crlf", runs_dir=tmp_path / "checkpoints").newline == "\r\n"
    assert load("a", runs_dir=tmp_path / "checkpoints").newline == "\n"


def test_undo_takes_the_last_exchange_back(lm: Lm) -> None:
    first, second, again = replies(lm, "the cat", "sat on", "/undo", "sat on")
    assert second == again and (first, second) == tuple(replies(lm, "the cat", "sat on"))
    done = lm("chat", "a", text="/undo\n")
    assert "There is no line to remove." in done.err


def test_reset_begins_again(lm: Lm) -> None:
    first, _, again = replies(lm, "the cat", "sat on", "/reset", "the cat")
    assert first == again


def test_probs_shows_how_likely_each_token_of_the_reply_was(lm: Lm) -> None:
    flags = ("--seed", "3", "--max-tokens", "6", "--temperature", "0", "--allow-unknown")
    out = lm("chat", "a", *flags, "--stop", "~", text="the cat\n/probs\n").out
    reply = lm("chat", "a", *flags, "--stop", "~", text="the cat\n").out
    lines = out.removeprefix(reply).splitlines()
    assert out.startswith(reply) and len(lines) == 6
    for line in lines:
        shares = [float(share) for share in re.findall(r"([\d.]+)%", line)]
        assert len(shares) == 5 and shares[0] == shares[1] == max(shares)
    assert lm("chat", "a", text="/probs\n").out == "There is no reply yet.\n"


def test_a_state_saved_in_a_chat_is_gone_on_from(lm: Lm, runs: Path) -> None:
    flags = ("--temperature", "0", *FLAGS)
    first, second = replies(lm, "the cat", "and", flags=flags)
    done = lm("chat", "a", *flags, text="the cat\n/state here\n/state bad/name\n/state\n")
    assert "Saved " in done.err and done.err.count("error: Snapshot ") == 2
    assert (runs / "a" / "states" / "here.safetensors").is_file()
    assert lm("chat", "a", "--state", "here", *flags, text="and\n").out == f"{second}\n\n"
    onward = lm("sample", "a", "--state", "here", "--prompt", "and\n", "--no-echo", *flags)
    assert onward.out == f"{second}\n"


def test_help_and_slips_are_answered_without_the_model(lm: Lm) -> None:
    done = lm("chat", "a", text="/help\n/prob\n/quit\nthe cat\n")
    assert (done.code, done.out) == (0, "")
    assert "/undo         remove your" in done.err and "Unknown command /prob. Did you mean '/probs'?" in done.err


def test_unknown_symbols_are_noted_or_refused_and_the_chat_continues(lm: Lm) -> None:
    done = lm("chat", "a", *FLAGS, text="the ☃\nthe cat\n")
    assert done.code == 0 and "symbols that the model never saw" in done.err
    strict = lm("chat", "a", *FLAGS, "--unknown", "error", text="the ☃\nthe cat\n".encode() + b"\xff\n")
    assert strict.code == 0 and "error: Line 1, column 5" in strict.err
    assert strict.out.count("\n\n") == 1


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no pty")
def test_a_terminal_is_read_line_by_line(runs: Path) -> None:
    ours, theirs = pty.openpty()
    chat = forked.Popen(
        ["chat", "a", *FLAGS], cwd=runs.parent, stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "TERM": "dumb"},
    )  # fmt: skip
    os.close(theirs)
    os.write(ours, b"the cat\n/quit\n")
    out, err = chat.communicate(timeout=60)
    os.close(ours)
    assert chat.returncode == 0, err
    assert out.count(b"> ") == 2 and b"\n\n" in out
