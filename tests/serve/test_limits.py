"""Who may ask, and how much: keys, sizes, numbers and time."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import time

import openai
import pytest

from tests.serve.conftest import Serve, Server, refusal, until

pytestmark = pytest.mark.slow

LONG = {"model": "gru", "prompt": "the", "max_tokens": 10_000_000, "seed": 1}


@pytest.fixture(scope="module")
def narrow(serve: Serve):
    """A server with room for little."""
    with serve(
        "gru", "--max-batch", "2", "--max-queue", "1", "--max-body", "20000", "--max-prompt-tokens", "50",
        "--max-completion-tokens", "10000000", "--max-requests", "8",
    ) as running:  # fmt: skip
        yield running


@pytest.fixture(scope="module")
def hasty(serve: Serve):
    """A server with little time for a request and its client."""
    with serve(
        "gru", "--max-completion-tokens", "10000000", "--timeout-seconds", "4", "--stall-seconds", "2",
    ) as running:  # fmt: skip
        yield running


def _broken_off() -> contextlib.suppress:
    return contextlib.suppress(ConnectionError)


@contextlib.contextmanager
def streaming(server: Server, **body):
    """An open stream whose first event has come, left unread after that."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        data = json.dumps({**LONG, "stream": True, **body}).encode()
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%b" % (len(data), data)
        )
        # Looked at, and left to be read.
        while b"data: " not in connection.recv(4096, socket.MSG_PEEK):
            time.sleep(0.001)
        yield connection


# -- keys -------------------------------------------------------------------------------------------


def test_without_the_key_only_health_and_docs_are_served(serve: Serve, tmp_path):
    (tmp_path / "keys").write_text("# ours\nfirst\n\nsecond\n")
    with serve("gru", "--api-key-file", str(tmp_path / "keys"), INKLING_API_KEY="third") as server:
        assert "needed" in server.said and "Authorization: Bearer KEY" in server.said
        body = {"prompt": "the", "max_tokens": 1}
        for key in ("first", "second", "third"):
            server.key = key
            assert server.post("/v1/completions", **body)["object"] == "text_completion"
        server.key = None
        for path, posted in (("/v1/models", None), ("/metrics", None), ("/v1/completions", body), ("/nowhere", None)):
            status, headers, answer = server.request("POST" if posted else "GET", path, posted)
            assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
            assert headers["www-authenticate"] == "Bearer"
        for header in ("Bearer firs", "Bearer first ", "Bearer", "Basic first", "first", "Bearer é"):
            given = {"Authorization": header}
            status = server.request("GET", "/v1/models", headers=given)[0]
            assert status == (200 if header == "Bearer first " else 401), header
        for path in ("/health", "/health/ready", "/docs", "/docs/files/swagger-ui.css", "/openapi.json"):
            assert server.request("GET", path)[0] == 200
        with (
            openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0) as client,
            pytest.raises(openai.AuthenticationError),
        ):
            client.models.list()


# -- sizes ------------------------------------------------------------------------------------------


def test_a_prompt_that_is_too_long_says_so(narrow: Server):
    status, error = refusal(narrow, {"prompt": "a" * 51})
    assert (status, error["code"], error["param"]) == (400, "context_length_exceeded", "prompt")
    assert "has 51 tokens" in error["message"] and "at most 50" in error["message"]
    with pytest.raises(openai.BadRequestError, match="at most 50"):
        narrow.openai.completions.create(model="gru", prompt="a" * 51)
    assert narrow.post("/v1/completions", prompt="a" * 50, max_tokens=1)["usage"]["prompt_tokens"] == 50


@pytest.mark.parametrize("size", [20_001, 1_000_000])
def test_a_body_that_is_too_long_is_413_with_and_without_a_length(narrow: Server, size):
    body = json.dumps({"prompt": "a" * size}).encode()
    assert refusal(narrow, body)[1]["code"] == "request_too_large"
    with socket.create_connection(("127.0.0.1", narrow.port), timeout=30) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )
        for begin in range(0, len(body), 5000):
            part = body[begin : begin + 5000]
            connection.sendall(b"%x\r\n%b\r\n" % (len(part), part))
        connection.sendall(b"0\r\n\r\n")
        assert b" 413 " in connection.recv(4096)
    assert narrow.request("GET", "/health")[0] == 200


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x00\xff\xfe garbage \r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 9\r\n\r\nabcde",
        b"A" * 100_000,
        b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 40_000,
    ],
    ids=lambda garbage: repr(garbage[:20]),
)
def test_an_invalid_request_ends_only_its_connection(narrow: Server, garbage):
    with socket.create_connection(("127.0.0.1", narrow.port), timeout=10) as connection, _broken_off():
        connection.sendall(garbage)
        while connection.recv(65536):
            pass
    assert narrow.request("GET", "/health")[0] == 200


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"null", b'"x"', b"1" * 5000, b"[" * 9000, b'{"a":' * 3000, b'{"prompt": "\xff"}',
        b'{"prompt": "\\ud800"}', b'{"temperature": NaN}', b'{"max_tokens": 1e400}', b'{"seed": 9223372036854775808}',
    ],
    ids=lambda body: repr(body[:20]),
)  # fmt: skip
def test_a_body_that_makes_no_sense_is_never_a_failure_of_the_server(narrow: Server, body):
    status, _, answer = narrow.request("POST", "/v1/completions", body)
    assert status == 400 or b"ud800" in body, answer


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": [-1] * 800_000},
        {"prompt": [[-1]] * 500_000},
        {"prompt": ["a"] * 500_000 + [1]},
        {"banned_tokens": [-1] * 800_000},
        {f"x{number}": 1 for number in range(200_000)},
        {"model": "x" * 4_000_000},
    ],
    ids=lambda body: next(iter(body)),
)
def test_a_body_of_nothing_but_faults_is_answered_soon_and_shortly(server: Server, body):
    started = time.monotonic()
    status, error = refusal(server, body)
    assert status in (400, 404) and len(error["message"]) < 2000
    assert time.monotonic() - started < 20


