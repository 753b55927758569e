"""Views as files: the suffix says whether it is a picture or a page."""

from __future__ import annotations

import io
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from lm.errors import ConfigError, MissingExtraError
from lm.files import check_place, write_file
from lm.html_parts.page import whole_page

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg", ".html")
DOTS_PER_INCH = 150
PICTURE_STYLE = ".picture { background: #fff; padding: 1rem; }"


def check_output(path: Path, *, has_page: bool = False) -> None:
    """Check, before long work, that a view can be written to `path`.

    Args:
        path: its suffix is one of `SUFFIXES`.
        has_page: whether the view has a page without a picture.

    Raises:
        ConfigError: the suffix is another one.
        MissingExtraError: pictures need matplotlib, which is not installed.
        RunError: no file can be written there.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise ConfigError(f"{path}: the name of a view's file ends with {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}.")
    check_place(path)
    if suffix == ".html" and has_page:
        return
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise MissingExtraError("Pictures need matplotlib: pip install '.[plot]' in a checkout of Inkling.") from None


def write_view(path: Path, title: str, figure: Callable[[], Figure], page: Callable[[], str] | None = None) -> None:
    """Write a view atomically; an existing file is replaced.

    Args:
        path: its suffix is one of `SUFFIXES`.
        title: of a page.
        figure: makes the picture.
        page: makes the page; None: a page with the picture.
    """
    suffix = path.suffix.lower()
    if suffix != ".html":
        write_file(path, _picture(figure(), suffix.removeprefix(".")))
    elif page is not None:
        write_file(path, page().encode("utf-8", "replace"))
    else:
        write_file(path, _page_with(title, figure()))


def _picture(figure: Figure, kind: str) -> bytes:
    from matplotlib import rc_context

    content = io.BytesIO()
    # The same view gives the same bytes.
    metadata = {"Date": None} if kind == "svg" else None
    with rc_context({"svg.hashsalt": "inkling"}):
        figure.savefig(content, format=kind, dpi=DOTS_PER_INCH, metadata=metadata)
    return content.getvalue()


def _page_with(title: str, figure: Figure) -> str:
    svg = _picture(figure, "svg").decode("utf-8")
    body = f"""<h1>{escape(title)}</h1>
<div class="picture">{svg[svg.index("<svg") :]}</div>"""
    return whole_page(title, body, PICTURE_STYLE)
