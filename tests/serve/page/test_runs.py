"""The tab Runs, as a visitor uses it."""

from __future__ import annotations

import csv
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


def keys(page: Page) -> Locator:
    """The legend of the chart."""
    return page.locator("#runs-plot li")


def table_of(page: Page) -> list[list[str]]:
    """The rows of the chart's CSV file."""
    with page.expect_download() as download:
        page.locator("#runs-plot").get_by_role("button", name="CSV").click()
    return list(csv.reader(download.value.path().read_text("utf-8").splitlines()))


def rename(page: Page, name: str) -> None:
    page.locator("#runs-rename").click()
    page.locator("#runs-new-name").get_by_role("textbox").fill(name)
    page.locator("#runs-give-name").click()


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
    expect(figure).to_contain_text("Comparable between all models.")
    expect(figure.locator("td")).to_have_text(f"{report['bits_per_byte']:.4f}")
    rows = RunFolder(folder_of(workshop, "gru")).read_metrics()
    points = [(row["step"], row["valid_bits_per_byte"]) for row in rows if row["valid_loss"] is not None]
    best = min(points, key=lambda point: point[1])
    expect(keys(page)).to_have_text(["gru train", f"gru validbest {best[1]:.5g} at {best[0]}"])
    saved = table_of(page)
    assert saved[0][:3] == ["curve", "step", "bits per byte (lower is better)"]
    assert [(int(x), float(y)) for name, x, y, *_ in saved[1:] if name == "gru valid"] == points
    # The arrow keys read the values of all curves at a point.
    page.locator("#runs-plot .plot").focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator("#runs-plot .said")).to_contain_text(f"gru valid {points[0][1]:.5g} at step {points[0][0]}")
    page.keyboard.press("Escape")
    page.get_by_label("by time").check()
    expect(page.locator("#runs-plot .title.below")).to_have_text("minutes of training")
    page.locator("#runs-metric").get_by_label("accuracy").check()
    expect(page.locator("#runs-plot .tools .title")).to_have_text("accuracy")
    # Smoothing and the log scale change the picture, and not the table of the points.
    before = page.locator("#runs-plot canvas").screenshot()
    page.locator("#runs-plot").get_by_label("Smoothing").fill("0.9")
    page.locator("#runs-plot").get_by_label("Log scale").check()
    assert page.locator("#runs-plot canvas").screenshot() != before
    accuracies = [row["valid_accuracy"] for row in rows if row["valid_loss"] is not None]
    assert [float(y) for name, _, y, *_ in table_of(page) if name == "gru valid"] == accuracies
    with page.expect_download() as download:
        page.locator("#runs-plot").get_by_role("button", name="PNG").click()
    assert download.value.suggested_filename == "runs-accuracy.png"
    assert download.value.path().read_bytes().startswith(b"\x89PNG")
    page.get_by_role("button", name="Model card").click()
    expect(page.locator("#runs-card h1")).to_have_text("gru")
    # Square brackets of Markdown are text.
    expect(page.locator("#runs-card")).to_contain_text("[0.9, 0.99]")


def test_several_runs_are_compared_side_by_side(open_page: OpenPage, workshop: Server):
    page = open_page("Runs", url=workshop.url)
    for name in ("gru", "transformer", "broken", "shakespeare-gru"):
        tick(page, name)
    expect(page.locator("#runs-report thead th small")).to_have_count(3)
    names = keys(page).locator(".name")
    expect(names).to_have_text(["transformer train", "transformer valid", "gru train", "gru valid"])
    expect(page.locator("#runs-report")).to_contain_text("broken cannot be read")
    expect(page.locator("#runs-report")).to_contain_text("shakespeare-gru has no learning curve")
    expect(page.get_by_role("button", name="Model card")).to_be_hidden()
    page.get_by_label("Select shakespeare-gru", exact=True).uncheck()
    option = page.locator("#runs-report .options tbody tr").filter(has_text="model.type")
    expect(option.locator("td")).to_have_text(["transformer", "gru"])
    assert "training.max_steps" not in page.locator("#runs-report .options").inner_text()
    page.get_by_label("Select transformer", exact=True).uncheck()
    expect(names).to_have_text(["gru train", "gru valid"])
    keys(page).get_by_role("button").first.click()
    expect(keys(page).get_by_role("button").first).to_have_attribute("aria-pressed", "false")

    # Runs that differ by their seed alone become one curve with a band.
    shutil.copytree(folder_of(workshop, "gru"), folder_of(workshop, "gru-2"))
    folder = RunFolder(folder_of(workshop, "gru-2"))
    record = folder.read_record()
    record["config"]["training"]["seed"] += 1
    folder.write_record(record)
    page.reload()
    page.get_by_role("tab", name="Runs").click()
    tick(page, "gru")
    tick(page, "gru-2")
    page.get_by_label("Seeds as a band").check()
    expect(names).to_have_text(["gru (2 seeds) train: mean", "gru (2 seeds) valid: mean"])
    assert all(low == y == high for _, _, y, low, high in table_of(page)[1:])
    expect(page.locator("#runs-report .options tbody th")).to_have_text(["training.seed"])
    shutil.rmtree(folder.path)