LINES = "the cat sat\n" * 150_000
HOSTILE: dict[str, tuple[str, dict]] = {
    "scores": ("/v1/score", {"text": "the cat sat on a mat and " * 800, "top": 20}),
    "alternatives": ("/v1/completions", {"prompt": "the", "n": 16, "max_tokens": 1000, "logprobs": 20}),
    "stop texts": ("/v1/completions", {"prompt": "the", "n": 16, "stop": [f"the {i:05}" for i in range(1000)]}),
    "prompts": ("/v1/completions", {"prompt": [[1]] * 900_000}),
    "texts": ("/v1/completions", {"prompt": ["a"] * 900_000}),
    "ids": ("/v1/completions", {"prompt": [[1] * 32_000] * 50, "max_tokens": 0}),
    "parts": (
        "/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}] * 90_000}]}
    ),
    "one part": (
        "/v1/chat/completions",
        {"model": "pieces", "messages": [{"role": "user", "content": [{"type": "text", "text": LINES}]}]},
    ),
    "one scored line": ("/v1/score", {"model": "pieces", "text": "the cat " * 500_000}),
    "characters": ("/tokenize", {"prompt": LINES, "return_token_strs": True}),
    "pieces": ("/tokenize", {"model": "pieces", "prompt": LINES}),
    "words": ("/tokenize", {"model": "words", "prompt": LINES.replace("\n", " ")}),
    "one line": ("/tokenize", {"model": "pieces", "prompt": "a" * 4_000_000}),
    "lines": ("/tokenize", {"model": "pieces", "prompt": ("a" * 249_000 + "\n") * 16}),
    "different words": ("/v1/score", {"model": "words", "text": " ".join(f"w{k}" for k in range(500_000))}),
    "half surrogate pairs": ("/v1/completions", {"prompt": "\ud800" * 1_300_000}),
    "fields": ("/v1/completions", {"prediction": {f"{k:06}": 1 for k in range(350_000)}}),
    "bytes": ("/detokenize", {"model": "pieces", "tokens": [100] * 900_000}),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_nothing_that_a_request_holds_keeps_the_event_loop_from_others(server: Server, name):
    path, body = HOSTILE[name]
    text = json.dumps({"model": "gru", **body}, separators=(",", ":"), ensure_ascii=False)
    data = text.encode("utf-8", "surrogatepass")
    assert len(data) < 4 << 20
    blocked: list[float] = []
    # What blocks the loop does so each time; a busy machine may let it wait now and then.
    while len(blocked) < 5 and 0 not in blocked:
        before = server.blocked()
        status, _, answer = server.request("POST", path, data)
        assert status == 200 or (status == 400 and len(answer["error"]["message"]) < 300), answer
        time.sleep(0.05)
        blocked.append(server.blocked() - before)
    assert 0 in blocked, blocked


# -- numbers ----------------------------------------------------------------------------------------


def test_a_full_queue_is_429_with_retry_after_and_empties_again(narrow: Server):
    with contextlib.ExitStack() as stack:
        # Two are written, one waits for its turn; the next is one too many.
        for _ in range(3):
            stack.enter_context(streaming(narrow))
        status, headers, answer = narrow.request("POST", "/v1/completions", {"prompt": "the", "max_tokens": 1})
        assert (status, answer["error"]["code"]) == (429, "rate_limit_exceeded")
        assert 1 <= int(headers["retry-after"]) <= 60
        with pytest.raises(openai.RateLimitError):
            narrow.openai.completions.create(model="gru", prompt="the")
    narrow.wait_idle()
    assert narrow.post("/v1/completions", prompt="the", max_tokens=1)


def test_short_requests_are_not_stuck_behind_long_ones(narrow: Server):
    alone = narrow.post("/v1/completions", prompt="a mat", max_tokens=20, seed=3)["choices"]
    with streaming(narrow), streaming(narrow):
        # Texts of minutes fill every slot: they still run when the short one is answered.
        assert narrow.post("/v1/completions", prompt="a mat", max_tokens=20, seed=3)["choices"] == alone
        assert narrow.texts() == 2
    narrow.wait_idle()


def test_too_many_requests_at_once_are_429(narrow: Server):
    with contextlib.ExitStack() as stack:
        for _ in range(8):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", narrow.port), timeout=10))
            connection.sendall(b"POST /tokenize HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\n")
        until(lambda: narrow.request("GET", "/v1/models")[0] == 429)
        assert narrow.request("GET", "/v1/models")[1]["retry-after"]
        assert narrow.request("GET", "/health")[0] == 200
    until(lambda: narrow.request("GET", "/v1/models")[0] == 200)


# -- time -------------------------------------------------------------------------------------------


def test_a_request_that_takes_too_long_is_504_and_its_slot_is_free(hasty: Server):
    started = time.monotonic()
    status, error = refusal(hasty, LONG)
    assert (status, error["code"]) == (504, "timeout")
    assert time.monotonic() - started > 3.5
    hasty.wait_idle()


def test_a_stream_that_takes_too_long_ends_with_an_error_event(hasty: Server):
    with pytest.raises(openai.APIError, match="took longer than 4 seconds"):
        for _ in hasty.openai.completions.create(**LONG, stream=True):
            pass
    hasty.wait_idle()


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_disconnects_frees_its_slot_at_once(narrow: Server, stream):
    data = json.dumps({**LONG, "stream": stream}).encode()
    with socket.create_connection(("127.0.0.1", narrow.port), timeout=30) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%b" % (len(data), data)
        )
        until(narrow.texts)
    # Long before the request would end, or be too old.
    narrow.wait_idle()
    status = 200 if stream else 499
    (line,) = until(
        lambda: [each for each in narrow.log() if each.get("code") == "client_gone" and each["status"] == status][-1:]
    )
    assert line["completion_tokens"] < 10_000_000


