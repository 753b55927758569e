"""The tab Runs, as a visitor uses it."""

from __future__ import annotations

import re
import shutil

import pytest
from playwright.sync_api import Browser, Locator, Page, expect

import lm
from lm.runs.run_folder import RunFolder
from tests.serve.conftest import Server
from tests.serve.page.conftest import STRANGE, OpenPage, folder_of
from tests.serve.page.test_write import choose, picker
from tests.serve.page.visitors import FOREIGN, foreign_page, refusal_of

pytestmark = pytest.mark.slow


def tick(page: Page, name: str) -> None:
    page.get_by_label(f"Select {name}", exact=True).check()


def row(page: Page, name: str) -> Locator:
    return page.locator("#runs-table tbody tr").filter(has=page.get_by_label(f"Select {name}", exact=True))


def test_every_run_is_in_the_table_and_a_damaged_one_says_why(open_page: OpenPage, workshop: Server):
    page = open_page("Runs", url=workshop.url)
    report = lm.load("gru", runs_dir=folder_of(workshop)).reports()["valid"]
    expect(row(page, "gru")).to_contain_text(re.compile(rf"gru.*gru-char.*text.*60.*{report['bits_per_byte']:.3f}"))
    expect(row(page, "shakespeare-gru")).to_contain_text("comes with Inkling")
    expect(row(page, "broken")).to_contain_text("cannot be read: broken/config.json is damaged")
    expect(row(page, STRANGE)).to_contain_text(STRANGE)
    # By keyboard too.
    page.get_by_label("Select gru", exact=True).focus()
    page.keyboard.press("Space")
    expect(page.locator("#runs-report")).to_contain_text("Scores")


def test_a_run_shows_its_report_in_words_its_curve_and_its_card(open_page: OpenPage, workshop: Server):
    page = open_page("Runs", url=workshop.url)
    tick(page, "gru")
    report = lm.load("gru", runs_dir=folder_of(workshop)).reports()["valid"]
    figure = page.locator("#runs-report tbody tr").filter(has_text="bits per byte")
    expect(figure).to_contain_text("comparable across all tokenizers")
    expect(figure.locator("td")).to_have_text(f"{report['bits_per_byte']:.4f}")
    points = [line for line in RunFolder(folder_of(workshop, "gru")).read_metrics() if line["valid_loss"] is not None]
    expect(page.locator("#runs-plot .dot")).to_have_count(len(points))
    last = f"gru, step 60: {points[-1]['valid_bits_per_byte']:.4f}"
    assert last in page.locator("#runs-plot .dot title").all_text_contents()
    page.get_by_label("by time").check()
    expect(page.locator("#runs-plot .title.below")).to_have_text("seconds")
    page.get_by_role("button", name="Model card").click()
    expect(page.locator("#runs-card h1")).to_have_text("gru")
    # Square brackets of Markdown are text.
    expect(page.locator("#runs-card")).to_contain_text("[0.9, 0.99]")


def test_several_runs_are_compared_side_by_side(open_page: OpenPage, workshop: Server):
    page = open_page("Runs", url=workshop.url)
    for name in ("gru", "transformer", "broken", "shakespeare-gru"):
        tick(page, name)
    expect(page.locator("#runs-report thead th small")).to_have_count(3)
    expect(page.locator("#runs-plot li")).to_have_text(["transformer", "gru"])
    expect(page.locator("#runs-plot .line")).to_have_count(2)
    expect(page.locator("#runs-report")).to_contain_text("broken cannot be read")
    expect(page.locator("#runs-report")).to_contain_text("shakespeare-gru has no learning curve")
    expect(page.get_by_role("button", name="Model card")).to_be_hidden()
    page.get_by_label("Select transformer", exact=True).uncheck()
    expect(page.locator("#runs-plot li")).to_have_text(["gru"])


def test_a_name_with_a_tag_in_it_stays_text_everywhere(open_page: OpenPage, workshop: Server):
    page = open_page("Runs", url=workshop.url)
    tick(page, STRANGE)
    expect(page.locator("#runs-report thead")).to_contain_text(STRANGE)
    expect(page.locator("#runs-plot li")).to_have_text([STRANGE])
    page.get_by_role("button", name="Model card").click()
    expect(page.locator("#runs-card h1")).to_have_text(STRANGE)
    page.locator("#runs-delete").click()
    expect(page.locator("#runs-question")).to_contain_text(f"Delete {STRANGE}?")
    page.locator("#runs-yes").click()
    expect(page.get_by_text(f"Deleted {STRANGE}.")).to_be_visible()
    expect(row(page, STRANGE)).to_have_count(0)
    assert page.title() != "pwned" and page.locator("img[src='x']").count() == 0
    assert not folder_of(workshop, STRANGE).exists()


