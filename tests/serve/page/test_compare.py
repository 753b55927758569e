"""The tab Compare."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from playwright.sync_api import expect

import lm
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
    press(page, "Write side by side")
    for number, (model, temperature) in enumerate([("gru", 0.4), ("transformer", 0.8), ("gru", 1.2)]):
        expected = lm.load(model, runs_dir=runs).sample("the cat ", max_tokens=50, temperature=temperature)
        expect(page.locator(f"#compare-{number + 1} textarea")).to_have_value(expected)
    expect(page.get_by_text("50 tokens").locator("visible=true")).to_have_count(3)
