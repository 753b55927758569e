"""The tab Runs, as a visitor uses it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Locator, Page, expect

import lm
from lm.checkpoint import RunFolder
from tests.serve.conftest import Serve, Server
from tests.serve.page.conftest import OpenPage
from tests.serve.page.house import FOREIGN, foreign_page, refusal_of

pytestmark = pytest.mark.slow

STRANGE = "<img src=x onerror=document.title='pwned'>"
"""A folder can be called anything, whatever Inkling would call it."""


@pytest.fixture(scope="module")
def archive(serve: Serve, runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of runs that may be deleted."""
    folder = tmp_path_factory.mktemp("archive")
    for name in ("gru", "transformer", "words"):
        shutil.copytree(runs / name, folder / name)
    shutil.copytree(runs / "words", folder / STRANGE)
    (folder / "broken").mkdir()
    (folder / "broken" / "config.json").write_text("{")
    with serve("gru", "words", "--allowed-host", FOREIGN, runs_dir=folder, page=True) as server:
        yield server


def folder_of(server: Server, name: str) -> Path:
    arguments = server.process.args
    assert isinstance(arguments, list)
    return Path(arguments[arguments.index("--runs-dir") + 1]) / name


def tick(page: Page, name: str) -> None:
    page.get_by_label(f"Look at {name}", exact=True).check()


def row(page: Page, name: str) -> Locator:
    return page.locator("#runs-table tbody tr").filter(has=page.get_by_label(f"Look at {name}", exact=True))


def test_every_run_is_in_the_table_and_a_damaged_one_says_why(open_page: OpenPage, archive: Server):
    page = open_page("Runs", url=archive.url)
    report = lm.load("gru", runs_dir=folder_of(archive, "")).reports()["valid"]
    expect(row(page, "gru")).to_contain_text(re.compile(rf"gru.*gru-char.*text.*60.*{report['bits_per_byte']:.3f}"))
    expect(row(page, "shakespeare-gru")).to_contain_text("shipped")
    expect(row(page, "broken")).to_contain_text("cannot be read: broken/config.json is damaged")
    expect(row(page, STRANGE)).to_contain_text(STRANGE)
    # With the keyboard too.
    page.get_by_label("Look at gru", exact=True).focus()
    page.keyboard.press("Space")
    expect(page.locator("#runs-report")).to_contain_text("How good it is")


def test_a_run_shows_its_report_in_words_its_curve_and_its_card(open_page: OpenPage, archive: Server):
    page = open_page("Runs", url=archive.url)
    tick(page, "gru")
    report = lm.load("gru", runs_dir=folder_of(archive, "")).reports()["valid"]
    figure = page.locator("#runs-report tbody tr").filter(has_text="bits per byte")
    expect(figure).to_contain_text("comparable across all tokenizers")
    expect(figure.locator("td")).to_have_text(f"{report['bits_per_byte']:.4f}")
    points = [line for line in RunFolder(folder_of(archive, "gru")).read_metrics() if line["valid_loss"] is not None]
    expect(page.locator("#runs-plot .dot")).to_have_count(len(points))
    assert f"gru, step 60: {points[-1]['valid_loss']:.4f}" in page.locator("#runs-plot .dot title").all_text_contents()
    page.get_by_label("by time").check()
    expect(page.locator("#runs-plot .title.below")).to_have_text("seconds")
    page.get_by_role("button", name="The whole card").click()
    expect(page.locator("#runs-card h1")).to_have_text("gru")
    # What Markdown could make of square brackets is text.
    expect(page.locator("#runs-card")).to_contain_text("[0.9, 0.99]")


