"""HTTP as clients speak it that are no browsers, and what the server says to those who ask amiss."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator

import pytest

from serve.connection import HALF_CLOSE_SECONDS
from tests.serve.conftest import Serve, Server, refusal, until

pytestmark = pytest.mark.slow

BODY = {"prompt": "the", "max_tokens": 30, "seed": 1}
ORIGIN = {"Origin": "http://app.example"}


@pytest.fixture(scope="module")
def plain(serve: Serve) -> Iterator[Server]:
    with serve(
        "gru", "--cors-origin", ORIGIN["Origin"], "--max-body", "20000", "--allowed-host", "Models.example",
        "--max-completion-tokens", "10000000", "--trusted-proxy", "127.0.0.0/8",
    ) as running:  # fmt: skip
        yield running


@pytest.fixture(scope="module")
def text(plain: Server) -> str:
    """What the model writes."""
    return str(plain.post("/v1/completions", **BODY)["choices"][0]["text"])


def head(method: str, path: str, *lines: str, version: str = "1.1") -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/{version}", *lines, "", ""]).encode()


def post(*lines: str, version: str = "1.1", **changed: object) -> bytes:
    body = json.dumps({**BODY, **changed}).encode()
    given = ("Host: localhost", "Content-Type: application/json", f"Content-Length: {len(body)}", *lines)
    return head("POST", "/v1/completions", *given, version=version) + body


def talk(server: Server, *parts: bytes, half_close: bool = False) -> tuple[str, str, bytes]:
    """The status line, the headers and what follows them until the server closes the connection."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        for part in parts:
            connection.sendall(part)
            time.sleep(0.02 * (len(parts) > 1))
        if half_close:
            connection.shutdown(socket.SHUT_WR)
        answer = b""
        while part := connection.recv(65536):
            answer += part
    start, _, rest = answer.partition(b"\r\n\r\n")
    status, _, headers = start.decode().partition("\r\n")
    return status, headers, rest


def text_of(body: bytes) -> str:
    return str(json.loads(body)["choices"][0]["text"])


# -- other protocols ----------------------------------------------------------------------------------


def test_curl_that_offers_http_2_is_answered_in_http_1(plain: Server, text):
    curl = shutil.which("curl")
    if curl is None or "HTTP2" not in subprocess.check_output([curl, "--version"], text=True):
        pytest.skip("needs curl with HTTP/2: apt-get install curl")
    for stream in (False, True):
        done = subprocess.run(
            [curl, "-s", "--http2", "-w", "%{http_code} %{http_version}", "-H", "Content-Type: application/json", "-d",
             json.dumps({**BODY, "stream": stream}), f"{plain.url}/v1/completions"],
            capture_output=True, timeout=60, check=True,
        )  # fmt: skip
        answer, end = done.stdout[:-7], done.stdout[-7:]
        assert end == b"200 1.1"
        if not stream:
            assert text_of(answer) == text
        else:
            events = [json.loads(line[6:]) for line in answer.decode().split("\n\n") if line[6:7] == "{"]
            assert "".join(event["choices"][0]["text"] for event in events) == text


@pytest.mark.parametrize("offer", ["h2c", "websocket", "TLS/1.0"])
def test_an_offer_to_upgrade_is_ignored_wherever_its_request_is_cut(plain: Server, text, offer):
    request = post("Connection: close, Upgrade,HTTP2-Settings", f"Upgrade: {offer}", "HTTP2-Settings: AAMAAABkAAQ")
    end = request.index(b"\r\n\r\n") + 4
    for cuts in ((end,), (end - 1,), (end + 1,), (10, end - 3, end + 5)):
        parts = [request[a:b] for a, b in zip((0, *cuts), (*cuts, len(request)), strict=True)]
        status, headers, body = talk(plain, *parts)
        assert status == "HTTP/1.1 200 OK" and "upgrade" not in headers
        assert text_of(body) == text
    # In chunks, and before another request on the same connection.
    given = ("Host: a", "Content-Type: application/json", "Transfer-Encoding: chunked", "Connection: Upgrade")
    body = json.dumps(BODY).encode()
    chunked = head("POST", "/v1/completions", *given, f"Upgrade: {offer}") + b"%x\r\n%b\r\n0\r\n\r\n" % (
        len(body),
        body,
    )
    assert talk(plain, chunked + post("Connection: close"))[2].count(text.encode()) == 2


