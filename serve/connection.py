"""uvicorn's connection with what it lacks.

Limits on the time and the size of a request's head; clients that offer another protocol, speak HTTP/1.0, or close
their sending side after the request; errors in OpenAI's form where a request cannot be parsed.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib
import json
import socket
from collections.abc import Awaitable, Callable
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

from serve.http_errors import RequestError
from serve.settings import ServeOptions

httptools: Any = None
# Without it uvicorn takes h11, which needs none of what `_HTTPTools` does.
with contextlib.suppress(ImportError):
    httptools = importlib.import_module("httptools")

MOST_HEAD_BYTES = 65_536
HALF_CLOSE_SECONDS = 1.0
"""A client that closes its sending side so soon after its request waits for the answer; later, it has gone away."""
GONE_AFTER_SECONDS = 0.2
"""How long a client that closed its sending side is taken to wait for its answer, before that is examined."""
GONE_CHECKS = 8
"""How often that is examined, each time after twice as long: the last time after 13 seconds."""
OFFERS = (b"upgrade", b"http2-settings")
"""Headers, and tokens of Connection, with which a client offers another protocol."""


_Base: Any = AutoHTTPProtocol


class _HTTPTools(_Base):  # type: ignore[misc]
    """uvicorn's connection over httptools, which ends a request's body at an offer to upgrade, and knows chunks only.

    An offer is ignored, as RFC 9110 allows: the request is parsed a second time without it.
    """

    parser: Any

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        while True:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as offer:
                data = self._without_offer() + data[offer.args[0] :]
                # The other one may be at its end, where the client asked to close the connection after this request.
                self.parser = self._new_parser()
            except httptools.HttpParserError:
                self.logger.warning("Invalid HTTP request received.")
                self.send_400_response("This is not a valid HTTP request.")
                return
            else:
                return

    def on_headers_complete(self) -> None:
        if self._is_offer():
            return
        super().on_headers_complete()
        if self.scope["http_version"] == "1.0":
            self.cycle.send = functools.partial(_send_until_close, self.cycle, self.cycle.send)

    def on_message_complete(self) -> None:
        if not self._is_offer():
            super().on_message_complete()

    def _new_parser(self) -> Any:
        parser = httptools.HttpRequestParser(self)
        # As uvicorn has it: requests after one that asks to close the connection are dropped, and do no harm.
        with contextlib.suppress(AttributeError):
            parser.set_dangerous_leniencies(lenient_data_after_close=True)
        return parser

    def _is_offer(self) -> bool:
        return bool(self.parser.should_upgrade()) and self.parser.get_method() != b"CONNECT"

    def _without_offer(self) -> bytes:
        """The head of the request that was parsed last, without the offer."""
        lines = [b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())]
        for name, value in self.headers:
            if name == b"connection":
                value = b",".join(token for token in value.split(b",") if token.strip().lower() not in OFFERS)
            if name not in OFFERS:
                lines.append(b"%b: %b" % (name, value))
        return b"\r\n".join([*lines, b"", b""])


async def _send_until_close(cycle: Any, send: Callable[[Any], Awaitable[None]], message: Any) -> None:
    """Answer HTTP/1.0, which has no chunks: where no length is stated, the body ends when the connection closes."""
    if message["type"] == "http.response.start":
        cycle.chunked_encoding = False
    else:
        cycle.expected_content_length = len(message.get("body", b""))
    await send(message)


def connection_class(options: ServeOptions) -> type[asyncio.Protocol]:
    """The protocol that one app's connections speak."""
    base: Any = _Base if httptools is None else _HTTPTools
    longest = max(int(options.max_body), int(options.max_upload))

    class Connection(base):  # type: ignore[misc]
        """Closed where a request's head does not come within `stall_seconds`, or does not end."""

        _head_bytes = 0
        _head_timer: asyncio.TimerHandle | None = None
        _gone_timer: asyncio.TimerHandle | None = None
        _read_at = 0.0

        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(transport)
            self._await_head()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_waiting()
            if self._gone_timer is not None:
                self._gone_timer.cancel()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            # Most of what arrives makes a request whole: then there is nothing to wait for.
            super().data_received(data)
            if self.cycle is not None and not self.cycle.response_complete:
                self._stop_waiting()
                self._read_at = self.loop.time()
                return
            self._head_bytes += len(data)
            # A body whose request was answered already is read to its end, or the client would miss the answer.
            answered = self.cycle is not None and self.cycle.more_body
            if self._head_bytes > (longest if answered else MOST_HEAD_BYTES):
                self.transport.abort()
            elif self._head_timer is None:
                self._await_head()

        def eof_received(self) -> bool:
            """Whether the connection stays open: where the client can still read the answer to a whole request."""
            if self.cycle is None or self.cycle.response_complete or self.cycle.more_body:
                return False
            if self.cycle.response_started and self.loop.time() - self._read_at > HALF_CLOSE_SECONDS:
                return False
            self.cycle.keep_alive = False
            self._gone_timer = self.loop.call_later(GONE_AFTER_SECONDS, self._look_if_gone, 0)
            return True

        def _look_if_gone(self, checks: int) -> None:
            # A client that has gone looks the same as one that waits, until its system is sent something and
            # resets the connection. An interim answer is what HTTP/1.1 allows anybody to be sent.
            if self.cycle.response_complete or self.transport.is_closing():
                return
            if self.transport.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                self.transport.abort()
            elif checks < GONE_CHECKS:
                silent = not self.cycle.response_started and not getattr(self, "pipeline", None)
                if checks == 0 and silent and self.cycle.scope["http_version"] == "1.1":
                    self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                self._gone_timer = self.loop.call_later(0.05 * 2**checks, self._look_if_gone, checks + 1)

        def send_400_response(self, msg: str) -> None:
            body = json.dumps(RequestError(400, msg).body()).encode()
            self.transport.write(
                b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\ncontent-length: %d\r\n"
                b"connection: close\r\n\r\n%b" % (len(body), body)
            )
            self.transport.close()

        def _await_head(self) -> None:
            self._head_timer = self.loop.call_later(options.stall_seconds, self.transport.abort)

        def _stop_waiting(self) -> None:
            self._head_bytes = 0
            if self._head_timer is not None:
                self._head_timer.cancel()
                self._head_timer = None

    return Connection
