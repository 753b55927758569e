"""This computer's processor and memory, and the memory of this process; without torch.

Sizes are in bytes. What cannot be found out is None. psutil is imported on first use: `lm sample` needs the number of
threads alone, and starts faster without it.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import platform
from pathlib import Path
from typing import Any

INSTRUCTION_SETS = {
    "x86": ("avx2", "f16c", "fma", "avx512f", "avx512bw", "avx512_vnni", "avx_vnni", "avx512_bf16", "avx512_fp16",
            "amx_tile", "amx_bf16", "amx_int8"),
    "arm": ("asimd", "asimddp", "bf16", "i8mm", "sve", "sve2"),
}  # fmt: skip
"""Those that training and decoding use."""


def usable_threads() -> int:
    """Hardware threads that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _psutil() -> Any:
    return importlib.import_module("psutil")


def cpu() -> dict[str, Any]:
    """Model, cores, threads that this process may use, and instruction sets."""
    # psutil knows neither the model nor the instruction sets.
    known: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text("utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            known.setdefault(name.strip(), value.strip())
    flags = {*known.get("flags", "").split(), *known.get("Features", "").split()}
    return {
        "model": known.get("model name") or platform.processor() or platform.machine(),
        "cores": _psutil().cpu_count(logical=False),
        "threads": os.cpu_count(),
        "usable_threads": usable_threads(),
        "instruction_sets": [name for names in INSTRUCTION_SETS.values() for name in names if name in flags],
        "bf16_instructions": bool(flags & {"avx512_bf16", "amx_bf16", "bf16"}) if flags else None,
    }


def memory() -> dict[str, int]:
    """Total and available memory of the computer, or of the container if that has less."""
    found = _psutil().virtual_memory()
    total, available = int(found.total), int(found.available)
    limit, used = _container()
    if limit is not None and limit < total:
        total, available = limit, min(limit - used, available)
    return {"total": total, "available": available}


def peak_resident_bytes() -> int | None:
    """The peak of this process's memory in RAM since `reset_peak_resident`, or since it began."""
    # psutil has no peak on Linux.
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text("utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:
        return getattr(_psutil().Process().memory_info(), "peak_wset", None)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


def reset_peak_resident() -> None:
    """Measure the peak from now on; no effect on systems that cannot."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _container() -> tuple[int | None, int]:
    """The lowest memory limit of this process's control groups, and the used part that cannot be freed.

    psutil does not know control groups.
    """
    root = Path("/sys/fs/cgroup")
    found: list[tuple[int, int]] = []
    for name in _control_groups():
        # Version 2 of control groups, then version 1. Without a limit it is "max", or a number above all memory.
        for group, limit, used in (
            (root / name, "memory.max", "memory.current"),
            (root / "memory" / name, "memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            with contextlib.suppress(OSError, ValueError):
                limit_bytes = int((group / limit).read_text())
                lines = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                found.append((limit_bytes, int((group / used).read_text()) - int(lines.get("inactive_file", 0))))
    return min(found, default=(None, 0), key=lambda pair: pair[0])


def _control_groups() -> list[str]:
    """The paths of this process's control groups and of their parents; in a container the root is its own group."""
    paths = {""}
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers in ("", "memory"):
                parts = path.strip("/").split("/")
                paths |= {"/".join(parts[:end]) for end in range(len(parts) + 1)}
    return sorted(paths)
