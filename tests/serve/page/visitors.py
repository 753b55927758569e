"""Visitors from another machine, requests without the page, and a recording proxy."""

from __future__ import annotations

import contextlib
import json
import re
import secrets
import shutil
import socket
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

from playwright.sync_api import Browser, Page

from tests.serve.conftest import Server

FOREIGN = "inkling.example"
"""A host name of a server for other machines."""


class Network(NamedTuple):
    """A proxy that stands in for all other machines."""

    url: str
    requests: list[bytes]
    """The requests to it."""


@contextlib.contextmanager
def listening_proxy() -> Iterator[Network]:
    """A proxy that only records its requests."""
    requests: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as proxy:

        def answer() -> None:
            while True:
                try:
                    connection, _ = proxy.accept()
                except OSError:
                    return
                with connection:
                    requests.append(connection.recv(4096))

        threading.Thread(target=answer, daemon=True).start()
        yield Network(f"http://127.0.0.1:{proxy.getsockname()[1]}", requests)
        # Wakes the thread; its socket is closed.
        proxy.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def foreign_page(browser: Browser, server: Server) -> Iterator[Page]:
    """The page under a foreign host name."""
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    arguments = ["--no-sandbox", f"--host-resolver-rules=MAP {FOREIGN} 127.0.0.1"]
    started = browser.browser_type.launch(executable_path=path, args=arguments)
    try:
        page = started.new_page()
        page.goto(f"http://{FOREIGN}:{server.port}/page/")
        page.get_by_role("tab", name="Write").wait_for()
        yield page
    finally:
        started.close()


def refusal_of(server: Server, button: str, data: list[Any], *, host: str, **more: str) -> str:
    """The error message of a click on a button, sent without the page and with `more` headers."""
    headers = {"Host": f"{host}:{server.port}", **more}
    config = server.request("GET", "/page/config", headers=headers)[2]
    (component,) = (each["id"] for each in config["components"] if each["props"].get("elem_id") == button)
    (handler,) = (each["id"] for each in config["dependencies"] if [component, "click"] in each["targets"])
    session = secrets.token_hex(8)
    body = {"data": data, "fn_index": handler, "session_hash": session}
    status, _, answer = server.request("POST", "/page/gradio_api/queue/join", body, headers=headers)
    assert status == 200, answer
    stream = server.request("GET", f"/page/gradio_api/queue/data?session_hash={session}", headers=headers)[2]
    events = [json.loads(line) for line in re.findall(r"^data: (.*)$", stream, re.MULTILINE)]
    (end,) = (event for event in events if event["msg"] == "process_completed")
    assert not end["success"], end
    return str(end["output"]["error"])