def test_a_client_that_does_not_read_is_cut_off(serve: Serve):
    with serve("gru", "--stall-seconds", "1", "--max-completion-tokens", "10000000") as server:
        with streaming(server, logprobs=20):
            server.wait_idle()
        # Either the server noticed first, or the system, which drops the connection after the same time.
        stalled = until(
            lambda: [line for line in server.log() if line.get("code") in ("client_stalled", "client_gone")]
        )
        assert len(stalled) == 1 and stalled[0]["seconds"] > 1


def test_a_client_that_reads_late_gets_its_whole_text_and_until_then_takes_no_slot_and_little_memory(serve: Serve):
    ask = {"prompt": "the", "n": 16, "max_tokens": 2000, "logprobs": 20, "seed": 7}
    with serve("gru", "--stall-seconds", "60") as server:
        warm = server.post("/v1/completions", **{**ask, "max_tokens": 300})
        before = server.rss()
        with streaming(server, **ask) as late, streaming(server, **ask), streaming(server, **ask):
            # All three wait for their clients: 48 texts of 2,000 tokens would be 200 MB.
            until(lambda: not server.metric("inkling_engine_running", "inkling_engine_prefilling"))
            assert server.metric("inkling_engine_waiting") == 48
            assert server.rss() < before + 80_000_000
            assert server.post("/v1/completions", prompt="a mat", max_tokens=20, seed=3)
            answer = http.client.HTTPResponse(late)
            answer.begin()
            texts = [""] * 16
            for line in answer:
                if line.startswith(b"data: {"):
                    for choice in json.loads(line[6:])["choices"]:
                        texts[choice["index"]] += choice["text"]
        assert [len(text) for text in texts] == [2000] * 16
        assert [text[:300] for text in texts] == [choice["text"] for choice in warm["choices"]]


def test_log_probabilities_of_an_answer_that_is_held_whole_are_bounded(server: Server):
    body = {"model": "gru", "prompt": "the", "n": 16, "max_tokens": 16_384, "logprobs": 20}
    status, error = refusal(server, body)
    assert (status, error["param"]) == (400, "logprobs") and "the limit is 2,000,000" in error["message"]


def test_a_body_that_does_not_come_is_408(hasty: Server):
    with socket.create_connection(("127.0.0.1", hasty.port), timeout=30) as connection:
        connection.sendall(b"POST /tokenize HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\n{")
        assert b" 408 " in connection.recv(4096)


def test_an_idle_connection_is_closed(hasty: Server):
    with socket.create_connection(("127.0.0.1", hasty.port), timeout=30) as connection:
        connection.sendall(b"GET /hea")
        started = time.monotonic()
        with contextlib.suppress(ConnectionError):
            assert connection.recv(4096) == b""
        assert time.monotonic() - started > 1
