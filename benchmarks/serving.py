"""Tokens per second and latency over HTTP with many clients: `lm serve` and the server of llama-cpp-python.

    python -m benchmarks.serving [--threads 2] [--clients 1 16 64] [--rounds 3]

The two shapes of benchmarks.decoding with the same random weights, each server a separate process, top_k 40 and
temperature 0.8. Clients run on the same machine, keep their connection, and stream one text after the other; the
servers take turns. Of every text that a counted round streamed:

    first token      from sending the request to the first text
    between tokens   (last text - first text) / tokens in between: one mean a request
    pauses           between two events that arrive: what a reader sees. `lm serve` sends tokens that are ready within
                     20 ms together; llama-cpp-python's server sends each alone

llama-cpp-python's server (pip install 'llama-cpp-python[server]' gguf) works on one request at a time, and the others
wait: its first tokens come late for many clients, and its tokens a second do not grow with them. llama.cpp's own
`llama-server`, which has slots for several, is a program that PyPI does not have; it is not measured here.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import http.client
import importlib.util
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import uvloop
from rich.console import Console
from rich.table import Table

from benchmarks.decoding import PROMPT, SHAPES, TOKENS, V, write_gguf
from benchmarks.machine import alternate, save, versions
from benchmarks.streams import Stream, run_clients
from lm.config import Section
from lm.models.base import LanguageModel, build_model
from lm.runs.run_folder import RunFolder
from lm.tokenizers.char import CharTokenizer
from lm.version import __version__

START_SECONDS = 60
TRANSFORMER = "transformer 6 x 384"
SAMPLING = {"temperature": 0.8, "top_k": 40, "top_p": 1.0, "min_p": 0.0}
CHARACTERS = "\n" + "".join(map(chr, range(48, 48 + V - 2)))
UNKNOWN = "~"
"""How llama.cpp spells the last token, which `lm serve` never draws: one character a token here too."""
TEXT = CHARACTERS[1:PROMPT]
"""PROMPT tokens with the start token, a line end, before it."""
SAME = 8
"""Greedy characters that both servers must agree on before anything is measured."""
PERCENTILES = (50, 95, 99)


def main() -> None:
    """Measure, print tables, and write the figures under benchmarks/results/."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each server (default: %(default)s)")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 16, 64], help="at once (default: 1 16 64)")
    parser.add_argument("--requests", type=int, default=2, help="of each client in a turn (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each server (default: %(default)s)")
    parser.add_argument("--max-batch", type=int, default=64, help="of lm serve (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="where the JSON goes (default: benchmarks/results/)")
    options = parser.parse_args()

    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="inkling-benchmark-") as folder, contextlib.ExitStack() as stack:
        servers = list(start(Path(folder), options, stack))
        agree(servers)
        for shape in SHAPES:
            for clients in options.clients:
                loads = {server.name: Load(server, clients, options) for server in servers if server.shape == shape}
                rates = alternate({name: load.run for name, load in loads.items()}, options.rounds)
                rows = [row(shape, clients, name, rates[name], load.waits()) for name, load in loads.items()]
                show(shape, clients, rows)
                results += rows
    record: dict[str, Any] = {
        "options": {
            "threads": options.threads,
            "requests": options.requests,
            "rounds": options.rounds,
            "max_batch": options.max_batch,
            "prompt_tokens": PROMPT,
            "tokens": TOKENS,
        },
        "versions": versions("numpy", "fastapi", "uvicorn", "uvloop", "llama-cpp-python"),
        "unit": "tokens/s over all clients; milliseconds",
        "note": "llama-cpp-python's server works on one request at a time",
        "results": results,
        "ratios": ratios(results),
    }
    print()
    for ratio in record["ratios"]:
        print(f"{ratio['shape']}, {ratio['of']} = {ratio['ratio']:.2f} x {ratio['to']}")
    print(f"\n{save('serving', record, options.out)}")


