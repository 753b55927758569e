"""What operators meet: the start, the end, health, figures, logs, and an engine that dies."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import uvicorn
from fastapi import FastAPI

from serve.app import make_app
from serve.connection import connection_class
from serve.program import listen, run
from serve.settings import ServeOptions, retry_after
from tests import forked
from tests.serve.conftest import ROOT, Serve, until

pytestmark = pytest.mark.slow


def lm_serve(*arguments: str, cwd, **environment: str) -> subprocess.CompletedProcess[str]:
    return forked.run(
        ["serve", *arguments], strict=True, cwd=cwd, capture_output=True, text=True, timeout=60,
        env={**os.environ, **environment},
    )  # fmt: skip


# -- the start --------------------------------------------------------------------------------------


def test_the_start_message_has_address_models_and_key_and_its_curl_line_works(server):
    assert f"{server.url}/v1" in server.said and "gru, transformer, words, pieces" in server.said
    assert re.search(r"key +none", server.said)
    command = server.said[server.said.index("curl") :].strip()
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(done.stdout)["choices"][0]["finish_reason"] == "length"


def test_a_port_in_use_is_one_sentence(server, runs):
    done = lm_serve("gru", "--runs-dir", str(runs), "--port", str(server.port), cwd=runs)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error: Cannot listen on 127.0.0.1, port {server.port}: address already in use.")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["grue"], "No run 'grue'"),
        (["gru@step-3"], "has no checkpoint 'step-3'"),
        (["gru", "--port", "70000"], "serve.port = 70000: give a number of at most 65535."),
        (["gru", "--max-memory", "2 apples"], "serve.max_memory = '2 apples'"),
        (["gru", "--max-memory", "1kB"], "more than --max-memory 1,000"),
        (["gru", "--api-key-file", "nowhere"], "--api-key-file nowhere: No such file"),
        (["gru", "--api-key", " "], "must not be empty"),
        (["gru", "--host", "256.0.0.1"], "Cannot listen on 256.0.0.1"),
    ],
)
def test_a_wrong_run_or_option_is_one_sentence(runs, arguments, sentence):
    done = lm_serve(*arguments, "--runs-dir", str(runs), cwd=runs)
    assert (done.returncode, done.stdout) == (1, ""), done
    assert sentence in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


def test_no_runs_at_all_says_how_to_train_one(tmp_path):
    code = (
        "from lm.runs import run_folder; from pathlib import Path; run_folder.shipped_folder = lambda: Path('none')\n"
        "from serve.engines.model_pool import ModelPool; from serve.settings import ServeOptions\n"
        "ModelPool(ServeOptions())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert "train one with lm train FILE" in done.stderr


def test_without_the_extra_the_message_names_what_to_install(runs):
    code = (
        "import sys; sys.modules['fastapi'] = None; sys.argv = ['lm', 'serve', 'gru']\n"
        "from cli.main import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert (
        done.stderr
        == "error: lm serve needs fastapi, which is not installed: pip install '.[serve]' in a checkout of Inkling\n"
    )


def test_every_option_is_a_flag(server):
    done = lm_serve("--help", cwd=ROOT)
    shown = " ".join(done.stdout.split())
    for name, field in ServeOptions.model_fields.items():
        if name != "runs":
            assert f"--{name.replace('_', '-')} " in shown
        assert field.description


def test_connections_that_wait_are_accepted_together_and_not_one_a_turn_of_the_loop():
    app, options, turns, seen = FastAPI(), ServeOptions(port=0), 0, []
    app.state.draining = asyncio.Event()
    deadline = time.monotonic() + 20

    @app.get("/")
    async def look() -> None:
        seen.append(turns)

    def count() -> None:
        nonlocal turns
        turns += 1
        if len(seen) == len(clients) or time.monotonic() > deadline:
            signal.raise_signal(signal.SIGTERM)
        else:
            asyncio.get_running_loop().call_soon(count)

    with contextlib.ExitStack() as stack:
        listening = stack.enter_context(listen(options))
        # Connections inherit it, and asyncio looks for it before it turns off Nagle's delay.
        assert listening.proto == socket.IPPROTO_TCP
        clients = [stack.enter_context(socket.create_connection(listening.getsockname())) for _ in range(60)]
        for client in clients:
            client.sendall(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        run(app, options, listening, count)
        assert all(client.recv(12) == b"HTTP/1.1 200" for client in clients)
    assert len(seen) == 60 and seen[-1] - seen[0] < 30, seen


# -- the end ----------------------------------------------------------------------------------------


def refuses_connections(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    except ConnectionRefusedError:
        return True
    return False


def test_sigterm_lets_requests_end_and_exits_0(serve: Serve):
    with serve("gru", "--max-completion-tokens", "1000000") as server:
        asked = {"model": "gru", "prompt": "the", "max_tokens": 60_000, "seed": 2}
        stream = server.openai.completions.create(stream=True, **asked)
        parts = [next(iter(stream)).choices[0].text]
        server.process.send_signal(signal.SIGTERM)
        until(lambda: refuses_connections(server.port))
        assert server.process.poll() is None
        parts += [chunk.choices[0].text for chunk in stream]
        assert len("".join(parts)) == 60_000
        assert server.process.wait(20) == 0
        assert any(line["event"] == "Shutting down." for line in server.log())
        assert all(line["level"] == "info" for line in server.log())


def test_a_request_that_exceeds_the_drain_time_gets_an_error_and_the_exit_code_is_0(serve: Serve):
    with serve("gru", "--drain-seconds", "1", "--max-completion-tokens", "10000000") as server:
        ask = {"model": "gru", "prompt": "the", "max_tokens": 10_000_000}
        stream = server.openai.completions.create(**ask, stream=True)
        next(iter(stream))
        with ThreadPoolExecutor() as pool:
            whole = pool.submit(server.request, "POST", "/v1/completions", ask)
            until(lambda: server.texts() == 2)
            started = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            with pytest.raises(openai.APIError, match="The server is shutting down"):
                for _ in stream:
                    pass
            status, _, answer = whole.result()
        assert (status, answer["error"]["code"]) == (503, "shutting_down")
        assert server.process.wait(20) == 0
        assert time.monotonic() - started > 0.5


def test_an_idle_server_ends_at_once_on_ctrl_c(serve: Serve):
    with serve("gru") as server:
        assert server.post("/v1/completions", prompt="the", max_tokens=1)
        assert server.end(signal.SIGINT) == 0


# -- looking ----------------------------------------------------------------------------------------


def test_health_is_live_and_ready(server):
    for path in ("/health", "/health/ready"):
        status, _, answer = server.request("GET", path)
        assert (status, answer) == (200, {"status": "ok", "dead": [], "skipped": []})


def test_metrics_count_requests_tokens_and_texts(serve: Serve):
    with serve("gru") as server:
        for _ in range(3):
            server.post("/v1/completions", prompt="the", max_tokens=7)
        server.request("POST", "/v1/completions", {"temperature": -1})
        server.request("GET", "/no/such/thing")
        text = server.request("GET", "/metrics")[2]
        assert 'inkling_requests_total{method="POST",route="/v1/completions",status="200"} 3.0' in text
        assert 'inkling_requests_total{method="POST",route="/v1/completions",status="400"} 1.0' in text
        assert 'inkling_requests_total{method="any",route="other",status="404"} 1.0' in text
        assert 'inkling_engine_drawn_tokens_total{model="gru"} 21.0' in text
        assert 'inkling_engine_healthy{model="gru"} 1.0' in text
        assert 'inkling_first_text_seconds_count{route="/v1/completions"} 3.0' in text
        assert "no/such" not in text


def test_metrics_have_the_lag_of_the_event_loop(server):
    started, before = time.monotonic(), server.metric("inkling_event_loop_lag_seconds_count")
    until(lambda: server.metric("inkling_event_loop_lag_seconds_count") >= before + 5)
    # A sample every 20 ms.
    more = server.metric("inkling_event_loop_lag_seconds_count") - before
    assert more <= (time.monotonic() - started) / 0.02 + 1
    assert server.metric("inkling_event_loop_lag_seconds_sum") >= 0


def test_the_log_has_a_json_line_a_request_with_its_id_and_no_prompt(serve: Serve):
    with serve("gru") as server:
        server.request("POST", "/v1/completions", {"prompt": "secret words", "max_tokens": 5, "seed": 9},
                       headers={"X-Request-ID": "mine-1"})  # fmt: skip
        assert server.request("GET", "/health", headers={"X-Request-ID": "mine-2"})[1]["x-request-id"] == "mine-2"
        assert server.request("GET", "/health", headers={"X-Request-ID": "no good"})[1]["x-request-id"][:4] == "req-"
        refused = server.request("POST", "/v1/completions", {"prompt": "a", "stop": ["secret words", ""]})
        assert refused[0] == 400
        (line,) = [line for line in server.log() if line.get("request_id") == "mine-1"]
        assert (line["level"], line["event"], line["method"], line["path"]) == (
            "info", "request", "POST", "/v1/completions"
        )  # fmt: skip
        assert (line["status"], line["model"], line["seed"]) == (200, "gru", 9)
        assert (line["prompt_tokens"], line["completion_tokens"]) == (12, 5)
        assert 0 <= line["first_text_seconds"] <= line["seconds"] < 10
        assert "secret" not in server.log_path.read_text("utf-8")


def test_the_log_has_prompts_on_request(serve: Serve):
    with serve("gru", "--log-prompts") as server:
        server.post("/v1/completions", prompt="secret words", max_tokens=1)
        server.post("/v1/score", text="other words")
        assert [line["prompt"] for line in server.log() if "prompt" in line] == ["secret words", "other words"]


def test_browsers_of_other_origins_are_accepted_only_on_request(serve: Serve, server):
    asked = {"Origin": "https://a.example"}
    preflight = {**asked, "Access-Control-Request-Method": "POST"}
    assert "access-control-allow-origin" not in server.request("GET", "/health", headers=asked)[1]
    assert server.request("OPTIONS", "/v1/completions", headers=preflight)[0] == 405
    with serve("gru", "--cors-origin", "https://a.example", key="k") as open_server:
        received = open_server.request("GET", "/health", headers=asked)[1]
        assert received["access-control-allow-origin"] == "https://a.example"
        open_server.key = None
        assert open_server.request("OPTIONS", "/v1/completions", headers=preflight)[0] == 200
        other = {"Origin": "https://b.example"}
        assert "access-control-allow-origin" not in open_server.request("GET", "/health", headers=other)[1]


def test_the_docs_need_no_other_host(server):
    status, headers, page = server.request("GET", "/docs")
    assert status == 200 and headers["content-type"].startswith("text/html")
    files = re.findall(r"""(?:src|href)=["']?([^"'>]+)""", page)
    assert len(files) == 3 and "http://" not in page and "https://" not in page and '"validatorUrl": null' in page
    for file in files:
        assert not file.startswith("/") and server.request("HEAD", f"/{file}")[0] == 200
    assert "url: 'openapi.json'" in page
    document = server.request("GET", "/openapi.json")[2]
    assert document["info"]["title"] == "Inkling" and "/v1/completions" in document["paths"]


@pytest.mark.parametrize(("seconds", "received"), [(0.0, 1), (0.2, 1), (3.1, 4), (1000.0, 60)])
def test_retry_after_is_a_whole_number_within_reason(seconds, received):
    assert retry_after(seconds) == received


# -- an engine that dies ------------------------------------------------------------------------------


class _Breaking:
    """A decoder that fails after a while, as one whose device was lost would."""

    def __init__(self, decoder, steps: int) -> None:
        self._decoder, self._left = decoder, steps

    def __getattr__(self, name):
        return getattr(self._decoder, name)

    def step(self, slots, ids):
        self._left -= 1
        if self._left < 0:
            raise RuntimeError("the device is gone")
        return self._decoder.step(slots, ids)


@contextlib.contextmanager
def here(app, options):
    """The app behind a port, in a thread of this process."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        config = uvicorn.Config(app, http=connection_class(options), ws="none", log_config=None, access_log=False)
        running = uvicorn.Server(config)
        thread = threading.Thread(target=lambda: asyncio.run(running.serve([listening])))
        switch = sys.getswitchinterval()
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            running.should_exit = True
            thread.join(30)
            sys.setswitchinterval(switch)


def ask(url: str, body=None):
    """Status and body, whatever the status."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json", "Authorization": "Bearer k"})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


