"""Two replicas on a local Ray cluster: one dies, and nobody who asks notices."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
import pytest

import lm
from serve.ray_proxy import MAX_BYTES, Proxy

pytestmark = pytest.mark.slow
ROOT = Path(lm.__file__).parents[1]
PATIENCE_SECONDS = 240
DEADLY = 13
LONG_TOKENS = 16_000
"""What takes more than a second to write."""
RUN, PROMPT, MAX_TOKENS, SEED = "shakespeare-gru", "ROMEO:", 40, 7


@dataclass
class Cluster:
    """The program, and what it says: Ray puts the process id of a replica before each line of its log."""

    process: subprocess.Popen[str]
    log: Path
    client: openai.OpenAI
    numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def ask(self, max_tokens: int = MAX_TOKENS) -> tuple[str, str]:
        """The id and the text of one request, which is not tried a second time."""
        done = self.client.completions.with_raw_response.create(
            model=RUN, prompt=PROMPT, max_tokens=max_tokens, seed=SEED,
            extra_headers={"X-Request-ID": f"request-{next(self.numbers)}"},
        )  # fmt: skip
        return done.headers["x-request-id"], done.parse().choices[0].text

    def lines(self) -> list[tuple[int, dict[str, object]]]:
        """What replicas logged so far: process id and facts."""
        found = re.findall(r"\(ServeReplica:\S+ pid=(\d+)\)\S* (\{.*\})", self.log.read_text("utf-8"))
        return [(int(pid), json.loads(line)) for pid, line in found]

    def started(self) -> set[int]:
        """The processes that ever loaded the run."""
        return {pid for pid, line in self.lines() if line["event"] == f"Loaded {RUN!r}."}

    def answered(self, ids: set[str]) -> set[int]:
        """The processes that answered these requests."""
        return {pid for pid, line in self.lines() if line.get("request_id") in ids}

    def wait(self, until: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not until():
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text("utf-8")
            time.sleep(0.05)

    def ask_until_answered_by(self, count: int, *, but: set[int] | None = None) -> tuple[set[int], set[str]]:
        """Ask until `count` processes other than `but` have answered: the processes and all texts."""
        ids, texts = set(), set()

        def enough() -> bool:
            request, text = self.ask()
            ids.add(request)
            texts.add(text)
            return len(self.answered(ids) - (but or set())) >= count

        self.wait(enough)
        return self.answered(ids), texts


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    folder = tempfile.mkdtemp(prefix="ray-")
    log = tmp_path_factory.mktemp("ray") / "log"
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DEDUP_LOGS": "0",
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serve.ray_proxy:middlewares",
        # Ray's processes give way to all others, and starve on a machine that is busy.
        "RAY_worker_niceness": "0",
        # Of this cluster alone; else Ray writes one into the user's home.
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
    }
    program = [sys.executable, str(Path(__file__).with_name("ray_cluster.py"))]
    with log.open("w", encoding="utf-8") as said, openai.OpenAI(
        base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=60
    ) as client:  # fmt: skip
        process = subprocess.Popen(
            [*program, folder, str(port), str(ROOT / "checkpoints"), str(DEADLY)],
            stdin=subprocess.PIPE, stdout=said, stderr=said, text=True, env=environment,
        )  # fmt: skip
        running = Cluster(process, log, client)
        try:
            running.wait(lambda: "two replicas are ready" in log.read_text("utf-8"))
            yield running
        except BaseException:
            process.terminate()
            raise
        finally:
            process.communicate(timeout=PATIENCE_SECONDS)
            shutil.rmtree(folder, ignore_errors=True)
    assert process.returncode == 0


@pytest.fixture(scope="module")
def text() -> str:
    """What the library writes."""
    return lm.load(RUN).sample(PROMPT, max_tokens=MAX_TOKENS, seed=SEED)


@pytest.mark.soak
def test_when_a_replica_is_killed_the_other_answers_and_a_new_one_comes(cluster: Cluster, text: str):
    both, texts = cluster.ask_until_answered_by(2)
    assert len(both) == 2 and texts == {text}
    killed = both.pop()
    with ThreadPoolExecutor() as asking:
        # Some of these are being answered by each; what has no answer yet is asked again.
        begun = [asking.submit(cluster.ask, LONG_TOKENS) for _ in range(6)]
        time.sleep(0.5)
        assert not any(each.done() for each in begun)
        os.kill(killed, signal.SIGKILL)
        answered = [each.result() for each in begun]
    assert {len(long) for _, long in answered} == {LONG_TOKENS} and len({long for _, long in answered}) == 1
    # Every request from here on succeeds; a new process takes part in the end.
    after, texts = cluster.ask_until_answered_by(2, but={killed})
    assert texts == {text}
    assert both < after and killed not in after and len(after) == 2 and after <= cluster.started()


@pytest.mark.soak
def test_a_replica_whose_engine_died_is_replaced(cluster: Cluster, text: str):
    both, _ = cluster.ask_until_answered_by(2)
    with pytest.raises(openai.InternalServerError) as broken:
        cluster.ask(max_tokens=DEADLY)
    assert broken.value.code == "engine_dead"
    # Until Ray has looked, some requests still come to it and fail, which the official client takes care of.
    patient = Cluster(cluster.process, cluster.log, cluster.client.with_options(max_retries=10), cluster.numbers)
    after, texts = patient.ask_until_answered_by(1, but=both)
    assert texts == {text}
    assert after <= cluster.started()


BODY = [{"type": "http.request", "body": b"a", "more_body": True}, {"type": "http.request", "body": b"b"}]


def through_proxy(*answers: list[dict[str, Any]], body: list[dict[str, Any]] = BODY) -> tuple[list[bytes], list[Any]]:
    """The bodies that reach replicas which answer so, one after the other, and what the client is sent."""
    left, bodies, sent = iter(answers), [], []
    messages = iter(body)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        parts = [await receive()]
        while parts[-1].get("more_body"):
            parts.append(await receive())
        bodies.append(b"".join(part.get("body", b"") for part in parts))
        for message in next(left):
            await send(message)

    async def receive() -> Any:
        return next(messages)

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "headers": [(b"x-request-id", b"mine")]}
    asyncio.run(Proxy(app)(scope, receive, send))
    return bodies, sent


def test_a_request_without_an_answer_is_sent_again_with_its_whole_body():
    start = {"type": "http.response.start", "status": 200, "headers": []}
    end = {"type": "http.response.body", "body": b"text"}
    assert through_proxy([], [], [start, end]) == ([b"ab"] * 3, [start, end])
    # An answer that has begun is not begun again, and nobody is left to answer a client that is gone.
    assert through_proxy([start]) == ([b"ab"], [start])
    assert through_proxy([], body=[{"type": "http.disconnect"}]) == ([b""], [])
    long = {"type": "http.request", "body": b"a" * (MAX_BYTES + 1), "more_body": True}
    bodies, sent = through_proxy([], body=[long, BODY[1]])
    assert [len(each) for each in bodies] == [MAX_BYTES + 2] and sent[0]["status"] == 502


@pytest.mark.parametrize(("status", "code"), [(429, "rate_limit_exceeded"), (503, "replica_gone"), (404, None)])
def test_errors_of_ray_itself_have_the_form_of_all_errors(status, code):
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", b"4"), (b"retry-after", b"1")]
    start = {"type": "http.response.start", "status": status, "headers": headers}
    _, sent = through_proxy([start, {"type": "http.response.body", "body": b"Full"}])
    given = dict(sent[0]["headers"])
    error = json.loads(sent[1]["body"])["error"]
    assert (sent[0]["status"], error["message"], error["code"]) == (status, "Full", code)
    assert given[b"content-type"] == b"application/json" and given[b"retry-after"] == b"1"
    assert int(given[b"content-length"]) == len(sent[1]["body"]) and len(given) == len(sent[0]["headers"])


def test_when_every_replica_goes_away_the_error_says_so():
    _, sent = through_proxy([], [], [])
    error = json.loads(sent[1]["body"])["error"]
    assert (sent[0]["status"], error["code"], error["type"]) == (502, "replica_gone", "server_error")
    assert (b"x-request-id", b"mine") in sent[0]["headers"]


def test_wrong_arguments_are_refused_in_one_sentence_and_right_ones_documented():
    wrong = {
        "Unknown option min_replica. Did you mean 'min_replicas'?": {"min_replica": "2"},
        "max_replicas = '2': must not be less than min_replicas 3.": {"min_replicas": "3", "max_replicas": "2"},
        "port = '8001': belongs to Ray's proxies: set it under http_options.": {"port": "8001"},
    }
    # In a process of its own: Ray's modules warn when they are imported.
    code = """
import json, sys
from lm.errors import ConfigError
from serve.ray_app import RayOptions, ServeOptions, application
for arguments in json.loads(sys.argv[1]):
    try:
        application(arguments)
    except ConfigError as error:
        print(error)
print(*(name for name in RayOptions.model_fields if name not in ServeOptions.model_fields))
"""
    ran = subprocess.run(
        [sys.executable, "-c", code, json.dumps(list(wrong.values()))], cwd=ROOT, capture_output=True, text=True,
        timeout=PATIENCE_SECONDS, check=False,
    )  # fmt: skip
    *sentences, names = ran.stdout.splitlines()
    assert sentences == list(wrong), ran.stderr
    page = (ROOT / "docs" / "how-to" / "serve-on-several-machines.md").read_text("utf-8")
    assert re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE) == names.split()
