"""Which training operations run on the native kernels, with which instruction set and which memory.

The native kernels compute in fp32 on the CPU. Under torch's autocast to bf16 their products round both operands to
bf16 and sum in fp32, if the CPU has instructions for it; inputs and results stay fp32. Every other operation runs on
torch.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lm.kernels.compiled import compiled, native

log = logging.getLogger(__name__)

R = TypeVar("R")

KINDS = (
    "gru", "lstm", "embedding", "linear", "dropout", "norm", "swiglu", "attention", "block", "entropy", "clip", "adamw",
)  # fmt: skip

MIN_STEPS, MIN_ROWS = 8, 64
"""Shorter sequences and smaller matrices run on torch: a native call first packs the weights."""

isa: str | None = None
"""The instruction set: "avx512", "avx2", "neon_dotprod" or "plain"; None: the best one of this CPU."""

bf16_isa: str | None = None
"""That of products in bf16: "amx_bf16", "avx512_bf16", "neon_bf16" or, for tests, "amx_emulated"; None: the best."""

_only_torch: ContextVar[bool] = ContextVar("only_torch", default=False)


@contextlib.contextmanager
def only_torch() -> Iterator[None]:
    """Inside, all operations of this thread run on torch."""
    token = _only_torch.set(True)
    try:
        yield
    finally:
        _only_torch.reset(token)


def usable(kind: str, inputs: Tensor) -> bool:
    """Whether an operation of this kind runs natively on these inputs: fp32, on the CPU.

    Under autocast only if the kernels have products in its format. Warns once if this install has no kernels.
    """
    if kind not in KINDS or inputs.device.type != "cpu" or inputs.dtype != torch.float32:
        return False
    if torch.is_autocast_enabled("cpu") and not products_in_bf16():
        return False
    return _installed()


def usable_for_all(kind: str, tensors: Sequence[Tensor]) -> bool:
    """Whether an in-place operation on these tensors runs natively: contiguous, fp32, on the CPU."""
    plain = all(
        (type(each) is Tensor or type(each) is nn.Parameter)
        and each.dtype is torch.float32
        and each.is_cpu
        and each.is_contiguous()
        for each in tensors
    )
    return kind in KINDS and plain and _installed()


def _installed() -> bool:
    # Torch's compiler can trace neither native calls nor context variables.
    if torch.compiler.is_compiling() or _only_torch.get():
        return False
    if native() is None:
        _warn_of_missing_kernels()
        return False
    return True


@functools.cache
def _warn_of_missing_kernels() -> None:
    if not compiled():
        log.warning(
            "This install has no native kernels, because it was built without GCC or Clang: training on the CPU "
            "runs on torch's own layers, which are slower."
        )


def isa_and_threads() -> tuple[str, int]:
    """The instruction set and the number of threads: the last two arguments of each native call."""
    _used.isa = (products_in_bf16() and bf16_instruction_set()) or isa or _best_isa()
    return _used.isa, torch.get_num_threads()


def used_isa_and_threads() -> tuple[str, int]:
    """Those of the last native call of this thread, whose helper threads are awake: for operations without products."""
    return isa or _used.isa or _best_isa(), torch.get_num_threads()


class _Used(threading.local):
    isa: str | None = None


_used = _Used()


def products_in_bf16() -> bool:
    """Whether native products round their operands to bf16 here: under autocast to bf16, on a CPU that has it."""
    if not torch.is_autocast_enabled("cpu") or torch.get_autocast_dtype("cpu") is not torch.bfloat16:
        return False
    return bf16_instruction_set() is not None


def bf16_instruction_set() -> str | None:
    """The instruction set of native products in bf16; None: there are no kernels, or this CPU has none of the sets."""
    return None if native() is None else bf16_isa or _best_bf16_isa()


@functools.cache
def _best_isa() -> str:
    name: str = compiled().instruction_sets()[0]
    return name


@functools.cache
def _best_bf16_isa() -> str | None:
    names: list[str] = compiled().bf16_instruction_sets()
    return names[0] if names else None


# -- weights that stay in fp32 ------------------------------------------------------------------------


def keep_in_fp32(weight: Tensor) -> None:
    """Mark a weight: its products run in fp32, also under autocast."""
    weight.stays_in_fp32 = True  # type: ignore[attr-defined]


def stays_in_fp32(weight: Tensor) -> bool:
    """Whether `keep_in_fp32` marked this weight."""
    return getattr(weight, "stays_in_fp32", False)


def in_its_format(weight: Tensor, call: Callable[..., R], *inputs: Any) -> R:
    """`call(*inputs)`; if `weight` stays in fp32, without autocast and with all inputs cast to fp32."""
    if not stays_in_fp32(weight):
        return call(*inputs)
    with torch.autocast(weight.device.type, enabled=False):
        return call(*cast_floats(inputs, torch.float32))


def cast_floats(value: Any, dtype: torch.dtype) -> Any:
    """Float tensors cast to `dtype`, also inside tuples and lists; other values unchanged."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    return type(value)(cast_floats(part, dtype) for part in value) if isinstance(value, tuple | list) else value


# -- memory -------------------------------------------------------------------------------------------


class _BufferPool(threading.local):
    """Large buffers that forward fills and backward frees, reused in the next step: new pages cost milliseconds."""

    def __init__(self) -> None:
        self._spare: list[Tensor] = []

    def take(self, count: int) -> Tensor:
        for index, buffer in enumerate(self._spare):
            if len(buffer) >= count:
                return self._spare.pop(index)
        if self._spare:
            self._spare.pop()
        return torch.empty(count)

    def give_back(self, buffer: Tensor) -> None:
        self._spare.append(buffer)

    def clear(self) -> None:
        self._spare.clear()


buffers = _BufferPool()


def release_buffers() -> None:
    """Free the buffers that this thread keeps for the next step."""
    buffers.clear()
