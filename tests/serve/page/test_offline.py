"""The page needs no network but the way to its server, and the server needs none at all."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Request, expect

from tests.serve.conftest import Serve
from tests.serve.page.conftest import PATIENCE

pytestmark = pytest.mark.slow


@contextlib.contextmanager
def listening_proxy() -> Iterator[tuple[str, list[bytes]]]:
    """An address that stands for the network, and what was asked of it."""
    asked: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as proxy:

        def answer() -> None:
            while True:
                try:
                    connection, _ = proxy.accept()
                except OSError:
                    return
                with connection:
                    asked.append(connection.recv(4096))

        threading.Thread(target=answer, daemon=True).start()
        yield f"http://127.0.0.1:{proxy.getsockname()[1]}", asked
        # Wakes the thread, which meets a socket that is closed.
        proxy.shutdown(socket.SHUT_RDWR)


def test_a_click_through_every_tab_asks_the_server_alone_and_breaks_no_rule(browser: Browser, serve: Serve):
    with contextlib.ExitStack() as stack:
        network, asked = stack.enter_context(listening_proxy())
        proxies = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy"), network)
        server = stack.enter_context(serve("gru", "transformer", page=True, **proxies))
        visit = stack.enter_context(contextlib.closing(browser.new_context(viewport={"width": 1280, "height": 860})))
        page = visit.new_page()
        page.set_default_timeout(PATIENCE)
        requests: list[Request] = []
        console: list[str] = []
        page.on("request", lambda request: requests.append(request))
        page.on("console", lambda message: console.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: console.append(f"uncaught: {error}"))
        page.goto(f"{server.url}/page/")
        page.get_by_role("tab", name="Write").wait_for()
        names = [tab.inner_text() for tab in page.get_by_role("tab").all()]
        assert {"Write", "Look", "Perplexity", "Compare", "Train", "Runs"} <= set(names)
        for name in (*names, *reversed(names)):
            page.get_by_role("tab", name=name, exact=True).click()
            page.get_by_role("tabpanel").locator("visible=true").first.wait_for()
            folded = page.locator("button.label-wrap:not(.open)").locator("visible=true")
            for _ in range(folded.count()):
                folded.first.click()
            page.wait_for_timeout(300)
        page.get_by_role("tab", name="Write").click()
        page.get_by_role("button", name="Write", exact=True).locator("visible=true").first.click()
        page.wait_for_function("[...document.querySelectorAll('textarea')].some(area => area.value.length > 50)")
        # A file goes up, and a curve is drawn: what a strict policy would be the first to break.
        page.get_by_role("tab", name="Perplexity").click()
        text = {
            "name": "a text.txt",
            "mimeType": "text/plain",
            "buffer": b"the cat sat on a mat and saw one red hen.\n",
        }
        page.locator("#measure-file input[type=file]").set_input_files(files=[text])
        expect(page.locator("#measured-text textarea")).to_have_value(re.compile("red hen"))
        page.locator("#measure").click()
        page.locator("#measure-plot path.line").wait_for()

        assert len(requests) > 20
        strangers = [each.url for each in requests if not each.url.startswith((f"{server.url}/", "data:", "blob:"))]
        assert not strangers
        assert not [line for line in console if line.startswith(("error", "uncaught")) or "Content Security" in line]
        # Neither versions nor figures of use are looked up or sent.
        assert not asked
