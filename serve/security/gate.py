"""What every request passes: an id, the key, the limits of body and number; and what is logged and counted of it.

The page is let in by the same keys, and by what the login form gave; what changes something there has to come from the
page itself, since any site may make a browser send requests here.
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
"""What needs no key, and is answered however busy the server is."""
READING = ("GET", "HEAD", "OPTIONS")
GRADIO = f"{PAGE}/gradio_api/"
UPLOADS = (f"{GRADIO}upload", f"{GRADIO}queue/join")
"""What may be as long as a text that is dropped, or pasted."""
UPLOAD_EXTRA = 65_536
"""What a form adds to the file in it."""
STREAMS = (f"{GRADIO}heartbeat/", f"{GRADIO}queue/data", f"{GRADIO}upload_progress")
"""Open for as long as a page is, and mostly silent."""
_USED = re.compile(
    r"queue/(?:join|data)|heartbeat/\w+|cancel|reset|component_server|upload|upload_progress|file=(?!\s*https?:).+"
    r"|startup-events|theme\.css|app_id|info",
    re.IGNORECASE,
)
"""What the page uses of Gradio's addresses. The others fetch from the network, edit programs or tell of visitors."""
PAGE_HEADERS = [
    # Gradio's page is put together by scripts and styles in its own text; nothing comes from, or goes to, elsewhere.
    (
        b"content-security-policy",
        b"default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
        b"img-src 'self' data: blob:; font-src 'self' data:; media-src 'self' data: blob:; worker-src 'self' blob:; "
        b"connect-src 'self'; object-src 'none'; frame-ancestors 'self'; form-action 'self'; base-uri 'self'",
    ),
    (b"x-content-type-options", b"nosniff"),
    # Other sites learn no address; "no-referrer" would make browsers send the login form with "Origin: null".
    (b"referrer-policy", b"same-origin"),
]
DISCARD_SECONDS = 5.0
"""How long the rest of a refused body is read, so that the client gets to see why."""
_REQUEST_ID = re.compile(rb"[\w.:-]{1,128}")


