"""Small trained runs, and `lm serve` as a process of its own in front of them."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import openai
import pytest

import lm
from cli import main as program
from tests import forked

T = TypeVar("T")
ROOT = Path(program.__file__).parents[1]
CONTEXT = 32
"""Of the Transformer."""
MODELS: dict[str, dict[str, Any]] = {
    "gru": {"preset": "gru-char", "model.hidden_size": 32, "model.embedding_size": 16, "model.table_orders": []},
    "transformer": {
        "preset": "transformer-char", "model.hidden_size": 32, "model.num_heads": 2, "model.num_layers": 2,
        "model.context_length": CONTEXT, "model.table_orders": [], "training.optimizer": "adamw",
    },
    "words": {"preset": "gru-word", "model.hidden_size": 16, "model.embedding_size": 16},
    "pieces": {
        "preset": "gru-subword", "model.hidden_size": 16, "model.embedding_size": 16, "tokenizer.size": 300,
    },
}  # fmt: skip
STEPS = {"training.max_steps": 60, "training.batch_size": 8, "training.bptt": 32, "training.warmup_steps": 0}


def make_text(lines: int, seed: int = 5) -> str:
    source = random.Random(seed)
    words = ("the cat", "sat on", "a mat", "and", "saw", "one red", "hen", "run by", "its", "dén", "in fog ☂")
    return "".join(" ".join(source.choice(words) for _ in range(8)) + ".\n" for _ in range(lines))


def train(folder: Path, name: str, *, seed: int = 1, overwrite: bool = False, kind: str | None = None) -> None:
    """A small run `name` under `folder`, of the model that it is called after."""
    text = folder / "text.txt"
    if not text.exists():
        folder.mkdir(parents=True, exist_ok=True)
        text.write_text(make_text(400), "utf-8")
    overrides = {**MODELS[kind or name], **STEPS, "training.seed": seed}
    config = lm.compose(str(text), preset=str(overrides.pop("preset")), overrides=overrides)
    lm.train(str(text), config, name=name, runs_dir=folder, overwrite=overwrite)


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A runs folder with one run of each of MODELS."""
    folder = tmp_path_factory.mktemp("runs")
    for name in MODELS:
        train(folder, name)
    return folder


def until(value: Callable[[], T], seconds: float = 30, said: Callable[[], str] = str) -> T:
    """What `value` gives as soon as that is true; `said` describes what there is instead once the time is over."""
    deadline = time.monotonic() + seconds
    while not (found := value()):
        assert time.monotonic() < deadline, said()
        time.sleep(0.02)
    return found


