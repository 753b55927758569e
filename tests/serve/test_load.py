"""64 clients at once, good and bad: no text is lost or mixed, slots are freed, memory stays flat, the queue is bounded.

Twenty seconds in the suite; ten minutes in `make soak`, where memory is looked at, and where new connections come while
the machine is busy.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import random
import statistics
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import lm
from benchmarks.connections import Load, measure
from tests.serve.conftest import Serve, Server, until

CLIENTS = 64
SHORT, LONG = 20, 3000
"""Tokens of a request."""
PROMPTS = ("the cat", "", "a mat and saw one red hen run by its dén in fog ☂ the cat sat on a mat", "in fog ☂.\n")
SEEDS = range(6)
MODELS = ("gru", "transformer")
TIMEOUT_SECONDS = 6
STALL_SECONDS = 3


@dataclass
class Tally:
    """What the clients saw."""

    counts: Counter[str] = field(default_factory=Counter)
    short: list[float] = field(default_factory=list)
    long: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


class Clients:
    """Clients of every kind, until a time."""

    def __init__(self, server: Server, expected: dict[tuple[str, str, int], str], until: float) -> None:
        self.server, self.expected, self.until = server, expected, until
        self.tally = Tally()

    async def run(self) -> Tally:
        await asyncio.gather(*(self._client(random.Random(number)) for number in range(CLIENTS)))
        return self.tally

    async def _client(self, dice: random.Random) -> None:
        kinds = [self._stream, self._whole, self._leave, self._stall, self._garbage, self._oversize, self._endless,
                 self._trickle]  # fmt: skip
        weights = [50, 20, 12, 1, 6, 4, 1, 2]
        while time.monotonic() < self.until:
            (kind,) = dice.choices(kinds, weights)
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                await kind(dice)
            self.tally.counts[kind.__name__] += 1

    # -- one connection --------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def _connected(self):
        reader, writer = await asyncio.open_connection("127.0.0.1", self.server.port)
        try:
            yield reader, writer
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    @staticmethod
    def _post(body: dict, path: str = "/v1/completions") -> bytes:
        data = json.dumps(body).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nConnection: close\r\n"
            f"Content-Length: {len(data)}\r\n\r\n"
        )
        return head.encode() + data

    @staticmethod
    async def _status(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
        lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines[1:] if line)
        return int(lines[0].split()[1]), headers

    async def _busy(self, status: int, headers: dict[str, str]) -> bool:
        """Whether the server says to come back later, as a good client then does (in less time, to keep it busy)."""
        if status != 429:
            assert status == 200, status
            return False
        assert 1 <= int(headers["retry-after"]) <= 60
        self.tally.counts["429"] += 1
        await asyncio.sleep(0.3)
        return True

    # -- good clients --------------------------------------------------------------------------------

    def _ask(self, dice: random.Random) -> tuple[dict, str]:
        tokens = dice.choice((SHORT, SHORT, SHORT, LONG))
        model, prompt, seed = dice.choice(MODELS), dice.choice(PROMPTS), dice.choice(SEEDS)
        body = {"model": model, "prompt": prompt, "seed": seed, "max_tokens": tokens}
        return body, self.expected[model, prompt, seed][:tokens]

    def _check(self, text: str, expected: str, body: dict) -> None:
        if text != expected:
            self.tally.wrong.append(f"{body}: {text[:60]!r}…, not {expected[:60]!r}…")

    async def _stream(self, dice: random.Random) -> None:
        body, expected = self._ask(dice)
        started = time.monotonic()
        async with self._connected() as (reader, writer):
            writer.write(self._post({**body, "stream": True}))
            if await self._busy(*await self._status(reader)):
                return
            content = (await reader.readline(), await reader.readline())[1]
            self.tally.first.append(time.monotonic() - started)
            content += await reader.read()
        text, ended = "", False
        for line in content.split(b"\n"):
            if line.startswith(b"data: [DONE]"):
                ended = True
            elif line.startswith(b"data: "):
                event = json.loads(line[6:])
                if "error" in event:
                    assert event["error"]["code"] == "timeout", event
                    self.tally.counts["timeout"] += 1
                    return
                text += event["choices"][0]["text"]
        self._check(text if ended else f"(broken off) {text}", expected, body)
        (self.tally.short if body["max_tokens"] == SHORT else self.tally.long).append(time.monotonic() - started)

    async def _whole(self, dice: random.Random) -> None:
        body, expected = self._ask(dice)
        async with self._connected() as (reader, writer):
            writer.write(self._post(body))
            status, headers = await self._status(reader)
            if status == 504:
                self.tally.counts["timeout"] += 1
                return
            if not await self._busy(status, headers):
                answer = json.loads(await reader.readexactly(int(headers["content-length"])))
                self._check(answer["choices"][0]["text"], expected, body)

    # -- bad clients ---------------------------------------------------------------------------------

    async def _leave(self, dice: random.Random) -> None:
        async with self._connected() as (reader, writer):
            body = {**self._ask(dice)[0], "max_tokens": LONG * 100, "stream": dice.random() < 0.5, "n": 2}
            writer.write(self._post(body))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(reader.read(dice.randrange(1, 2000)), 0.5 * dice.random())
            if dice.random() < 0.5:
                writer.transport.abort()

    async def _stall(self, dice: random.Random) -> None:
        async with self._connected() as (_, writer):
            writer.transport.pause_reading()
            writer.write(self._post({**self._ask(dice)[0], "max_tokens": LONG * 100, "stream": True}))
            await asyncio.sleep(STALL_SECONDS + 1)

    async def _endless(self, dice: random.Random) -> None:
        async with self._connected() as (reader, writer):
            writer.write(self._post({**self._ask(dice)[0], "max_tokens": 10_000_000, "stream": True}))
            if await self._busy(*await self._status(reader)):
                return
            content = await reader.read()
            # Beside 63 others this client may be too slow for a text without end.
            assert b'"code":"timeout"' in content[-600:] or b'"code":"client_stalled"' in content[-600:], content[-600:]
            self.tally.counts["timeout"] += 1

    async def _garbage(self, dice: random.Random) -> None:
        bodies = (
            b"{",
            b"[" * 5000,
            b"\xff\xfe",
            b'{"prompt": 7}',
            b'{"max_tokens": -1}',
            b'{"no": 1}',
            b'{"stop": ["a", ""]}',
        )
        async with self._connected() as (reader, writer):
            if dice.random() < 0.3:
                writer.write(dice.randbytes(dice.randrange(1, 3000)) + b"\r\n\r\n")
                await asyncio.wait_for(reader.read(), 20)
                return
            data = dice.choice(bodies)
            writer.write(
                b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nConnection: close\r\n"
                b"Content-Length: %d\r\n\r\n%b" % (len(data), data)
            )
            status, _ = await self._status(reader)
            assert status in (400, 429), status

    async def _oversize(self, dice: random.Random) -> None:
        async with self._connected() as (reader, writer):
            writer.write(self._post({"prompt": "a" * dice.choice((300_000, 3_000_000))}))
            status, _ = await self._status(reader)
            assert status == 413, status

    async def _trickle(self, dice: random.Random) -> None:
        async with self._connected() as (reader, writer):
            for byte in self._post({"prompt": "the"})[: dice.randrange(10, 60)]:
                writer.write(bytes([byte]))
                await asyncio.sleep(0.01)
            await asyncio.wait_for(reader.read(), 20)


def load(
    serve: Serve, runs: Path, tell, *, seconds: float, warm_seconds: float = 0, most_drift: float = math.inf
) -> None:
    expected = {
        (model, prompt, seed): lm.load(model, runs_dir=runs).sample(prompt, max_tokens=LONG, seed=seed)
        for model in MODELS for prompt in PROMPTS for seed in SEEDS
    }  # fmt: skip
    with serve(
        *MODELS, "--max-batch", "8", "--max-queue", "12", "--max-body", "200000", "--timeout-seconds",
        str(TIMEOUT_SECONDS), "--stall-seconds", str(STALL_SECONDS), "--max-completion-tokens", "10000000",
        "--prefix-cache", "4MB",
    ) as server:  # fmt: skip
        warm = asyncio.run(Clients(server, expected, time.monotonic() + warm_seconds).run())
        server.wait_idle()
        before = server.rss()
        tally = asyncio.run(Clients(server, expected, time.monotonic() + seconds).run())
        server.wait_idle()
        after = server.rss()
        for _ in range(3):
            # What single large requests took is given back on the way; what leaks is not.
            if after < before * (1 + most_drift):
                break
            asyncio.run(Clients(server, expected, time.monotonic() + 5).run())
            server.wait_idle()
            after = server.rss()
        drawn = server.metric("inkling_engine_drawn_tokens_total")
        tell(
            f"\n{dict(tally.counts)}\nshort: median {statistics.median(tally.short):.3f} s, "
            f"99 %: {statistics.quantiles(tally.short, n=100)[98]:.3f} s; long: median "
            f"{statistics.median(tally.long):.3f} s; first text: median {statistics.median(tally.first):.3f} s\n"
            f"{drawn:,.0f} tokens drawn; {before / 2**20:.1f} MiB → {after / 2**20:.1f} MiB "
        )
        assert tally.wrong == warm.wrong == []
        assert tally.short and tally.long and tally.counts["_whole"]
        assert tally.counts["429"] > 0 and tally.counts["timeout"] > 0
        # Who asks for little does not wait for those who ask for more than there is time for.
        assert statistics.median(tally.short) < TIMEOUT_SECONDS / 2
        assert after < before * (1 + most_drift)
        until(lambda: server.metric("inkling_open_requests") == 1)  # this one
        assert server.request("GET", "/health")[0] == 200
        # Every slot is there again: as many texts as the batch holds are written side by side.
        done = server.post("/v1/completions", model="gru", prompt=[""] * 8, max_tokens=SHORT, seed=1)
        assert {choice["text"] for choice in done["choices"]} == {expected["gru", "", 1][:SHORT]}
        assert not [line for line in server.log() if line["level"] in ("critical",) or "exception" in line]
        assert server.end() == 0


@pytest.mark.soak
def test_twenty_seconds_of_clients_of_every_kind(serve: Serve, runs: Path) -> None:
    # What stalled clients let pile up makes memory rise and fall: only a long look can say that it is flat.
    load(serve, runs, lambda text: None, seconds=20)


@pytest.mark.soak
def test_ten_minutes_of_clients_of_every_kind(serve: Serve, runs: Path, capsys) -> None:
    def tell(text: str) -> None:
        with capsys.disabled():
            sys.stdout.write(text)

    load(serve, runs, tell, seconds=600, warm_seconds=60, most_drift=0.05)


@pytest.mark.soak
def test_new_connections_are_answered_while_streams_and_the_machine_are_busy(serve: Serve, capsys) -> None:
    with serve("shakespeare-gru") as server:
        figures = measure(server.port, Load(clients=40, rate=90, busy=3, seconds=25))
        with capsys.disabled():
            sys.stdout.write(f"\n{figures} ")
        assert figures.health_seconds["p99"] < 1 and figures.longest_queue < 100
        # The streams are not stopped for it.
        assert figures.tokens_per_second > 2000 and figures.first_text_seconds["p99"] < 2
