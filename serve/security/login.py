"""Who may see the page where keys are set: who sends one as API clients do, or gave one to the form at /login.

The form answers with a cookie that is made from the key and does not tell it. Browsers send it back for the page alone,
never for the API, and only from the page itself.
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
from urllib.parse import parse_qs

from fastapi import APIRouter, Request
from starlette.responses import HTMLResponse, RedirectResponse, Response

PAGE = "/page"
"""Where the page is mounted."""
LOGIN, LOGOUT, FAVICON = "/login", "/logout", "/favicon.ico"
PUBLIC_PATHS = ("/", LOGIN, LOGOUT, FAVICON)
"""What stands before the page, and needs no key."""
COOKIE = "inkling_page"
MOST_FORM_BYTES = 16_384
"""A form that is longer holds no key."""
_SENT = re.compile(rb"(?:^|[;\s])inkling_page=([0-9a-f]{64})(?=[;\s]|$)")

router = APIRouter(include_in_schema=False)


def is_page(path: str) -> bool:
    """Whether an address belongs to the page."""
    return path == PAGE or path.startswith(f"{PAGE}/")


class Backoff:
    """How long those who failed have to wait: twice as long after each failure beyond the first few.

    What is remembered is bounded: the longest unchanged goes first.
    """

    FREE = 10
    """Failures without a wait."""
    MOST_SECONDS = 60.0
    FORGET_SECONDS = 900.0
    """After so long without a failure, the count begins anew."""
    MOST = 4096
    """Who are remembered."""

    def __init__(self) -> None:
        self._failed: OrderedDict[Hashable, tuple[int, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._failed)

    def seconds(self, who: Hashable) -> float:
        """How long they still have to wait; 0 or less: no longer."""
        count, last = self._failed.get(who, (0, 0.0))
        if count < self.FREE:
            return 0.0
        return last + min(self.MOST_SECONDS, 2.0 ** (count - self.FREE)) - time.monotonic()

    def fail(self, who: Hashable) -> int:
        """Note a failure: how many there were."""
        now = time.monotonic()
        count, last = self._failed.pop(who, (0, now))
        count = 1 if now - last > self.FORGET_SECONDS else min(count + 1, 1000)
        self._failed[who] = (count, now)
        if len(self._failed) > self.MOST:
            self._failed.popitem(last=False)
        return count


class TooManyGuessesError(Exception):
    """Too many wrong keys: no key is looked at for `seconds`."""

    def __init__(self, seconds: float) -> None:
        self.seconds = max(1, math.ceil(seconds))
        unit = "second" if self.seconds == 1 else "seconds"
        super().__init__(f"Too many wrong keys came from your address: wait {self.seconds} {unit}.")


class Keys:
    """The keys of one server. All are compared each time, so that the time tells neither how far nor which.

    Addresses that send many wrong keys wait. A wrong key that is sent again is no new guess: only itself waits, or a
    program with an old key would shut out all others behind the same address. For the same reason a key that was
    accepted from an address stays accepted from there.
    """

    def __init__(self, keys: tuple[bytes, ...]) -> None:
        self._keys = keys
        self._cookies = tuple(_cookie(key).encode("ascii") for key in keys)
        self._backoff = Backoff()
        self._accepted: OrderedDict[Hashable, None] = OrderedDict()

    def __bool__(self) -> bool:
        return bool(self._keys)

    def accept(self, key: bytes, address: str) -> bool:
        """Whether this is one of the keys, sent from `address`.

        Raises:
            TooManyGuessesError: it is not looked at.
        """
        return self._accept([key], self._keys, address)

    def accept_cookie(self, header: bytes, address: str) -> bool:
        """Whether a Cookie header has what the form gave out.

        Raises:
            TooManyGuessesError: it is not looked at.
        """
        # A page on another port of this host can set a cookie of the same name: any of them may be the right one.
        sent = _SENT.findall(header)
        return bool(sent) and self._accept(sent[:8], self._cookies, address)

    def _accept(self, sent: list[bytes], right: tuple[bytes, ...], address: str) -> bool:
        where = _subscriber(address)
        # Python hashes bytes with a secret of the process.
        pair = (where, hash(tuple(sent)))
        if pair not in self._accepted:
            wait = max(self._backoff.seconds(pair), self._backoff.seconds(where))
            if wait > 0:
                raise TooManyGuessesError(wait)
        found = [hmac.compare_digest(each, one) for each in sent for one in right]
        if any(found):
            self._accepted[pair] = None
            self._accepted.move_to_end(pair)
            if len(self._accepted) > Backoff.MOST:
                self._accepted.popitem(last=False)
            return True
        if self._backoff.fail(pair) == 1:
            self._backoff.fail(where)
        return False


def _subscriber(address: str) -> str:
    """What one who guesses cannot change at will: an IPv4 address, or the network part of an IPv6 address."""
    if ":" not in address:
        return address
    try:
        return str(ipaddress.ip_network((address.partition("%")[0], 64), strict=False))
    except ValueError:
        return address


def _cookie(key: bytes) -> str:
    return hmac.new(key, b"inkling page", sha256).hexdigest()


FORM = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="robots" content="noindex"><title>Log in · Inkling</title>
<link rel="icon" href="/favicon.ico" type="image/svg+xml">
<style>
:root {{ color-scheme: light dark; --back: #f8fafc; --card: #fff; --line: #cbd5e1; --text: #0f172a; --quiet: #475569;
  --strong: #4f46e5; --wrong: #b91c1c; }}
@media (prefers-color-scheme: dark) {{ :root {{ --back: #0b0f19; --card: #1f2937; --line: #4b5563; --text: #f3f4f6;
  --quiet: #9ca3af; --strong: #6366f1; --wrong: #fca5a5; }} }}
* {{ box-sizing: border-box; }}
body {{ margin: 0; min-height: 100vh; display: grid; place-items: center; padding: 1rem; background: var(--back);
  color: var(--text); font: 16px/1.5 ui-sans-serif, system-ui, sans-serif; }}
form {{ width: 100%; max-width: 24rem; padding: 2rem; background: var(--card); border: 1px solid var(--line);
  border-radius: .75rem; }}
h1 {{ margin: 0; font-size: 1.5rem; letter-spacing: -.01em; }}
p {{ margin: .25rem 0 1.25rem; color: var(--quiet); }}
p[role=alert] {{ margin: 0 0 1rem; color: var(--wrong); }}
label {{ display: block; margin-bottom: .25rem; font-weight: 600; }}
input, button {{ width: 100%; padding: .65rem .75rem; font: inherit; border-radius: .5rem; }}
input {{ margin-bottom: 1rem; color: inherit; background: var(--back); border: 1px solid var(--line); }}
button {{ color: #fff; background: var(--strong); border: 0; font-weight: 600; cursor: pointer; }}
:focus-visible {{ outline: 3px solid var(--strong); outline-offset: 2px; }}
</style>
<form method="post" action="{action}">
<h1>Inkling</h1>
<p>This server asks for an API key, which whoever started it can give you.</p>
{wrong}<label for="key">API key</label>
<input id="key" name="key" type="password" autocomplete="current-password" required autofocus>
<button>Log in</button>
</form></html>
"""

