"""Where Inkling keeps what it can make or fetch again: downloads, text from stdin, prepared tokens."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import filelock

from lm.errors import CorpusError

STALE_SECONDS = 24 * 3600
_LOCK = ".lock"


def cache_folder() -> Path:
    """`INKLING_CACHE` where it is set, else `inkling` in the user's cache folder; not created here."""
    if chosen := os.environ.get("INKLING_CACHE"):
        return Path(chosen).expanduser()
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "inkling"


@contextmanager
def workplace(folder: Path) -> Iterator[Path]:
    """A new folder inside `folder` to build something in before it is renamed into place; gone afterwards.

    What a killed process left here is swept away a day later; a process that lives holds a lock on its folder.

    Raises:
        CorpusError: writing failed (full disk, no permission).
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(".building-*"):
            with suppress(OSError):
                if time.time() - left.stat().st_mtime > STALE_SECONDS and not _in_use(left):
                    shutil.rmtree(left, ignore_errors=True)
        place = Path(tempfile.mkdtemp(prefix=".building-", dir=folder))
    except OSError as error:
        raise unwritable(folder, error) from None
    lock = filelock.FileLock(place / _LOCK)
    try:
        # A disk that knows no locks does without.
        with suppress(OSError, NotImplementedError):
            lock.acquire()
        yield place
    finally:
        lock.release()
        shutil.rmtree(place, ignore_errors=True)


def _in_use(place: Path) -> bool:
    """Whether a living process builds in the folder; the clock, which may jump, does not say that."""
    if not (place / _LOCK).exists():
        return False
    try:
        with filelock.FileLock(place / _LOCK, timeout=0):
            return False
    except filelock.Timeout:
        return True


def unwritable(folder: Path, error: OSError) -> CorpusError:
    """The sentence for a cache that cannot be written."""
    return CorpusError(
        f"Cannot write to the cache folder {folder}: {error.strerror or error}. "
        "Make room there, or set INKLING_CACHE to another folder."
    )


def sync(path: Path) -> None:
    """Force a file's content to the disk, so that a rename never shows a file whose content was lost."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def put_in_place(built: Path, target: Path, *, good: Callable[[Path], bool] = lambda path: False) -> None:
    """Rename a finished file or folder to `target`, replacing what is there.

    A folder that is there is kept where it is `good` (another process was faster, and made the same), else moved
    aside into the workplace, to go away with it: at every instant `target` is whole or absent.
    """
    for attempt in range(10):
        try:
            os.replace(built, target)
            return
        except OSError:
            if not target.is_dir() or attempt == 9:
                raise
        if good(target):
            return
        with suppress(OSError):
            os.replace(target, Path(tempfile.mkdtemp(dir=built.parent)) / "old")
