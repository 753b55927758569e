"""Clients that stream completions from a server of OpenAI's API, and note when each piece arrives.

Bare asyncio and a C parser, because they share the machine with the server that is measured. What arrived is read as
JSON only when all is over.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httptools


@dataclass
class Stream:
    """What came back for one request, and when."""

    begun: float
    pieces: list[tuple[float, bytes]] = field(default_factory=list)

    def events(self) -> list[tuple[float, str]]:
        """When each text arrived; read once there is nothing left to measure."""
        found, rest = [], b""
        for when, piece in self.pieces:
            *whole, rest = (rest + piece).replace(b"\r\n", b"\n").split(b"\n\n")
            for event in whole:
                data = event.removeprefix(b"data: ")
                if event.startswith(b"data: {"):
                    answer = json.loads(data)
                    if "error" in answer:
                        raise SystemExit(f"A request failed: {answer['error']}")
                    found += [(when, choice["text"]) for choice in answer["choices"] if choice["text"]]
        return found


class Connection(asyncio.Protocol):
    """One client: sends a request on command, and records when each piece of the answer arrives."""

    def __init__(self) -> None:
        self.stream = Stream(0.0)
        self._done: asyncio.Future[None] | None = None

    async def ask(self, request: bytes) -> Stream:
        """The whole stream."""
        self._parser = httptools.HttpResponseParser(self)
        self._done = asyncio.get_running_loop().create_future()
        self.stream = Stream(time.perf_counter())
        self._transport.write(request)
        await self._done
        if self._parser.get_status_code() != 200:
            raise SystemExit(f"{self._parser.get_status_code()}: {self.stream.pieces}")
        return self.stream

    def connection_made(self, transport: Any) -> None:
        """The client may ask."""
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Bytes arrived."""
        self._now = time.perf_counter()
        self._parser.feed_data(data)

    def on_body(self, body: bytes) -> None:
        """A piece of the answer."""
        self.stream.pieces.append((self._now, body))

    def on_message_complete(self) -> None:
        """The answer is whole."""
        self._end(None)

    def connection_lost(self, error: Exception | None) -> None:
        """The server hung up."""
        self._end(error or ConnectionError("the server hung up"))

    def _end(self, error: Exception | None) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_result(None) if error is None else self._done.set_exception(error)


async def run_clients(port: int, requests: Sequence[Sequence[bytes]]) -> list[Stream]:
    """As many clients as there are lists, each with its requests one after the other."""

    async def one(mine: Sequence[bytes]) -> list[Stream]:
        transport, connection = await asyncio.get_running_loop().create_connection(Connection, "127.0.0.1", port)
        try:
            return [await connection.ask(request) for request in mine]
        finally:
            transport.close()

    streams = await asyncio.gather(*map(one, requests))
    return [stream for each in streams for stream in each]
