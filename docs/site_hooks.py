"""Hooks of the site (mkdocs.yml)."""

import re
import tempfile
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

MARK = re.compile(r"^(\s*```+\w+) (?:run|soak|ci|norun)$", re.MULTILINE)
"""The word behind the language says who runs a block (tests/repo/test_readme.py). The site does not know it."""
SHIPPED = "shakespeare-gru"
"""The run whose page for a browser the site has."""
PLACE = f"<!-- the page of {SHIPPED} -->"
"""Where a page of the documentation links to it; it is in the site alone."""


def on_files(files: Files, config: Any, **_: Any) -> Files:
    """Add the page of the shipped run, as `lm export` writes it."""
    import lm
    from lm.interop import html

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{SHIPPED}.html"
        html.export(lm.load(SHIPPED), path)
        files.append(File.generated(config, path.name, content=path.read_text("utf-8")))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The text of a page without those words, and with the link."""
    return MARK.sub(r"\1", markdown).replace(PLACE, f"[Open the page of {SHIPPED}](../{SHIPPED}.html).")
