"""This machine's processor, memory, GPUs and build of torch; and its speed in matrix products.

Sizes are in bytes. What cannot be found out is None.
"""

from __future__ import annotations

import platform
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lm import host
from lm._renamed import old_names
from lm.device import DTYPES, Precision, computing
from lm.kernels.autograd import product
from lm.kernels.compiled import native


def describe() -> dict[str, Any]:
    """All facts that need no measurement."""
    return {"cpu": cpu(), "memory": host.memory(), "gpus": gpus(), "software": software()}


def cpu() -> dict[str, Any]:
    """The facts of `lm.host.cpu`, and the instruction sets that torch and the kernels use."""
    return {
        **host.cpu(),
        "torch_uses": torch.backends.cpu.get_cpu_capability(),
        "kernels_use": None if native() is None else native().instruction_sets()[0],
    }


def available_bytes(device: torch.device) -> int | None:
    """Memory still free for tensors on a device."""
    if device.type == "cuda":
        # Memory that torch caches for reuse counts as free.
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory())
    return host.memory()["available"]


def name_of(device: torch.device) -> str:
    """The product name of a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return str(host.cpu()["model"]) if device.type == "cpu" else f"Apple {platform.machine()}"


def matmul_peak(device: torch.device, precision: Precision, *, seconds: float = 0.3) -> float:
    """The highest speed of square matrix products on all threads, in floating-point operations per second.

    Args:
        device: of the products.
        precision: of the products; for fp32 on a CPU the native product is measured too.
        seconds: duration of the measurement, about.
    """
    ways: list[Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = [torch.mm]
    if precision == "fp32" and device.type == "cpu" and native() is not None:
        ways.append(product)
    threads = torch.get_num_threads()
    torch.set_num_threads(host.usable_threads())
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
        # The next size takes eight times as long, and runs four times.
        if time.perf_counter() + 32 * took > until or size >= 16_384:
            return best
        size *= 2


def wait(device: torch.device) -> None:
    """Wait until the device has finished its queue."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def gpus() -> list[dict[str, Any]]:
    """Each GPU that torch sees, with its memory and capabilities."""
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
    """Versions of Python, torch and the libraries that compute."""
    cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    build = torch.__config__.show()

    def built(pattern: str) -> str | None:
        found = re.search(pattern, build)
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
    """Version of the NVIDIA driver, from /proc; nvidia-smi takes a second."""
    try:
        found = re.search(r"Kernel Module.*?\s(\d+[\d.]+)\s", Path("/proc/driver/nvidia/version").read_text("utf-8"))
    except OSError:
        return None
    return found[1] if found else None


if not TYPE_CHECKING:
    __getattr__ = old_names(__name__)