def ratios(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Tokens a second with many clients over those with one, and over the other server's with as many."""
    rates = {(row["shape"], row["server"], row["clients"]): row["tokens_per_second"]["median"] for row in results}
    found = []
    for (shape, server, clients), rate in rates.items():
        others = [(server, min(each for _, _, each in rates))]
        others += [(name, clients) for of, name, each in rates if (of, each) == (shape, clients) and server == OURS]
        found += [
            {"shape": shape, "of": f"{server}, {clients} clients", "to": f"{name}, {count} clients",
             "ratio": rate / rates[shape, name, count]}
            for name, count in others
            if (name, count) != (server, clients)
        ]  # fmt: skip
    return found


# -- servers -----------------------------------------------------------------------------------------

OURS = "lm serve fp32"


@dataclass
class Server:
    """A running server, and how it is asked."""

    name: str
    shape: str
    port: int
    body: dict[str, Any]

    def request(self, **changes: Any) -> bytes:
        """The bytes of one request."""
        content = json.dumps({**self.body, **changes}).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{self.port}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        )
        return head.encode() + content


def start(folder: Path, options: argparse.Namespace, stack: contextlib.ExitStack) -> Iterator[Server]:
    """Write the models and start what serves them."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    for shape, settings in SHAPES.items():
        model = build_model(Section(**settings), V, seed=1).eval()
        write_run(model, folder / settings["type"])
        if shape == TRANSFORMER:
            write_gguf(model, "f32", folder / "f32.gguf", [*map(escape, CHARACTERS), UNKNOWN])
    names = [settings["type"] for settings in SHAPES.values()]
    port = free_port()
    command = ["-m", "cli.main", "serve", *names, "--runs-dir", str(folder), "--port", str(port),
               "--max-batch", str(options.max_batch), "--no-page"]  # fmt: skip
    stack.enter_context(program(command, environment, folder / "inkling.log", port, "/health"))
    for shape, settings in SHAPES.items():
        yield Server(OURS, shape, port, {"model": settings["type"], "prompt": TEXT, **SAMPLING})
    if not (importlib.util.find_spec("llama_cpp") and importlib.util.find_spec("starlette_context")):
        print("llama-cpp-python's server is not installed: pip install 'llama-cpp-python[server]' gguf")
        return
    port = free_port()
    threads = str(options.threads)
    # Without the last, a request is cut off when another comes.
    command = ["-m", "llama_cpp.server", "--model", str(folder / "f32.gguf"), "--port", str(port),
               "--n_ctx", str(SHAPES[TRANSFORMER]["context_length"]), "--n_threads", threads,
               "--n_threads_batch", threads, "--verbose", "False", "--interrupt_requests", "False"]  # fmt: skip
    stack.enter_context(program(command, environment, folder / "llama.log", port, "/v1/models"))
    # No start token is added: the prompt has it.
    body = {"prompt": f"\n{TEXT}", "repeat_penalty": 1.0, **SAMPLING}
    yield Server("llama-cpp-python server f32", TRANSFORMER, port, body)


def write_run(model: LanguageModel, path: Path) -> None:
    """A run as `lm train` leaves it, but for the training."""
    run = RunFolder(path)
    record = {
        "inkling": __version__,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "parameters": model.num_parameters(),
        "corpus": {"name": "none", "sha256": "", "key": "", "notes": [], "splits": {}},
        "config": {
            "corpus": {"source": "none"},
            "model": model.options.model_dump(mode="json"),
            "tokenizer": {"type": "char"},
        },
    }
    run.create(record, CharTokenizer.train([CHARACTERS], CharTokenizer.Options()))
    run.write_best(model.arrays(), step=0, valid_loss=0.0)


def escape(character: str) -> str:
    """As a vocabulary of RWKV spells it."""
    return {"\n": "\\n", "\\": "\\\\"}.get(character, character)


def free_port() -> int:
    """One that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port: int = listening.getsockname()[1]
        return port


