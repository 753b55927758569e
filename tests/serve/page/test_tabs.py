"""The page finds its tabs."""

from __future__ import annotations

from pathlib import Path

import pytest

from serve.page import tabs


def test_a_module_in_the_folder_is_a_tab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "toy.py").write_text(
        "from serve.page.tabs import Tab\n\n\ndef build(page):\n    pass\n\n\nTAB = Tab('Toy', 15, build)\n"
    )
    labels = [tab.label for tab in tabs.find_tabs()]
    # The page opens with Write.
    assert labels[0] == "Write" and {"Perplexity", "Compare", "Inside", "Train", "Runs"} < set(labels)
    monkeypatch.setattr(tabs, "__path__", [*tabs.__path__, str(tmp_path)])
    assert [tab.label for tab in tabs.find_tabs()] == [*labels[:1], "Toy", *labels[1:]]
