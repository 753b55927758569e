"""The device, its memory, and the number format of products.

`lm.training.precision` decides how much of a training uses a low number format.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy.typing as npt
import torch

from lm._renamed import old_names
from lm.errors import DeviceError

Precision = Literal["fp32", "tf32", "bf16", "fp16"]
"""A number format; tf32 is fp32 whose products use ten bits of the fraction, on GPUs that support it."""
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""The dtype in which numbers of a format are stored."""


def pick_device(name: str | None = None) -> torch.device:
    """The device `name`; None: the best one here, which is cuda, then mps, then cpu.

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
        raise DeviceError(f"Device {name!r} is not available: use {' or '.join(present)}, or leave --device out.")
    return torch.device(name)


def to_device(array: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    """The tensor of an array on a device; on a GPU of NVIDIA or AMD the host does not wait for the copy."""
    tensor = torch.from_numpy(array)
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


TO_TRAIN = "for this model and batch: lower training.batch_size, training.bptt or model.hidden_size"
TO_USE = "for this model and text: end other programs, give a shorter text, or use another --device"
"""The remedies of `enough_memory`: for training, and for the use of a model."""


@contextlib.contextmanager
def enough_memory(remedy: str = TO_TRAIN) -> Iterator[None]:
    """Inside, lack of memory raises a DeviceError.

    Args:
        remedy: the rest of the sentence "The memory is not enough …".

    Raises:
        DeviceError: in place of torch's and Python's errors.
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
    """Inside, products run in `precision`; operations that autocast excludes stay in fp32.

    Args:
        device: of the tensors.
        precision: of the products.
        autocast: False if weights and inputs already are in `precision`.
    """
    low = precision in ("bf16", "fp16")
    with contextlib.ExitStack() as stack:
        if device.type == "cuda":
            stack.enter_context(_tf32(precision == "tf32"))
        if low and autocast:
            stack.enter_context(torch.autocast(device.type, dtype=DTYPES[precision]))
        if device.type == "cpu" and precision == "fp16":
            # oneDNN has no fp16 LSTM; torch's own kernels are complete, but slow. fp16 on a CPU is for tests.
            # By default this sets allow_tf32 too, which warns if torch was built without Intel GPUs.
            stack.enter_context(torch.backends.mkldnn.flags(enabled=False, allow_tf32=None))
        yield


@contextlib.contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    """Allow tf32 for fp32 products or not; torch's default is only for recurrent layers of cuDNN."""
    products: Any = torch.backends.cuda.matmul
    layers: Any = torch.backends.cudnn
    parts = products, layers.conv, layers.rnn
    before = [part.fp32_precision for part in parts]
    # Torch has an older interface too. Reading it fails if both interfaces were used and disagree. If they agree, this
    # must not change, because other programs and torch's compiler read it.
    try:
        older = products.allow_tf32, layers.allow_tf32
    except RuntimeError:
        older = None
    if older is not None:
        products.allow_tf32 = layers.allow_tf32 = allowed
    # The older interface leaves recurrent layers to torch.backends.fp32_precision, which may be tf32.
    for part in parts:
        part.fp32_precision = "tf32" if allowed else "ieee"
    try:
        yield
    finally:
        if older is not None:
            products.allow_tf32, layers.allow_tf32 = older
        for part, precision in zip(parts, before, strict=True):
            part.fp32_precision = precision


@contextlib.contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Inside, an operation on the CPU without a deterministic kernel is an error, and new memory is not filled.

    On a GPU the host program's setting stays, by default torch's fastest kernels: sums by atomic additions and cuDNN's
    recurrent layers may then have other last bits in each run.
    """
    # As use_deterministic_algorithms, but that imports torch's compiler for more than a second.
    before = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("error" if device.type == "cpu" else before)
    settings: Any = torch.utils.deterministic
    # By default torch then fills all new memory, which costs time and only matters for reads of unwritten memory.
    fills, settings.fill_uninitialized_memory = settings.fill_uninitialized_memory, False
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)
        settings.fill_uninitialized_memory = fills


def memory_bytes(device: torch.device) -> int:
    """All memory of a GPU, in use or not."""
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    return torch.cuda.get_device_properties(device).total_memory


def send_ids(ids: Any, device: torch.device) -> torch.Tensor:
    """Nested lists of integers as an int64 tensor on a device; the host does not wait for a GPU."""
    if device.type != "cuda":
        return torch.tensor(ids, dtype=torch.int64, device=device)
    return torch.tensor(ids, dtype=torch.int64).pin_memory().to(device, non_blocking=True)


def memory_in_use(device: torch.device) -> int | None:
    """Bytes in use now: of tensors on a GPU, of the whole process on a CPU; None if the system does not report it."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


if not TYPE_CHECKING:
    __getattr__ = old_names(__name__)
