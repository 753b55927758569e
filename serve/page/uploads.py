"""File access check: a request may name only files that were uploaded.

Gradio 6 does not check this for a page that is mounted in another app: a visitor could read any file of the machine, or
make the server fetch any web address.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastapi import HTTPException, Request
from gradio.utils import get_upload_folder


async def only_uploads(request: Request) -> None:
    """Refuse a request with a file that was not uploaded. Every route of Gradio depends on it.

    Raises:
        HTTPException: 403.
    """
    if request.method != "POST" or request.headers.get("content-type", "").startswith("multipart/form-data"):
        return
    try:
        data = await request.json()
    except (ValueError, RecursionError):
        # Gradio cannot parse it either.
        return
    uploads = Path(get_upload_folder()).resolve()
    for path in _file_paths(data):
        if not _resolved(path).is_relative_to(uploads):
            raise HTTPException(403, "The request names a file that was not uploaded here.")


def _file_paths(data: Any) -> Iterator[str]:
    """The file paths in the JSON of a request."""
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
