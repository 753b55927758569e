"""Atomic writes, and tensor files with their own hash. No pickle, and no torch.

A file is written under a temporary name, synced and renamed. A tensor file is safetensors; its facts (step, hashes, …)
are one JSON text in the header. Equal tensors and facts give equal bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
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
"""Those of numpy by their names in safetensors files; numpy has no BF16."""
BF16 = "BF16"
"""A tensor of bf16: an array of its bits, uint16, until it is widened to fp32."""
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


def umask() -> int:
    """The mode bits that new files of this process do not get."""
    current = os.umask(0)
    os.umask(current)
    return current


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


def _digest_arrays(arrays: Mapping[str, npt.NDArray[Any]], facts: Mapping[str, Any], bf16: Collection[str] = ()) -> str:
    total = hashlib.sha256(digest(facts).encode())
    for name in sorted(arrays):
        array = np.asarray(arrays[name], order="C")
        _add_to_digest(total, name, BF16 if name in bf16 else str(array.dtype), array)
    return total.hexdigest()


def _add_to_digest(total: Any, name: str, dtype: str, array: npt.NDArray[Any]) -> None:
    total.update(f"{name}|{dtype}|{array.shape}|".encode())
    total.update(array.reshape(-1).view(np.uint8).data)


def pack_arrays(arrays: Mapping[str, npt.NDArray[Any]], facts: Mapping[str, Any] | None = None) -> bytes:
    """A safetensors file with JSON facts, and the hash of tensors and facts."""
    # Not ascontiguousarray, which adds a dimension to a scalar.
    arrays = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    known = {**(facts or {}), "format_version": FORMAT_VERSION}
    header = json.dumps({**known, "sha256": _digest_arrays(arrays, known)}, sort_keys=True)
    # One entry: safetensors writes several entries in random order.
    return safetensors.numpy.save(dict(arrays), metadata={HEADER: header})


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is read when it is written elsewhere."""

    dtype: str
    """Its name in safetensors files."""
    shape: tuple[int, ...]
    read: Callable[[], npt.NDArray[Any]]
    """Its values; of bf16, its bits as uint16."""

    @property
    def size(self) -> int:
        """Bytes in a file."""
        return math.prod(self.shape) * _itemsize(self.dtype)


def write_tensors(path: Path, tensors: Mapping[str, LazyTensor], facts: Mapping[str, Any] | None = None) -> None:
    """A file as `pack_arrays` makes it, written tensor by tensor: the memory holds one at a time.

    Raises:
        RunError: the disk is full or read-only.
    """
    known = {**(facts or {}), "format_version": FORMAT_VERSION}
    total = hashlib.sha256(digest(known).encode())
    entries: dict[str, dict[str, Any]] = {}
    at = 0
    # Wide numbers first, so that all are aligned.
    for name in sorted(tensors, key=lambda name: (-_itemsize(tensors[name].dtype), name)):
        tensor = tensors[name]
        entries[name] = {
            "dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [at, at := at + tensor.size]
        }  # fmt: skip

    def header(sha256: str) -> bytes:
        metadata = {HEADER: json.dumps({**known, "sha256": sha256}, sort_keys=True)}
        text = json.dumps({"__metadata__": metadata, **entries}, separators=(",", ":")).encode()
        return text + b" " * (-len(text) % 8)

    # The hash stands before the tensors: its place is filled at the end.
    empty = header("0" * len(total.hexdigest()))
    with replacing(path) as partial, partial.open("wb") as file:
        file.write(len(empty).to_bytes(8, "little") + empty)
        for name in sorted(tensors):
            tensor = tensors[name]
            array = np.asarray(tensor.read(), order="C")
            assert array.shape == tensor.shape and array.nbytes == tensor.size, name
            _add_to_digest(total, name, BF16 if tensor.dtype == BF16 else str(array.dtype), array)
            file.seek(8 + len(empty) + entries[name]["data_offsets"][0])
            file.write(array.reshape(-1).view(np.uint8).data)
        file.seek(8)
        file.write(header(total.hexdigest()))
        file.flush()
        os.fsync(file.fileno())


def _itemsize(dtype: str) -> int:
    return 2 if dtype == BF16 else np.dtype(_DTYPES[dtype]).itemsize


def widened(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """The values of bf16 in fp32, exact."""
    values = bits.astype(np.uint32)
    values <<= 16
    return values.view(np.float32)


def read_arrays(path: Path) -> tuple[Arrays, dict[str, Any]]:
    """Tensors and facts of a file written by `pack_arrays` or `write_tensors`, checked; bf16 as fp32.

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
            names = list(file.keys())
            bf16 = {name for name in names if file.get_slice(name).get_dtype() == BF16}
            # Windows cannot replace a file that is mapped.
            mapped = set(names) if path.stat().st_size >= MAPPED_BYTES and os.name == "posix" else bf16
            arrays = {name: file.get_tensor(name) for name in names if name not in mapped}
        if mapped:
            header, content = map_tensors(path)
            arrays |= {name: view_tensor(header[name], content) for name in mapped}
    except (safetensors.SafetensorError, OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CorruptRunError(f"{path} is damaged ({error}): restore it from a copy, or train again.") from None
    if facts.pop("sha256", None) != _digest_arrays(arrays, facts, bf16):
        raise CorruptRunError(f"{path} fails its hash, so it was edited or damaged: restore it, or train again.")
    for name in bf16:
        arrays[name] = widened(arrays[name])
    return arrays, facts


def map_arrays(path: Path) -> tuple[Arrays, dict[str, Any]]:
    """As `read_arrays`, but the arrays (except bf16) are views of the file, and their hash is not checked."""
    try:
        header, content = map_tensors(path)
        facts = _facts(header.pop("__metadata__", None))
        check_version(facts["format_version"], path)
        arrays = {}
        for name, entry in header.items():
            array = view_tensor(entry, content)
            arrays[name] = widened(array) if entry["dtype"] == BF16 else array
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CorruptRunError(f"{path} is damaged ({error}): restore it from a copy, or train again.") from None
    return arrays, facts


def map_tensors(path: Path) -> tuple[dict[str, Any], npt.NDArray[np.uint8]]:
    """The header of any safetensors file, and its content after that as a view, whose changes stay in memory.

    Raises:
        OSError, ValueError: it cannot be read, or its header is not one.
    """
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if not 0 < size <= os.fstat(file.fileno()).st_size - 8:
            raise ValueError("its header is incomplete")
        header = json.loads(file.read(size))
    if not isinstance(header, dict):
        raise ValueError("its header is not a table of tensors")
    # An empty file cannot be mapped.
    rest = path.stat().st_size - 8 - size
    return header, np.memmap(path, np.uint8, mode="c", offset=8 + size) if rest else np.empty(0, np.uint8)


def view_tensor(entry: Mapping[str, Any], content: npt.NDArray[np.uint8]) -> npt.NDArray[Any]:
    """A tensor of a safetensors file, from its entry in the header; of bf16, its bits as uint16.

    Raises:
        KeyError, ValueError, TypeError: the entry does not fit the file, or numpy has no such numbers.
    """
    kind = np.uint16 if entry["dtype"] == BF16 else _DTYPES[entry["dtype"]]
    return content[slice(*entry["data_offsets"])].view(kind).reshape(entry["shape"])


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
