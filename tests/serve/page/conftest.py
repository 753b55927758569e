"""A server with the page, small runs behind it, and a real Chromium in front of it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

import lm
from tests.serve.conftest import CONTEXT, MODELS, Serve, Server, make_text
from tests.serve.page.visitors import FOREIGN, Network, listening_proxy

PATIENCE = 20_000
"""Milliseconds that a test waits for something to appear."""

expect.set_options(timeout=PATIENCE)


@pytest.fixture(scope="session")
def network() -> Iterator[Network]:
    """A proxy that records the requests of `site` to other machines."""
    with listening_proxy() as proxy:
        yield proxy


@pytest.fixture(scope="session")
def site(serve: Serve, runs: Path, network: Network, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """`lm serve` with the page, for all runs and a slow one named "slow"."""
    folder = tmp_path_factory.mktemp("site")
    for name in MODELS:
        shutil.copytree(runs / name, folder / name)
    size = {"model.hidden_size": 512, "model.num_heads": 8, "model.num_layers": 4, "model.context_length": CONTEXT}
    overrides = {
        **size,
        "model.table_orders": [],
        "training.max_steps": 1,
        "training.batch_size": 1,
        "training.bptt": 8,
        "training.sample_tokens": None,
    }
    # Short, because its report takes as long as the model is slow.
    text = str(folder / "short.txt")
    Path(text).write_text(make_text(40), "utf-8")
    lm.train(text, lm.compose(text, preset="transformer-char", overrides=overrides), name="slow", runs_dir=folder)
    proxies = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy"), network.url)
    with serve("gru", "transformer", "words", "pieces", "slow", runs_dir=folder, page=True, **proxies) as server:
        yield server


STRANGE = "<img src=x onerror=document.title='pwned'>"
"""A folder may have any name, also one that Inkling would not give."""


@pytest.fixture(scope="session")
def workshop(serve: Serve, runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of all runs in its folder, in which tests train, add and delete runs."""
    folder = tmp_path_factory.mktemp("workshop")
    for name in ("gru", "transformer", "words"):
        shutil.copytree(runs / name, folder / name)
    shutil.copytree(runs / "words", folder / STRANGE)
    (folder / "broken").mkdir()
    (folder / "broken" / "config.json").write_text("{")
    with serve("--allowed-host", FOREIGN, runs_dir=folder, page=True) as server:
        yield server


def folder_of(server: Server, name: str = "") -> Path:
    """A run of a server's folder, or the folder itself."""
    arguments = server.process.args
    assert isinstance(arguments, list)
    return Path(arguments[arguments.index("--runs-dir") + 1]) / name


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One Chromium for the tests of a file; a test fails without it.

    Not for all files: while it runs, nothing else in this process can run an event loop.
    """
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert path is not None, "The page is tested in Chromium: apt-get install chromium"
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()


OpenPage = Callable[..., Page]


@pytest.fixture
def open_page(browser: Browser, request: pytest.FixtureRequest) -> Iterator[OpenPage]:
    """open_page(tab="Perplexity"): a visitor of `site` (or `url`), with an empty browser storage.

    At the end of the test it fails if the page had an error: an uncaught exception, or a request to
    anywhere but the server.
    """
    contexts, troubles = [], []

    def open_it(tab: str | None = None, *, url: str | None = None, query: str = "", **settings: Any) -> Page:
        base = url or request.getfixturevalue("site").url
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 860}, **settings})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on(
            "request",
            lambda sent: None if sent.url.startswith((base, "data:", "blob:")) else troubles.append(sent.url),
        )
        page.goto(f"{base}/page/{query}")
        page.get_by_role("tab", name="Write").wait_for()
        if tab is not None:
            page.get_by_role("tab", name=tab).click()
        return page

    yield open_it
    for context in contexts:
        context.close()
    assert not troubles