@contextlib.contextmanager
def program(command: list[str], environment: dict[str, str], log: Path, port: int, path: str) -> Iterator[None]:
    """A server as a process, from its first answer on."""
    with log.open("wb") as said:
        process = subprocess.Popen([sys.executable, *command], stdout=said, stderr=said, env=environment)
        try:
            deadline = time.monotonic() + START_SECONDS
            while not answers(port, path):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(f"{' '.join(command[:3])} did not start:\n{log.read_text('utf-8')[-2000:]}")
                time.sleep(0.1)
            yield
        finally:
            process.terminate()
            process.wait(START_SECONDS)


def answers(port: int, path: str) -> bool:
    """Whether a server answers there."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def agree(servers: list[Server]) -> None:
    """Make sure that both servers have the same weights and read the same tokens."""
    texts = set()
    for server in servers:
        if server.shape == TRANSFORMER:
            (stream,) = uvloop.run(
                run_clients(server.port, [[server.request(max_tokens=SAME, temperature=0.0, stream=True)]])
            )
            texts.add("".join(text for _, text in stream.events()))
    if len(texts) > 1:
        raise SystemExit(f"The servers do not agree on the likeliest text: {sorted(texts)}")


# -- loads -------------------------------------------------------------------------------------------


class Load:
    """`clients` clients at once on one server."""

    def __init__(self, server: Server, clients: int, options: argparse.Namespace) -> None:
        self._server, self._clients = server, clients
        # A client alone makes a few more, so that its percentiles mean something.
        self._each = options.requests if clients > 1 else 4 * options.requests
        self._tokens = TOKENS[server.shape]
        self._turns: list[list[Stream]] = []

    def run(self) -> float:
        """One turn; every request has its own seed, the same in each turn."""
        seeds = iter(range(self._clients * self._each))
        requests = [
            [self._server.request(max_tokens=self._tokens, seed=next(seeds), stream=True) for _ in range(self._each)]
            for _ in range(self._clients)
        ]
        self._turns.append(uvloop.run(run_clients(self._server.port, requests)))
        return float(self._clients * self._each * self._tokens)

    def waits(self) -> dict[str, list[float]]:
        """The times that were waited in counted turns, in milliseconds."""
        first, between, pauses = [], [], []
        for stream in (stream for turn in self._turns[1:] for stream in turn):
            events = stream.events()
            # One character is one token.
            lengths = [len(text) for _, text in events]
            if sum(lengths) != self._tokens:
                raise SystemExit(f"{self._server.name} sent {sum(lengths)} tokens of {self._tokens}.")
            times = np.array([when for when, _ in events]) * 1000
            first.append(times[0] - stream.begun * 1000)
            pauses += np.diff(times).tolist()
            if len(events) > 1:
                between.append((times[-1] - times[0]) / sum(lengths[1:]))
        return {"first_token": first, "between_tokens": between, "pauses": pauses}


# -- figures -----------------------------------------------------------------------------------------


def row(
    shape: str, clients: int, name: str, rate: dict[str, float], waits: dict[str, list[float]]
) -> dict[str, Any]:  # fmt: skip
    """One line of the results."""
    return {
        "shape": shape, "server": name, "clients": clients, "tokens_per_second": rate,
        **{
            f"{kind}_ms": {f"p{p}": float(np.percentile(times, p)) if times else None for p in PERCENTILES}
            for kind, times in waits.items()
        },
    }  # fmt: skip


def show(shape: str, clients: int, rows: list[dict[str, Any]]) -> None:
    """One table."""
    table = Table(title=f"{shape}, {clients} clients", box=None, title_justify="left")
    table.add_column("server")
    for title in ("tokens/s", "first token, ms", "between tokens, ms", "pauses, ms"):
        table.add_column(title, justify="right")
    for each in rows:
        waits = [
            " / ".join("-" if value is None else f"{value:.2f}" for value in each[f"{kind}_ms"].values())
            for kind in ("first_token", "between_tokens", "pauses")
        ]
        table.add_row(each["server"], f"{each['tokens_per_second']['median']:,.0f}", *waits)
    Console(width=120).print(table, "")


if __name__ == "__main__":
    main()
