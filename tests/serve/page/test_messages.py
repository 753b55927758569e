"""The library's messages on the page."""

from __future__ import annotations

import pytest

from serve.page.messages import without_commands


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("a.txt is not UTF-8: byte 3 is 0xe9.", "a.txt is not UTF-8: byte 3 is 0xe9."),
        (
            "The train split has 9 tokens. Give a longer text, or lower the batch: --set training.batch_size=8",
            "The train split has 9 tokens. Give a longer text.",
        ),
        (
            "It is too long: give a part of it, or start with a greater --max-upload.",
            "It is too long: give a part of it.",
        ),
        ("There is no model yet: train one, on the page or with lm train FILE.", "There is no model yet: train one."),
        ("Columns: a, b; choose one with --text-column.", "Columns: a, b."),
        ("x exists already: choose another --name, or go on with it: lm train --resume x", "x exists already."),
        ("--precision bf16: this device lacks it; use fp32.", "precision bf16: this device lacks it; use fp32."),
        ("Use --text-column text.", "Use text column text."),
        ("A dash -- like this -- stays. So does lm.", "A dash -- like this -- stays. So does lm."),
    ],
)
def test_advice_for_a_command_line_does_not_reach_the_page(message: str, shown: str) -> None:
    assert without_commands(message) == shown
