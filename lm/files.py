"""Atomic writes, and tensor files with their own hash. No pickle, and no torch.

A file is written under a temporary name, synced and renamed. A tensor file is safetensors; its facts (step, hashes, …)
are one JSON text in the header. Equal tensors and facts give equal bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy

from lm.errors import CorruptRunError, FormatVersionError, RunError, RunNotFoundError

FORMAT_VERSION = 1

Arrays = dict[str, npt.NDArray[Any]]
_DTYPES = {
    "F32": np.float32, "F64": np.float64, "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8,
    "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "F16": np.float16, "BOOL": np.bool_,
}  # fmt: skip
"""Those of numpy by their names in safetensors files."""
HEADER = "inkling"
"""The entry of a safetensors header that holds the facts."""
MAPPED_BYTES = 64 << 20
"""Larger tensor files are mapped into memory, not read, so that the system can drop their pages after use."""


def sync_folder(folder: Path) -> None:
    """Force a rename in `folder` to the disk."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_synced(path: Path, content: bytes) -> None:
    """Write a file and force it to the disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def write_file(path: Path, content: bytes | str) -> None:
    """Replace the file at `path` atomically.

    Raises:
        RunError: the disk is full or read-only; the old file is unchanged.
    """
    with replacing(path) as partial:
        write_synced(partial, content.encode("utf-8") if isinstance(content, str) else content)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path for a file that is written and synced inside, and then replaces `path` atomically.

    Raises:
        RunError: the disk is full or read-only; the old file is unchanged. Other errors leave it unchanged too.
    """
    if path.exists() and not path.is_file():
        raise RunError(f"Cannot write {path}: it is no file, and would be lost.")
    # The name is unique to this process, so that two writers of one file do not mix.
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        partial.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        raise RunError(f"Cannot write {path}: {error.strerror or error}. The old file is untouched.") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def check_place(path: Path) -> None:
    """Check, before long work, that a file can be written at `path`; leaves nothing there.

    Raises:
        RunError: the path is not a file, or its folder cannot be written to or made.
    """
    if path.exists() and not path.is_file():
        raise RunError(f"Cannot write {path}: it is no file, and would be lost.")
    check_folder(path.parent)


def check_folder(folder: Path) -> None:
    """See that files could be written into a folder, which need not be there yet; nothing is left there.

    Raises:
        RunError: it cannot be written to or made.
    """
    folder = folder.absolute()
    there = next(each for each in (folder, *folder.parents) if each.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise RunError(f"Cannot write to {folder}: {there}: {error.strerror or error}.") from None


def digest(value: Any) -> str:
    """sha256 of a JSON value in canonical form."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _digest_arrays(arrays: Mapping[str, npt.NDArray[Any]], facts: Mapping[str, Any]) -> str:
    total = hashlib.sha256(digest(facts).encode())
    for name in sorted(arrays):
        array = np.asarray(arrays[name], order="C")
        total.update(f"{name}|{array.dtype}|{array.shape}|".encode())
        total.update(array.reshape(-1).view(np.uint8).data)
    return total.hexdigest()


def pack_arrays(arrays: Mapping[str, npt.NDArray[Any]], facts: Mapping[str, Any] | None = None) -> bytes:
    """A safetensors file with JSON facts, and the hash of tensors and facts."""
    # Not ascontiguousarray, which adds a dimension to a scalar.
    arrays = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    known = {**(facts or {}), "format_version": FORMAT_VERSION}
    header = json.dumps({**known, "sha256": _digest_arrays(arrays, known)}, sort_keys=True)
    # One entry: safetensors writes several entries in random order.
    return safetensors.numpy.save(dict(arrays), metadata={HEADER: header})


def read_arrays(path: Path) -> tuple[Arrays, dict[str, Any]]:
    """Tensors and facts of a file written by `pack_arrays`, checked.

    Raises:
        RunNotFoundError: there is no such file.
        CorruptRunError: the file is truncated or was edited.
        FormatVersionError: it was written by a newer Inkling.
    """
    if not path.is_file():
        raise RunNotFoundError(f"{path} is missing: restore it from a copy, or train again.")
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            facts = _facts(file.metadata())
            check_version(facts["format_version"], path)
            # Windows cannot replace a file that is mapped.
            if path.stat().st_size >= MAPPED_BYTES and os.name == "posix":
                arrays = _map_tensors(path)[0]
            else:
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (safetensors.SafetensorError, OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CorruptRunError(f"{path} is damaged ({error}): restore it from a copy, or train again.") from None
    if facts.pop("sha256", None) != _digest_arrays(arrays, facts):
        raise CorruptRunError(f"{path} fails its hash, so it was edited or damaged: restore it, or train again.")
    return arrays, facts


def map_arrays(path: Path) -> tuple[Arrays, dict[str, Any]]:
    """As `read_arrays`, but the arrays are views of the file, and their hash is not checked."""
    try:
        arrays, metadata = _map_tensors(path)
        facts = _facts(metadata)
        check_version(facts["format_version"], path)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CorruptRunError(f"{path} is damaged ({error}): restore it from a copy, or train again.") from None
    return arrays, facts


def _map_tensors(path: Path) -> tuple[Arrays, Mapping[str, str] | None]:
    """Tensors of a safetensors file as views of the mapped file, and its metadata; changes stay in memory."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    metadata = header.pop("__metadata__", None)
    content = np.memmap(path, np.uint8, mode="c", offset=8 + size)
    arrays = {
        name: np.require(
            content[slice(*entry["data_offsets"])].view(_DTYPES[entry["dtype"]]).reshape(entry["shape"]), None, "A"
        )
        for name, entry in header.items()
    }
    return arrays, metadata


def read_facts(path: Path) -> dict[str, Any]:
    """Facts of a file written by `pack_arrays`, without its tensors; empty if they cannot be read."""
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            return _facts(file.metadata())
    except (safetensors.SafetensorError, OSError, ValueError, TypeError, KeyError):
        return {}


def _facts(metadata: Mapping[str, str] | None) -> dict[str, Any]:
    facts = json.loads((metadata or {})[HEADER])
    if not isinstance(facts, dict):
        raise ValueError(f"its header {HEADER!r} holds no facts")
    return facts


def read_json(path: Path) -> Any:
    """The JSON value in a file.

    Raises:
        RunNotFoundError, CorruptRunError: the file is missing, or is not JSON.
    """
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise RunNotFoundError(f"{path} is missing: restore it from a copy, or train again.") from None
    except (ValueError, RecursionError, OSError) as error:
        raise CorruptRunError(f"{path} is damaged ({error}): restore it from a copy, or train again.") from None


def check_version(version: int, path: Path) -> None:
    """Raise FormatVersionError for a file that a newer Inkling wrote."""
    if version > FORMAT_VERSION:
        raise FormatVersionError(
            f"{path} has format version {version}, this Inkling reads up to {FORMAT_VERSION}: upgrade Inkling "
            "to use it."
        )
