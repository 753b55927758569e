"""`lm page`: the server with the browser opened, also for who has no run yet."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from cli import main as program
from serve.settings import ServeOptions
from tests.cli.conftest import Lm

pytestmark = pytest.mark.slow

ROOT = Path(program.__file__).parents[1]
WITHOUT_RUNS = (
    "import sys, pathlib; from lm.runs import run_folder as r; r.shipped_folder = lambda: pathlib.Path('none')\n"
    "from cli.main import main; main()"
)
WITHOUT_GRADIO = "import sys; sys.modules['gradio'] = None\nfrom cli.main import main; main()"


def environment(**more: str) -> dict[str, str]:
    known = {name: value for name, value in os.environ.items() if name not in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER")}
    return {**known, "PYTHONPATH": str(ROOT), **more}


@contextlib.contextmanager
def running(code: str, *arguments: str, cwd: Path, **more: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The program, and what it said until it answered."""
    with subprocess.Popen(
        [sys.executable, "-c", code, *arguments], cwd=cwd, env=environment(**more), stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, encoding="utf-8",
    ) as process:  # fmt: skip
        assert process.stdout is not None and process.stderr is not None
        said = ""
        while " -d '" not in said:
            line = process.stdout.readline()
            assert line, process.stderr.read()
            said += line
        try:
            yield process, said
        finally:
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=60)
        assert process.returncode == 0


def ask(url: str, **body: object) -> tuple[int, str]:
    data = json.dumps(body).encode() if body else None
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_who_has_no_run_gets_a_page_on_the_next_free_port_and_the_browser_goes_there(tmp_path: Path) -> None:
    browser = tmp_path / "browser"
    browser.write_text('#!/bin/sh\necho "$1" >> "$0.log"\n')
    browser.chmod(0o755)
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            # Where it is in use already, all the better.
            stack.enter_context(socket.create_server(("127.0.0.1", ServeOptions().port)))
        process, said = stack.enter_context(running(WITHOUT_RUNS, "page", cwd=tmp_path, BROWSER=str(browser)))
        url = re.findall(r"(http://127.0.0.1:(\d+))/page/", said)[0]
        assert ServeOptions().port < int(url[1]) <= ServeOptions().port + 50
        assert "none yet" in said
        for path in ("/page/", "/health", "/health/ready", "/metrics", "/docs"):
            assert ask(url[0] + path)[0] == 200, path
        assert json.loads(ask(f"{url[0]}/v1/models")[1]) == {"object": "list", "data": [], "skipped": []}
        for path in ("/v1/completions", "/v1/score", "/tokenize"):
            for named in ({}, {"model": "x"}):
                status, answer = ask(url[0] + path, prompt="a", text="a", **named)
                if status != 400:
                    error = json.loads(answer)["error"]
                    assert (status, error["code"]) == (404, "model_not_found") and "train one" in error["message"]
        assert ask(f"{url[0]}/tokenizer_info")[0] == ask(f"{url[0]}/v1/models/x")[0] == 404
        process.send_signal(signal.SIGHUP)
        assert ask(f"{url[0]}/health/ready")[0] == 200
        assert (tmp_path / "browser.log").read_text() == f"{url[0]}/page/\n"


def test_a_requested_port_is_taken_or_refused(lm: Lm, runs: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = lm("page", "a", "--port", port, "--no-browser")
    assert done.code == 1 and f"Cannot listen on 127.0.0.1, port {port}: address already in use." in done.err


def test_the_browser_stays_closed_where_that_is_said(runs: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    code = f"import sys, webbrowser; webbrowser.open = lambda url: open({str(log)!r}, 'a').write(url)\n{WITHOUT_RUNS}"
    with running(code, "page", "a", "--no-browser", "--port", "0", cwd=tmp_path, BROWSER="x") as (_, said):
        assert "/page/" in said and not log.exists()


def test_without_gradio_there_is_no_page_and_a_sentence(runs: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_GRADIO, "page", "a", "--port", "0"], cwd=tmp_path, env=environment(),
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, "")
    assert (
        done.stderr
        == "error: lm page needs gradio, which is not installed: pip install '.[serve]' in a checkout of Inkling\n"
    )


def test_without_gradio_the_api_is_served_all_the_same(runs: Path, tmp_path: Path) -> None:
    with running(WITHOUT_GRADIO, "serve", "a", "--port", "0", cwd=tmp_path) as (_, said):
        lines = [line for line in said.splitlines() if line.lstrip().startswith("page ")]
        assert len(lines) == 1 and "missing" in lines[0] and "pip install '.[serve]'" in lines[0]
        assert "gradio" in lines[0]
        url = re.findall(r"http://127.0.0.1:\d+", said)[0]
        assert ask(f"{url}/v1/completions", prompt="the", max_tokens=1)[0] == 200
        assert ask(f"{url}/")[0] == ask(f"{url}/page/")[0] == 404


def test_every_option_of_the_server_is_one_of_the_page(lm: Lm) -> None:
    shown = " ".join(lm("page", "--help").out.split())
    for name in ServeOptions.model_fields:
        if name not in ("runs", "no_page"):
            assert f"--{name.replace('_', '-')} " in shown
    assert "--no-browser" in shown and "--no-page" not in shown
