"""The checks of every request (host, origin, API key, limits), its id, its metrics and its line in the access log.

The page accepts the same keys, and the cookie of the login form. A request that changes something on the page must come
from the page itself, because any web site can make a browser send requests to this server.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import secrets
import time
from collections.abc import Callable
from typing import Any

from starlette.datastructures import State
from starlette.responses import RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.http_errors import MAX_SHOWN, RequestError, error_response_for, shutting_down, too_many_requests
from serve.metrics import Metrics
from serve.security.hosts import Proxies, from_same_site, is_local, is_loopback, name_check
from serve.security.login import LOGIN, PAGE, PUBLIC_PATHS, Keys, TooManyGuessesError, is_page
from serve.settings import ServeOptions

log = logging.getLogger("serve.requests")

OPEN_PATHS = ("/health", "/health/ready", "/docs", "/openapi.json")
"""Paths without a key, a check of the host, or a limit of open requests."""
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
GRADIO = f"{PAGE}/gradio_api/"
UPLOADS = (f"{GRADIO}upload", f"{GRADIO}queue/join")
"""Paths with the limit `max_upload`: a text is uploaded or pasted there."""
UPLOAD_EXTRA = 65_536
"""Bytes that a form adds to the uploaded file."""
STREAMS = (f"{GRADIO}heartbeat/", f"{GRADIO}queue/data", f"{GRADIO}upload_progress")
"""Streams of a page, open as long as the page is."""
_USED_BY_PAGE = re.compile(
    r"queue/(?:join|data)|heartbeat/\w+|cancel|reset|component_server|upload|upload_progress|file=(?!\s*https?:).+"
    r"|startup-events|theme\.css|app_id|info",
    re.IGNORECASE,
)
"""The allowed paths of Gradio. Others fetch from the network, edit programs, or send data about users."""
PAGE_HEADERS = [
    # Gradio's page has inline scripts and styles. It loads nothing from other hosts and sends nothing to them.
    (
        b"content-security-policy",
        b"default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
        b"img-src 'self' data: blob:; font-src 'self' data:; media-src 'self' data: blob:; worker-src 'self' blob:; "
        b"connect-src 'self'; object-src 'none'; frame-ancestors 'self'; form-action 'self'; base-uri 'self'",
    ),
    (b"x-content-type-options", b"nosniff"),
    # With "no-referrer", browsers would send the login form with "Origin: null".
    (b"referrer-policy", b"same-origin"),
]
DISCARD_SECONDS = 5.0
"""How long the rest of a refused body is read, so that the client sees the error."""
_REQUEST_ID = re.compile(rb"[\w.:-]{1,128}")


class Gate:
    """The outermost ASGI middleware."""

    def __init__(
        self, app: ASGIApp, *, options: ServeOptions, keys: Keys, metrics: Metrics, proxies: Proxies,
        cors: Callable[[ASGIApp], ASGIApp] | None = None,
    ) -> None:  # fmt: skip
        """`cors` adds CORS headers to the error answers of the gate."""
        self._app, self._options, self._keys, self._metrics = app, options, keys, metrics
        self._proxies, self._cors = proxies, cors
        # With keys no check is needed: a web site that points its name to this server has no key and no cookie.
        self._is_own_name = None if keys else name_check(options)
        self._open_requests = 0
        self._open_streams = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it with an error."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        self._find_client(scope, headers)
        method = scope["method"]
        if method == "HEAD" and not is_page(scope["path"]):
            # The server leaves the body out.
            scope = {**scope, "method": "GET"}
        body = _Body(receive, self._options, upload=scope["path"].rstrip("/") in UPLOADS)
        request = _RequestScope(scope, headers, body, send)
        stream = request.path.startswith(STREAMS)
        self._count(1, stream=stream)
        try:
            await (self._serve_stream if stream else self._serve)(scope, headers, body, request)
        except asyncio.CancelledError:
            request.log_fields.setdefault("code", "cut_off")
            if not request.status:
                await request.refuse(shutting_down(), self._cors)
            raise
        except Exception as error:
            if isinstance(error, TooManyGuessesError):
                error = too_many_requests(error.seconds, str(error))
            if not isinstance(error, RequestError):
                log.exception("A request failed.", extra={"fields": {"request_id": request.id}})
            if not request.status:
                await body.discard()
                await request.refuse(error_response_for(error), self._cors)
        finally:
            self._count(-1, stream=stream)
            self._log(scope, request, method)

    def _find_client(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
        """Set the client and the scheme of the scope, from the headers of a trusted proxy if there is one."""
        peer, port = scope.get("client") or ("", 0)
        if is_page(scope["path"]):
            local = is_local(peer, scope["http_version"], headers, self._proxies)
            scope.setdefault("state", {})["is_local"] = local
        trusted = peer in self._proxies
        if trusted and b"x-forwarded-for" in headers:
            # A proxy may add a second header instead of extending the first.
            named = b",".join(value for name, value in scope["headers"] if name == b"x-forwarded-for")
            client = self._proxies.client(peer, named.decode("latin-1"))
            scope["client"] = (client, port if client == peer else 0)
        # A false claim of TLS gives a client no more than a cookie that is for TLS only.
        scheme = headers.get(b"x-forwarded-proto", b"").strip().lower()
        if scheme in (b"http", b"https") and (trusted or is_loopback(peer)):
            scope["scheme"] = scheme.decode("ascii")

    def _count(self, change: int, *, stream: bool) -> None:
        # The streams of open pages have a limit of their own.
        if stream:
            self._open_streams += change
        else:
            self._open_requests += change
            self._metrics.open.inc(change)

    async def _serve(self, scope: Scope, headers: dict[bytes, bytes], body: _Body, request: _RequestScope) -> None:
        path, method = request.path, scope["method"]
        of_page, public = is_page(path), path in PUBLIC_PATHS
        is_open = path in OPEN_PATHS or path.startswith("/docs/")
        self._check_host(scope, headers, is_open=is_open)
        if (of_page or public) and method not in SAFE_METHODS and not from_same_site(headers):
            raise RequestError(403, "Another site sent this request: open the page itself.", code="cross_site")
        count = self._open_streams if path.startswith(STREAMS) else self._open_requests
        if count > self._options.max_requests and not is_open:
            raise too_many_requests(1, "The server has too many open requests. Retry in a moment.")
        needs_key = self._keys and not is_open and not public and (of_page or method != "OPTIONS")
        client = (scope.get("client") or ("",))[0]
        if needs_key and not (of_page and self._keys.accept_cookie(headers.get(b"cookie", b""), client)):
            key = headers.get(b"authorization", b"")
            # A browser has no key, but may send the password for a proxy.
            if path in (PAGE, f"{PAGE}/") and method in SAFE_METHODS and not key.lower().startswith(b"bearer "):
                await RedirectResponse(LOGIN, 303)(scope, body.receive, request.send)
                return
            self._check_key(key, client)
        if path.startswith(GRADIO) and not _USED_BY_PAGE.fullmatch(path.removeprefix(GRADIO).rstrip("/")):
            raise RequestError(404, "The page does not have this address.")
        body.check_length(headers.get(b"content-length"))
        await self._app(scope, body.receive, request.send)

    def _check_host(self, scope: Scope, headers: dict[bytes, bytes], *, is_open: bool) -> None:
        count = sum(name == b"host" for name, _ in scope["headers"])
        if count != 1 and (count or scope["http_version"] != "1.0"):
            raise RequestError(400, f"A request has exactly one Host header: this one has {count or 'none'}.")
        if count and not is_open and self._is_own_name is not None and not self._is_own_name(headers[b"host"]):
            name = headers[b"host"].decode("latin-1")[:MAX_SHOWN]
            raise RequestError(
                421, f"This server does not answer for {name!r}. If that is its name, start it with --allowed-host "
                "and the name, or with a key.", code="unknown_host",
            )  # fmt: skip

    def _check_key(self, header: bytes, client: str) -> None:
        scheme, _, key = header.partition(b" ")
        key = key.strip() if scheme.lower() == b"bearer" else b""
        if not key or not self._keys.accept(key, client):
            problem = "Incorrect API key provided." if key else "You didn't provide an API key."
            raise RequestError(401, f"{problem} Send it as Authorization: Bearer KEY.", code="invalid_api_key")

    async def _serve_stream(
        self, scope: Scope, headers: dict[bytes, bytes], body: _Body, request: _RequestScope
    ) -> None:
        """Serve a stream of the page, and end it when the server stops: it does not end by itself."""
        # The inner app would be Gradio's.
        stopping = asyncio.ensure_future(_drained(scope["app"].state))
        serving = asyncio.ensure_future(self._serve(scope, headers, body, request))
        try:
            await asyncio.wait((serving, stopping), return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopping.cancel()
            if not serving.done():
                serving.cancel()
            # Raises its exceptions, except the cancellation.
            with contextlib.suppress(asyncio.CancelledError):
                await serving
        await request.finish()

    def _log(self, scope: Scope, request: _RequestScope, method: str) -> None:
        """Write the access log and the metrics."""
        seconds = time.monotonic() - request.started
        of_page = is_page(request.path)
        route = PAGE if of_page else getattr(scope.get("route"), "path", "other")
        status = request.status or 499
        self._metrics.answered(route, method if route != "other" else "any", status, seconds, request.log_fields)
        log.log(
            # A page sends a hundred requests when it opens.
            logging.DEBUG if of_page and status < 400 else logging.INFO,
            "request",
            extra={"fields": {
                "request_id": request.id, "method": method, "path": request.path, "status": status,
                "seconds": round(seconds, 6), "client": (scope.get("client") or ("",))[0], **request.log_fields,
            }},
        )  # fmt: skip


class _RequestScope:
    """One request: its id, its log fields, and the status of its answer."""

    def __init__(self, scope: Scope, headers: dict[bytes, bytes], body: _Body, send: Send) -> None:
        given = headers.get(b"x-request-id", b"")
        self.id = given.decode("ascii") if _REQUEST_ID.fullmatch(given) else f"req-{secrets.token_hex(12)}"
        self.started = time.monotonic()
        self.path: str = scope["path"]
        self.status = 0
        self.log_fields: dict[str, Any] = {}
        self._complete = False
        self._scope, self._send = scope, send
        scope.setdefault("state", {}).update(log_fields=self.log_fields, discard=body.discard)

    async def send(self, message: Message) -> None:
        """Send a part of the answer; add the id and the headers of the page."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = [*message.get("headers", ()), (b"x-request-id", self.id.encode("ascii"))]
            if is_page(self.path) or self.path in PUBLIC_PATHS:
                # Gradio would let any site read its answers.
                headers = [each for each in headers if not each[0].lower().startswith(b"access-control-")]
                headers += PAGE_HEADERS
            message["headers"] = headers
        else:
            self._complete = not message.get("more_body", False)
        await self._send(message)

    async def finish(self) -> None:
        """End an incomplete answer."""
        if self.status and not self._complete:
            await self.send({"type": "http.response.body", "body": b""})

    async def refuse(self, error: RequestError, cors: Callable[[ASGIApp], ASGIApp] | None) -> None:
        """Answer with an error, with the headers of `cors` if given."""
        self.log_fields["code"] = error.code
        answer: ASGIApp = error.response()
        await (answer if cors is None else cors(answer))(self._scope, _disconnected, self.send)