class Gate:
    """ASGI middleware; the outermost."""

    def __init__(
        self, app: ASGIApp, *, options: ServeOptions, keys: Keys, metrics: Metrics, proxies: Proxies,
        cors: Callable[[ASGIApp], ASGIApp] | None = None,
    ) -> None:  # fmt: skip
        """`cors` adds to an answer what lets pages of other origins read it."""
        self._app, self._options, self._keys, self._metrics = app, options, keys, metrics
        self._proxies, self._cors = proxies, cors
        # A web site that points its name to this server knows no key, and a browser sends it no cookie of ours.
        self._is_own_name = None if keys else name_check(options)
        self._open = 0
        self._streams = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request pass, or answer it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        self._find_client(scope, headers)
        asked = scope
        if scope["method"] == "HEAD" and not is_page(scope["path"]):
            # Whoever sends the answer leaves its body out.
            scope = {**scope, "method": "GET"}
        body = _Body(receive, self._options, upload=scope["path"].rstrip("/") in UPLOADS)
        visit = _Visit(scope, headers, body, send)
        stream = visit.path.startswith(STREAMS)
        self._count(1, stream=stream)
        try:
            if stream:
                await self._until_the_end(scope, headers, body, visit)
            else:
                await self._serve(scope, headers, body, visit)
        except asyncio.CancelledError:
            visit.log_fields.setdefault("code", "cut_off")
            if not visit.status:
                await visit.refuse(shutting_down(), self._cors)
            raise
        except Exception as error:
            if isinstance(error, TooManyGuessesError):
                error = too_many_requests(error.seconds, str(error))
            if not isinstance(error, RequestError):
                log.exception("A request failed.", extra={"fields": {"request_id": visit.id}})
            if not visit.status:
                await body.discard()
                await visit.refuse(error_response_for(error), self._cors)
        finally:
            self._count(-1, stream=stream)
            self._tell(scope, visit, asked["method"])

    def _find_client(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
        """Put into the scope who asks, and how, where that is known from a proxy that is trusted."""
        peer, port = scope.get("client") or ("", 0)
        if is_page(scope["path"]):
            local = is_local(peer, scope["http_version"], headers, self._proxies)
            scope.setdefault("state", {})["is_local"] = local
        trusted = peer in self._proxies
        if trusted and b"x-forwarded-for" in headers:
            # A proxy may add a header of the same name instead of a name to the list.
            named = b",".join(value for name, value in scope["headers"] if name == b"x-forwarded-for")
            client = self._proxies.client(peer, named.decode("latin-1"))
            scope["client"] = (client, port if client == peer else 0)
        # Whoever says of itself that it uses TLS gets no more by that than a cookie for TLS alone.
        scheme = headers.get(b"x-forwarded-proto", b"").strip().lower()
        if scheme in (b"http", b"https") and (trusted or is_loopback(peer)):
            scope["scheme"] = scheme.decode("ascii")

    def _count(self, change: int, *, stream: bool) -> None:
        # Pages that are only looked at take no request's place.
        if stream:
            self._streams += change
        else:
            self._open += change
            self._metrics.open.inc(change)

    async def _serve(self, scope: Scope, headers: dict[bytes, bytes], body: _Body, visit: _Visit) -> None:
        path, method = visit.path, scope["method"]
        of_page = is_page(path)
        open_to_all = path in OPEN_PATHS or path.startswith("/docs/")
        self._check_host(scope, headers, open_to_all=open_to_all)
        if (of_page or path in PUBLIC_PATHS) and method not in READING and not from_same_site(headers):
            raise RequestError(403, "Another site sent this request: open the page itself.", code="cross_site")
        at_once = self._streams if path.startswith(STREAMS) else self._open
        if at_once > self._options.max_requests and not open_to_all:
            raise too_many_requests(1, "Too many requests at once. Come back in a moment.")
        needs_key = self._keys and not open_to_all and path not in PUBLIC_PATHS and (of_page or method != "OPTIONS")
        client = (scope.get("client") or ("",))[0]
        if needs_key and not (of_page and self._keys.accept_cookie(headers.get(b"cookie", b""), client)):
            key = headers.get(b"authorization", b"")
            # Browsers bring no key, though perhaps the password that a proxy asked them for.
            if path in (PAGE, f"{PAGE}/") and method in READING and not key.lower().startswith(b"bearer "):
                await RedirectResponse(LOGIN, 303)(scope, body.receive, visit.send)
                return
            self._check_key(key, client)
        if path.startswith(GRADIO) and not _USED.fullmatch(path.removeprefix(GRADIO).rstrip("/")):
            raise RequestError(404, "The page has no such address.")
        body.check_length(headers.get(b"content-length"))
        await self._app(scope, body.receive, visit.send)

    def _check_host(self, scope: Scope, headers: dict[bytes, bytes], *, open_to_all: bool) -> None:
        given = sum(name == b"host" for name, _ in scope["headers"])
        if given != 1 and (given or scope["http_version"] != "1.0"):
            raise RequestError(400, f"A request has exactly one Host header: this one has {given or 'none'}.")
        if given and not open_to_all and self._is_own_name is not None and not self._is_own_name(headers[b"host"]):
            name = headers[b"host"].decode("latin-1")[:MAX_SHOWN]
            raise RequestError(
                421, f"This server does not answer for {name!r}. If that is a name of this server, start it with "
                "--allowed-host and the name, or with a key.", code="unknown_host",
            )  # fmt: skip

    def _check_key(self, header: bytes, client: str) -> None:
        scheme, _, given = header.partition(b" ")
        given = given.strip() if scheme.lower() == b"bearer" else b""
        if not given or not self._keys.accept(given, client):
            said = "Incorrect API key provided." if given else "You didn't provide an API key."
            raise RequestError(401, f"{said} Send it as Authorization: Bearer KEY.", code="invalid_api_key")

    async def _until_the_end(self, scope: Scope, headers: dict[bytes, bytes], body: _Body, visit: _Visit) -> None:
        """A stream of the page; it would not end by itself when the server does."""
        # Further in, the scope's app is Gradio's.
        ending = asyncio.ensure_future(_all_is_written(scope["app"].state))
        serving = asyncio.ensure_future(self._serve(scope, headers, body, visit))
        try:
            await asyncio.wait((serving, ending), return_when=asyncio.FIRST_COMPLETED)
        finally:
            ending.cancel()
            if not serving.done():
                serving.cancel()
            # What it raised is raised here, unless it was told to stop.
            with contextlib.suppress(asyncio.CancelledError):
                await serving
        await visit.finish()

    def _tell(self, scope: Scope, visit: _Visit, method: str) -> None:
        seconds = time.monotonic() - visit.began
        of_page = is_page(visit.path)
        route = PAGE if of_page else getattr(scope.get("route"), "path", "other")
        status = visit.status or 499
        self._metrics.answered(route, method if route != "other" else "any", status, seconds, visit.log_fields)
        log.log(
            # A page asks for a hundred things when it is opened.
            logging.DEBUG if of_page and status < 400 else logging.INFO,
            "request",
            extra={"fields": {
                "request_id": visit.id, "method": method, "path": visit.path, "status": status,
                "seconds": round(seconds, 6), "client": (scope.get("client") or ("",))[0], **visit.log_fields,
            }},
        )  # fmt: skip


class _Visit:
    """One request: its id, its facts, and what was answered."""

    def __init__(self, scope: Scope, headers: dict[bytes, bytes], body: _Body, send: Send) -> None:
        given = headers.get(b"x-request-id", b"")
        self.id = given.decode("ascii") if _REQUEST_ID.fullmatch(given) else f"req-{secrets.token_hex(12)}"
        self.began = time.monotonic()
        self.path: str = scope["path"]
        self.status = 0
        self._whole = False
        self.log_fields: dict[str, Any] = {}
        self._scope, self._send = scope, send
        scope.setdefault("state", {}).update(log_fields=self.log_fields, discard=body.discard)

    async def send(self, message: Message) -> None:
        """Pass an answer on, with the id; the page's with what browsers are told of it."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            told = [*message.get("headers", ()), (b"x-request-id", self.id.encode("ascii"))]
            if is_page(self.path) or self.path in PUBLIC_PATHS:
                # Gradio would let any site read what it answers.
                told = [each for each in told if not each[0].lower().startswith(b"access-control-")] + PAGE_HEADERS
            message["headers"] = told
        else:
            self._whole = not message.get("more_body", False)
        await self._send(message)

    async def finish(self) -> None:
        """End an answer that was broken off."""
        if self.status and not self._whole:
            await self.send({"type": "http.response.body", "body": b""})

    async def refuse(self, error: RequestError, cors: Callable[[ASGIApp], ASGIApp] | None) -> None:
        """Answer with an error, which pages of other origins may read where `cors` lets them."""
        self.log_fields["code"] = error.code
        answer: ASGIApp = error.response()
        await (answer if cors is None else cors(answer))(self._scope, _nothing, self.send)


async def _all_is_written(state: State) -> None:
    """Until the server drains and no model is at work."""
    await state.draining.wait()
    while state.models.in_use:
        await asyncio.sleep(0.1)


async def _nothing() -> Message:
    return {"type": "http.disconnect"}


class _Body:
    """A request's body, counted and timed while it is read. An upload may go on for as long as something arrives."""

    def __init__(self, receive: Receive, options: ServeOptions, *, upload: bool = False) -> None:
        self._receive, self._seconds, self._upload = receive, options.stall_seconds, upload
        self._limit = int(options.max_upload) + UPLOAD_EXTRA if upload else int(options.max_body)
        self._read = 0
        self._whole = False
        self._deadline = time.monotonic() + options.stall_seconds

    def check_length(self, stated: bytes | None) -> None:
        """Refuse what says itself that it is too long."""
        if stated is not None and stated.isdigit() and int(stated) > self._limit:
            raise self._too_long()

    def _too_long(self) -> RequestError:
        return RequestError(413, f"The body is longer than {self._limit:,} bytes.", code="request_too_large")

    async def receive(self) -> Message:
        """The next part."""
        if self._whole:
            return await self._receive()
        if self._upload:
            self._deadline = time.monotonic() + self._seconds
        try:
            async with asyncio.timeout(self._deadline - time.monotonic()):
                message = await self._receive()
        except TimeoutError:
            raise RequestError(
                408, f"The body did not arrive within {self._seconds:g} seconds.", code="request_timeout"
            ) from None
        if message["type"] == "http.request":
            self._read += len(message.get("body", b""))
            self._whole = not message.get("more_body", False)
            if self._read > self._limit:
                raise self._too_long()
        return message

    async def discard(self) -> None:
        """Read on for a while without keeping anything: a client that still writes would miss the answer."""
        try:
            async with asyncio.timeout(min(DISCARD_SECONDS, self._seconds)):
                while not self._whole and self._read < 16 * self._limit:
                    message = await self._receive()
                    self._read += len(message.get("body", b""))
                    self._whole = message["type"] != "http.request" or not message.get("more_body", False)
        except TimeoutError:
            pass
