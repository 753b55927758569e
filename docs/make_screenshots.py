"""docs/images/*.png: pictures of the page in a browser, for docs/how-to/use-the-page.md and the README.

    python docs/make_screenshots.py        # or: make screenshots
    python docs/make_screenshots.py --all FOLDER     # to look at: every tab, on three sizes, light and dark

Needs Chromium, and `pip install playwright`.
"""

from __future__ import annotations

import argparse
import io
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from lm.config import CorpusConfig
from lm.corpora import open_corpus
from lm.corpora.named import BUILTIN

ROOT = Path(__file__).parents[1]
IMAGES = Path(__file__).with_name("images")
RUN = "shakespeare-gru"
COLOURS = 96
"""Colours of a picture: few, so that the file is small."""
SIZES = {"desktop": (1280, 800), "laptop": (1024, 640), "phone": (390, 844)}
TEXT = (
    "ROMEO:\nBut soft, what light through yonder window breaks?\nIt is the east, and Juliet is the sun.\n\n"
    "The quarterly report is due on Friday; please reply to this e-mail.\n"
)


def main() -> None:
    """Take the pictures of the docs, or with --all those of every tab."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", type=Path, metavar="FOLDER", help="take every tab, on three sizes, light and dark")
    every: Path | None = parser.parse_args().all
    IMAGES.mkdir(exist_ok=True)
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        raise SystemExit("The pictures are made with Chromium, which is not installed: apt-get install chromium")
    with tempfile.TemporaryDirectory() as folder:
        runs = Path(folder) / "checkpoints"
        shutil.copytree(ROOT / "checkpoints" / RUN, runs / RUN)
        with _Server(runs) as url, sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
            if every is not None:
                every_tab(browser, url, every)
            else:
                for picture in (write, surprise, perplexity, compare, train, runs_tab, phone):
                    picture(browser, url)
            browser.close()


class _Server:
    """`lm serve` as a process of its own."""

    def __init__(self, runs: Path) -> None:
        self._arguments = [sys.executable, "-m", "cli.main", "serve", RUN, "--port", "0", "--runs-dir", str(runs)]

    def __enter__(self) -> str:
        self._process = subprocess.Popen(
            self._arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if found := re.search(r"(http://\S+?)/page/", line):
                return found[1]
        raise SystemExit("The server did not start.")

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()


# -- pictures -----------------------------------------------------------------------------------------


def write(browser: Browser, url: str) -> None:
    """A text that the model continues."""
    page = _open(browser, url)
    page.locator("#paper textarea").fill("ROMEO:\n")
    page.get_by_role("button", name="Write", exact=True).click()
    page.get_by_text("ended at the length").wait_for()
    _save(page, "write")


def surprise(browser: Browser, url: str) -> None:
    """Tokens coloured by their surprise, and the alternatives of one."""
    page = _open(browser, url)
    page.locator("#paper textarea").fill("JULIET:\nO ")
    page.get_by_label("Surprise", exact=True).check()
    page.get_by_role("button", name="Write", exact=True).click()
    page.get_by_text("ended at the length").wait_for()
    page.wait_for_timeout(1000)
    page.locator("#sheet-text .mark").nth(30).click()
    page.wait_for_timeout(800)
    _save(page, "surprise")


def perplexity(browser: Browser, url: str) -> None:
    """A text that the model predicts well, with a line that it does not."""
    page = _open(browser, url, "Perplexity")
    page.locator("#measured-text textarea").fill(TEXT)
    page.locator("#measure").click()
    page.locator("#measure-map .mark").nth(100).wait_for()
    page.wait_for_timeout(1500)
    _save(page, "perplexity", full=True)


def compare(browser: Browser, url: str) -> None:
    """Three temperatures."""
    page = _open(browser, url, "Compare")
    page.locator("#compare-prompt textarea").fill("First Citizen:\n")
    page.get_by_label("3 columns").check()
    page.get_by_role("button", name="Write side by side").click()
    page.get_by_text("300 tokens").nth(2).wait_for()
    page.wait_for_timeout(500)
    _save(page, "compare", full=True)


def train(browser: Browser, url: str) -> None:
    """A training after some seconds."""
    page = _open(browser, url, "Train")
    text = "".join(open_corpus(CorpusConfig(source=BUILTIN)).splits["train"].chunks())
    page.locator("#train-file input[type=file]").set_input_files(
        {"name": "python-topics.txt", "mimeType": "text/plain", "buffer": text.encode()}
    )
    page.wait_for_timeout(1500)
    page.locator("#train-go").click()
    page.wait_for_timeout(45_000)
    _save(page, "train", keep_open=True)
    page.locator("#train-stop").click()
    page.get_by_text("Stopped at step").wait_for()
    page.context.close()


def runs_tab(browser: Browser, url: str) -> None:
    """The list of runs."""
    page = _open(browser, url, "Runs")
    page.wait_for_timeout(1000)
    for box in page.locator("#runs-table input[type=checkbox]").all():
        box.check()
    page.wait_for_timeout(1000)
    _save(page, "runs")


def every_tab(browser: Browser, url: str, folder: Path) -> None:
    """Each tab on each size, light and dark, and the tab Write in projector mode: to look at, not for the docs."""
    folder.mkdir(parents=True, exist_ok=True)
    for size, (width, height) in SIZES.items():
        for scheme in ("light", "dark"):
            page = _open(browser, url, query=f"?__theme={scheme}", width=width, height=height)
            page.locator("#paper textarea").fill("ROMEO:\n")
            page.get_by_role("button", name="Write", exact=True).locator("visible=true").click()
            page.get_by_text("ended at the length").wait_for()
            for tab in page.get_by_role("tab").all():
                tab.click()
                page.wait_for_timeout(700)
                page.screenshot(path=folder / f"{tab.inner_text().lower()}-{size}-{scheme}.png")
            if (size, scheme) == ("desktop", "light"):
                page.get_by_role("button", name="Projector").click()
                page.get_by_role("tab", name="Write").click()
                page.wait_for_timeout(500)
                page.screenshot(path=folder / "write-projector.png")
            page.context.close()


def phone(browser: Browser, url: str) -> None:
    """A phone in dark mode."""
    page = _open(browser, url, query="?__theme=dark", width=390, height=844)
    page.locator("#paper textarea").fill("ROMEO:\n")
    page.get_by_role("button", name="Write", exact=True).click()
    page.get_by_text("ended at the length").wait_for()
    _save(page, "phone")


def _open(
    browser: Browser, url: str, tab: str = "Write", *, query: str = "", width: int = 1180, height: int = 800
) -> Page:
    page = browser.new_context(viewport={"width": width, "height": height}).new_page()
    page.goto(f"{url}/page/{query}")
    page.get_by_role("tab", name=tab, exact=True).click()
    page.wait_for_timeout(500)
    return page


def _save(page: Page, name: str, *, full: bool = False, keep_open: bool = False) -> None:
    page.mouse.move(0, 0)
    picture = Image.open(io.BytesIO(page.screenshot(full_page=full))).convert("RGB")
    picture.quantize(COLOURS, method=Image.Quantize.MAXCOVERAGE).save(IMAGES / f"{name}.png", optimize=True)
    print(f"{name}.png: {(IMAGES / f'{name}.png').stat().st_size:,} bytes")  # noqa: T201
    if not keep_open:
        page.context.close()


if __name__ == "__main__":
    main()