async def _drained(state: State) -> None:
    """Wait until the server stops and no request uses a model."""
    await state.draining.wait()
    while state.models.in_use:
        await asyncio.sleep(0.1)


async def _disconnected() -> Message:
    return {"type": "http.disconnect"}


class _Body:
    """The body of a request, with limits of size and time. An upload may take long if data keeps arriving."""

    def __init__(self, receive: Receive, options: ServeOptions, *, upload: bool = False) -> None:
        self._receive, self._seconds, self._upload = receive, options.stall_seconds, upload
        self._limit = int(options.max_upload) + UPLOAD_EXTRA if upload else int(options.max_body)
        self._read = 0
        self._complete = False
        self._deadline = time.monotonic() + options.stall_seconds

    def check_length(self, stated: bytes | None) -> None:
        """Check the Content-Length header."""
        if stated is not None and stated.isdigit() and int(stated) > self._limit:
            raise self._too_long()

    def _too_long(self) -> RequestError:
        return RequestError(413, f"The body is longer than {self._limit:,} bytes.", code="request_too_large")

    async def receive(self) -> Message:
        """The next part.

        Raises:
            RequestError: 408 too slow, 413 too long.
        """
        if self._complete:
            return await self._receive()
        if self._upload:
            self._deadline = time.monotonic() + self._seconds
        try:
            async with asyncio.timeout(self._deadline - time.monotonic()):
                message = await self._next()
        except TimeoutError:
            raise RequestError(
                408, f"The body did not arrive within {self._seconds:g} seconds.", code="request_timeout"
            ) from None
        if self._read > self._limit:
            raise self._too_long()
        return message

    async def _next(self) -> Message:
        message = await self._receive()
        self._read += len(message.get("body", b""))
        self._complete = message["type"] == "http.request" and not message.get("more_body", False)
        return message

    async def discard(self) -> None:
        """Read the rest for a while: a client that still sends would not see the answer."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(min(DISCARD_SECONDS, self._seconds)):
                while not self._complete and self._read < 16 * self._limit:
                    if (await self._next())["type"] != "http.request":
                        return
