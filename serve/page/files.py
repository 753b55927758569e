"""Which files a visitor may name: those that were uploaded, and no others.

A page that is mounted in another app gets no such check from Gradio 6: whoever names a file of the machine in a request
would be shown it, and whoever names a web address would make the server fetch it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastapi import HTTPException, Request
from gradio.utils import get_upload_folder


async def only_uploads(request: Request) -> None:
    """Refuse a request of the page with a file that was not uploaded; every address of Gradio depends on it.

    Raises:
        HTTPException: 403.
    """
    if request.method != "POST" or request.headers.get("content-type", "").startswith("multipart/form-data"):
        return
    try:
        data = await request.json()
    except (ValueError, RecursionError):
        # No handler will get it either.
        return
    uploads = Path(get_upload_folder()).resolve()
    for path in _files(data):
        if not _resolved(path).is_relative_to(uploads):
            raise HTTPException(403, "The request names a file that was not uploaded here.")


def _files(data: Any) -> Iterator[str]:
    """The paths of files in what a handler would be given."""
    waiting = [data]
    while waiting:
        match waiting.pop():
            case {"path": str(path), **rest}:
                yield path
                waiting += rest.values()
            case dict(each):
                waiting += each.values()
            case list(each):
                waiting += each


def _resolved(path: str) -> Path:
    try:
        return Path(path).resolve()
    except (OSError, ValueError):
        return Path("/")
