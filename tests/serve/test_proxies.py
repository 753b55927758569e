"""Documented configurations of HAProxy and nginx (docs/how-to/serve-on-several-machines.md), before two replicas."""

from __future__ import annotations

import contextlib
import http.client
import json
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serve.conftest import ROOT, Serve, Server, until

pytestmark = pytest.mark.slow

PROXIES = ("haproxy", "nginx")
LONG = {"model": "gru", "prompt": "the", "max_tokens": 10_000_000, "seed": 1}
AROUND_NGINX = """
daemon off;
user root;
pid {folder}/pid;
error_log stderr;
events {{ }}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    {inside}
}}
"""
"""What a system's own nginx.conf has, for a program that anybody may start anywhere."""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def documented(language: str, ports: dict[str, int]) -> str:
    """The file that the page links to, with other ports."""
    found = (ROOT / "docs" / "how-to" / {"haproxy": "haproxy.cfg", "nginx": "nginx.conf"}[language]).read_text("utf-8")
    for port, other in ports.items():
        assert port in found
        found = found.replace(port, str(other))
    return found


def program(name: str, config: str, folder: Path) -> list[str]:
    path = shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/local/sbin")
    if path is None:
        pytest.skip(f"needs {name}: apt-get install {name}")
    if name == "nginx":
        config = AROUND_NGINX.format(folder=folder, inside=config)
    (folder / "config").write_text(config, "utf-8")
    return [path, "-db", "-f", str(folder / "config")] if name == "haproxy" else [path, "-c", str(folder / "config")]


@pytest.fixture(scope="module")
def replicas(serve: Serve) -> Iterator[list[Server]]:
    options = ("--max-completion-tokens", "10000000", "--trusted-proxy", "127.0.0.1")
    with serve("gru", *options) as one, serve("gru", *options) as two:
        yield [one, two]


@pytest.fixture(scope="module")
def proxies(replicas: list[Server], tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, int]]:
    """Both of them in front of the same replicas: the port of each."""
    ports = {}
    with contextlib.ExitStack() as stack:
        for name in PROXIES:
            ports[name] = free_port()
            config = documented(name, {"8000": ports[name], "8001": replicas[0].port, "8002": replicas[1].port})
            said = tmp_path_factory.mktemp(name) / "said"
            with said.open("w") as written:
                process = subprocess.Popen(program(name, config, said.parent), stdout=written, stderr=written)
            stack.callback(process.wait, 20)
            stack.callback(process.terminate)
            # The health check of HAProxy has to find the replicas first.
            until(lambda port=ports[name]: answers(port), said=said.read_text)
        yield ports


def answers(port: int) -> bool:
    try:
        return ask(port, max_tokens=1)[0] == 200
    except OSError:
        return False


def ask(port: int, more: dict[str, str] | None = None, **body: Any) -> tuple[int, dict[str, str], Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    with contextlib.closing(connection):
        headers = {"Content-Type": "application/json", **(more or {})}
        connection.request("POST", "/v1/completions", json.dumps({**LONG, **body}), headers)
        answer = connection.getresponse()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, json.loads(answer.read())


@contextlib.contextmanager
def open_request(port: int, **body: Any) -> Iterator[socket.socket]:
    data = json.dumps({**LONG, **body}).encode()
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%b" % (len(data), data)
        )
        yield connection


@pytest.mark.parametrize("proxy", PROXIES)
def test_streams_pass_piece_by_piece_and_both_replicas_get_work(proxies, replicas, proxy):
    with open_request(proxies[proxy], stream=True) as one, open_request(proxies[proxy], stream=True) as two:
        for stream in (one, two):
            # The text is endless, and its beginning is here.
            read = b""
            while b"data: " not in read:
                read += stream.recv(4096)
        # Nobody reads them, so that they may pause.
        assert [replica.texts() for replica in replicas] == [1, 1]
    for replica in replicas:
        replica.wait_idle()


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("proxy", PROXIES)
def test_requests_whose_clients_went_away_are_given_up(proxies, replicas, proxy, stream):
    with contextlib.ExitStack() as stack:
        for _ in range(6):
            stack.enter_context(open_request(proxies[proxy], stream=stream))
        until(lambda: sum(replica.texts() for replica in replicas) == 6)
    for replica in replicas:
        replica.wait_idle()


@pytest.mark.parametrize("proxy", PROXIES)
def test_refusals_pass_as_they_are_and_the_log_names_the_client(proxies, replicas, proxy):
    headers = {"X-Forwarded-For": "203.0.113.7", "X-Request-ID": f"through-{proxy}"}
    status, received, answer = ask(proxies[proxy], headers, max_tokens=-1)
    assert status == 400 and "max_tokens = -1" in answer["error"]["message"]
    assert received["x-request-id"] == f"through-{proxy}"
    lines = [line for replica in replicas for line in replica.log()]
    (line,) = (line for line in lines if line.get("request_id") == f"through-{proxy}")
    # The proxy says that it was asked by this test, whose address is trusted too.
    assert line["client"] == "203.0.113.7"


def test_after_the_death_of_a_replica_the_other_answers_and_errors_are_json(proxies, replicas):
    one, two = replicas
    found: dict[str, list[tuple[int, dict[str, str], Any]]] = {name: [] for name in proxies}
    threads = []
    for name, port in proxies.items():
        # One request of each proxy at each replica.
        for count in (1, 2):
            threads.append(threading.Thread(target=lambda n=name, p=port: found[n].append(ask(p)), daemon=True))
            before = sum(replica.texts() for replica in replicas)
            threads[-1].start()
            until(lambda before=before: sum(replica.texts() for replica in replicas) > before)
            assert count == 1 or len({replica.texts() for replica in replicas}) == 1
    kill(two)
    until(lambda: all(found.values()))
    for name, ((status, _, answer),) in found.items():
        assert (status, answer["error"]["code"], answer["error"]["type"]) == (502, "replica_gone", "server_error"), name
    texts = set()
    for name, port in proxies.items():
        for _ in range(20):
            status, _, answer = ask(port, max_tokens=10)
            assert status == 200, (name, answer)
            texts.add(answer["choices"][0]["text"])
    assert len(texts) == 1
    kill(one)
    for port in proxies.values():
        status, headers, answer = ask(port, max_tokens=1)
        assert status in (502, 503) and headers["content-type"] == "application/json"
        assert answer["error"]["type"] == "server_error"
    for thread in threads:
        thread.join(20)
    assert [[status for status, _, _ in answers] for answers in found.values()] == [[502, 502], [502, 502]]


def kill(replica: Server) -> None:
    replica.process.send_signal(signal.SIGKILL)
    replica.process.wait(20)
