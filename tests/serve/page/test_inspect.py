"""The tab Inspect, as a visitor uses it: tokens as marks, their alternatives, and the effect of the settings."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import Locator, Page, expect

import lm
from lm.generation.distribution import softmax
from lm.generation.options import SamplingOptions
from lm.generation.request import Request, Score
from lm.html_parts.token_marks import Mark, marks_html, percent, score_note, surprise_strength
from lm.tokenizers.char import CharOptions, CharTokenizer
from serve.page.tabs.inspect import Position, TokenSequence, chart_html
from tests.serve.conftest import Server
from tests.serve.page.conftest import OpenPage
from tests.serve.page.test_write import set_control

PROMPT = "the cat "
NASTY = "<script>window.hit = 1</script><img src=x onerror='window.hit = 1'> {{value}} ${1 + 1} &amp;"

slow = pytest.mark.slow


def begin(page: Page, text: str) -> None:
    page.locator("#look-prompt textarea").wait_for()
    # A component ignores keys before it is ready.
    page.wait_for_timeout(250)
    page.locator("#look-prompt textarea").fill(text)


def marks(page: Page) -> Locator:
    return page.locator("#look-text .mark")


def write(page: Page, *, tokens: int) -> list[str]:
    """Press Write, wait for this number of marks and the chart of the end, and give the text of each mark."""
    page.locator("#look-write").click()
    return written(page, tokens)


def written(page: Page, tokens: int) -> list[str]:
    expect(page.locator("#look-status")).to_contain_text(f"{tokens:,} tokens")
    expect(page.locator("#look-status")).not_to_contain_text("writing")
    expect(marks(page)).to_have_count(tokens)
    return texts_of(page)


def texts_of(page: Page) -> list[str]:
    """The text of each mark, without the signs that make white space visible."""
    script = "marks => marks.map(m => [...m.childNodes].filter(n => n.nodeType === 3).map(n => n.data).join(''))"
    return list(marks(page).evaluate_all(script))


def bars(page: Page, kind: str = "") -> Locator:
    return page.locator(f"#look-chart .bar{kind}")


def said(page: Page) -> Locator:
    return page.locator("#look-chart .said").first


def choose_model(page: Page, name: str) -> None:
    page.get_by_role("combobox", name="Model", exact=True).locator("visible=true").click()
    page.get_by_role("option", name=re.compile(rf"^{name}\b")).locator("visible=true").click()


@slow
def test_each_token_is_a_mark_and_the_text_is_the_librarys_for_the_seed(open_page: OpenPage, runs: Path) -> None:
    page = open_page("Inspect")
    begin(page, PROMPT)
    set_control(page, "Length", 60)
    set_control(page, "Top-k", 20)
    page.get_by_label("Seed").locator("visible=true").fill("7")
    expected = lm.load("gru", runs_dir=runs).sample(PROMPT, max_tokens=60, top_k=20, seed=7)
    assert "".join(write(page, tokens=60)) == expected
    expect(page.locator("#look-text .given")).to_have_text(PROMPT.strip())
    note = str(marks(page).first.get_attribute("title"))
    assert f"“{expected[0]}”: " in note and note.count("“") >= 5
    assert "".join(write(page, tokens=60)) == expected


@slow
def test_the_chart_shows_the_prompts_next_token_before_anything_is_written(open_page: OpenPage, runs: Path) -> None:
    page = open_page("Inspect")
    expect(page.locator("#look-chart")).to_contain_text("Type a prompt and press Enter")
    begin(page, PROMPT)
    page.locator("#look-prompt textarea").press("Enter")
    expect(said(page)).to_contain_text("After “the cat␣”")
    run = lm.load("gru", runs_dir=runs)
    decoder = run.decoder()
    ids = [run.tokenizer.start_id, *run.tokenizer.encode(PROMPT).tolist()]
    shares = np.sort(softmax(decoder.prefill(decoder.open(), ids)[-1:].astype(np.float64))[0])[::-1]
    assert bars(page).locator(".share:not(b)").all_inner_texts() == [percent(share) for share in shares[:12]]
    # The chart also appears when the prompt loses the focus.
    begin(page, "a mat")
    page.locator("#look-prompt textarea").press("Tab")
    expect(said(page)).to_contain_text("After “a mat”")


@slow
def test_the_chart_follows_the_settings(open_page: OpenPage) -> None:
    page = open_page("Inspect")
    begin(page, PROMPT)
    page.locator("#look-prompt textarea").press("Enter")
    expect(bars(page)).to_have_count(12)
    before = bars(page).locator(".share:not(b)").all_inner_texts()
    expect(bars(page, ".out")).to_have_count(0)
    set_control(page, "Top-k", 3)
    expect(bars(page, ":not(.out)")).to_have_count(3)
    expect(said(page)).to_contain_text("keep 3 of")
    set_control(page, "Top-k", 0)
    expect(bars(page, ".out")).to_have_count(0)
    set_control(page, "Temperature", 0)
    expect(bars(page, ":not(.out)")).to_have_count(1)
    expect(bars(page, ":not(.out)").locator("b.share")).to_have_text("100%")
    expect(said(page)).to_contain_text("keep only")
    assert bars(page).locator(".share:not(b)").all_inner_texts() == before
    set_control(page, "Temperature", 1)
    expect(bars(page).first.locator("b.share")).to_have_text(before[0])


@slow
def test_a_mark_is_picked_by_mouse_and_by_keyboard_and_another_token_continues_the_text(
    open_page: OpenPage, runs: Path
) -> None:
    page = open_page("Inspect")
    begin(page, PROMPT)
    set_control(page, "Length", 20)
    texts = write(page, tokens=20)
    marks(page).nth(5).click()
    expect(said(page)).to_contain_text(f"The text has “{texts[5].replace(' ', '␣')}”")
    expect(bars(page, ".chosen")).to_have_count(1)
    expect(page.locator("#look-text .about")).to_contain_text("nats")
    for key in ("Home", *["ArrowRight"] * 8, "ArrowLeft", "Enter"):
        page.keyboard.press(key) if key != "Home" else marks(page).nth(5).press(key)
    expect(page.locator("#look-text .mark.chosen")).to_have_attribute("data-index", "7")
    expect(said(page)).to_contain_text(f"The text has “{texts[7].replace(' ', '␣')}”")

    other = bars(page, ":not(.chosen)").nth(1)
    token = int(str(other.get_attribute("data-token")))
    other.press("Enter")
    changed = written(page, 28)
    run = lm.load("gru", runs_dir=runs)
    assert changed[:8] == [*texts[:7], run.tokenizer.decode([token])]
    ids = run.tokenizer.encode(PROMPT + "".join(changed[:8])).tolist()
    request = Request((run.tokenizer.start_id, *ids), SamplingOptions(max_tokens=20))
    assert "".join(changed[8:]) == "".join(event.text for event in run.events(request))
    # The token that the visitor picked has its own chart.
    marks(page).nth(7).click()
    expect(bars(page, ".chosen")).to_have_attribute("data-token", str(token))


@slow
@pytest.mark.parametrize("name", ["words", "pieces"])
def test_tokens_that_are_not_characters_are_marks_too(open_page: OpenPage, runs: Path, name: str) -> None:
    page = open_page("Inspect")
    begin(page, "the cat")
    choose_model(page, name)
    # The chart follows the model.
    expect(said(page)).to_contain_text("After “the cat”")
    set_control(page, "Length", 25)
    text = "".join(write(page, tokens=25))
    # The first tokens of a character with several tokens show a dot.
    assert text.replace("·", "") == lm.load(name, runs_dir=runs).sample("the cat", max_tokens=25)


@slow
def test_the_text_stays_after_stop_and_can_be_inspected(open_page: OpenPage, site: Server) -> None:
    page = open_page("Inspect")
    choose_model(page, "slow")
    set_control(page, "Length", 4000)
    page.locator("#look-write").click()
    expect(marks(page).nth(20)).to_be_attached()
    page.locator("#look-stop").click()
    site.wait_idle()
    expect(page.locator("#look-status")).to_contain_text("stopped")
    count = marks(page).count()
    expect(page.locator("#look-status")).to_contain_text(f"{count:,} tokens")
    marks(page).nth(3).click()
    expect(bars(page, ".chosen")).to_have_count(1)


@slow
def test_a_script_in_a_prompt_is_a_text(open_page: OpenPage) -> None:
    page = open_page("Inspect")
    begin(page, NASTY)
    set_control(page, "Length", 5)
    write(page, tokens=5)
    assert page.locator("#look-text .given").inner_text() == NASTY
    expect(said(page)).to_contain_text(NASTY[-12:])
    assert page.locator("#look-text script, #look-text img, #look-chart script, #look-chart img").count() == 0
    assert page.evaluate("window.hit") is None


@slow
def test_a_phone_shows_it_without_scrolling_sideways(open_page: OpenPage) -> None:
    page = open_page("Inspect", viewport={"width": 390, "height": 844}, query="?__theme=dark")
    begin(page, PROMPT)
    write(page, tokens=300)
    marks(page).nth(40).click()
    expect(bars(page, ".chosen")).to_have_count(1)
    assert page.evaluate("document.documentElement.scrollWidth") == 390


# -- parts -------------------------------------------------------------------------------------------


def tokenizer() -> CharTokenizer:
    return CharTokenizer(CharOptions(), "\nabc")


def position(
    shares: list[float], *, tokens: tuple[int, ...] = (), index: int = 0, starts: tuple[int, ...] = (0,)
) -> Position:
    scores = tuple(Score(token, -1.0, ()) for token in tokens)
    sequence = TokenSequence("m", "a", (0, 1), tokens, scores, starts)
    return Position(sequence, index, np.log([shares]).astype(np.float32), tokenizer(), "a")


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


def test_the_sequence_until_an_index_has_nothing_after_it() -> None:
    sequence = TokenSequence("m", "a", (0, 1), (1, 2, 3), (Score(1, -1.0, ()),) * 3, (0, 2))
    assert sequence.until(1) == TokenSequence("m", "a", (0, 1), (1,), (Score(1, -1.0, ()),), (0,))
    assert sequence.until(2).starts == (0, 2)


def test_the_penalties_count_only_the_tokens_since_the_model_started() -> None:
    options = SamplingOptions(temperature=1.0, presence_penalty=math.log(4))
    shares = [0.2, 0.2, 0.4, 0.2, 1e-9]
    # The model generated "b", the third token.
    assert position(shares, tokens=(2,), index=1).probabilities(options)[:4] == pytest.approx(
        [2 / 7, 2 / 7, 1 / 7, 2 / 7]
    )
    # A token that the visitor picked belongs to the prompt of the next tokens.
    picked = position(shares, tokens=(2,), index=1, starts=(0, 1)).probabilities(options)
    assert picked[:4] == pytest.approx([0.2, 0.2, 0.4, 0.2])


def test_a_symbol_outside_the_vocabulary_is_reported() -> None:
    unknown = Position(TokenSequence("m", "☃", (0, 4)), 0, np.zeros((1, 5), np.float32), tokenizer(), "☃")
    assert "The prompt has a symbol outside the vocabulary" in chart_html(unknown, SamplingOptions())
    assert "outside the vocabulary" not in chart_html(position([0.2] * 5), SamplingOptions())


def test_the_sentence_describes_the_effect_of_the_settings() -> None:
    shares = [0.1, 0.2, 0.6, 0.1, 1e-9]
    shown = chart_html(position(shares), SamplingOptions(temperature=1.0, top_k=2))
    assert "After <b>“a”</b>, the model gives 60% to <b>“b”</b>." in shown
    assert "Your settings keep 2 of 5 tokens and give it 75%." in shown
    shown = chart_html(position(shares, tokens=(3,)), SamplingOptions(temperature=0.0))
    assert "Your settings keep only <b>“b”</b>." in shown
    assert "The text has <b>“c”</b>: 10% in the model, excluded by your settings." in shown