def test_http_1_0_gets_a_stream_that_ends_with_the_connection(plain: Server, text):
    status, headers, body = talk(plain, post(version="1.0", stream=True))
    assert status == "HTTP/1.1 200 OK" and "transfer-encoding" not in headers and "connection: close" in headers
    events = body.decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""] and all(event.startswith("data: ") for event in events[:-1])
    assert "".join(json.loads(event[6:])["choices"][0]["text"] for event in events[:-2]) == text
    status, headers, body = talk(plain, post(version="1.0"))
    assert f"content-length: {len(body)}" in headers and text_of(body) == text


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_a_client_that_closes_its_sending_side_gets_its_answer(plain: Server, text, version):
    assert text_of(talk(plain, post(version=version), half_close=True)[2]) == text
    assert b"data: [DONE]\n\n" in talk(plain, post(version=version, stream=True), half_close=True)[2]
    # A request that is not whole is no request.
    assert talk(plain, post(version=version)[:-1], half_close=True) == ("", "", b"")


def test_a_slow_answer_is_announced_so_that_a_lost_client_is_noticed(plain: Server):
    status, _, rest = talk(plain, post(max_tokens=16_000, n=16), half_close=True)
    assert status == "HTTP/1.1 100 Continue" and rest.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b'"completion_tokens":256000,' in rest


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_closes_its_sending_side_and_goes_away_frees_its_slot(plain: Server, stream):
    with socket.create_connection(("127.0.0.1", plain.port), timeout=20) as connection:
        connection.sendall(post(max_tokens=10_000_000, stream=stream))
        connection.shutdown(socket.SHUT_WR)
        until(plain.texts)
    plain.wait_idle()


def test_a_client_that_closes_its_side_of_a_stream_late_has_gone_away(plain: Server):
    with socket.create_connection(("127.0.0.1", plain.port), timeout=20) as connection:
        connection.sendall(post(max_tokens=10_000_000, stream=True))
        time.sleep(HALF_CLOSE_SECONDS + 0.1)
        connection.shutdown(socket.SHUT_WR)
        plain.wait_idle()


# -- the head of a request ------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/health", "/health/ready", "/v1/models", "/v1/models/gru", "/metrics", "/docs"])
def test_head_is_answered_as_get_without_the_body(plain: Server, path):
    status, headers, body = talk(plain, head("HEAD", path, "Host: localhost", "Connection: close"))
    assert status == "HTTP/1.1 200 OK" and body == b""
    assert "content-length: 0" not in headers and "content-length: " in headers


def test_head_of_a_post_route_is_405(plain: Server):
    assert plain.request("HEAD", "/v1/completions")[0] == 405
    assert [line for line in plain.log() if line.get("method") == "HEAD"][-1]["status"] == 405


@pytest.mark.parametrize(
    ("lines", "said"), [((), "none"), (("Host: localhost", "Host: localhost"), "2"), (("Host: a", "host: b"), "2")]
)
def test_http_1_1_has_exactly_one_host_header(plain: Server, lines, said):
    for path in ("/health", "/v1/models", "/nowhere"):
        status, _, body = talk(plain, head("GET", path, *lines, "Connection: close"))
        assert status == "HTTP/1.1 400 Bad Request"
        assert json.loads(body)["error"]["message"] == f"A request has exactly one Host header: this one has {said}."


def test_http_1_0_may_have_none(plain: Server):
    assert talk(plain, head("GET", "/v1/models", version="1.0"))[0] == "HTTP/1.1 200 OK"
    assert talk(plain, head("GET", "/v1/models", "Host: a", "Host: a", version="1.0"))[0] == "HTTP/1.1 400 Bad Request"


def test_an_invalid_request_gets_an_error_body(plain: Server):
    status, headers, body = talk(plain, b"GET / HTTP/9.9\r\n\r\n")
    assert status == "HTTP/1.1 400 Bad Request" and "content-type: application/json" in headers
    assert json.loads(body)["error"]["message"] == "This is not a valid HTTP request."


