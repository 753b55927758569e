"""The tab Train, as a visitor uses it."""

from __future__ import annotations

import re

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.serve.conftest import Server, make_text
from tests.serve.page.conftest import OpenPage
from tests.serve.page.visitors import FOREIGN, foreign_page, refusal_of

pytestmark = pytest.mark.slow

TEXT = make_text(11_000).encode()
"""Long enough that the training does not end before it is stopped."""
PASTED = make_text(1000)
"""The same, and short enough for the text box."""


def give(page: Page, name: str, content: bytes) -> None:
    page.locator("#train-file input[type=file]").set_input_files(
        {"name": name, "mimeType": "text/plain", "buffer": content}
    )
    expect(page.locator("#train-file")).to_contain_text(re.sub(r"[^\w.]", "", name)[:4])


def press_train(page: Page) -> None:
    page.locator("#train-go").click()


def status(page: Page):
    return expect(page.locator("#train-status"))


def test_a_training_shows_its_progress_and_after_a_stop_the_model_can_write(open_page: OpenPage, workshop: Server):
    page = open_page("Train", url=workshop.url)
    status(page).to_contain_text("No training yet")
    give(page, "hens & <b>foxes<i>.txt", TEXT)
    press_train(page)
    # Samples and a curve appear while it learns.
    expect(page.locator("#train-samples figure").first).to_be_visible(timeout=40_000)
    status(page).to_contain_text(re.compile(r"Step \d+ of [\d,]+ · loss \d\.\d\d · about .* left"))
    expect(page.locator("#train-plot canvas")).to_be_visible()
    assert page.locator("#train-status progress").get_attribute("value")
    steps = [int(step) for step in re.findall(r"step (\d+) ", page.locator("#train-samples").inner_text())]
    assert steps == sorted(steps, reverse=True)
    # A page that is opened later shows the same training.
    other = open_page("Train", url=workshop.url)
    status(other).to_contain_text("Step")
    expect(other.locator("#train-samples figure").first).to_be_visible()
    other.get_by_role("button", name="Stop and save the model").click()
    for visitor in (page, other):
        status(visitor).to_contain_text("The model is saved.")
        status(visitor).to_contain_text(re.compile(r"predicts the next character correctly \d+% of the time"))
        status(visitor).to_contain_text("Go to Write")
        expect(visitor.get_by_role("button", name="Stop and save")).to_be_hidden()
    # The file name is shown as text; the run's name has only its safe characters.
    name = re.findall(r"run (\S+)", page.locator("#train-status").inner_text())[-1]
    assert re.fullmatch(r"[\w.-]+-hybrid(-\d+)?", name) and page.locator("#train-status i").count() == 0
    text = workshop.post("/v1/completions", model=name, prompt="the", max_tokens=20, seed=1)["choices"][0]["text"]
    assert len(text) == 20
    page.get_by_role("tab", name="Write").click()
    expect(page.get_by_label("Model").locator("visible=true").first).to_be_visible()
    page.get_by_label("Model").locator("visible=true").first.click()
    expect(page.get_by_role("option", name=name)).to_be_visible()


@pytest.mark.soak
def test_a_second_training_waits_and_can_be_cancelled(open_page: OpenPage, workshop: Server):
    page = open_page("Train", url=workshop.url)
    for turn in range(2):
        page.locator("#train-paste textarea").fill(PASTED)
        press_train(page)
        status(page).to_contain_text("pasted text · Default · 1 minute")
        if turn:
            status(page).to_contain_text("Waiting for 1 other training.")
    page.get_by_role("button", name="Cancel").click()
    status(page).to_contain_text("Stopped before the first model was saved.")
    # The first one can still be chosen and stopped.
    page.get_by_label("Training", exact=True).click()
    page.get_by_role("option", name=re.compile("pasted text.*(preparing|training)")).click()
    page.get_by_role("button", name="Stop and save the model").click()
    status(page).to_contain_text("Stopped")


def test_missing_and_unreadable_texts_are_refused_with_a_sentence(open_page: OpenPage, workshop: Server):
    page = open_page("Train", url=workshop.url)
    press_train(page)
    expect(page.get_by_text("There is no text yet. Drop a file or paste a text.")).to_be_visible()
    give(page, "cafe.txt", b"caf\xe9")
    press_train(page)
    expect(page.get_by_text("cafe.txt is not UTF-8: byte 3 (line 1) is 0xe9.")).to_be_visible()
    page.locator("#train-paste textarea").fill("Once upon a time")
    press_train(page)
    expect(page.get_by_text("There is a file and a pasted text")).to_be_visible()
    page.locator("#train-file").get_by_label("Clear").last.click()
    page.locator("#train-paste textarea").fill("a")
    press_train(page)
    status(page).to_contain_text("Training failed. pasted text is too short to split")
    status(page).to_contain_text(
        "Your text is still there: change it, or choose another kind of model, and press Train."
    )
    expect(page.locator("#train-paste textarea")).to_have_value("a")


def test_a_visitor_from_another_machine_sees_how_to_allow_training_and_is_refused(browser: Browser, workshop: Server):
    with foreign_page(browser, workshop) as page:
        page.get_by_role("tab", name="Train").click()
        expect(page.get_by_text("lm serve --allow-training")).to_be_visible()
        expect(page.locator("#train-go")).to_be_disabled()
    for button, data in (("train-go", [None, PASTED, 1, "gru"]), ("train-stop", [None])):
        assert "switched off for visitors from other machines" in refusal_of(workshop, button, data, host=FOREIGN)
        assert "--allow-training" in refusal_of(workshop, button, data, host=FOREIGN)
        # A proxy may replace the host by a name of this machine.
        for sign in ("X-Forwarded-For", "X-Forwarded-Port", "Forwarded", "Via"):
            assert "--allow-training" in refusal_of(workshop, button, data, host="localhost", **{sign: "a"})
