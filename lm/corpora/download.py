"""Download a named corpus completely, or leave nothing."""

from __future__ import annotations

import hashlib
import http.client
import shutil
import urllib.parse
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

from lm.corpora.cache import put_in_place, sync, unwritable, workplace
from lm.corpora.corpus import Progress, logger
from lm.errors import CorpusError, DownloadError

TIMEOUT_SECONDS = 60
_BLOCK = 1 << 20


def download(
    name: str,
    urls: Sequence[str],
    files: Sequence[Sequence[str]],
    target: Path,
    *,
    sha256: str | None,
    check: Callable[[int, Path], object],
    progress: Progress,
) -> None:
    """Download the files of a corpus into the folder `target`, which appears complete or not at all.

    Args:
        name: of the corpus, in errors.
        urls: tried in order. A .zip holds the files; any other URL is the one file.
        files: for each file its names: first the name to give it, then other names it may have in the archive.
        target: the folder to make.
        sha256: of the download; None: no check but `check`.
        check: called with the index of a file and its path; raises CorpusError for a wrong file.
        progress: called with bytes downloaded.

    Raises:
        DownloadError: every URL failed; gives the reason for each.
    """
    reasons = []
    with workplace(target.parent) as place:
        for url in urls:
            logger.info("Downloading %s from %s", name, url)
            try:
                _fetch(url, place / "fetched", sha256, progress)
                folder = place / "files"
                folder.mkdir(exist_ok=True)
                if urllib.parse.urlsplit(url).path.endswith(".zip"):
                    _unpack(place / "fetched", files, folder)
                else:
                    (place / "fetched").replace(folder / files[0][0])
                for number, known_as in enumerate(files):
                    check(number, folder / known_as[0])
                    sync(folder / known_as[0])
                put_in_place(folder, target)
                return
            except CorpusError as error:
                reasons.append(f"{url}: {error}")
            except OSError as error:
                raise unwritable(target.parent, error) from None
    raise DownloadError(
        f"{name} could not be downloaded. {' '.join(reasons)} "
        f"Try again later, or put its files into a folder {name!r} of --data-dir or INKLING_DATA."
    )


def _fetch(url: str, path: Path, sha256: str | None, progress: Progress) -> None:
    """Download `url` to `path`, and check length and hash."""
    digest, done = hashlib.sha256(), 0
    request = urllib.request.Request(url, headers={"User-Agent": "inkling-lm"})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)
    # urllib raises URLError (an OSError), and http.client its own errors for broken responses.
    except (OSError, http.client.HTTPException) as error:
        raise DownloadError(f"{getattr(error, 'reason', None) or error}.") from None
    with response, path.open("wb") as file:
        total = int(response.headers.get("Content-Length") or 0)
        while True:
            try:
                block = response.read(_BLOCK)
            except (OSError, http.client.HTTPException) as error:
                raise DownloadError(f"the connection broke after {done:,} bytes ({error}).") from None
            if not block:
                break
            file.write(block)
            digest.update(block)
            done += len(block)
            progress("downloading", done, total)
    if total and done != total:
        raise DownloadError(f"the connection broke after {done:,} of {total:,} bytes.")
    if sha256 and digest.hexdigest() != sha256:
        raise DownloadError(f"the download is not the published archive (sha256 {digest.hexdigest()}).")


def _unpack(archive: Path, files: Sequence[Sequence[str]], folder: Path) -> None:
    """Extract the wanted files from any folder of a .zip."""
    try:
        with zipfile.ZipFile(archive) as opened:
            members = {Path(member).name: member for member in opened.namelist()}
            for known_as in files:
                inside = next((members[known] for known in known_as if known in members), None)
                if inside is None:
                    raise DownloadError(f"the archive lacks {known_as[-1]}.")
                with opened.open(inside) as source, (folder / known_as[0]).open("wb") as copy:
                    shutil.copyfileobj(source, copy, _BLOCK)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise DownloadError(f"the archive is damaged ({error}).") from None
