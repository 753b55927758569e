"""The tab Write, as a visitor uses it: writing, drafts and versions."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from playwright.sync_api import Locator, Page, expect

import lm
from cli import main as program
from tests.serve.conftest import Server, until
from tests.serve.page.conftest import OpenPage, folder_of

ROOT = Path(program.__file__).parents[1]

pytestmark = pytest.mark.slow


def paper(page: Page) -> str:
    return page.locator("#paper textarea").input_value()


def begin(page: Page, text: str) -> None:
    page.locator("#paper textarea").fill(text)


def set_control(page: Page, name: str, value: object) -> None:
    """Type a number into a control of the visible tab."""
    if not page.get_by_label(f"number input for {name}").first.is_visible():
        page.get_by_role("button", name="More").locator("visible=true").click()
        # A component ignores keys before it is ready.
        page.wait_for_timeout(250)
    field = page.get_by_label(f"number input for {name}").locator("visible=true")
    field.fill(str(value))
    field.press("Tab")
    expect(field).to_have_value(str(value))


def press(page: Page, name: str) -> None:
    page.get_by_role("button", name=name, exact=True).locator("visible=true").click()


def write(page: Page, *, button: str = "Write") -> str:
    """Press the button, and wait for the end."""
    press(page, button)
    expect(page.locator("#write-status")).to_contain_text("ended")
    return paper(page)


def test_the_text_is_the_one_that_the_library_and_the_command_line_give_for_the_seed(
    open_page: OpenPage, site: Server, runs: Path
) -> None:
    page = open_page()
    begin(page, "the cat ")
    set_control(page, "Length", 60)
    set_control(page, "Top-k", 20)
    page.get_by_label("Seed").first.fill("7")
    text = write(page)
    assert text == "the cat " + lm.load("gru", runs_dir=runs).sample("the cat ", max_tokens=60, top_k=20, seed=7)
    expect(page.locator("#write-status")).to_contain_text("60 tokens · ")
    with page.expect_download() as download:
        press(page, "Download")
    assert Path(download.value.path()).read_text("utf-8") == text
    expect(page.locator("#write-status")).to_contain_text("seed 7")

    page.get_by_text("Reproduce this text").click()
    command = page.locator("#recipe textarea").input_value()
    assert command.startswith("lm sample gru ")
    path = Path(sys.executable).parent
    printed = subprocess.run(
        ["bash", "-c", command.replace("lm sample", f"{path / 'python'} -m cli.main sample", 1)], check=True,
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    ).stdout  # fmt: skip
    assert printed == text + "\n"
    page.get_by_label("curl").check()
    expect(page.locator("#recipe textarea")).to_have_value(re.compile("^curl http"))
    answer = subprocess.run(
        ["bash", "-c", page.locator("#recipe textarea").input_value()], check=True, capture_output=True, text=True
    ).stdout
    assert "the cat " + json.loads(answer)["choices"][0]["text"] == text
    page.get_by_label("Python").check()
    expect(page.locator("#recipe textarea")).to_have_value(re.compile("^from openai"))
    printed = subprocess.run(
        [sys.executable, "-c", page.locator("#recipe textarea").input_value()],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert "the cat " + printed == text + "\n"


def test_a_text_is_continued_undone_and_regenerated(open_page: OpenPage) -> None:
    page = open_page()
    begin(page, "a mat ")
    set_control(page, "Length", 40)
    first = write(page)
    expect(page.get_by_role("button", name="Continue", exact=True)).to_be_visible()
    press(page, "Continue")
    # The seed changes: the same one would give a similar text.
    expect(page.locator("#write-status")).to_contain_text("seed 2")
    expect(page.locator("#write-status")).to_contain_text("ended")
    second = paper(page)
    assert second.startswith(first) and len(second) > len(first)
    press(page, "Regenerate")
    expect(page.locator("#write-status")).not_to_contain_text(re.compile(r"seed 2\b"))
    expect(page.locator("#write-status")).to_contain_text("ended")
    third = paper(page)
    assert third.startswith(first) and third != second
    expect(page.locator("#sheet-bar output")).to_have_text("2/2")
    press(page, "Previous version")
    expect(page.locator("#paper textarea")).to_have_value(second)
    expect(page.get_by_role("button", name="Previous version")).to_be_disabled()
    press(page, "Next version")
    expect(page.locator("#paper textarea")).to_have_value(third)
    press(page, "Undo")
    expect(page.locator("#paper textarea")).to_have_value(first)
    press(page, "Undo")
    expect(page.locator("#paper textarea")).to_have_value("a mat ")
    expect(page.get_by_role("button", name="Write", exact=True)).to_be_visible()
    for button in ("Undo", "Regenerate"):
        expect(page.get_by_role("button", name=button, exact=True)).to_be_disabled()
    # The versions that Regenerate replaced are still there.
    expect(page.locator("#sheet-bar output")).to_have_text("1/1")


def test_temperature_0_gives_the_same_text_for_any_seed_and_a_preset_sets_it(open_page: OpenPage) -> None:
    page = open_page()
    set_control(page, "Length", 50)
    texts = {}
    for preset in ("Greedy", "Lively"):
        page.get_by_role("button", name=preset, exact=True).click()
        expect(page.get_by_label("number input for Temperature").locator("visible=true")).to_have_value(
            "0" if preset == "Greedy" else "1.1"
        )
        for seed in ("11", "12"):
            page.get_by_label("Seed").first.fill(seed)
            begin(page, "red ")
            page.locator("#paper textarea").press("Shift+Enter")
            expect(page.locator("#write-status")).to_contain_text(f"seed {seed} · ended")
            texts[preset, seed] = paper(page)
    assert texts["Greedy", "11"] == texts["Greedy", "12"]
    assert len(set(texts.values())) == 3


def test_several_samples_are_side_by_side_and_one_is_taken(open_page: OpenPage, runs: Path) -> None:
    page = open_page()
    begin(page, "sat on ")
    set_control(page, "Length", 40)
    set_control(page, "Samples side by side", 3)
    press(page, "Write")
    expect(page.locator("#write-status")).to_contain_text("120 tokens")
    expect(page.locator("#write-status")).to_contain_text("ended")
    request = lm.load("gru", runs_dir=runs).request("sat on ", lm.SamplingOptions(max_tokens=40, n=3))
    expected = ["", "", ""]
    for event in lm.load("gru", runs_dir=runs).events(request):
        expected[event.index] += event.text
    for number, text in enumerate(expected):
        expect(page.locator(f"#sample-{number + 1} textarea")).to_have_value(text)
    expect(page.locator("#sample-4 textarea")).to_be_hidden()
    page.get_by_role("button", name="Take this one").nth(1).click()
    expect(page.locator("#paper textarea")).to_have_value("sat on " + expected[1])
    expect(page.locator("#sample-1 textarea")).to_be_hidden()


def test_the_same_text_and_seed_give_the_same_piece_and_typed_text_stays_after_undo_and_regenerate(
    open_page: OpenPage,
) -> None:
    page = open_page()
    begin(page, "the cat ")
    set_control(page, "Length", 30)
    first = write(page)
    begin(page, "the cat ")
    # Nothing is left of the piece.
    press(page, "Write")
    expect(page.locator("#paper textarea")).to_have_value(first)
    expect(page.locator("#write-status")).to_contain_text("seed 1 · ended")
    # Typed before, after and inside the piece.
    for keys, typed in (("Control+Home", "See: "), ("Control+End", " END"), ("Control+End ArrowLeft*10", "MIDDLE")):
        for key in keys.split():
            name, _, times = key.partition("*")
            for _ in range(int(times or 1)):
                page.locator("#paper textarea").press(name)
        page.keyboard.type(typed)
    assert paper(page) == f"See: {first[:-6]}MIDDLE{first[-6:]} END"
    press(page, "Regenerate")
    expect(page.locator("#write-status")).not_to_contain_text(re.compile(r"seed 1\b"))
    expect(page.locator("#write-status")).to_contain_text("30 tokens")
    expect(page.locator("#write-status")).to_contain_text("ended")
    assert paper(page).startswith("See: the cat MIDDLE END") and len(paper(page)) == len("See: the cat MIDDLE END") + 30
    press(page, "Undo")
    expect(page.locator("#paper textarea")).to_have_value("See: the cat MIDDLE END")
    expect(page.get_by_role("button", name="Write", exact=True)).to_be_visible()


def choose(page: Page, model: str) -> None:
    """Pick a model in the visible tab."""
    page.get_by_role("combobox", name="Model", exact=True).locator("visible=true").first.click()
    page.get_by_role("option", name=re.compile(f"^{model} ")).click()


def picker(page: Page) -> Locator:
    """The model picker of the tab Write."""
    return page.get_by_role("combobox", name="Model", exact=True).locator("visible=true").first


def begin_long(page: Page, text: str = "") -> None:
    """Start a long text with the slow model, and wait for its beginning."""
    choose(page, "slow")
    set_control(page, "Length", 4000)
    begin(page, text)
    press(page, "Write")
    wait_for_more(page, len(text) + 20)


def wait_for_more(page: Page, length: int) -> None:
    page.wait_for_function(f"document.querySelector('#paper textarea').value.length > {length}")


def stopped(page: Page, site: Server, prompt: str) -> str:
    """The text after a stop; checks that status and command reproduce exactly this text."""
    expect(page.locator("#write-status")).to_contain_text(re.compile(r"tokens · .* · seed \d+ · stopped"))
    site.wait_idle()
    said = re.findall(r"^([\d,]+) tokens.* seed (\d+) ", page.locator("#write-status").inner_text())[0]
    tokens, seed = (int(number.replace(",", "")) for number in said)
    text = lm.load("slow", runs_dir=folder_of(site)).sample(prompt, max_tokens=tokens, seed=seed)
    expect(page.locator("#paper textarea")).to_have_value(prompt + text)
    if not page.locator("#recipe textarea").is_visible():
        page.get_by_text("Reproduce this text").click()
    expect(page.locator("#recipe textarea")).to_have_value(re.compile(f" --max-tokens={tokens} --seed={seed} "))
    return text


def test_the_text_stays_after_stop_with_its_number_of_tokens(open_page: OpenPage, site: Server) -> None:
    page = open_page()
    begin_long(page)
    press(page, "Stop")
    assert 20 < len(stopped(page, site, "")) < 4000
    press(page, "Undo")
    expect(page.locator("#paper textarea")).to_have_value("")
    expect(page.locator("#recipe textarea")).to_have_value("")


def test_another_button_during_a_piece_ends_the_piece_first(open_page: OpenPage, site: Server) -> None:
    page = open_page()
    begin_long(page, "a mat ")
    press(page, "Regenerate")
    expect(page.locator("#write-status")).not_to_contain_text(re.compile(r"seed 1\b"))
    wait_for_more(page, 26)
    until(lambda: site.texts() == 1)
    press(page, "Stop")
    stopped(page, site, "a mat ")
    press(page, "Regenerate")
    wait_for_more(page, 26)
    press(page, "Undo")
    site.wait_idle()
    expect(page.locator("#write-status")).to_have_text("")
    expect(page.locator("#paper textarea")).to_have_value("a mat ")


def test_typing_during_a_piece_stops_it_and_a_reload_restores_the_text_and_the_controls(
    open_page: OpenPage, site: Server
) -> None:
    page = open_page()
    begin_long(page, "a mat ")
    page.locator("#paper textarea").press("Control+Home")
    page.keyboard.type("It is: ")
    expect(page.locator("#write-status")).to_contain_text("stopped")
    site.wait_idle()
    sheet = paper(page)
    assert sheet.startswith("It is: a mat ") and len(sheet) > 30
    # Text that is typed while the server is away is stored too.
    page.context.set_offline(True)
    page.locator("#paper textarea").press("Control+End")
    page.keyboard.type(" to be stored")
    page.context.set_offline(False)
    page.get_by_label("number input for Temperature").locator("visible=true").fill("0.3")
    page.keyboard.press("Tab")
    page.reload()
    expect(page.get_by_role("tab", name="Write", selected=True)).to_be_visible()
    expect(page.locator("#paper textarea")).to_have_value(sheet + " to be stored")
    expect(picker(page)).to_have_value(re.compile("^slow "))
    expect(page.get_by_label("number input for Temperature").locator("visible=true")).to_have_value("0.3")
    # What the model wrote is still told apart from what was typed.
    expect(page.locator("#paper .ink .typed").first).to_have_text(re.compile("^It is: a mat "))
    expect(page.locator("#paper .ink .written").first).to_be_attached()


def test_a_closed_browser_frees_the_slots(open_page: OpenPage, site: Server) -> None:
    page = open_page()
    choose(page, "slow")
    set_control(page, "Length", 4000)
    press(page, "Write")
    page.wait_for_function("document.querySelector('#paper textarea').value.length > 20")
    assert site.texts() == 1
    page.context.close()
    site.wait_idle()


def test_markup_is_text_in_prompt_sample_and_error(open_page: OpenPage) -> None:
    page = open_page()
    evil = "<script>window.hurt=1</script><img src=x onerror='window.hurt=1'>${window.hurt=1}{{value}}"
    begin(page, evil)
    set_control(page, "Length", 5)
    text = write(page)
    assert text.startswith(evil)
    page.get_by_text("Reproduce this text").click()
    assert "<script>" in page.locator("#recipe textarea").input_value()
    assert page.evaluate("window.hurt") is None
    assert page.locator("img[src=x]").count() == 0


def test_a_phone_has_no_sideways_scrolling(open_page: OpenPage) -> None:
    page = open_page(viewport={"width": 390, "height": 844})
    for tab in ("Write", "Compare", "Runs"):
        # The tabs wrap: all are visible.
        page.get_by_role("tab", name=tab).click()
        page.wait_for_timeout(300)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_the_keyboard_alone_is_enough_to_write(open_page: OpenPage) -> None:
    page = open_page()
    set_control(page, "Length", 20)
    page.locator("#paper textarea").focus()
    page.keyboard.type("hen ")
    for _ in range(5):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.textContent.trim()") == "Write":
            break
    page.keyboard.press("Enter")
    expect(page.locator("#write-status")).to_contain_text("ended")
    assert paper(page).startswith("hen ") and len(paper(page)) > 10