def test_the_table_is_sorted_by_a_heading_and_keeps_its_order_and_selection(open_page: OpenPage, workshop: Server):
    page = open_page("Runs", url=workshop.url)
    tick(page, "gru")
    head = page.locator("#runs-table thead th").filter(has_text="bits per byte")
    cells = page.locator("#runs-table tbody .c5")
    for order in ("ascending", "descending"):
        head.get_by_role("button").click()
        expect(head).to_have_attribute("aria-sort", order)
        values = [float(str(cell.get_attribute("data-key"))) for cell in cells.all()]
        assert values == sorted(values, reverse=order == "descending") and len(values) >= 4
    # A run that cannot be read has no figure: it is last.
    assert page.locator("#runs-table tbody tr").last.locator("th").inner_text() == "broken"
    expect(page.get_by_label("Select gru", exact=True)).to_be_checked()


def test_a_run_gets_a_name_and_a_note_and_writes(open_page: OpenPage, workshop: Server):
    page = open_page("Runs", url=workshop.url)
    tick(page, "words")
    for name, message in (("gru", "There is already a run named"), ("../gru", "is no name for a run")):
        rename(page, name)
        expect(page.get_by_test_id("toast-body").last).to_contain_text(message)
        page.locator("#runs-no").click()
    with RunFolder(folder_of(workshop, "words")).lock():
        rename(page, "wörter-1")
        expect(page.get_by_text("is being trained by another process: wait for it, stop it.")).to_be_visible()
        page.locator("#runs-no").click()
    rename(page, "wörter-1")
    expect(row(page, "wörter-1")).to_have_count(1)
    expect(row(page, "words")).to_have_count(0)
    assert not folder_of(workshop, "words").exists()
    assert "wörter-1" in folder_of(workshop, "wörter-1/README.md").read_text("utf-8").splitlines()[0]
    assert workshop.post("/v1/completions", model="wörter-1", prompt="the", max_tokens=1)

    tick(page, "wörter-1")
    page.locator("#runs-note textarea").fill("the <b>small</b>\none")
    page.locator("#runs-keep-note").click()
    expect(row(page, "wörter-1").locator(".note")).to_have_text("the <b>small</b> one")
    assert RunFolder(folder_of(workshop, "wörter-1")).read_note() == "the <b>small</b>\none\n"
    page.locator("#runs-write").click()
    expect(picker(page)).to_have_value(re.compile("^wörter-1 "))
    page.get_by_role("tab", name="Runs").click()
    rename(page, "words")
    expect(row(page, "words")).to_have_count(1)
    # The note moves with the run; an empty one is removed.
    tick(page, "words")
    expect(page.locator("#runs-note textarea")).to_have_value("the <b>small</b>\none")
    page.locator("#runs-note textarea").fill("")
    page.locator("#runs-keep-note").click()
    expect(row(page, "words").locator(".note")).to_have_count(0)
    assert not folder_of(workshop, "words/note.txt").exists()


def test_a_name_with_a_tag_in_it_stays_text_everywhere(open_page: OpenPage, workshop: Server):
    page = open_page("Runs", url=workshop.url)
    tick(page, STRANGE)
    expect(page.locator("#runs-report thead")).to_contain_text(STRANGE)
    expect(keys(page).locator(".name")).to_have_text([f"{STRANGE} train", f"{STRANGE} valid"])
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
    expect(page.locator("#runs-rename")).to_be_hidden()
    expect(page.locator("#runs-note")).to_be_hidden()
    expect(page.locator("#runs-write")).to_be_visible()
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
        expect(page.locator("#runs-plot canvas")).to_be_visible()
        expect(page.locator("#runs-delete")).to_be_hidden()
        expect(page.locator("#runs-rename")).to_be_hidden()
        expect(page.locator("#runs-note")).to_be_hidden()
    views = [None, "loss", "step", False]
    for button, data in (
        ("runs-delete", [None]), ("runs-yes", [*views, None]), ("runs-rename", [None]),
        ("runs-give-name", [*views, None, "mine"]), ("runs-keep-note", [None, "mine"]),
    ):  # fmt: skip
        assert "switched off for visitors from other machines" in refusal_of(workshop, button, data, host=FOREIGN)
    assert folder_of(workshop, "gru").exists()