# -- other origins, other names -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "/v1/models", None, 200),
        ("POST", "/v1/completions", {"prompt": 3}, 400),
        ("POST", "/v1/completions", {"prompt": "a" * 20_001}, 413),
        ("GET", "/nowhere", None, 404),
        ("DELETE", "/v1/models", None, 405),
    ],
)
def test_a_page_of_an_origin_that_may_ask_can_read_refusals_too(plain: Server, method, path, body, status):
    answer = plain.request(method, path, body, headers=ORIGIN)
    assert (answer[0], answer[1]["access-control-allow-origin"]) == (status, ORIGIN["Origin"])
    other = plain.request(method, path, body, headers={"Origin": "http://other.example"})
    assert other[0] == status and "access-control-allow-origin" not in other[1]


def test_that_a_key_is_missing_can_be_read_as_well(serve: Serve):
    with serve("gru", "--cors-origin", "*", key="k") as server:
        server.key = None
        status, headers, _ = server.request("GET", "/v1/models", headers=ORIGIN)
        assert (status, headers["access-control-allow-origin"]) == (401, "*")
        # With a key the name does not matter: a site that takes one for its own knows no key.
        given = {"Host": "rebound.example", "Authorization": "Bearer k"}
        assert server.request("GET", "/v1/models", headers=given)[0] == 200
        # Guesses have to wait, and what was accepted before does not.
        for number in range(20):
            status, headers, _ = server.request("GET", "/v1/models", headers={"Authorization": f"Bearer {number}"})
            assert (status, headers.get("retry-after")) == ((401, None) if number < 10 else (429, "1"))
        assert server.request("GET", "/v1/models", headers=given)[0] == 200


@pytest.mark.parametrize("host", ["rebound.example", "localhost.rebound.example", "127.0.0.1.rebound.example:80"])
def test_without_a_key_a_name_that_a_web_site_can_have_is_not_answered(plain: Server, host):
    for path, body in (("/v1/models", None), ("/v1/completions", BODY), ("/metrics", None), ("/nowhere", None)):
        status, error = refusal(plain, body, path, Host=host) if body else refusal_of_get(plain, path, host)
        assert (status, error["code"]) == (421, "unknown_host") and "--allowed-host" in error["message"]
    assert plain.request("GET", "/health", headers={"Host": host})[0] == 200


def refusal_of_get(server: Server, path: str, host: str) -> tuple[int, dict[str, str]]:
    status, _, answer = server.request("GET", path, headers={"Host": host})
    return status, answer["error"]


@pytest.mark.parametrize("host", ["localhost:1", "127.0.0.1", "192.0.2.7:8000", "[::1]:80", "models.example", "models"])
def test_names_of_the_machine_are_answered(plain: Server, host):
    assert plain.request("GET", "/v1/models", headers={"Host": host})[0] == 200
    assert plain.request("GET", "/v1/models", headers={"Host": socket.gethostname()})[0] == 200


# -- what is noted ------------------------------------------------------------------------------------


def test_for_all_requests_the_figures_have_few_names(plain: Server):
    for number in range(20):
        plain.request("GET", f"/nowhere/{number}")
        plain.request("GET", f"/v1/models/{number}")
    for method in ("PROPFIND", "MKCOL", "PURGE", "TRACE", "LINK"):
        assert plain.request(method, "/v1/models")[0] == 405
    figures = plain.request("GET", "/metrics")[2]
    assert 'inkling_requests_total{method="other",route="/v1/models",status="405"} 5.0' in figures
    assert not [word for word in ("/nowhere", "models/1", "PURGE", "TRACE") if word in figures]


def test_the_log_names_the_client_that_a_trusted_proxy_names(plain: Server):
    plain.request("GET", "/v1/models", headers={"X-Forwarded-For": "203.0.113.9, 192.0.2.44, 127.0.0.2"})
    assert [line["client"] for line in plain.log() if line.get("path") == "/v1/models"][-1] == "192.0.2.44"