def test_several_runs_are_compared_side_by_side(open_page: OpenPage, archive: Server):
    page = open_page("Runs", url=archive.url)
    for name in ("gru", "transformer", "broken", "shakespeare-gru"):
        tick(page, name)
    expect(page.locator("#runs-report thead th small")).to_have_count(3)
    expect(page.locator("#runs-plot li")).to_have_text(["transformer", "gru"])
    expect(page.locator("#runs-plot .line")).to_have_count(2)
    expect(page.locator("#runs-report")).to_contain_text("broken cannot be read")
    expect(page.locator("#runs-report")).to_contain_text("shakespeare-gru keeps no learning curve")
    expect(page.get_by_role("button", name="The whole card")).to_be_hidden()
    page.get_by_label("Look at transformer", exact=True).uncheck()
    expect(page.locator("#runs-plot li")).to_have_text(["gru"])


def test_a_name_with_a_tag_in_it_stays_text_everywhere(open_page: OpenPage, archive: Server):
    page = open_page("Runs", url=archive.url)
    tick(page, STRANGE)
    expect(page.locator("#runs-report thead")).to_contain_text(STRANGE)
    expect(page.locator("#runs-plot li")).to_have_text([STRANGE])
    page.get_by_role("button", name="The whole card").click()
    expect(page.locator("#runs-card h1")).to_have_text(STRANGE)
    page.locator("#runs-delete").click()
    expect(page.locator("#runs-question")).to_contain_text(f"Delete {STRANGE}?")
    page.locator("#runs-yes").click()
    expect(page.get_by_text(f"Deleted {STRANGE}.")).to_be_visible()
    expect(row(page, STRANGE)).to_have_count(0)
    assert page.title() != "pwned" and page.locator("img[src='x']").count() == 0
    assert not folder_of(archive, STRANGE).exists()


def test_a_run_is_deleted_once_that_is_confirmed_and_its_engine_retires(open_page: OpenPage, archive: Server):
    page = open_page("Runs", url=archive.url)
    assert archive.post("/v1/completions", model="words", prompt="the", max_tokens=1)
    tick(page, "words")
    page.locator("#runs-delete").click()
    expect(page.locator("#runs-question")).to_contain_text("Delete words? Nothing brings it back.")
    page.locator("#runs-no").click()
    expect(page.locator("#runs-question")).to_be_hidden()
    assert folder_of(archive, "words").exists()
    page.locator("#runs-delete").click()
    page.locator("#runs-yes").click()
    expect(row(page, "words")).to_have_count(0)
    expect(page.locator("#runs-report")).to_be_empty()
    assert not folder_of(archive, "words").exists()
    assert archive.request("POST", "/v1/completions", {"model": "words", "prompt": "the"})[0] == 404
    assert archive.request("GET", "/health")[0] == 200
    # The other one serves on.
    assert archive.post("/v1/completions", prompt="the", max_tokens=1)["model"] == "gru"


def test_a_run_that_is_shipped_or_trained_is_not_deleted(open_page: OpenPage, archive: Server):
    page = open_page("Runs", url=archive.url)
    with RunFolder(folder_of(archive, "transformer")).lock():
        for name in ("shakespeare-gru", "transformer"):
            tick(page, name)
        page.locator("#runs-delete").click()
        page.locator("#runs-yes").click()
        expect(page.get_by_text("is shipped with Inkling and read-only: it cannot be deleted")).to_be_visible()
        expect(page.get_by_text("is being trained by another process")).to_be_visible()
    expect(row(page, "transformer")).to_have_count(1)
    expect(row(page, "shakespeare-gru")).to_have_count(1)
    assert folder_of(archive, "transformer").exists()


def test_who_comes_from_elsewhere_may_look_and_not_delete(browser: Browser, archive: Server):
    with foreign_page(browser, archive) as page:
        page.get_by_role("tab", name="Runs").click()
        tick(page, "gru")
        expect(page.locator("#runs-plot .line")).to_be_visible()
        expect(page.locator("#runs-delete")).to_be_hidden()
    for button, data in (("runs-delete", [None]), ("runs-yes", [None, "step"])):
        assert "switched off for visitors from other machines" in refusal_of(archive, button, data, host=FOREIGN)
    assert folder_of(archive, "gru").exists()