@dataclass
class Server:
    """A running `lm serve`."""

    process: subprocess.Popen[str]
    port: int
    said: str
    """What it printed when it started."""
    log_path: Path
    key: str | None = None
    clients: list[openai.OpenAI] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def openai(self) -> openai.OpenAI:
        """The official client."""
        if not self.clients:
            key = self.key or "none"
            self.clients.append(openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60))
        return self.clients[0]

    def request(
        self, method: str, path: str, body: Any = None, *, headers: dict[str, str] | None = None, timeout: float = 60
    ) -> tuple[int, dict[str, str], Any]:
        """Status, headers and the decoded body of one request on a new connection; compressed bodies stay bytes."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        given = {"Content-Type": "application/json"} if body is not None else {}
        if self.key:
            given["Authorization"] = f"Bearer {self.key}"
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        try:
            connection.request(method, path, data, {**given, **(headers or {})})
            answer = connection.getresponse()
            content = answer.read()
            received = {name.lower(): value for name, value in answer.getheaders()}
            if "content-encoding" in received:
                return answer.status, received, content
            is_json = bool(content) and received.get("content-type", "").startswith("application/json")
            return answer.status, received, json.loads(content) if is_json else content.decode("utf-8")
        finally:
            connection.close()

    def post(self, path: str, **body: Any) -> Any:
        """The answer to a request that succeeds."""
        status, _, answer = self.request("POST", path, body)
        assert status == 200, answer
        return answer

    def metric(self, *names: str) -> float:
        """The sum of some figures at /metrics, all of one moment."""
        text = self.request("GET", "/metrics")[2]
        wanted = "|".join(names)
        return sum(float(value) for value in re.findall(rf"^(?:{wanted})(?:{{.*}})? (\S+)$", text, re.MULTILINE))

    def texts(self) -> float:
        """Texts that are written, read or waiting."""
        return self.metric(*(f"inkling_engine_{place}" for place in ("running", "prefilling", "waiting")))

    def blocked(self) -> float:
        """How often the server's own work kept the event loop for more than 50 ms."""
        text = self.request("GET", "/metrics")[2]
        name = "inkling_event_loop_blocked_seconds"
        count, less = (re.search(rf"^{name}_{end} (\S+)$", text, re.M) for end in ("count", 'bucket{le="0.05"}'))
        assert count and less
        return float(count[1]) - float(less[1])

    def wait_idle(self, seconds: float = 30) -> None:
        """Until no slot is taken."""
        until(lambda: not self.texts(), seconds, lambda: "slots were not freed")

    def log(self) -> list[dict[str, Any]]:
        """The lines of the log so far, each JSON."""
        with contextlib.suppress(OSError):
            # A line is written after its answer, but before another request is looked at.
            self.request("GET", "/health")
        return [json.loads(line) for line in self.log_path.read_text("utf-8").splitlines()]

    def rss(self) -> int:
        """Bytes of memory that it holds."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.findall(r"VmRSS:\s+(\d+) kB", status)[0]) * 1024

    def end(self, number: int = signal.SIGTERM, timeout: float = 60) -> int:
        """Its exit code after a signal."""
        self.process.send_signal(number)
        return self.process.wait(timeout)

    def close(self) -> None:
        for client in self.clients:
            client.close()
        if self.process.poll() is None:
            self.end()
        if self.process.stdout is not None:
            self.process.stdout.close()


Serve = Callable[..., contextlib.AbstractContextManager[Server]]


@pytest.fixture(scope="session")
def serve(tmp_path_factory: pytest.TempPathFactory, runs: Path) -> Serve:
    """with serve("gru", "--max-batch", "4") as server: a server of the session's runs, or of `runs_dir`.

    It has the page only where `page` says so: that takes seconds.
    """

    @contextlib.contextmanager
    def start(
        *arguments: str, runs_dir: Path = runs, key: str | None = None, page: bool = False, **environment: str
    ) -> Iterator[Server]:
        log = tmp_path_factory.mktemp("server") / "log"
        given = [*(["--api-key", key] if key else []), *([] if page else ["--no-page"]), *arguments]
        with log.open("w", encoding="utf-8") as stderr:
            # Gradio is warned of what pandas is about to change, and leaves event loops open.
            process = forked.Popen(
                ["serve", "--runs-dir", str(runs_dir), "--port", "0", *given], strict=not page,
                imported=("serve.page",) if page else (), cwd=runs_dir,
                stdout=subprocess.PIPE, stderr=stderr, text=True, encoding="utf-8", env={**os.environ, **environment},
            )  # fmt: skip
        assert process.stdout is not None
        said = ""
        while " -d '" not in said:
            line = process.stdout.readline()
            if not line:
                process.stdout.close()
                process.wait(60)
                pytest.fail(f"The server ended: {log.read_text('utf-8')}")
            said += line
        port = re.findall(r"http://127.0.0.1:(\d+)/v1", said)[0]
        server = Server(process, int(port), said, log, key)
        try:
            yield server
        finally:
            server.close()

    return start


@pytest.fixture(scope="module")
def server(serve: Serve) -> Iterator[Server]:
    """A server of all runs, shared by the tests of a file."""
    with serve("gru", "transformer", "words", "pieces") as running:
        yield running


def refusal(server: Server, body: Any, path: str = "/v1/completions", **headers: str) -> tuple[int, dict[str, Any]]:
    """The status and the error of a request that fails, in OpenAI's form."""
    status, received, answer = server.request("POST", path, body, headers=headers)
    assert status >= 400, answer
    assert answer.keys() == {"error"} and answer["error"].keys() == {"message", "type", "param", "code"}
    assert received["x-request-id"]
    return status, answer["error"]
