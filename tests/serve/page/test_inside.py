"""The tab Inside."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

import lm
from lm.runs.run_folder import RunFolder
from serve.page import inside_views
from serve.page.inside_views import ViewError
from tests.serve.conftest import Server
from tests.serve.page.conftest import OpenPage, folder_of

pytestmark = pytest.mark.slow

TEXTS = "zqj<b>", "the cat", "the cat sat on"


def choose(page: Page, box: str, option: str) -> None:
    page.locator(box).get_by_role("combobox").click()
    page.get_by_role("option", name=re.compile(option)).click()


@pytest.mark.slow
def test_a_visitor_sees_a_model_learn_and_the_views_of_it(open_page: OpenPage, site: Server) -> None:
    folder = RunFolder(folder_of(site, "gru"))
    for number, text in enumerate(TEXTS):
        folder.append_film({"step": 30 * number, "valid_loss": 2.0, "progress": number / 2, "text": text})
    page = open_page("Inside")
    said, drawn = page.locator("#inside-said"), page.locator("#inside-drawn")
    # The film moves by keyboard, and the dot with it.
    slider = drawn.get_by_role("slider")
    expect(drawn.locator("pre").locator("visible=true")).to_have_text(TEXTS[0])
    first = drawn.locator(".dot.now").get_attribute("d")
    slider.press("End")
    expect(drawn.locator("pre").locator("visible=true")).to_have_text(TEXTS[2])
    assert drawn.locator(".dot.now").get_attribute("d") != first
    assert slider.get_attribute("aria-valuetext") == "step 60 of 60 · validation loss 2.000"
    drawn.get_by_role("button", name="Play").click()
    expect(drawn.locator("pre").locator("visible=true")).to_have_text(TEXTS[0])
    expect(drawn.locator("pre").locator("visible=true")).to_have_text(TEXTS[2])
    with page.expect_download() as download:
        page.locator("#inside-download").click()
    assert download.value.suggested_filename == "gru-film.html"
    assert TEXTS[1] in Path(download.value.path()).read_text("utf-8")
    # The views, each computed when it is opened.
    page.get_by_label("Gradients").check()
    expect(said).to_contain_text("by a factor of")
    expect(page.locator("#inside-plot canvas")).to_be_visible()
    expect(page.locator("#inside-plot li")).to_have_count(2)
    page.get_by_label("Attention").check()
    expect(said).to_have_text("gru has no attention.")
    page.locator("#inside-text textarea").fill("the cat sat on a mat and saw one red hen")
    page.get_by_label("Who said this letter").check()
    expect(said).to_contain_text("The text is your text.")
    page.locator("#inside-marks .mark").nth(4).click()
    expect(page.locator("#inside-details")).to_contain_text("network")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    expect(page.locator("#inside-details mark")).to_have_text("a")
    choose(page, "#inside-model", "^transformer")
    page.get_by_label("Attention").check()
    expect(page.locator("#inside-choice")).to_be_visible()
    before = drawn.locator("svg").get_attribute("aria-label")
    choose(page, "#inside-choice", "^layer 1, head 1")
    expect(drawn.locator("svg")).to_have_attribute("aria-label", "Attention of layer 1, head 1")
    assert before == "Attention of layer 0, head 0"
    page.get_by_label("Film").check()
    expect(said).to_contain_text("has no film")


def test_views_say_what_they_read_and_what_is_missing(runs: Path) -> None:
    gru = lm.load("gru", runs_dir=runs)
    # Without a text, the validation text; a long text is cut, and a short one has too little for neurons.
    assert inside_views.text_of(gru, "why", "") == (
        "its validation text", gru.tokenizer.decode(gru.own_text().splits["valid"].ids[1:401])
    )  # fmt: skip
    assert inside_views.text_of(gru, "why", "ab" * 500) == ("the first 400 characters of your text", "ab" * 200)
    with pytest.raises(ViewError, match="few to say what a unit tracks"):
        inside_views.compute(gru, "neurons", "the cat")
    text = gru.tokenizer.decode(gru.own_text().splits["train"].ids[1:1500])
    found = inside_views.compute(gru, "neurons", text, "0.3")
    unit = inside_views.unit_of(found.view, "0.3")
    assert unit is not None and [value for _, value in found.choices] == ["0.3"]
    assert inside_views.unit_marks(found.view, unit).count("<span") >= 700
    assert "characters since the last newline" in inside_views.units_html(found.view)
    # The terms of a token add up to its log-probability.
    why = inside_views.compute(gru, "why", "<b>the cat").view
    assert "<b>t" not in inside_views.why_marks(why)
    table = inside_views.terms_html(why, 5)
    terms = [float(term) for term in re.findall(r"<td>([+-]\d+\.\d\d)</td>", table)]
    assert sum(terms[: len(why.sources)]) == pytest.approx(why.log_probabilities[5] - why.baseline[5], abs=0.05)
    assert inside_views.terms_html(why, 99) == ""


def test_a_server_reads_no_text_from_elsewhere_for_a_visitor(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = lm.load("gru", runs_dir=runs)
    monkeypatch.setattr(inside_views, "cached_text", lambda corpus, tokenizer: None)
    where = run.config.corpus.model_copy(update={"source": "https://example.com/text.txt"})
    monkeypatch.setitem(run.__dict__, "config", run.config.model_copy(update={"corpus": where}))
    name, text = inside_views.text_of(run, "why", "")
    assert name == "a text that it wrote" and text == run.sample(max_tokens=400, seed=1)
