"""The device and the number format that work runs with; a device that is not here is refused before any work starts.

How much of a training uses the number format is `lm.training.precision`.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch

from lm.errors import DeviceError

# Large tensors in huge pages are filled several times as fast; torch asks when it first allocates one.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

Precision = Literal["fp32", "tf32", "bf16", "fp16"]
"""A number format: tf32 is fp32 whose products read ten bits of the fraction, on GPUs that have it."""
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""What numbers of a format are stored as."""


def pick_device(name: str | None = None) -> torch.device:
    """The device called `name`, or the best one present: cuda, then mps, then cpu.

    Raises:
        DeviceError: there is no such device here.
    """
    present = ["cpu"]
    if torch.backends.mps.is_available():
        present.insert(0, "mps")
    if torch.cuda.is_available():
        present[:0] = ["cuda", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    if name is None:
        return torch.device(present[0])
    if name not in present:
        raise DeviceError(f"Device {name!r} is not here: use {' or '.join(present)}, or leave --device out.")
    return torch.device(name)


TO_TRAIN = "for this model and batch: lower training.batch_size, training.bptt or model.hidden_size"
TO_USE = "for this model and text: end other programs, give a shorter text, or take another --device"
"""What is not enough, and what to do, in training and in the use of a model."""


@contextlib.contextmanager
def enough_memory(remedy: str = TO_TRAIN) -> Iterator[None]:
    """Say in a sentence that memory ran out.

    Args:
        remedy: what helps, after a colon.

    Raises:
        DeviceError: in place of what torch and Python raise for it.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        cpu = re.search("can't allocate memory|not enough memory|Storage size calculation overflow", str(error))
        if not (cpu or isinstance(error, MemoryError | torch.OutOfMemoryError)):
            raise
        raise DeviceError(
            f"The memory is not enough {remedy} ({(str(error).splitlines() or [type(error).__name__])[0][:200]})."
        ) from None


@contextlib.contextmanager
def computing(device: torch.device, precision: Precision, *, autocast: bool = True) -> Iterator[None]:
    """Run products in `precision`; what torch lists as delicate stays in fp32.

    Args:
        device: where.
        precision: of the products.
        autocast: False where weights and inputs are in `precision` already, so that nothing has to be cast.
    """
    low = precision in ("bf16", "fp16")
    with contextlib.ExitStack() as stack:
        if device.type == "cuda":
            stack.enter_context(_tf32(precision == "tf32"))
        if low and autocast:
            stack.enter_context(torch.autocast(device.type, dtype=DTYPES[precision]))
        if device.type == "cpu" and precision == "fp16":
            # oneDNN has no fp16 LSTM; torch's own kernels have everything, slowly. fp16 on a CPU is for tests.
            # Left alone, allow_tf32 is set too, which warns where torch knows no Intel GPU.
            stack.enter_context(torch.backends.mkldnn.flags(enabled=False, allow_tf32=None))
        yield


@contextlib.contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    """Whether fp32 products may be tf32 ones; left alone, torch lets recurrent layers of cuDNN and nothing else."""
    # The older of torch's two interfaces: once the newer one is used, torch refuses to read the older one.
    products, layers = torch.backends.cuda.matmul, torch.backends.cudnn
    before = products.allow_tf32, layers.allow_tf32
    products.allow_tf32 = layers.allow_tf32 = allowed
    try:
        yield
    finally:
        products.allow_tf32, layers.allow_tf32 = before


@contextlib.contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Only deterministic kernels on the CPU; on a GPU, where some have no such form, torch says which."""
    # As use_deterministic_algorithms, which would import torch's compiler for more than a second.
    before = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("error" if device.type == "cpu" else before)
    settings: Any = torch.utils.deterministic
    # By default torch then writes over all new memory first, which only hides what reads it before writing.
    fills, settings.fill_uninitialized_memory = settings.fill_uninitialized_memory, False
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)
        settings.fill_uninitialized_memory = fills


def memory_in_use(device: torch.device) -> int | None:
    """Bytes that are in use now: of tensors on a GPU, of the whole process on a CPU; None where it cannot be told."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


@contextlib.contextmanager
def kept_memory() -> Iterator[None]:
    """Inside, memory that a step frees stays with the process for the next step; given back at the end.

    A step that takes it from the system again, page by page, loses a tenth of its time and more. Only glibc is told.
    """
    if platform.libc_ver()[0] != "glibc":
        yield
        return
    library = ctypes.CDLL(None)
    for option, value in _KEPT.items():
        library.mallopt(option, value)
    try:
        yield
    finally:
        for option, value in _USUAL.items():
            library.mallopt(option, value)
        library.malloc_trim(0)


# M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD of mallopt(3); larger pieces than the last (its maximum) are never kept.
_KEPT = {-1: 2**31 - 1, -2: 64 * 2**20, -3: 32 * 2**20}
_USUAL = {-1: 128 * 2**10, -2: 128 * 2**10, -3: 128 * 2**10}
