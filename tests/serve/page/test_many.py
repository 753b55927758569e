"""Many visitors at once."""

from __future__ import annotations

from pathlib import Path

import pytest
from playwright.sync_api import expect

import lm
from tests.serve.page.conftest import OpenPage
from tests.serve.page.test_write import paper, press, set_control

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("visitors", [4, pytest.param(20, marks=pytest.mark.soak)])
def test_pages_that_write_at_once_do_not_disturb_each_other(open_page: OpenPage, runs: Path, visitors: int) -> None:
    pages = [open_page() for _ in range(visitors)]
    for number, page in enumerate(pages):
        page.locator("#paper textarea").fill("the cat " * (number % 3))
        page.get_by_label("Seed").first.fill(str(100 + number))
        set_control(page, "Length", 300)
    for page in pages:
        press(page, "Write")
    run = lm.load("gru", runs_dir=runs)
    for number, page in enumerate(pages):
        expect(page.locator("#write-status")).to_contain_text(f"seed {100 + number} · ended")
        prompt = "the cat " * (number % 3)
        assert paper(page) == prompt + run.sample(prompt, seed=100 + number, max_tokens=300)