def test_a_run_is_deleted_after_confirmation_and_its_engine_ends(open_page: OpenPage, workshop: Server):
    page = open_page("Runs", url=workshop.url)
    assert workshop.post("/v1/completions", model="words", prompt="the", max_tokens=1)
    tick(page, "words")
    page.locator("#runs-delete").click()
    expect(page.locator("#runs-question")).to_contain_text("Delete words? This cannot be undone.")
    page.locator("#runs-no").click()
    expect(page.locator("#runs-question")).to_be_hidden()
    assert folder_of(workshop, "words").exists()
    page.locator("#runs-delete").click()
    page.locator("#runs-yes").click()
    expect(row(page, "words")).to_have_count(0)
    expect(page.locator("#runs-report")).to_be_empty()
    assert not folder_of(workshop, "words").exists()
    assert workshop.request("POST", "/v1/completions", {"model": "words", "prompt": "the"})[0] == 404
    assert workshop.request("GET", "/health")[0] == 200
    # The other models still work.
    assert workshop.post("/v1/completions", model="gru", prompt="the", max_tokens=1)
    # Its selection is gone too: the next question has only what is selected then.
    expect(page.locator("#runs-table input:checked")).to_have_count(0)
    tick(page, "transformer")
    page.locator("#runs-delete").click()
    expect(page.locator("#runs-question")).to_have_text("Delete transformer? This cannot be undone.")
    page.locator("#runs-no").click()


def test_a_shipped_run_is_not_offered_for_deletion_and_one_that_trains_stays(open_page: OpenPage, workshop: Server):
    page = open_page("Runs", url=workshop.url)
    tick(page, "shakespeare-gru")
    expect(page.locator("#runs-report")).to_contain_text("Scores")
    expect(page.locator("#runs-delete")).to_be_hidden()
    with RunFolder(folder_of(workshop, "transformer")).lock():
        tick(page, "transformer")
        page.locator("#runs-delete").click()
        expect(page.locator("#runs-question")).to_have_text("Delete transformer? This cannot be undone.")
        page.locator("#runs-yes").click()
        expect(page.get_by_text("is being trained by another process: wait for it, stop it.")).to_be_visible()
    expect(row(page, "transformer")).to_have_count(1)
    assert folder_of(workshop, "transformer").exists()
    # The runs that remain are still selected.
    checked = page.locator("#runs-table input:checked")
    assert {box.get_attribute("value") for box in checked.all()} == {"transformer", "shakespeare-gru"}


def test_a_picker_begins_with_the_best_run_and_has_what_another_process_made(open_page: OpenPage, workshop: Server):
    page = open_page(url=workshop.url)
    scores = {
        path.name: lm.load(path.name, runs_dir=path.parent).reports()["valid"]["bits_per_byte"]
        for path in folder_of(workshop).iterdir()
        if (path / "model.safetensors").exists()
    }
    best = min(scores, key=scores.__getitem__)
    expect(picker(page)).to_have_value(re.compile(rf"^{re.escape(best)} .*, {scores[best]:.2f} bits/byte\)$"))
    # A new run is offered as soon as the picker opens, with its score.
    shutil.copytree(folder_of(workshop, "gru"), folder_of(workshop, "late"))
    choose(page, "late")
    expect(picker(page)).to_have_value(f"late (gru-char, {scores['gru']:.2f} bits/byte)")
    # The browser stores a choice until its run is deleted.
    page.reload()
    expect(picker(page)).to_have_value(re.compile("^late "))
    shutil.rmtree(folder_of(workshop, "late"))
    page.get_by_role("tab", name="Runs").click()
    expect(row(page, "late")).to_have_count(0)
    page.get_by_role("tab", name="Write").click()
    expect(picker(page)).to_have_value(re.compile(f"^{re.escape(best)} "))


def test_a_visitor_from_another_machine_may_see_runs_but_not_delete_them(browser: Browser, workshop: Server):
    with foreign_page(browser, workshop) as page:
        page.get_by_role("tab", name="Runs").click()
        tick(page, "gru")
        expect(page.locator("#runs-plot .line")).to_be_visible()
        expect(page.locator("#runs-delete")).to_be_hidden()
    for button, data in (("runs-delete", ["step", None]), ("runs-yes", ["step", None, None])):
        assert "switched off for visitors from other machines" in refusal_of(workshop, button, data, host=FOREIGN)
    assert folder_of(workshop, "gru").exists()
