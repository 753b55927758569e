"""Hooks of the site (mkdocs.yml)."""

import re
from typing import Any

MARK = re.compile(r"^(\s*```+\w+) (?:run|soak|ci|norun)$", re.MULTILINE)
"""The word behind the language says who runs a block (tests/repo/test_readme.py). The site does not know it."""


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The text of a page without those words."""
    return MARK.sub(r"\1", markdown)
