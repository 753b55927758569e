"""How long a new connection waits while the server and its machine are busy.

    python -m benchmarks.connections [--clients 40] [--rate 90] [--busy 3] [--seconds 25]

One `lm serve shakespeare-gru`, and against it at once, all on this machine:

    clients     keep their connection and stream one completion after the other
    rate        new connections a second, each of which asks for /health once and ends: a balancer's check, or a visitor
    busy        other processes that only compute

    health      from opening the connection to the whole answer; one that fails or lasts 20 s ends the measurement
    queue       connections that the system has made and the server has not accepted yet
    first text  from sending a request for a completion to its first text
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import save, versions
from benchmarks.serving import free_port, program
from benchmarks.streams import Connection, Stream

RUN = "shakespeare-gru"
TOKENS = 300
WARM_SECONDS = 3.0
"""At full load, before anything counts."""
GIVE_UP_SECONDS = 20.0
QUEUE_SECONDS = 0.05
"""Between two checks of the queue."""
HEALTH = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"


@dataclass(frozen=True)
class Load:
    """How much of what at once."""

    clients: int = 40
    rate: float = 90.0
    """New connections a second."""
    busy: int = 3
    seconds: float = 25.0


@dataclass(frozen=True)
class Figures:
    """What the load saw."""

    health_seconds: dict[str, float]
    """p50, p99 and max."""
    answered: int
    """New connections that were answered."""
    longest_queue: int
    tokens_per_second: float
    """Over all streams."""
    first_text_seconds: dict[str, float]


def main() -> None:
    """Measure, print the figures, and write them under benchmarks/results/."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in asdict(Load()).items():
        parser.add_argument(f"--{name}", type=type(value), default=value, help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, help="where the JSON goes (default: benchmarks/results/)")
    given = vars(parser.parse_args())
    out = given.pop("out")
    load, port = Load(**given), free_port()
    command = ["-m", "cli.main", "serve", RUN, "--port", str(port), "--no-page"]
    with tempfile.TemporaryDirectory(prefix="inkling-benchmark-") as folder:
        log = Path(folder) / "log"
        with program(command, dict(os.environ), log, port, "/health"):
            figures = measure(port, load)
    for name, value in asdict(figures).items():
        shown = {key: round(each, 4) for key, each in value.items()} if isinstance(value, dict) else round(value, 1)
        print(f"{name:<20}{shown}")
    record: dict[str, Any] = {
        "options": {**asdict(load), "run": RUN, "tokens": TOKENS},
        "versions": versions("fastapi", "uvicorn"),
        "results": asdict(figures),
    }
    print(save("connections", record, out))


def measure(port: int, load: Load, *, model: str = RUN) -> Figures:
    """Put the load on the server at a port of this machine, and measure.

    Raises:
        OSError, TimeoutError: a new connection failed, or was not answered in time.
    """
    with busy_processes(load.busy, WARM_SECONDS + load.seconds + GIVE_UP_SECONDS):
        return asyncio.run(_measure(port, load, model))


async def _measure(port: int, load: Load, model: str) -> Figures:
    begun = time.perf_counter()
    counted, end = begun + WARM_SECONDS, begun + WARM_SECONDS + load.seconds
    streaming = [asyncio.create_task(_stream(port, model, number, end)) for number in range(load.clients)]
    queue = asyncio.create_task(_watch_queue(port, end))
    checks = []
    for number in range(int((end - begun) * load.rate)):
        await asyncio.sleep(begun + number / load.rate - time.perf_counter())
        checks.append(asyncio.create_task(_check(port)))
    waits = [seconds for when, seconds in await asyncio.gather(*checks) if when >= counted]
    streams = [stream for each in await asyncio.gather(*streaming) for stream in each]
    events = [stream.events() for stream in streams]
    first = [
        received[0][0] - stream.begun
        for stream, received in zip(streams, events, strict=True)
        if stream.begun >= counted
    ]
    # One character is one token.
    tokens = sum(len(text) for received in events for when, text in received if counted <= when < end)
    return Figures(
        health_seconds=_spread(waits), answered=len(waits), longest_queue=await queue,
        tokens_per_second=tokens / load.seconds, first_text_seconds=_spread(first),
    )  # fmt: skip


def _spread(seconds: list[float]) -> dict[str, float]:
    return {"p50": float(np.median(seconds)), "p99": float(np.percentile(seconds, 99)), "max": max(seconds)}


async def _stream(port: int, model: str, number: int, end: float) -> list[Stream]:
    """One client: completions one after the other until `end`."""
    transport, connection = await asyncio.get_running_loop().create_connection(Connection, "127.0.0.1", port)
    streams: list[Stream] = []
    try:
        while time.perf_counter() < end:
            body = {
                "model": model, "prompt": "ROMEO:", "max_tokens": TOKENS, "stream": True,
                "seed": 1000 * number + len(streams),
            }  # fmt: skip
            content = json.dumps(body).encode()
            head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(content)}\r\n"
            streams.append(await connection.ask(f"{head}Content-Type: application/json\r\n\r\n".encode() + content))
    finally:
        transport.close()
    return streams


async def _check(port: int) -> tuple[float, float]:
    """One new connection: when it was opened, and how long it took until /health was answered."""
    begun = time.perf_counter()
    async with asyncio.timeout(GIVE_UP_SECONDS):
        transport, connection = await asyncio.get_running_loop().create_connection(Connection, "127.0.0.1", port)
        try:
            await connection.ask(HEALTH)
        finally:
            transport.close()
    return begun, time.perf_counter() - begun


async def _watch_queue(port: int, end: float) -> int:
    longest = 0
    while time.perf_counter() < end:
        longest = max(longest, accept_queue(port))
        await asyncio.sleep(QUEUE_SECONDS)
    return longest


def accept_queue(port: int) -> int:
    """Connections to 127.0.0.1 that wait to be accepted: Recv-Q of `ss -ltn`. Linux only; 0 elsewhere."""
    with contextlib.suppress(FileNotFoundError), Path("/proc/net/tcp").open() as table:
        # Listening sockets come first, before thousands of connections.
        for line in table:
            fields = line.split()
            if fields[1] == f"0100007F:{port:04X}" and fields[3] == "0A":
                return int(fields[4].partition(":")[2], 16)
    return 0


@contextlib.contextmanager
def busy_processes(count: int, seconds: float) -> Iterator[None]:
    """Processes that only compute, until the end of the block and never longer than `seconds`."""
    code = f"import time\nend = time.monotonic() + {seconds}\nwhile time.monotonic() < end: pass"
    processes = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


if __name__ == "__main__":
    main()
