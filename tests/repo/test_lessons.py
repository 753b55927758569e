"""The lessons of docs/lessons/: their ```python blocks run in order, and print what the ```text block below says."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
LESSONS = sorted((ROOT / "docs" / "lessons").glob("*.md"))
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Step(NamedTuple):
    """A block of Python, and what it prints."""

    line: int
    code: str
    output: str


def steps(text: str) -> list[Step]:
    """The python blocks of a page, each with the text block that follows it before the next one."""
    found: list[Step] = []
    for match in BLOCK.finditer(text):
        language, body = match.groups()
        if language == "python":
            found.append(Step(text.count("\n", 0, match.start()) + 2, body, ""))
        elif language == "text":
            assert found, "output before any code"
            assert not found[-1].output, f"two outputs after line {found[-1].line}"
            found[-1] = found[-1]._replace(output=body)
    return found


def run(page: Path, text: str) -> list[tuple[Step, str]]:
    """Each step with what it really prints; an error names the line of the page."""
    names: dict[str, Any] = {"__name__": "__lesson__"}
    results = []
    for step in steps(text):
        printed = io.StringIO()
        code = compile("\n" * (step.line - 1) + step.code, str(page), "exec")
        with contextlib.redirect_stdout(printed):
            exec(code, names)
        results.append((step, printed.getvalue()))
    return results


@pytest.mark.parametrize("page", LESSONS, ids=lambda page: page.stem)
def test_a_lesson_prints_what_it_says(page: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import torch

    monkeypatch.chdir(tmp_path)
    random = torch.get_rng_state()
    try:
        results = run(page, page.read_text("utf-8"))
    finally:
        torch.set_rng_state(random)
        torch.set_printoptions(profile="default")
    assert results
    for step, printed in results:
        assert printed == step.output, f"{page.name}, line {step.line}"


def test_every_lesson_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text("utf-8")
    assert LESSONS
    assert not [page.name for page in LESSONS if f"lessons/{page.name}" not in navigation]


def test_blocks_share_names_and_are_compared_with_the_text_below() -> None:
    page = "# T\n\n```python\nx = 2\n```\n\ntext\n\n```python\nprint(x)\n```\n\n```text\n3\n```\n"
    (first, nothing), (second, printed) = run(Path("page.md"), page)
    assert (first.line, first.output, nothing) == (4, "", "")
    assert (second.line, second.output, printed) == (10, "3\n", "2\n")
