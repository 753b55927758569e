"""Style sheets and scripts of the page's components.

uPlot.iife.min.js is uPlot 1.6.32 as published on npm; uPlot.LICENSE is its licence (MIT).
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

from fastapi import APIRouter, HTTPException
from fastapi.responses import Response

from serve.security.login import PAGE

SERVED = ("uPlot.iife.min.js",)
"""Files that the browser requests; the others are in the page itself."""
YEAR_SECONDS = 31_536_000

router = APIRouter(include_in_schema=False)


def read_asset(name: str) -> str:
    """The text of a file in this folder."""
    return (Path(__file__).parent / name).read_text("utf-8")


@functools.cache
def asset_url(name: str) -> str:
    """The address of a file of SERVED; it contains a hash, so that browsers may keep the file."""
    digest = hashlib.sha256(read_asset(name).encode("utf-8")).hexdigest()[:16]
    return f"{PAGE}/files/{digest}/{name}"


@router.get(f"{PAGE}/files/{{digest}}/{{name}}")
async def send_file(digest: str, name: str) -> Response:
    """A file of SERVED."""
    if name not in SERVED or not asset_url(name).endswith(f"/{digest}/{name}"):
        raise HTTPException(404, "There is no such file.")
    headers = {"Cache-Control": f"private, max-age={YEAR_SECONDS}, immutable"}
    return Response(read_asset(name), media_type="text/javascript", headers=headers)
