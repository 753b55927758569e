"""Style sheets and scripts of the page's components."""

from __future__ import annotations

from pathlib import Path


def read_asset(name: str) -> str:
    """The text of a file in this folder."""
    return (Path(__file__).parent / name).read_text("utf-8")
