"""uvicorn's HTTP connection with additions.

Limits on the time and the size of a request's head; support for clients that offer another protocol, use HTTP/1.0, or
close their sending side after the request; errors in OpenAI's form for requests that cannot be parsed.
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
# Without it uvicorn uses h11, which does not need `_HTTPTools`.
with contextlib.suppress(ImportError):
    httptools = importlib.import_module("httptools")

MAX_HEAD_BYTES = 65_536
HALF_CLOSE_SECONDS = 1.0
"""A client that closes its sending side this soon after its request waits for the answer. Later, it is gone."""
FIRST_CHECK_SECONDS = 0.2
"""Time until the first check of a client that closed its sending side."""
MAX_CHECKS = 8
"""Number of checks. Each interval is twice as long: the last check is after 13 seconds."""
UPGRADE_HEADERS = (b"upgrade", b"http2-settings")
"""Headers, and tokens of Connection, that offer another protocol."""


_Base: Any = AutoHTTPProtocol


class _HTTPTools(_Base):  # type: ignore[misc]
    """uvicorn's httptools connection, which ends a request at an upgrade offer, and answers only in chunks.

    The offer is ignored, as RFC 9110 allows: the request is parsed again without it.
    """

    parser: Any

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        while True:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as offer:
                data = self._head_without_upgrade() + data[offer.args[0] :]
                # A new parser: the old one may have ended because the request closes the connection.
                self.parser = self._new_parser()
            except httptools.HttpParserError:
                self.logger.warning("Invalid HTTP request received.")
                self.send_400_response("This is not a valid HTTP request.")
                return
            else:
                return

    def on_headers_complete(self) -> None:
        if self._is_upgrade():
            return
        super().on_headers_complete()
        if self.scope["http_version"] == "1.0":
            self.cycle.send = functools.partial(_send_until_close, self.cycle, self.cycle.send)

    def on_message_complete(self) -> None:
        if not self._is_upgrade():
            super().on_message_complete()

    def _new_parser(self) -> Any:
        parser = httptools.HttpRequestParser(self)
        # Like uvicorn: data after a request that closes the connection is ignored.
        with contextlib.suppress(AttributeError):
            parser.set_dangerous_leniencies(lenient_data_after_close=True)
        return parser

    def _is_upgrade(self) -> bool:
        return bool(self.parser.should_upgrade()) and self.parser.get_method() != b"CONNECT"

    def _head_without_upgrade(self) -> bytes:
        """The head of the last request without the upgrade offer."""
        lines = [b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())]
        for name, value in self.headers:
            if name == b"connection":
                value = b",".join(token for token in value.split(b",") if token.strip().lower() not in UPGRADE_HEADERS)
            if name not in UPGRADE_HEADERS:
                lines.append(b"%b: %b" % (name, value))
        return b"\r\n".join([*lines, b"", b""])


async def _send_until_close(cycle: Any, send: Callable[[Any], Awaitable[None]], message: Any) -> None:
    """Answer HTTP/1.0, which has no chunks: the end of the connection ends a body without a length."""
    if message["type"] == "http.response.start":
        cycle.chunked_encoding = False
    else:
        cycle.expected_content_length = len(message.get("body", b""))
    await send(message)


def connection_class(options: ServeOptions) -> type[asyncio.Protocol]:
    """The connection class of one app."""
    base: Any = _Base if httptools is None else _HTTPTools
    max_body = max(int(options.max_body), int(options.max_upload))

    class Connection(base):  # type: ignore[misc]
        """A connection that is closed if a request's head takes longer than `stall_seconds` or is too long."""

        _head_bytes = 0
        _head_timer: asyncio.TimerHandle | None = None
        _check_timer: asyncio.TimerHandle | None = None
        _read_at = 0.0

        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(transport)
            self._start_head_timer()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_head_timer()
            if self._check_timer is not None:
                self._check_timer.cancel()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            # Usually the data completes the head of a request.
            super().data_received(data)
            if self.cycle is not None and not self.cycle.response_complete:
                self._stop_head_timer()
                self._read_at = self.loop.time()
                return
            self._head_bytes += len(data)
            # The rest of a body is read even after the answer, or the client would not see the answer.
            answered = self.cycle is not None and self.cycle.more_body
            if self._head_bytes > (max_body if answered else MAX_HEAD_BYTES):
                self.transport.abort()
            elif self._head_timer is None:
                self._start_head_timer()

        def eof_received(self) -> bool:
            """Whether the connection stays open, for the answer to a complete request."""
            if self.cycle is None or self.cycle.response_complete or self.cycle.more_body:
                return False
            if self.cycle.response_started and self.loop.time() - self._read_at > HALF_CLOSE_SECONDS:
                return False
            self.cycle.keep_alive = False
            self._check_timer = self.loop.call_later(FIRST_CHECK_SECONDS, self._check_client, 0)
            return True

        def _check_client(self, checks: int) -> None:
            # A disconnected client looks like a waiting one until its system answers a packet with a reset. HTTP/1.1
            # allows an interim answer at any time.
            if self.cycle.response_complete or self.transport.is_closing():
                return
            if self.transport.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                self.transport.abort()
            elif checks < MAX_CHECKS:
                silent = not self.cycle.response_started and not getattr(self, "pipeline", None)
                if checks == 0 and silent and self.cycle.scope["http_version"] == "1.1":
                    self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                self._check_timer = self.loop.call_later(0.05 * 2**checks, self._check_client, checks + 1)

        def send_400_response(self, msg: str) -> None:
            body = json.dumps(RequestError(400, msg).body()).encode()
            self.transport.write(
                b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\ncontent-length: %d\r\n"
                b"connection: close\r\n\r\n%b" % (len(body), body)
            )
            self.transport.close()

        def _start_head_timer(self) -> None:
            self._head_timer = self.loop.call_later(options.stall_seconds, self.transport.abort)

        def _stop_head_timer(self) -> None:
            self._head_bytes = 0
            if self._head_timer is not None:
                self._head_timer.cancel()
                self._head_timer = None

    return Connection
