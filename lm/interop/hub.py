"""Downloads a model from the hub of Hugging Face: only the files that are read, never a pickle or code."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lm.errors import ModelSourceError
from lm.interop.model_folder import PATTERNS

PREFIX = "hf:"
_SOURCE = re.compile(r"hf:((?:[\w.-]+/)?[\w.-]+)(?:@([\w./-]+))?")


def download(source: str) -> Path:
    """The folder of a model on this machine: from the cache of huggingface_hub, or downloaded into it.

    Args:
        source: hf:ID or hf:ID@REVISION.

    Raises:
        ModelSourceError: no such model or revision, no access, or no network.
    """
    match = _SOURCE.fullmatch(source)
    if match is None:
        raise ModelSourceError(f"{source!r} is not a model of the hub: write hf:OWNER/NAME or hf:OWNER/NAME@REVISION.")
    import httpx
    from huggingface_hub import errors, snapshot_download

    try:
        with _quiet():
            return Path(snapshot_download(match[1], revision=match[2], allow_patterns=list(PATTERNS)))
    except errors.GatedRepoError:
        reason = "its owner gives access on request only: ask there, and log in with: hf auth login"
    except errors.RepositoryNotFoundError:
        reason = "there is no such model on the hub, or it is private: check the name"
    except errors.RevisionNotFoundError:
        reason = f"it has no revision {match[2]}"
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, httpx.HTTPError, ConnectionError):
        reason = "it is not in the cache, and the hub cannot be reached: try again with a network, or give a folder"
    except (errors.HfHubHTTPError, OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [repr(error)])[0].rstrip(".")
    raise ModelSourceError(f"{source} could not be downloaded: {reason}.")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress bars and warnings of the library."""
    from huggingface_hub import utils

    library: Any = utils
    shown, level = not library.are_progress_bars_disabled(), library.logging.get_verbosity()
    library.disable_progress_bars()
    library.logging.set_verbosity_error()
    try:
        yield
    finally:
        library.logging.set_verbosity(level)
        if shown:
            library.enable_progress_bars()
