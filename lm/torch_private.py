"""All uses of torch (and glibc) that are not public interfaces.

Each function uses one interface, named in its docstring. `tests/test_torch_private.py` has a test for each, which fails
if a release of torch changes it. So torch has an upper bound in `pyproject.toml`: raise it when these tests pass with
the new release. One private class is used elsewhere: `lm.profiling.tensor_memory` derives from `TorchDispatchMode`.

Torch is imported when a function is called: `import lm` calls `set_environment`, must be quick and loads no torch.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from torch.autograd.graph import Node
    from torch.optim import Optimizer

Module = TypeVar("Module", bound="nn.Module")

ENVIRONMENT = {
    # By default torch's OpenMP threads spin for milliseconds before they sleep, on cores that the kernels need.
    # With this count they spin for some ten microseconds. libgomp reads it when torch is imported.
    "GOMP_SPINCOUNT": "1000",
    # Large tensors in huge pages are filled several times as fast. Torch reads it when it first allocates one.
    "THP_MEM_ALLOC_ENABLE": "1",
}


def set_environment() -> None:
    """Set the environment variables of `ENVIRONMENT` that are not set; before torch is imported."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


# -- memory of the process ----------------------------------------------------------------------------

# M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD of mallopt(3); blocks above the last, here its maximum, are never kept.
_KEEP = {-1: 2**31 - 1, -2: 64 * 2**20, -3: 32 * 2**20}
_DEFAULT = {-1: 128 * 2**10, -2: 128 * 2**10, -3: 128 * 2**10}


@contextlib.contextmanager
def keep_freed_memory() -> Iterator[None]:
    """Inside, memory that a step frees stays with the process for the next step; released at the end.

    Uses `mallopt` and `malloc_trim` of glibc, and does nothing on other systems. To get the pages from the system in
    every step costs a tenth of the step's time or more.
    """
    import ctypes
    import platform

    if platform.libc_ver()[0] != "glibc":
        yield
        return
    library = ctypes.CDLL(None)
    for option, value in _KEEP.items():
        library.mallopt(option, value)
    try:
        yield
    finally:
        for option, value in _DEFAULT.items():
            library.mallopt(option, value)
        library.malloc_trim(0)


# -- optimizers ---------------------------------------------------------------------------------------


def plain_step(optimizer: type[Optimizer]) -> Callable[..., Any]:
    """An optimizer's `step` without its decorators (`__wrapped__`), to be called inside `torch.no_grad`.

    The decorators import torch's compiler, which takes more than a second.
    """
    import inspect

    step: Callable[..., Any] = inspect.unwrap(optimizer.step)
    return step


def keep_compiler_away_from_optimizers() -> None:
    """Set `__dynamo_disable` on methods of all optimizers, whose decorator would else import torch's compiler."""
    from torch.optim import Optimizer

    for name in ("add_param_group", "load_state_dict", "state_dict", "zero_grad"):
        if plain := getattr(getattr(Optimizer, name), "__wrapped__", None):
            setattr(plain, "__dynamo_disable", plain)


def foreach(operation: Literal["add", "copy", "lerp", "mul"], tensors: Sequence[Tensor], *arguments: Any) -> None:
    """Apply an in-place method to many tensors in one call (`_foreach_add_` and so on)."""
    import torch

    getattr(torch, f"_foreach_{operation}_")(list(tensors), *arguments)


def foreach_differences(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> list[Tensor]:
    """New tensors: each of `tensors` minus that of `others`, in one call (`_foreach_sub`)."""
    import torch

    return list(torch._foreach_sub(list(tensors), list(others)))


def foreach_norms(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The 2-norm of each tensor, scalars in fp32, in one call (`_foreach_norm`)."""
    import torch

    low = any(tensor.dtype in (torch.float16, torch.bfloat16) for tensor in tensors)
    norms: list[Tensor] = list(torch._foreach_norm(list(tensors), 2, *([torch.float32] if low else [])))
    return norms


@contextlib.contextmanager
def optimizer_flags(optimizer: Optimizer, divisor: Tensor, skip: Tensor) -> Iterator[bool]:
    """Inside, `step` divides gradients by `divisor`, or changes nothing if `skip` is 1; yields whether it can.

    Uses `grad_scale`, `found_inf` and `_step_supports_amp_scaling`, as torch's GradScaler does with fused optimizers.
    Both are scalars in fp32 on the device, and no host waits for them.
    """
    target: Any = optimizer
    if not getattr(target, "_step_supports_amp_scaling", False):
        yield False
        return
    target.grad_scale, target.found_inf = divisor, skip
    try:
        yield True
    finally:
        del target.grad_scale, target.found_inf


# -- tensors ------------------------------------------------------------------------------------------


def sparse_rows(gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Row numbers (N,) and rows (N, …) of a sparse gradient that may repeat rows (`_indices`, `_values`).

    The public `indices` and `values` need a coalesced tensor.
    """
    return gradient._indices()[0], gradient._values()


def storages(tensor: Tensor) -> list[tuple[int, torch.UntypedStorage]]:
    """The storages of a tensor, each with an id that is unique while it lives (`_cdata`)."""
    import torch

    if tensor.layout is torch.sparse_coo:
        parts = [tensor._indices(), tensor._values()]
    elif tensor.layout is torch.strided:
        parts = [tensor]
    else:
        return []
    return [(part.untyped_storage()._cdata, part.untyped_storage()) for part in parts]


def tree_tensors(values: Any) -> list[Tensor]:
    """All tensors in nested tuples, lists, dicts and registered dataclasses (`torch.utils._pytree`)."""
    from torch import Tensor
    from torch.utils._pytree import tree_leaves

    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def register_tree(kind: type) -> None:
    """Let torch find the tensors in objects of a dataclass (`torch.utils._pytree`)."""
    from torch.utils import _pytree

    if kind not in _pytree.SUPPORTED_NODES:
        _pytree.register_dataclass(kind)


# -- modules ------------------------------------------------------------------------------------------


def shallow_copy(module: Module) -> Module:
    """A module with the same parameters and submodules; to replace a submodule of one leaves the other (`_modules`)."""
    import copy

    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    return twin


def has_hooks(module: nn.Module) -> bool:
    """Whether the module itself has hooks, which a native kernel would not call (`_forward_hooks` and others)."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def recurrent_function(name: str) -> Callable[..., Any]:
    """The function behind `nn.RNNBase`: "rnn_tanh", "rnn_relu", "gru" or "lstm" (`torch._VF`)."""
    from torch import _VF

    function: Callable[..., Any] = getattr(_VF, name)
    return function


def ignore_in_ddp(module: nn.Module, names: list[str]) -> None:
    """Exclude parameters from `DistributedDataParallel` (`_set_params_and_buffers_to_ignore_for_model`)."""
    from torch.nn.parallel import DistributedDataParallel

    ignore: Any = DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
    ignore(module, names)


# -- autograd -----------------------------------------------------------------------------------------


def after_backward(callback: Callable[[], None]) -> None:
    """Call `callback` at the end of the backward pass that is running (`_execution_engine.queue_callback`)."""
    import torch

    engine: Any = torch.autograd.Variable._execution_engine
    engine.queue_callback(callback)


def function_of_node(node: Node) -> type | None:
    """The torch.autograd.Function that made a node of the graph; None for nodes of torch (`_forward_cls`)."""
    function: type | None = getattr(node, "_forward_cls", None)
    return function
