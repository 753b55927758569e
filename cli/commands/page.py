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

POSITION = 5
MORE_PORTS = 50
"""How many ports after the usual one are tried."""


def command(*, no_browser: bool, **given: Any) -> None:
    """Open a page in the browser: write with your models, look into them, compare them, train new ones.

    This is lm serve with the browser opened: the API is there too. The next free port is taken where the usual one is
    in use, and there need not be a run yet.

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
        # What Python would find is a browser for the terminal, in which the page does not work.
        return
    # An address to listen on may mean all of them; it is no place to go to.
    address = address.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")
    # Some browsers return when they are closed.
    threading.Thread(target=webbrowser.open, args=(f"{address}/page/",), daemon=True).start()


_NO_BROWSER = Annotated[bool, typer.Option("--no-browser", help="Do not open the browser.")]
with_flags(
    command,
    more=[inspect.Parameter("no_browser", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=_NO_BROWSER)],
    leave_out=("no_page",),
)
