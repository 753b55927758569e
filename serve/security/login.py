"""API keys, and the login form of the page at /login.

The form sets a cookie derived from the key by HMAC. Browsers send it only to the page, never to the API, and only
from the page itself.
"""

from __future__ import annotations

import hmac
import html
import ipaddress
import math
import re
import time
from collections import OrderedDict
from collections.abc import Hashable
from hashlib import sha256
from pathlib import Path
from string import Template
from urllib.parse import parse_qs

from fastapi import APIRouter, Request
from starlette.responses import HTMLResponse, RedirectResponse, Response

PAGE = "/page"
"""The path of the page."""
LOGIN, LOGOUT, FAVICON = "/login", "/logout", "/favicon.ico"
PUBLIC_PATHS = ("/", LOGIN, LOGOUT, FAVICON)
"""Paths of the page that need no key."""
COOKIE = "inkling_page"
MAX_FORM_BYTES = 16_384
"""A longer form has no key."""
_COOKIE = re.compile(rb"(?:^|[;\s])inkling_page=([0-9a-f]{64})(?=[;\s]|$)")

router = APIRouter(include_in_schema=False)


def is_page(path: str) -> bool:
    """Whether a path belongs to the page."""
    return path == PAGE or path.startswith(f"{PAGE}/")


class Backoff:
    """Waiting times after failures: none for the first few, then twice as long each time.

    The number of entries is limited: the oldest one goes first.
    """

    FREE = 10
    """Failures without a wait."""
    MAX_SECONDS = 60.0
    FORGET_SECONDS = 900.0
    """The count restarts after this time without a failure."""
    MAX_ENTRIES = 4096

    def __init__(self) -> None:
        self._failed: OrderedDict[Hashable, tuple[int, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._failed)

    def seconds(self, who: Hashable) -> float:
        """The remaining wait; 0 or less: none."""
        count, last = self._failed.get(who, (0, 0.0))
        if count < self.FREE:
            return 0.0
        return last + min(self.MAX_SECONDS, 2.0 ** (count - self.FREE)) - time.monotonic()

    def fail(self, who: Hashable) -> int:
        """Count a failure, and return the count."""
        now = time.monotonic()
        count, last = self._failed.pop(who, (0, now))
        count = 1 if now - last > self.FORGET_SECONDS else min(count + 1, 1000)
        self._failed[who] = (count, now)
        if len(self._failed) > self.MAX_ENTRIES:
            self._failed.popitem(last=False)
        return count


class TooManyGuessesError(Exception):
    """Too many wrong keys: the address must wait `seconds`."""

    def __init__(self, seconds: float) -> None:
        self.seconds = max(1, math.ceil(seconds))
        unit = "second" if self.seconds == 1 else "seconds"
        super().__init__(f"Too many wrong keys came from your address: wait {self.seconds} {unit}.")


class Keys:
    """The keys of one server. Each check compares all of them, so that its time reveals nothing.

    An address that sends many different wrong keys must wait. The same wrong key again is no new guess, and makes only
    that key wait: otherwise a program with an old key would lock out all others behind the same address. For the same
    reason, a key that was accepted from an address stays accepted.
    """

    def __init__(self, keys: tuple[bytes, ...]) -> None:
        self._keys = keys
        self._cookies = tuple(_cookie(key).encode("ascii") for key in keys)
        self._backoff = Backoff()
        self._accepted: OrderedDict[Hashable, None] = OrderedDict()

    def __bool__(self) -> bool:
        return bool(self._keys)

    def accept(self, key: bytes, address: str) -> bool:
        """Whether a key from `address` is right.

        Raises:
            TooManyGuessesError: the address must wait.
        """
        return self._accept([key], self._keys, address)

    def accept_cookie(self, header: bytes, address: str) -> bool:
        """Whether a Cookie header has a right cookie of the form.

        Raises:
            TooManyGuessesError: the address must wait.
        """
        # Pages on other ports of this host may set cookies of the same name.
        sent = _COOKIE.findall(header)
        return bool(sent) and self._accept(sent[:8], self._cookies, address)

    def _accept(self, sent: list[bytes], right: tuple[bytes, ...], address: str) -> bool:
        network = _network(address)
        # The hash of bytes has a secret salt in each process.
        pair = (network, hash(tuple(sent)))
        if pair not in self._accepted:
            wait = max(self._backoff.seconds(pair), self._backoff.seconds(network))
            if wait > 0:
                raise TooManyGuessesError(wait)
        found = [hmac.compare_digest(each, one) for each in sent for one in right]
        if any(found):
            self._accepted[pair] = None
            self._accepted.move_to_end(pair)
            if len(self._accepted) > Backoff.MAX_ENTRIES:
                self._accepted.popitem(last=False)
            return True
        if self._backoff.fail(pair) == 1:
            self._backoff.fail(network)
        return False


def _network(address: str) -> str:
    """What a client cannot change: its IPv4 address, or the network part of its IPv6 address."""
    if ":" not in address:
        return address
    try:
        return str(ipaddress.ip_network((address.partition("%")[0], 64), strict=False))
    except ValueError:
        return address


def _cookie(key: bytes) -> str:
    return hmac.new(key, b"inkling page", sha256).hexdigest()


ICON = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16">'
    '<path fill="#6366f1" d="M8 1c3 4 5 6.2 5 9a5 5 0 0 1-10 0c0-2.8 2-5 5-9z"/></svg>'
)


FORM = Template(Path(__file__).with_name("login.html").read_text("utf-8"))


def _form(error: str = "") -> str:
    return FORM.substitute(error=f'<p role="alert">{html.escape(error)}</p>\n' if error else "")


def _redirect(address: str) -> Response:
    return RedirectResponse(address, 303)


@router.get("/")
async def root() -> Response:
    """Redirect to the page."""
    return _redirect(f"{PAGE}/")


@router.get(LOGIN)
async def ask(request: Request) -> Response:
    """The login form."""
    return HTMLResponse(_form()) if request.app.state.keys else _redirect(f"{PAGE}/")


@router.get(FAVICON)
async def icon() -> Response:
    """The icon of the page."""
    return Response(ICON, media_type="image/svg+xml", headers={"cache-control": "max-age=86400"})


@router.post(LOGIN)
async def log_in(request: Request) -> Response:
    """Set the cookie if the key is right."""
    keys: Keys = request.app.state.keys
    if not keys:
        return _redirect(f"{PAGE}/")
    body = await request.body()
    try:
        # A form of four megabytes would block the event loop for a third of a second.
        sent = {} if len(body) > MAX_FORM_BYTES else parse_qs(body.decode("latin-1"), max_num_fields=8)
    except ValueError:
        sent = {}
    key = sent.get("key", [""])[0].strip().encode("utf-8", "replace")
    try:
        if not keys.accept(key, request.client.host if request.client else ""):
            return HTMLResponse(_form("That is not a key of this server."), 401)
    except TooManyGuessesError as error:
        return HTMLResponse(_form(str(error)), 429, {"Retry-After": str(error.seconds)})
    answer = _redirect(f"{PAGE}/")
    answer.set_cookie(
        COOKIE, _cookie(key), path=PAGE, httponly=True, samesite="strict", secure=request.url.scheme == "https"
    )
    return answer


@router.post(LOGOUT)
async def log_out() -> Response:
    """Delete the cookie."""
    answer = _redirect(LOGIN)
    answer.delete_cookie(COOKIE, path=PAGE, httponly=True, samesite="strict")
    return answer
