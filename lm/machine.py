"""What this machine has: processor, memory, GPUs and the builds of torch; and how fast it multiplies.

Sizes are in bytes. What cannot be found out here is None.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lm.device import DTYPES, Precision, computing
from lm.kernels.autograd import product
from lm.kernels.compiled import native

INSTRUCTION_SETS = {
    "x86": ("avx2", "f16c", "fma", "avx512f", "avx512bw", "avx512_vnni", "avx_vnni", "avx512_bf16", "avx512_fp16",
            "amx_tile", "amx_bf16", "amx_int8"),
    "arm": ("asimd", "asimddp", "bf16", "i8mm", "sve", "sve2"),
}  # fmt: skip
"""Those that matter to training and decoding, of what a processor names."""


def describe() -> dict[str, Any]:
    """All that is known without measuring."""
    return {"cpu": cpu(), "memory": memory(), "gpus": gpus(), "software": software()}


def cpu() -> dict[str, Any]:
    """Model, cores, threads that this process may use, and instruction sets."""
    lines = _fields(Path("/proc/cpuinfo"))
    flags = {*lines.get("flags", [""])[0].split(), *lines.get("Features", [""])[0].split()}
    cores = set(zip(lines.get("physical id", []), lines.get("core id", []), strict=False))
    return {
        "model": lines.get("model name", [platform.processor() or platform.machine()])[0],
        "cores": len(cores) or None,
        "threads": os.cpu_count(),
        "usable_threads": usable_threads(),
        "instruction_sets": [name for names in INSTRUCTION_SETS.values() for name in names if name in flags],
        "torch_uses": torch.backends.cpu.get_cpu_capability(),
        "kernels_use": None if native() is None else native().instruction_sets()[0],
        "bf16_instructions": bool(flags & {"avx512_bf16", "amx_bf16", "bf16"}) if flags else None,
    }


def usable_threads() -> int:
    """Hardware threads that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory() -> dict[str, int | None]:
    """Of the machine, or of the container where that has less."""
    total, free = None, None
    with contextlib.suppress(ValueError, OSError, AttributeError):
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    lines = _fields(Path("/proc/meminfo"))
    if "MemAvailable" in lines:
        free = int(lines["MemAvailable"][0].split()[0]) * 1024
    limit, used = _container()
    if limit is not None and (total is None or limit < total):
        total = limit
        free = min(limit - used, limit if free is None else free)
    return {"total": total, "available": free}


def available_bytes(device: torch.device) -> int | None:
    """Memory that tensors on a device may still take."""
    if device.type == "cuda":
        # What torch holds back for reuse counts as free.
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory())
    return memory()["available"]


def peak_resident_bytes() -> int | None:
    """The most memory of this process in RAM since `reset_peak_resident`, or since it began."""
    if (peak := _status("VmHWM")) is not None:
        return peak
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


def reset_peak_resident() -> None:
    """Count the peak from here; without effect where the system cannot."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def name_of(device: torch.device) -> str:
    """What a person calls a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return str(cpu()["model"]) if device.type == "cpu" else f"Apple {platform.machine()}"


def matmul_peak(device: torch.device, precision: Precision, *, seconds: float = 0.3) -> float:
    """The most floating-point operations a second that square matrix products reach, on all threads.

    Args:
        device: where.
        precision: of the products; for fp32 on a CPU the native product is tried as well as torch's.
        seconds: how long to measure, about.
    """
    ways: list[Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = [torch.mm]
    if precision == "fp32" and device.type == "cpu" and native() is not None:
        ways.append(product)
    threads = torch.get_num_threads()
    torch.set_num_threads(usable_threads())
    try:
        with torch.inference_mode(), computing(device, precision, autocast=False):
            return max(_fastest(way, device, DTYPES[precision], seconds / len(ways)) for way in ways)
    finally:
        torch.set_num_threads(threads)


def _fastest(
    way: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], device: torch.device, dtype: torch.dtype, seconds: float
) -> float:
    best, size, until = 0.0, 256, time.perf_counter() + seconds
    while True:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        way(a, b)
        for _ in range(3):
            wait(device)
            begun = time.perf_counter()
            way(a, b)
            wait(device)
            took = time.perf_counter() - begun
            best = max(best, 2 * size**3 / took)
        # The next size takes eight times as long, four times over.
        if time.perf_counter() + 32 * took > until or size >= 16_384:
            return best
        size *= 2