@pytest.mark.parametrize("stream", [False, True])
def test_a_dead_engine_ends_all_its_requests_is_unhealthy_and_can_be_replaced(runs, stream):
    options = ServeOptions(runs=("gru",), runs_dir=runs, api_key=("k",))
    app = make_app(options)
    models = app.state.models
    models.preload()
    engine = models.loaded["gru"].worker.engine
    engine.decoder = _Breaking(engine.decoder, 20)
    with here(app, options) as url:
        body = {"prompt": "the", "max_tokens": 10, "seed": 1}
        text = json.loads(ask(f"{url}/v1/completions", body)[1])["choices"]
        assert ask(f"{url}/health")[0] == 200
        status, answer = ask(f"{url}/v1/completions", {**body, "max_tokens": 100, "stream": stream})
        error = json.loads(answer.strip().rpartition("data: ")[2])["error"]
        assert (status, error["code"], error["type"]) == (200 if stream else 500, "engine_dead", "server_error")
        assert "[DONE]" not in answer and "The engine of the model 'gru' died." in error["message"]
        for path in ("/health", "/health/ready"):
            assert ask(url + path) == (503, '{"status":"dead","dead":["gru"],"skipped":[]}')
        assert ask(f"{url}/v1/completions", body)[0] == 500
        assert 'inkling_engine_healthy{model="gru"} 0.0' in ask(f"{url}/metrics")[1]
        assert ask(f"{url}/admin/reload", {}) == (200, '{"models":{"gru":"reloaded"}}')
        assert ask(f"{url}/health")[0] == 200
        assert json.loads(ask(f"{url}/v1/completions", body)[1])["choices"] == text


def test_an_engine_that_hangs_is_not_healthy(runs, monkeypatch):
    monkeypatch.setattr("serve.engines.worker.STUCK_SECONDS", 0.2)
    options = ServeOptions(runs=("gru",), runs_dir=runs)
    app = make_app(options)
    models = app.state.models
    models.preload()
    engine, hang = models.loaded["gru"].worker.engine, threading.Event()
    step = engine.decoder.step
    engine.decoder = _Breaking(engine.decoder, 0)
    engine.decoder.step = lambda slots, ids: (hang.wait(20), step(slots, ids))[1]
    with here(app, options) as url:
        asked = threading.Thread(target=ask, args=(f"{url}/v1/completions", {"prompt": "the", "max_tokens": 3}))
        asked.start()
        until(lambda: ask(f"{url}/health")[0] == 503)
        hang.set()
        asked.join(20)
        until(lambda: ask(f"{url}/health")[0] == 200)
