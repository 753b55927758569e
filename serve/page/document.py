"""The HTML document around Gradio's components, and the headers of Gradio's files.

Gradio's own document shows nothing before its scripts have loaded. This one has the masthead, and grey boxes where the
tabs will be; the browser shows them at once. `assets/document.html` is the document, `assets/shell.css` its style sheet
and `assets/shell.js` its script: links, the projector mode, arrow keys between tabs, and status texts for screen
readers.
"""

from __future__ import annotations

import gzip
import json
import logging
import re
from collections.abc import Sequence
from string import Template

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lm.html_parts import escape
from serve.page.assets import read_asset
from serve.page.context import TabLink

log = logging.getLogger(__name__)

FOREVER = "private, max-age=31536000, immutable"
"""Cache-Control of a file whose address changes with its content."""
COMPRESSION = 6
"""Level of gzip, from 1 to 9."""
_LOGOUT = "<form action='/logout' method='post'><button>Log out</button></form>"
_CONFIG = re.compile(
    r"<script>window\.gradio_config = .+?</script>\s*<script>window\.gradio_api_info = .+?</script>", re.DOTALL
)
_SCRIPT = re.compile(r'<script type="module"[^>]* src="([^"]+)"')
_STYLE = re.compile(r'<link rel="stylesheet"[^>]* href="([^"]+)"')


class Document:
    """The document of one server.

    Args:
        tabs: id and label of each tab.
        links: what a link to each tab restores, by the tab's id.
        logout: adds a button to log out.
    """

    def __init__(self, tabs: Sequence[tuple[str, str]], links: dict[str, TabLink], *, logout: bool) -> None:
        self._template = Template(read_asset("document.html"))
        self._parts = {
            "style": read_asset("shell.css"),
            "shell": read_asset("shell.js").replace(
                "LINKS", json.dumps({id_: dict(link) for id_, link in links.items()})
            ),
            "tabs": "".join(f"<span>{escape(label)}</span>" for _, label in tabs),
            "logout": _LOGOUT if logout else "",
        }

    def html(self, gradio: str) -> str:
        """The document with the configuration and files that Gradio's document names.

        Gradio's document stays as it is if it has another form than expected.
        """
        found = [pattern.search(gradio) for pattern in (_CONFIG, _SCRIPT, _STYLE)]
        config, script, style = found
        if config is None or script is None or style is None:
            log.warning("This version of Gradio has an unknown document: the page has no masthead.")
            return gradio
        return self._template.substitute(
            self._parts, config=config[0], gradio_script=script[1], gradio_style=style[1]
        )  # fmt: skip


class DocumentMiddleware:
    """ASGI middleware of Gradio's app: replaces its document, and lets browsers keep the files that never change.

    The document is compressed; Gradio compresses its files itself. Streams are passed on.
    """

    def __init__(self, app: ASGIApp, *, document: Document) -> None:
        self._app, self._document = app, document

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and change its answer."""
        if scope["type"] != "http" or scope["method"] != "GET":
            await self._app(scope, receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if path in ("", "/"):
            zipped = "gzip" in Headers(scope=scope).get("accept-encoding", "")
            await self._app(scope, receive, _DocumentSender(self._document, send, zipped=zipped))
        elif path.startswith("/assets/") or (path == "/theme.css" and b"v=" in scope["query_string"]):
            await self._app(scope, receive, _cached(send))
        else:
            await self._app(scope, receive, send)


def _cached(send: Send) -> Send:
    async def send_cached(message: Message) -> None:
        if message["type"] == "http.response.start" and message["status"] == 200:
            MutableHeaders(scope=message)["cache-control"] = FOREVER
        await send(message)

    return send_cached


class _DocumentSender:
    """Collects Gradio's document, and sends the page's instead."""

    def __init__(self, document: Document, send: Send, *, zipped: bool) -> None:
        self._document, self._send, self._zipped = document, send, zipped
        self._start: Message | None = None
        self._body = bytearray()

    async def __call__(self, message: Message) -> None:
        """Take a part of the answer."""
        if message["type"] == "http.response.start":
            is_document = message["status"] == 200 and Headers(scope=message).get("content-type", "").startswith(
                "text/html"
            )
            if is_document:
                self._start = message
                return
        if self._start is None:
            await self._send(message)
            return
        self._body += message.get("body", b"")
        if message.get("more_body", False):
            return
        body = self._document.html(self._body.decode("utf-8")).encode("utf-8")
        headers = MutableHeaders(scope=self._start)
        if self._zipped:
            body = gzip.compress(body, COMPRESSION, mtime=0)
            headers["content-encoding"] = "gzip"
        headers.add_vary_header("Accept-Encoding")
        headers["cache-control"] = "no-cache"
        headers["content-length"] = str(len(body))
        await self._send(self._start)
        await self._send({"type": "http.response.body", "body": body})
