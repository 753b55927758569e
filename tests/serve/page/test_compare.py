"""The tab Compare: models write, and are measured, side by side."""

from __future__ import annotations

import asyncio
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from playwright.sync_api import expect

import lm
from lm.comparison.result import Comparison
from lm.runs.run_folder import RunFolder
from serve.engines.available_runs import AvailableRun
from serve.http_errors import RequestError
from serve.page.comparisons import _StoppedError, _Work, compare_runs
from serve.page.context import Page
from serve.settings import ServeOptions
from tests.serve.conftest import make_text
from tests.serve.page.conftest import OpenPage
from tests.serve.page.test_write import press, set_control

pytestmark = pytest.mark.slow


def test_models_and_settings_write_side_by_side_what_each_writes_alone(open_page: OpenPage, runs: Path) -> None:
    page = open_page("Compare")
    page.locator("#compare-prompt textarea").fill("the cat ")
    page.get_by_label("3 columns").check()
    expect(page.locator("#compare-3 textarea")).to_be_visible()
    expect(page.locator("#compare-4 textarea")).to_be_hidden()
    page.get_by_role("combobox").locator("visible=true").nth(1).click()
    page.get_by_role("option", name=re.compile("^transformer ")).click()
    set_control(page, "Length", 50)
    stop = page.get_by_role("button", name="Stop", exact=True).locator("visible=true").first
    expect(stop).to_be_disabled()
    press(page, "Write side by side")
    for number, (model, temperature) in enumerate([("gru", 0.4), ("transformer", 0.8), ("gru", 1.2)]):
        expected = lm.load(model, runs_dir=runs).sample("the cat ", max_tokens=50, temperature=temperature)
        expect(page.locator(f"#compare-{number + 1} textarea")).to_have_value(expected)
    expect(page.get_by_text("50 tokens").locator("visible=true")).to_have_count(3)
    expect(stop).to_be_disabled()


def test_models_are_measured_on_their_own_split_or_a_text_as_lm_compare_does(open_page: OpenPage, runs: Path) -> None:
    page = open_page("Compare")
    chosen = page.locator("#compare-models")
    for name in ("gru", "transformer"):
        expect(chosen.locator(".token", has_text=re.compile(rf"^\s*{name} "))).to_be_visible()
    result, measure = page.locator("#compare-result"), page.locator("#compare-measure")
    page.wait_for_timeout(250)
    measure.click()
    found = lm.compare(["gru", "transformer"], runs_dir=runs)
    expect(result.locator(".verdict")).to_have_text(found.verdict.sentence)
    expect(result.locator(".result").first).to_have_text(found.differences[0].sentence)
    rows = result.locator("table").first.locator("tbody tr")
    expect(rows.locator("td:nth-child(2)")).to_have_text([f"{each.bits_per_byte:.4f}" for each in found.candidates])
    expect(result).to_contain_text(f"the test split of {found.candidates[0].name}: {found.bytes:,} bytes")
    expect(page.locator("#compare-note")).to_be_hidden()

    # A text of the visitor, with a symbol that one model left out of its tokens has no conclusion but a reason.
    page.get_by_label("a text", exact=True).check()
    measure.click()
    toast = page.get_by_test_id("toast-body").last
    expect(toast).to_contain_text("The text is empty. Paste a text first.")
    text = "the cat <b>sat</b> on a mat.\n" * 40
    page.locator("#compare-text textarea").fill(text)
    measure.click()
    found = lm.compare(["gru", "transformer"], text=text, runs_dir=runs)
    expect(result.locator(".result").first).to_have_text(found.differences[0].sentence)
    expect(result).to_contain_text(f"the pasted text: {found.bytes:,} bytes")
    assert result.locator(".passage pre b b").count() == 0
    expect(result.locator(".passage pre").first).to_contain_text("<b>sat</b>")

    chosen.locator(".token-remove").first.click()
    measure.click()
    expect(page.get_by_test_id("toast-body").last).to_contain_text("Select two or more different models.")


class _Models:
    """The models of a page."""

    def __init__(self, runs: Path, *names: str) -> None:
        self.available_runs = {name: AvailableRun(RunFolder(runs / name), "best") for name in names}


def test_one_comparison_runs_at_a_time_and_ends_with_its_visitor(runs: Path) -> None:
    async def visit() -> None:
        page = Page(_Models(runs, "gru", "words"), ServeOptions(), None)  # type: ignore[arg-type]
        text = make_text(2000)
        first = compare_runs(page, ["gru", "words"], text=text)
        assert await anext(first) == "Reading the texts …"
        second = compare_runs(page, ["gru", "words"], text=text[:200])
        assert await anext(second) == "Waiting for the comparison of another visitor …"
        # The first visitor leaves: its work ends, and the second one gets a result.
        await first.aclose()
        *_, found = [now async for now in second]
        assert isinstance(found, Comparison) and found.bytes == len(text[:200].encode())
        left = _Work([lm.load(name, runs_dir=runs) for name in ("gru", "words")], text, None, 300)
        left.stopped.set()
        with pytest.raises(_StoppedError):
            left.compare()
        with pytest.raises(RequestError, match="not offered any more"):
            await anext(compare_runs(page, ["gru", "gone"], text="a"))
        slow = Page(_Models(runs, "gru", "words"), ServeOptions(timeout_seconds=0.001), None)  # type: ignore[arg-type]
        with pytest.raises(RequestError, match=r"took longer than 0\.001 seconds"):
            [now async for now in compare_runs(slow, ["gru", "words"], text=text)]

    # In a thread of its own: the browser of the other tests runs an event loop in this one.
    with ThreadPoolExecutor(1) as thread:
        thread.submit(lambda: asyncio.run(visit())).result()
