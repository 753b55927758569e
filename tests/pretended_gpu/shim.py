"""Builds `fake_cuda.cpp` and loads it; torch must not be imported yet in this process."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

SOURCE = Path(__file__).with_name("fake_cuda.cpp")
BUILDS = Path(__file__).parents[2] / "build" / "pretended_gpu"
"""Libraries by the hash of the source and the version of torch; git ignores the folder."""


def compiler() -> str | None:
    """A C++ compiler's path; None: this machine has none."""
    return next(filter(None, map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))), None)


def missing() -> str | None:
    """Why the library cannot be built or used here; None: it can."""
    if compiler() is None:
        return "needs a C++ compiler"
    if any(_torch().glob("lib/libtorch_cuda.*")):
        return "this build of torch has CUDA of its own"
    return None


def _torch() -> Path:
    """The folder of torch, which is not imported."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def build() -> Path:
    """The shared library, compiled if the source or torch changed."""
    torch = _torch()
    version = importlib.metadata.version("torch")
    name = hashlib.sha256(f"{version} {sys.version} {torch} {SOURCE.read_text('utf-8')}".encode()).hexdigest()[:16]
    library = BUILDS / f"{name}.so"
    if library.exists():
        return library
    found = compiler()
    assert found is not None, "a C++ compiler is needed"
    BUILDS.mkdir(parents=True, exist_ok=True)
    part = library.with_suffix(f".{os.getpid()}")
    include, libraries = torch / "include", torch / "lib"
    paths = (include, include / "torch" / "csrc" / "api" / "include", sysconfig.get_paths()["include"])
    command = [
        found, "-std=c++20", "-shared", "-fPIC", "-O1", str(SOURCE), "-o", str(part), *(f"-I{path}" for path in paths),
        f"-L{libraries}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{libraries}",
    ]  # fmt: skip
    subprocess.run(command, check=True)
    # Two processes may build at the same time; each has a whole file.
    part.replace(library)
    return library


def load() -> None:
    """Load the library into this process, before torch."""
    assert "torch" not in sys.modules, "load the pretended GPU before torch"
    ctypes.CDLL(str(build()), mode=ctypes.RTLD_GLOBAL)
