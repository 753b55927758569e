"""How quick the page is: from opening it to being able to write, and from a press to the first letter.

    python -m benchmarks.page [--pages 20] [--rounds 5]

A real Chromium and the server run on one machine and share its cores. The figures are

    open         a browser that was never here, until the button Write is there; and one that comes back: seconds, and
                 bytes of all answers
    slow         the same on 400 kbit/s with 400 ms to each answer ("slow 3G"), and when something is visible
    first text   from pressing Write to the first letter on the page, and the time of the engine for it
    many pages   so many pages that write at once: the first letter of each, and whether each text is the one that its
                 seed gives alone
"""

from __future__ import annotations

import argparse
import contextlib
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page, sync_playwright

from benchmarks.machine import save, versions
from lm.runs.run import load

ROOT = Path(__file__).parents[1]
RUN = "shakespeare-gru"
LENGTH = 2000
SLOW = {"offline": False, "latency": 400, "downloadThroughput": 50_000, "uploadThroughput": 50_000}
"""Milliseconds, and bytes a second."""
_WATCH = """() => {
  const paper = document.querySelector('#paper textarea');
  const before = paper.value.length;
  window.pressed = performance.now();
  const buttons = [...document.querySelectorAll('[role=tabpanel] button')];
  buttons.find((button) => button.textContent.trim() === 'Write').click();
  const check = () => {
    if (paper.value.length > before) window.first = performance.now() - window.pressed;
    else requestAnimationFrame(check);
  };
  check();
}"""


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pages", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        raise SystemExit("Chromium is not installed: apt-get install chromium")
    with _server() as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        _open(browser, url)[1].context.close()
        fresh, again, first = [], [], []
        transfers = _transfers(browser, url)
        for _ in range(options.rounds):
            seconds, page = _open(browser, url)
            fresh.append(seconds)
            again.append(_timed(page, lambda page=page: page.reload()))
            first.append(_write(page))
            page.context.close()
        many = _many(browser, url, options.pages)
        browser.close()
    results = {
        "open_seconds": statistics.median(fresh),
        "open_again_seconds": statistics.median(again),
        **transfers,
        "first_text_seconds": statistics.median(first),
        "engine_first_text_seconds": statistics.median(_engine_first() for _ in range(options.rounds)),
        "pages": many,
    }
    print("\n".join(f"{name}: {value}" for name, value in results.items()))
    record = {
        "options": vars(options), "versions": versions("gradio", "fastapi", "uvicorn", "playwright"), "results": results
    }  # fmt: skip
    print(save("page", record))


def _transfers(browser: Browser, url: str) -> dict[str, float]:
    """Bytes of a first and a second visit, and the times on a slow network."""
    page = browser.new_context().new_page()
    received = _counted(page)
    _timed(page, lambda: page.goto(f"{url}/page/"))
    page.wait_for_timeout(1000)
    fresh = sum(received)
    received.clear()
    _timed(page, lambda: page.reload())
    page.wait_for_timeout(1000)
    again = sum(received)
    page.context.close()
    page = browser.new_context().new_page()
    page.set_default_timeout(120_000)
    page.context.new_cdp_session(page).send("Network.emulateNetworkConditions", SLOW)
    seconds = _timed(page, lambda: page.goto(f"{url}/page/", wait_until="commit"))
    paint = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime / 1000")
    page.context.close()
    return {
        "open_bytes": fresh, "open_again_bytes": again, "slow_first_paint_seconds": paint, "slow_open_seconds": seconds
    }  # fmt: skip


def _counted(page: Page) -> list[int]:
    """The bytes of each answer from now on."""
    received: list[int] = []
    session = page.context.new_cdp_session(page)
    session.send("Network.enable")
    session.on("Network.loadingFinished", lambda event: received.append(event["encodedDataLength"]))
    return received


def _many(browser: Browser, url: str, count: int) -> dict[str, Any]:
    pages = [_open(browser, url)[1] for _ in range(count)]
    for number, page in enumerate(pages):
        page.get_by_role("button", name="More").locator("visible=true").click()
        # What is typed before a widget is alive is lost.
        page.wait_for_timeout(500)
        field = page.get_by_label("number input for Length")
        field.fill(str(LENGTH))
        field.press("Tab")
        page.get_by_label("Seed").first.fill(str(number + 1))
    begun = time.perf_counter()
    for page in pages:
        page.evaluate(_WATCH)
    for page in pages:
        page.get_by_text("ended at the length").wait_for(timeout=120_000)
    seconds = time.perf_counter() - begun
    first = sorted(page.evaluate("window.first / 1000") for page in pages)
    run = load(RUN)
    right = sum(
        page.locator("#paper textarea").input_value() == run.sample("", seed=number + 1, max_tokens=LENGTH)
        for number, page in enumerate(pages)
    )
    return {
        "pages": count, "tokens_each": LENGTH, "seconds": seconds, "texts_as_alone": right,
        "first_text_median_seconds": statistics.median(first), "first_text_worst_seconds": first[-1],
    }  # fmt: skip


def _open(browser: Browser, url: str) -> tuple[float, Page]:
    page = browser.new_context().new_page()
    return _timed(page, lambda: page.goto(f"{url}/page/")), page


def _timed(page: Page, go: Any) -> float:
    begun = time.perf_counter()
    go()
    page.get_by_role("button", name="Write", exact=True).wait_for()
    return time.perf_counter() - begun


def _write(page: Page) -> float:
    # A button is there a moment before it is alive.
    page.wait_for_timeout(500)
    page.evaluate(_WATCH)
    page.wait_for_function("window.first !== undefined")
    seconds: float = page.evaluate("window.first / 1000")
    return seconds


def _engine_first() -> float:
    run = load(RUN)
    engine = run.engine()
    from lm.generation.options import SamplingOptions

    begun = time.perf_counter()
    next(engine.run(run.request("", SamplingOptions())))
    return time.perf_counter() - begun


@contextlib.contextmanager
def _server() -> Iterator[str]:
    process = subprocess.Popen(
        [sys.executable, "-m", "cli.main", "serve", RUN, "--port", "0"], cwd=ROOT, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        address = next(
            (found[1] for line in process.stdout if (found := re.search(r"(http://\S+?)/page/", line))), None
        )
        if address is None:
            raise SystemExit("The server did not start.")
        yield address
    finally:
        process.terminate()
        process.wait()


if __name__ == "__main__":
    main()
