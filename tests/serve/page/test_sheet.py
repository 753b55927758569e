"""The tab Write: the views of the text, the chart of the next token, and slow motion."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import Browser, Locator, Page, expect

import lm
from lm.generation.distribution import draw, softmax
from lm.generation.filters import FILTERS, SamplingContext
from lm.generation.options import SamplingOptions
from lm.generation.request import Score
from lm.generation.sampler import Sampler
from lm.html_parts.token_marks import Mark, marks_html, percent, score_note, surprise_strength
from lm.tokenizers.char import CharOptions, CharTokenizer
from serve.page.assets import read_asset
from serve.page.sheet_views import plain_html
from serve.page.text_editor import EditorCommand
from tests.serve.page.conftest import OpenPage
from tests.serve.page.test_write import begin, choose, paper, press, set_control, write

PROMPT = "the cat "
NASTY = "<script>window.hit = 1</script><img src=x onerror='window.hit = 1'> {{value}} ${1 + 1} &amp;"

slow = pytest.mark.slow


def look(page: Page, view: str) -> None:
    page.get_by_label(view, exact=True).check()


def marks(page: Page) -> Locator:
    return page.locator("#sheet-text .mark")


def texts_of(page: Page) -> list[str]:
    """The text of each mark, without the signs that make white space visible."""
    script = "marks => marks.map(m => [...m.childNodes].filter(n => n.nodeType === 3).map(n => n.data).join(''))"
    return list(marks(page).evaluate_all(script))


def bars(page: Page, kind: str = "") -> Locator:
    return page.locator(f"#next-token .bar{kind}")


def said(page: Page) -> Locator:
    return page.locator("#next-token .said")


@slow
def test_each_token_is_a_mark_and_another_token_continues_the_text_from_there(open_page: OpenPage, runs: Path) -> None:
    page = open_page(viewport={"width": 1024, "height": 640})
    begin(page, PROMPT)
    look(page, "Surprise")
    set_control(page, "Length", 20)
    text = write(page)
    run = lm.load("gru", runs_dir=runs)
    assert text == PROMPT + run.sample(PROMPT, max_tokens=20)
    expect(marks(page)).to_have_count(len(text))
    assert "".join(texts_of(page)) == text
    expect(page.locator("#sheet-text .given")).to_have_text(re.compile(PROMPT.strip()))
    assert f"“{text[-1]}”: ".replace(" ”", "␣”") in str(marks(page).last.get_attribute("title")).replace(" ”", "␣”")
    # All is in the window, chart and sliders beside the text.
    for shown in ("#sheet-text", "#next-token", "#write-go", "#write-undo"):
        assert page.locator(shown).bounding_box()["y"] + page.locator(shown).bounding_box()["height"] <= 640  # type: ignore[index]
    expect(page.get_by_label("number input for Temperature").locator("visible=true")).to_be_in_viewport()

    at = len(PROMPT) + 5
    expect(said(page)).to_contain_text("After “")
    marks(page).nth(at).click()
    expect(said(page)).to_contain_text(f"The text has “{text[at].replace(' ', '␣')}”")
    expect(page.locator("#sheet-text .about")).to_contain_text("nats")
    for key in ("ArrowRight", "ArrowRight", "ArrowRight", "ArrowLeft", "Enter"):
        page.keyboard.press(key)
    at += 2
    expect(page.locator("#sheet-text .mark.chosen")).to_have_attribute("data-index", str(at))
    expect(said(page)).to_contain_text(f"The text has “{text[at].replace(' ', '␣')}”")
    other = bars(page, ":not(.chosen)").nth(1)
    token = int(str(other.get_attribute("data-token")))
    other.press("Enter")
    start = text[:at] + run.tokenizer.decode([token])
    expect(page.locator("#paper textarea")).to_have_value(re.compile(f"^{re.escape(start)}.{{20}}$", re.DOTALL))
    # Seed 1 is used by the part that is left.
    assert paper(page) == start + run.sample(start, max_tokens=20, seed=2)
    page.locator("[data-act=back]").click()
    expect(page.locator("#paper textarea")).to_have_value(text)


@slow
def test_the_chart_follows_text_model_and_sliders_without_the_server(open_page: OpenPage, runs: Path) -> None:
    page = open_page()
    expect(said(page)).to_contain_text("Type a text")
    begin(page, PROMPT)
    expect(said(page)).to_contain_text("After “the cat␣”")
    run = lm.load("gru", runs_dir=runs)
    decoder = run.decoder()
    ids = [run.tokenizer.start_id, *run.tokenizer.encode(PROMPT).tolist()]
    shares = np.sort(softmax(decoder.prefill(decoder.open(), ids)[-1:].astype(np.float64))[0])[::-1]
    before = bars(page).locator(".share:not(b)").all_inner_texts()
    assert before == [percent(share) for share in shares[: len(before)]]
    widths = bars(page).locator(".before").evaluate_all("lanes => lanes.map(lane => lane.style.width)")
    page.context.set_offline(True)
    set_control(page, "Top-k", 3)
    expect(bars(page, ":not(.out)")).to_have_count(3)
    expect(said(page)).to_contain_text("keep 3 of")
    set_control(page, "Temperature", 0)
    expect(bars(page, ":not(.out)").locator("b.share")).to_have_text("100%")
    expect(said(page)).to_contain_text("keep only")
    assert bars(page).locator(".before").evaluate_all("lanes => lanes.map(lane => lane.style.width)") == widths
    set_control(page, "Top-k", 0)
    set_control(page, "Temperature", 1)
    expect(bars(page).first.locator("b.share")).to_have_text(before[0])
    page.context.set_offline(False)


@pytest.mark.soak
@pytest.mark.parametrize("name", ["words", "pieces"])
def test_tokens_that_are_not_characters_are_marks_too(open_page: OpenPage, runs: Path, name: str) -> None:
    page = open_page()
    choose(page, name)
    set_control(page, "Length", 12)
    begin(page, "the cat")
    look(page, "Surprise")
    text = write(page)
    assert text == "the cat" + lm.load(name, runs_dir=runs).sample("the cat", max_tokens=12)
    expect(marks(page).first).to_be_visible()
    page.wait_for_timeout(600)
    assert "".join(texts_of(page)).replace("·", "") == text


@slow
def test_copies_are_underlined_and_a_unit_colours_the_tokens(open_page: OpenPage, runs: Path) -> None:
    page = open_page()
    source = (runs / "text.txt").read_text("utf-8")[100:160]
    begin(page, NASTY[:30] + source)
    look(page, "Copies")
    expect(page.locator("#sheet-legend")).to_contain_text("stands word for word")
    copied = "".join(page.locator("#sheet-text .copied").all_inner_texts())
    assert source in copied and "script" not in copied
    look(page, "Neuron")
    expect(page.locator("#sheet-legend")).to_contain_text("low")
    expect(marks(page)).to_have_count(30 + len(source))
    unit = page.locator("#sheet-unit input")
    unit.fill("0.9999")
    unit.press("Enter")
    expect(page.locator("#sheet-legend")).to_contain_text("has units 0 to")


@slow
def test_slow_motion_writes_the_text_of_the_seed_and_shows_where_each_number_falls(
    open_page: OpenPage, runs: Path
) -> None:
    page = open_page(query="?__theme=dark")
    begin(page, NASTY)
    set_control(page, "Length", 6)
    page.get_by_label("Slow motion").check()
    set_control(page, "Tokens per second", 4)
    page.set_viewport_size({"width": 390, "height": 844})
    press(page, "Write")
    expect(page.locator("#next-token .drop")).to_be_visible()
    expect(page.locator("#next-token .number")).to_contain_text(re.compile(r"The number 0\.\d{3} falls on"))
    expect(page.get_by_role("button", name="Stop", exact=True)).to_be_visible()
    expect(page.get_by_role("button", name="Write", exact=True)).to_be_hidden()
    expect(page.locator("#write-status")).to_contain_text("ended")
    assert paper(page) == NASTY + lm.load("gru", runs_dir=runs).sample(NASTY, max_tokens=6)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert page.locator("#next-token script, #sheet-text img, #paper script, #sheet-bar img").count() == 0
    assert page.evaluate("window.hit") is None


@slow
def test_drafts_are_kept_apart_and_those_of_an_older_page_are_taken_over(open_page: OpenPage) -> None:
    page = open_page()
    url = page.url
    # A page of the same server without the script.
    page.goto(url.replace("/page/", "/favicon.ico"))
    page.evaluate("""() => {
      localStorage.clear();
      localStorage.setItem('inkling.paper', JSON.stringify('an old text'));
      localStorage.setItem('inkling.look-prompt', JSON.stringify('an old prompt'));
    }""")
    page.goto(url)
    expect(page.locator("#paper textarea")).to_have_value("an old text")
    drafts = page.get_by_label("Draft", exact=True)
    expect(drafts.locator("option")).to_have_text(["an old text", "an old prompt"])
    drafts.select_option("an old prompt")
    expect(page.locator("#paper textarea")).to_have_value("an old prompt")
    press(page, "New")
    begin(page, "a third")
    page.reload()
    expect(page.locator("#paper textarea")).to_have_value("a third")
    expect(drafts.locator("option")).to_have_text(["an old text", "an old prompt", "a third"])
    page.on("dialog", lambda dialog: dialog.accept())
    press(page, "Delete")
    expect(page.locator("#paper textarea")).to_have_value("an old prompt")
    expect(drafts.locator("option")).to_have_count(2)


# -- the filters in the browser ------------------------------------------------------------------------------


def cases() -> list[tuple[list[float], dict[str, Any]]]:
    """Logits and options: at random, with ties, and extreme ones."""
    generator = np.random.default_rng(0)
    choices: dict[str, list[Any]] = {
        "temperature": [0.0, 1e-3, 0.8, 1.0, 2.0], "top_k": [None, 1, 3, 500], "top_p": [None, 0.01, 0.5, 0.9, 1.0],
        "min_p": [None, 0.05, 0.5], "typical_p": [None, 0.05, 0.5, 1.0], "repetition_penalty": [None, 1.3],
        "presence_penalty": [0.0, 1.5], "frequency_penalty": [0.0, -0.4],
    }  # fmt: skip
    found = []
    for number in range(300):
        logits = generator.normal(0, 3, (5, 40, 300)[number % 3])
        if number % 4 == 1:
            logits = logits.round()
        if number % 4 == 2:
            logits[generator.integers(len(logits), size=2)] = [3e38, -3e38]
        if number % 4 == 3:
            logits[:] = 1.0
        options = {name: values[generator.integers(len(values))] for name, values in choices.items()}
        found.append((logits.astype(np.float32).tolist(), options))
    return found


@slow
def test_the_browsers_filters_give_the_samplers_probabilities_and_draws(browser: Browser) -> None:
    page = browser.new_page()
    numbers = np.random.default_rng(1).random(300).tolist()
    text = {"banned": [4], "fallback": 0, "text_counts": [[0, 1], [2, 2]], "generated_counts": [[2, 2]]}
    script = (
        read_asset("filters.js")
        + """
      cases => cases.map(([logits, options, text, number]) => {
        const shares = inklingFilters.probabilities(logits, options, text);
        return [[...shares], inklingFilters.draw(shares, number)];
      })"""
    )
    # The function after the filters.
    filters, function = script.rsplit("cases =>", 1)
    given = [(logits, options, text, number) for (logits, options), number in zip(cases(), numbers, strict=True)]
    found = page.evaluate(f"given => {{ {filters} return (cases => {function})(given); }}", given)
    names = page.evaluate(f"() => {{ {filters} return inklingFilters.names; }}")
    page.close()
    assert names == [
        next(iter(each.controls)) for each in FILTERS if any(slider is not None for slider in each.controls.values())
    ]
    for (logits, values, _, number), (shares, token) in zip(given, found, strict=True):
        options = SamplingOptions(**values)
        tokenizer = CharTokenizer(CharOptions(), "\n" + "".join(map(chr, range(200, 198 + len(logits)))))
        context = SamplingContext.after([0], [2, 2], options, len(logits))
        sampler = Sampler(options.model_copy(update={"allow_unknown": True, "banned_tokens": (4,)}), tokenizer)
        row = np.array([logits], dtype=np.float32)
        expected = sampler.probabilities(row, [context])[0]
        assert (np.array(shares) > 0).tolist() == (expected > 0).tolist(), (json.dumps(values), logits)
        assert shares == pytest.approx(expected.tolist(), abs=1e-12)
        if options.temperature:
            with np.errstate(divide="ignore"):
                assert token == draw(np.log(expected[None]) - np.log(expected.max()), [number])[0]


# -- parts -------------------------------------------------------------------------------------------


def test_probabilities_are_shown_in_percent() -> None:
    assert [percent(share) for share in (0, 0.0004, 0.0012, 0.0349, 0.1, 0.934, 1)] == [
        "0", "<0.1%", "0.1%", "3.5%", "10%", "93%", "100%",
    ]  # fmt: skip


def test_the_colour_grows_with_the_nats_up_to_six() -> None:
    assert [surprise_strength(value) for value in (0.0, -3.0, -6.0, -60.0, -math.inf)] == [0, 0.5, 1, 1, 1]


def test_a_tooltip_has_the_alternatives_and_whether_the_token_was_the_first_choice() -> None:
    top = ((0, math.log(0.5)), (1, math.log(0.25)))
    assert score_note(Score(0, math.log(0.5), top), "ab".__getitem__) == (
        "“a”: 50% (0.69 nats), the first choice; alternatives: “b” 25%"
    )
    assert score_note(Score(2, math.log(0.13), top), "abc".__getitem__) == (
        "“c”: 13% (2.04 nats); alternatives: “a” 50%, “b” 25%"
    )


def test_a_mark_holds_its_text_as_text_and_a_note_cannot_leave_its_quotes() -> None:
    shown = marks_html([Mark("<b>", 0.5, "\"'><script>")])
    assert "&lt;b&gt;" in shown and "<script" not in shown and 'title="&quot;&#x27;&gt;' in shown


def test_parts_of_a_text_are_counted_as_a_browser_counts_and_shown_as_text() -> None:
    command = EditorCommand.parse({"text": "😀<b>y", "parts": [[3, 0], [2, 1], [1, 0]]})
    assert command.spans() == [(0, 2, 0), (2, 4, 1), (4, 5, 0)]
    shown = plain_html(command, [(1, 3)])
    assert shown == (
        '<span class="given">😀</span><span class="given copied">&lt;</span>'
        '<span class="copied">b</span><span class="">&gt;</span><span class="given">y</span>'
    )
