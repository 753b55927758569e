"""Middleware for Ray's HTTP proxies: it retries requests of a dying replica, and sends errors as JSON.

    RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=serve.ray_proxy:middlewares ray start --head

Without it, a request whose replica died gets "Internal Server Error" as plain text.
"""

from __future__ import annotations

from collections import deque

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.http_errors import RequestError

ATTEMPTS = 3
MAX_BYTES = 4 << 20
"""A request with a longer body is not retried."""


def middlewares() -> list[Middleware]:
    """The middleware for Ray's proxies."""
    return [Middleware(Proxy)]


class Proxy:
    """ASGI middleware. A request changes nothing on a replica, so it can be retried until its answer starts."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward a request, up to `ATTEMPTS` times."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = await _read_body(receive)
        attempts = ATTEMPTS if body and not body[-1].get("more_body", False) else 1
        for _ in range(attempts):
            attempt = _Attempt(body, receive, send)
            await self._app(scope, attempt.receive, attempt.send)
            if attempt.started or attempt.disconnected:
                return
        error = RequestError(502, "The replica stopped: retry the request.", code="replica_gone").response()
        if (given := dict(scope["headers"]).get(b"x-request-id")) is not None:
            error.headers["x-request-id"] = given.decode("latin-1")
        await error(scope, receive, send)


async def _read_body(receive: Receive) -> list[Message]:
    """The parts of a request's body, up to MAX_BYTES."""
    parts: list[Message] = []
    size = 0
    while size <= MAX_BYTES:
        message = await receive()
        parts.append(message)
        size += len(message.get("body", b""))
        if not message.get("more_body", False):
            break
    return parts


class _Attempt:
    """One attempt to forward a request."""

    def __init__(self, body: list[Message], receive: Receive, send: Send) -> None:
        self._body, self._receive, self._send = deque(body), receive, send
        self._plain_start: Message | None = None
        self.started = self.disconnected = False

    async def receive(self) -> Message:
        """The stored parts, then new messages."""
        message = self._body.popleft() if self._body else await self._receive()
        self.disconnected = self.disconnected or message["type"] == "http.disconnect"
        return message

    async def send(self, message: Message) -> None:
        """Forward an answer. An error of Ray, which is plain text, becomes a JSON error."""
        self.started = True
        if message["type"] == "http.response.start" and message["status"] >= 400 and _is_plain(message):
            self._plain_start = message
            return
        if self._plain_start is not None:
            status = self._plain_start["status"]
            code = "rate_limit_exceeded" if status == 429 else "replica_gone" if status >= 500 else None
            text = message.get("body", b"").decode("utf-8", "replace")
            error = RequestError(status, text or "Ray could not forward the request.", code=code).response()
            other = [
                h for h in self._plain_start["headers"] if h[0].lower() not in (b"content-type", b"content-length")
            ]
            await self._send({**self._plain_start, "headers": [*other, *error.raw_headers]})
            self._plain_start = None
            message = {"type": "http.response.body", "body": error.body}
        await self._send(message)


def _is_plain(start: Message) -> bool:
    return any(name.lower() == b"content-type" and value.startswith(b"text/plain") for name, value in start["headers"])
