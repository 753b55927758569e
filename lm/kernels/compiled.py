"""The compiled module `lm.kernels._native`, if this install has it."""

from __future__ import annotations

import functools
import importlib
import os
from typing import Any

from lm.host import usable_threads


def native() -> Any:
    """The compiled module; None if this install has none, or INKLING_NATIVE=0 turns it off."""
    return None if os.environ.get("INKLING_NATIVE") == "0" else compiled()


@functools.cache
def compiled() -> Any:
    """The compiled module, whatever INKLING_NATIVE is; None if this install has none."""
    try:
        return importlib.import_module("lm.kernels._native")
    except ImportError:
        return None


def default_threads() -> int:
    """OMP_NUM_THREADS if it is set, as in torch; else the number of cores that this process may use."""
    requested = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    if requested.isdigit() and int(requested) > 0:
        return int(requested)
    return usable_threads()
