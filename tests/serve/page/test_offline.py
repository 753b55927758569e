"""The page sends requests only to its server, and the server to nobody."""

from __future__ import annotations

import contextlib
import re

import pytest
from playwright.sync_api import Browser, Request, expect

from tests.serve.conftest import Server
from tests.serve.page.conftest import PATIENCE
from tests.serve.page.visitors import Network

pytestmark = pytest.mark.slow


def test_a_click_through_every_tab_uses_only_the_server_and_breaks_no_policy(
    browser: Browser, site: Server, network: Network
):
    with contextlib.closing(browser.new_context(viewport={"width": 1280, "height": 860})) as visit:
        page = visit.new_page()
        page.set_default_timeout(PATIENCE)
        requests: list[Request] = []
        console: list[str] = []
        page.on("request", lambda request: requests.append(request))
        page.on("console", lambda message: console.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: console.append(f"uncaught: {error}"))
        page.goto(f"{site.url}/page/")
        page.get_by_role("tab", name="Write").wait_for()
        names = [tab.inner_text() for tab in page.get_by_role("tab").all()]
        assert {"Write", "Perplexity", "Compare", "Train", "Runs"} <= set(names)
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
        # An upload and a chart: the first things that a strict policy breaks.
        page.get_by_role("tab", name="Perplexity").click()
        text = {
            "name": "a text.txt",
            "mimeType": "text/plain",
            "buffer": b"the cat sat on a mat and saw one red hen.\n",
        }
        page.locator("#measure-file input[type=file]").set_input_files(files=[text])
        expect(page.locator("#measured-text textarea")).to_have_value(re.compile("red hen"))
        page.locator("#measure").click()
        page.locator("#measure-plot canvas").wait_for()

        assert len(requests) > 20
        strangers = [each.url for each in requests if not each.url.startswith((f"{site.url}/", "data:", "blob:"))]
        assert not strangers
        assert not [line for line in console if line.startswith(("error", "uncaught")) or "Content Security" in line]
        # No version check, no usage statistics.
        assert not network.requests
