"""The cache folder: downloads, text from stdin and prepared tokens, all of which can be made again."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import filelock
import platformdirs

from lm.errors import CorpusError

STALE_SECONDS = 24 * 3600
_LOCK = ".lock"


def cache_folder() -> Path:
    """`INKLING_CACHE` if it is set, else `inkling` in the user's cache folder; not created here."""
    if chosen := os.environ.get("INKLING_CACHE"):
        return Path(chosen).expanduser()
    return platformdirs.user_cache_path("inkling", appauthor=False, opinion=False)


@contextmanager
def workplace(folder: Path) -> Iterator[Path]:
    """A temporary folder inside `folder`, in which to build something that is then renamed; removed afterwards.

    A folder that a killed process left is removed after a day. A running process holds a lock on its folder.

    Raises:
        CorpusError: writing failed (full disk, no permission).
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(".building-*"):
            with suppress(OSError):
                if time.time() - left.stat().st_mtime > STALE_SECONDS and not _in_use(left):
                    shutil.rmtree(left, ignore_errors=True)
        temporary = Path(tempfile.mkdtemp(prefix=".building-", dir=folder))
    except OSError as error:
        raise unwritable(folder, error) from None
    lock = filelock.FileLock(temporary / _LOCK)
    try:
        # Some file systems have no locks.
        with suppress(OSError, NotImplementedError):
            lock.acquire()
        yield temporary
    finally:
        lock.release()
        shutil.rmtree(temporary, ignore_errors=True)


def _in_use(folder: Path) -> bool:
    """Whether a running process holds the lock of the folder; its age alone does not prove that, as clocks jump."""
    if not (folder / _LOCK).exists():
        return False
    try:
        with filelock.FileLock(folder / _LOCK, timeout=0):
            return False
    except filelock.Timeout:
        return True


def unwritable(folder: Path, error: OSError) -> CorpusError:
    """The error for a cache that cannot be written."""
    return CorpusError(
        f"Cannot write to the cache folder {folder}: {error.strerror or error}. "
        "Make room there, or set INKLING_CACHE to another folder."
    )


def sync(path: Path) -> None:
    """Force a file's content to the disk, so that a renamed file is always complete."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def put_in_place(built: Path, target: Path, *, good: Callable[[Path], bool] = lambda path: False) -> None:
    """Rename a finished file or folder to `target`, replacing an existing one.

    Args:
        built: the file or folder, in a `workplace`.
        target: its final path; at every moment it is complete or absent.
        good: whether an existing folder stays (another process was faster and made the same). Else it is moved into
            the workplace, which removes it.
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