ICON = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16">'
    '<path fill="#6366f1" d="M8 1c3 4 5 6.2 5 9a5 5 0 0 1-10 0c0-2.8 2-5 5-9z"/></svg>'
)


def _form(wrong: str = "") -> str:
    return FORM.format(action=LOGIN, wrong=f'<p role="alert">{html.escape(wrong)}</p>\n' if wrong else "")


def _go(address: str) -> Response:
    return RedirectResponse(address, 303)


@router.get("/")
async def root() -> Response:
    """To the page."""
    return _go(f"{PAGE}/")


@router.get(LOGIN)
async def ask(request: Request) -> Response:
    """The form."""
    return HTMLResponse(_form()) if request.app.state.keys else _go(f"{PAGE}/")


@router.get(FAVICON)
async def icon() -> Response:
    """A drop of ink; browsers ask for it by themselves."""
    return Response(ICON, media_type="image/svg+xml", headers={"cache-control": "max-age=86400"})


@router.post(LOGIN)
async def log_in(request: Request) -> Response:
    """The cookie, for a right key."""
    keys: Keys = request.app.state.keys
    if not keys:
        return _go(f"{PAGE}/")
    body = await request.body()
    try:
        # To parse four megabytes takes a third of a second, in which nobody else is answered.
        sent = {} if len(body) > MOST_FORM_BYTES else parse_qs(body.decode("latin-1"), max_num_fields=8)
    except ValueError:
        sent = {}
    key = sent.get("key", [""])[0].strip().encode("utf-8", "replace")
    try:
        if not keys.accept(key, request.client.host if request.client else ""):
            return HTMLResponse(_form("That is not a key of this server."), 401)
    except TooManyGuessesError as error:
        return HTMLResponse(_form(str(error)), 429, {"Retry-After": str(error.seconds)})
    answer = _go(f"{PAGE}/")
    answer.set_cookie(
        COOKIE, _cookie(key), path=PAGE, httponly=True, samesite="strict", secure=request.url.scheme == "https"
    )
    return answer


@router.post(LOGOUT)
async def log_out() -> Response:
    """The cookie goes."""
    answer = _go(LOGIN)
    answer.delete_cookie(COOKIE, path=PAGE, httponly=True, samesite="strict")
    return answer