def wait(device: torch.device) -> None:
    """Until the device has done all that it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def gpus() -> list[dict[str, Any]]:
    """Each GPU that torch sees, with its memory and what it computes in."""
    found: list[dict[str, Any]] = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            known = torch.cuda.get_device_properties(index)
            free, total = torch.cuda.mem_get_info(index)
            found.append(
                {
                    "device": f"cuda:{index}",
                    "name": known.name,
                    "memory": total,
                    "available": free,
                    "compute_capability": f"{known.major}.{known.minor}",
                    "multiprocessors": known.multi_processor_count,
                    # bf16 came with the tensor cores of capability 8.0; below, torch emulates it.
                    "bf16": known.major >= 8,
                }
            )
    if torch.backends.mps.is_available():
        total = torch.mps.recommended_max_memory()
        found.append(
            {
                "device": "mps",
                "name": f"Apple {platform.machine()}",
                "memory": total,
                "available": total - torch.mps.current_allocated_memory(),
                "compute_capability": None,
                "multiprocessors": None,
                "bf16": None,
            }
        )
    return found


def software() -> dict[str, str | None]:
    """Versions of what computes."""
    cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    shown = torch.__config__.show()

    def built(pattern: str) -> str | None:
        found = re.search(pattern, shown)
        return found[1] if found else None

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "cudnn": None if cudnn is None else str(cudnn),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else None,
        "mkl": built(r"Math Kernel Library Version (\S+)"),
        "onednn": built(r"MKL-DNN v(\S+)"),
        "driver": _driver(),
    }


def _driver() -> str | None:
    """NVIDIA's, from what the kernel says; asking nvidia-smi takes a second."""
    try:
        found = re.search(r"Kernel Module.*?\s(\d+[\d.]+)\s", Path("/proc/driver/nvidia/version").read_text("utf-8"))
    except OSError:
        return None
    return found[1] if found else None


def _fields(path: Path) -> dict[str, list[str]]:
    """A file of "name : value" lines, of which /proc has several; nothing where it is not there."""
    found: dict[str, list[str]] = {}
    with contextlib.suppress(OSError):
        for line in path.read_text("utf-8", errors="replace").splitlines():
            name, colon, value = line.partition(":")
            if colon:
                found.setdefault(name.strip(), []).append(value.strip())
    return found


def _status(name: str) -> int | None:
    values = _fields(Path("/proc/self/status")).get(name)
    return int(values[0].split()[0]) * 1024 if values else None


def _container() -> tuple[int | None, int]:
    """The tightest limit of this process's control groups, and what of it is taken by what cannot be given back."""
    root = Path("/sys/fs/cgroup")
    found: list[tuple[int, int]] = []
    for name in _own_groups():
        # Version 2 of control groups, then version 1; one without a limit says "max", or a number beyond all memory.
        for group, limit, used in (
            (root / name, "memory.max", "memory.current"),
            (root / "memory" / name, "memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            with contextlib.suppress(OSError, ValueError):
                most = int((group / limit).read_text())
                lines = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                found.append((most, int((group / used).read_text()) - int(lines.get("inactive_file", 0))))
    return min(found, default=(None, 0), key=lambda pair: pair[0])


def _own_groups() -> list[str]:
    """The paths of this process's control groups, and of those above them; inside a container the root is its own."""
    paths = {""}
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers in ("", "memory"):
                parts = path.strip("/").split("/")
                paths |= {"/".join(parts[:end]) for end in range(len(parts) + 1)}
    return sorted(paths)
