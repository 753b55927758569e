"""lm page."""

from __future__ import annotations

import inspect
import os
import sys
import threading
import webbrowser
from typing import Annotated, Any

import typer

from cli.commands.serve import read_options, serve, with_flags

POSITION = 6
MORE_PORTS = 50
"""Ports that are tried after the default one."""


def command(*, no_browser: bool, **given: Any) -> None:
    """Open a page in the browser to write with models and train them.

    This is lm serve with the browser opened; the API is available too. If the default port is in use, the next free
    port is used. No run is needed yet.

    \b
    lm page
    lm page shakespeare-gru --no-browser
    """
    asked_for_port = given.get("port") is not None
    serve(
        read_options(given),
        "lm page",
        for_page=True,
        or_next=0 if asked_for_port else MORE_PORTS,
        then=None if no_browser else _open_browser,
    )


def _open_browser(address: str) -> None:
    if sys.platform == "linux" and not {"DISPLAY", "WAYLAND_DISPLAY", "BROWSER"} & os.environ.keys():
        # Python would find a text browser, in which the page does not work.
        return
    # A browser cannot open the address that means all addresses.
    address = address.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")
    # Some browsers return only when they are closed.
    threading.Thread(target=webbrowser.open, args=(f"{address}/page/",), daemon=True).start()


_NO_BROWSER = Annotated[bool, typer.Option("--no-browser", help="Do not open the browser.")]
with_flags(
    command,
    more=[inspect.Parameter("no_browser", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=_NO_BROWSER)],
    leave_out=("no_page",),
)
