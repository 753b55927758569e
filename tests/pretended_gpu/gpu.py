"""A pretended GPU: tensors of device "cuda" that are computed on the CPU, with every operator watched.

    from tests.pretended_gpu import gpu      # before torch is imported, in a process of its own
    with gpu.pretended() as watch:
        model.to("cuda")                     # any code of lm/ on device "cuda"
        watch.reset()
        step.run(batches, 1.0)
        watch.waits, watch.operators         # Counter of (kind, place), Counter of names

A `GpuTensor` has device "cuda" and contains a CPU tensor. A dispatch mode computes each operator on the CPU tensors, so
values are right, and refuses what a GPU refuses: operators that mix devices. `fake_cuda.cpp` lets autograd and autocast
accept the device.

What it counts:

    waits        the host waits for the device: `.item()`, `float(t)`, `nonzero`, boolean masks, `unique`, copies to
                 the host, copies from pageable memory or without non_blocking, `synchronize`
    operators    launches: every operator on a GPU tensor that is no view. A fused or foreach operator counts once, an
                 operator that launches several kernels too
    float64      tensors of float64 on the device, which Apple GPUs do not have

What it does not prove: speed; numbers as CUDA kernels round them; kernels that refuse a dtype, shape or layout on CUDA
alone; cuDNN: `_VF.gru`, `lstm` and `rnn_*` are one operator `_cudnn_rnn` here, computed in fp32 by the CPU's layers;
torch's choice of an attention kernel: here flash for low formats without a mask, else the memory-efficient one; the
order of streams: everything runs at once, so a missing synchronisation is not seen; memory; random numbers of CUDA's
generator; code of torch's compiler; CUDA graphs.
"""

# ruff: noqa: E402, SIM905 - the library is loaded before torch

from __future__ import annotations

from tests.pretended_gpu import shim

shim.load()

import collections
import contextlib
import functools
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

ROOT = Path(__file__).parents[2]
GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
NAME = "Pretended GPU"
MEMORY_BYTES = 8 * 2**30
aten = torch.ops.aten

VIEWS = frozenset(
    """
_indices _values _nnz alias as_strided chunk detach diagonal expand is_coalesced lift_fresh narrow permute
_reshape_alias select slice sparse_dim dense_dim split split_with_sizes squeeze t transpose unbind unfold unsqueeze
view view_as_real _unsafe_view _coalesced_ empty empty_like empty_strided new_empty new_empty_strided
_sparse_coo_tensor_unsafe _sparse_coo_tensor_with_dims_and_tensors set_ resize_
""".split()
)
"""Operators that launch nothing."""
WAITS = frozenset(
    """
_local_scalar_dense nonzero masked_select _unique2 unique_dim unique_consecutive equal _coalesce is_nonzero
repeat_interleave bincount
""".split()
)
"""Operators whose result's value or size the host must know."""
COPIES = frozenset(("copy_", "_to_copy", "_copy_from", "_copy_from_and_resize"))
CPU_INDICES = frozenset(("index", "index_put_", "index_put", "_index_put_impl_", "_unsafe_index"))
"""Operators that accept indices on the CPU for a tensor on the GPU; they then copy them."""


PASSED_ON = "lm/profiling/tensor_memory.py"
"""A dispatch mode, through which operators of other places come."""


class MixedDevicesError(RuntimeError):
    """An operator got tensors of both devices."""


class GpuTensor(torch.Tensor):
    """A tensor whose device is cuda:0 and whose numbers are in `host`."""

    host: Tensor

    @staticmethod
    def __new__(cls, host: Tensor) -> GpuTensor:
        sparse = host.layout is not torch.strided
        self: GpuTensor = torch.Tensor._make_wrapper_subclass(
            cls, host.size(), strides=None if sparse else host.stride(),
            storage_offset=None if sparse else host.storage_offset(), dtype=host.dtype, layout=host.layout, device=GPU,
            requires_grad=False, dispatch_layout=sparse,
        )  # fmt: skip
        self.host = host
        return self

    def __init__(self, host: Tensor) -> None:
        pass

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        return self.detach()

    @data.setter
    def data(self, new: Tensor) -> None:
        assert isinstance(new, GpuTensor), "a tensor of the CPU as data of one on the GPU"
        torch._C.TensorBase.data.__set__(self, new)  # type: ignore[attr-defined]
        self.host = new.host

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"GpuTensor({self.host!r})"

    def tolist(self) -> Any:
        WATCH.wait("tolist")
        return self.host.tolist()

    def data_ptr(self) -> int:
        # Only for native code, which would read memory of the other device.
        raise MixedDevicesError(f"the address of a tensor on the GPU is read at {place()}")

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")

    def __deepcopy__(self, memo: dict[int, Any]) -> GpuTensor:
        with torch.no_grad():
            made: GpuTensor = self.detach().clone()  # type: ignore[assignment]
        made.requires_grad_(self.requires_grad)
        if hasattr(self, "_is_param"):
            made._is_param = True  # type: ignore[attr-defined]
        memo[id(self)] = made
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})

    __torch_function__ = torch._C._disabled_torch_function_impl


class Watch:
    """Counts since the last `reset`."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.is_error = False
        self.reset()

    def reset(self) -> None:
        """Set all counts to zero."""
        self.waits: Counter[tuple[str, str]] = Counter()
        """(kind, "lm/file.py:line") → times the host waited."""
        self.events: Counter[tuple[str, str]] = Counter()
        """The same for waits for an event, which may be long over: of a step before."""
        self.operators: Counter[str] = Counter()
        self.float64: Counter[tuple[str, str]] = Counter()

    def wait(self, kind: str) -> None:
        """Count a wait at the current place; an error where `torch.cuda.set_sync_debug_mode("error")` says so."""
        with self.lock:
            self.waits[kind, place()] += 1
        if self.is_error:
            raise RuntimeError(f"called a synchronizing CUDA operation: {kind} at {place()}")

    def set_sync_debug_mode(self, mode: int | str) -> None:
        """As that of torch.cuda."""
        self.is_error = mode in (2, "error")

    def wait_for_event(self) -> None:
        with self.lock:
            self.events["event", place()] += 1

    def launch(self, name: str, results: Any) -> None:
        """Count an operator on the GPU, with its result."""
        each = results if isinstance(results, list | tuple) else (results,)
        with self.lock:
            self.operators[name] += 1
            if any(isinstance(result, GpuTensor) and result.dtype == torch.float64 for result in each):
                self.float64[name, place()] += 1

    def report(self) -> dict[str, Any]:
        """The counts as JSON values."""
        return {
            "waits": sum(self.waits.values()),
            "wait_places": {f"{kind} {where}": count for (kind, where), count in self.waits.most_common()},
            "events": sum(self.events.values()),
            "operators": sum(self.operators.values()),
            "operator_names": dict(self.operators.most_common()),
            "float64": {f"{kind} {where}": count for (kind, where), count in self.float64.most_common()},
        }


WATCH = Watch()


def place() -> str:
    """File and line of the innermost caller in lm/; "backward" in autograd's thread."""
    frame: FrameType | None = sys._getframe(1)
    home = f"{ROOT}/lm/"
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(home) and not name.endswith(PASSED_ON):
            return f"{name.removeprefix(f'{ROOT}/')}:{frame.f_lineno}"
        frame = frame.f_back
    return "backward"


# -- operators --------------------------------------------------------------------------------------


class _Mode(TorchDispatchMode):
    """Sends every operator through `run`."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Else torch's compiler is imported, which takes seconds.
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """One operator: on the GPU if a tensor or the argument `device` says so."""
    name, written, in_parts, is_view = _facts(func)
    tensors: list[Tensor] = []
    plain_args = tuple(_unwrap(value, tensors) for value in args)
    plain = {key: _unwrap(value, tensors) for key, value in kwargs.items()}
    on_gpu = any(isinstance(tensor, GpuTensor) for tensor in tensors)
    wanted = kwargs.get("device")
    to_gpu = wanted is not None and torch.device(wanted).type == "cuda"
    if not on_gpu and not to_gpu:
        lost = next((tensor for tensor in tensors if tensor.is_cuda), None)
        assert lost is None, f"{name} at {place()}: a tensor lost its host memory, a fault of the pretended GPU"
        return func(*args, **kwargs)
    if name == "layout":
        return plain_args[0].layout
    if in_parts:
        # In inference mode, torch sends an operator that others make up, such as `to`, as a whole.
        with _Mode():
            return func.decompose(*args, **kwargs)
    if on_gpu:
        _check(name, tensors)
    _count_waits(name, args, kwargs, on_gpu=on_gpu, to_gpu=to_gpu)
    if to_gpu:
        plain["device"] = CPU
    if "pin_memory" in plain:
        plain["pin_memory"] = False
    out = STAND_INS.get(name, func)(*plain_args, **plain)
    if written:
        results = [
            kwargs[key] if key in kwargs else args[index] if index < len(args) else None for index, key in written
        ]
        for result in results:
            if isinstance(result, GpuTensor) and result.shape != result.host.shape:
                raise NotImplementedError(f"{func} changes the shape of a tensor in place")
        out = results[0] if len(results) == 1 else tuple(results)
    elif to_gpu or (wanted is None and (name not in COPIES or isinstance(args[0], GpuTensor))):
        if is_view and torch.is_inference_mode_enabled() and not tensors[0].is_inference():
            # As in torch, a view of a tensor that autograd knows stays one.
            with torch.inference_mode(False):
                out = _wrap(out)
        else:
            out = _wrap(out)
    if name not in VIEWS:
        WATCH.launch(name, out)
    return out


@functools.cache
def _facts(func: Any) -> tuple[str, tuple[tuple[int, str], ...], bool, bool]:
    """The name of an operator, the arguments that it writes and returns, whether others make it up, and whether its
    results are views."""
    schema = func._schema
    returns_written = any(each.alias_info is not None and each.alias_info.is_write for each in schema.returns)
    written = [
        (index, argument.name)
        for index, argument in enumerate(schema.arguments)
        if returns_written and argument.alias_info is not None and argument.alias_info.is_write
    ]
    space, name = schema.name.split("::")
    kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    in_parts = space == "aten" and kernel(func.name(), "CompositeImplicitAutograd")
    is_view = not written and any(each.alias_info is not None for each in schema.returns)
    return name, tuple(written), in_parts, is_view


def _unwrap(value: Any, tensors: list[Tensor]) -> Any:
    """The host's tensors of an argument; all its tensors go into `tensors`."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return value.host if isinstance(value, GpuTensor) else value
    if isinstance(value, list | tuple):
        return type(value)(_unwrap(each, tensors) for each in value)
    return value


def _wrap(value: Any) -> Any:
    if isinstance(value, Tensor):
        return GpuTensor(value)
    if isinstance(value, list | tuple):
        return type(value)(_wrap(each) for each in value)
    return value


def _check(name: str, tensors: list[Tensor]) -> None:
    """Raise what CUDA raises where tensors of both devices meet; scalars of the CPU may, as in torch."""
    others = [tensor for tensor in tensors if not isinstance(tensor, GpuTensor)]
    if not others or name in COPIES or name == "is_same_size":
        return
    if name in CPU_INDICES:
        others = [tensor for tensor in others if tensor.dtype not in (torch.int64, torch.bool, torch.uint8)]
    if any(tensor.ndim > 0 for tensor in others) or (others and name.startswith(("_foreach", "_fused"))):
        shapes = ", ".join(f"{tuple(tensor.shape)} on {tensor.device.type}" for tensor in tensors)
        raise MixedDevicesError(
            f"{name} at {place()}: Expected all tensors to be on the same device, but got {shapes}."
        )


def _count_waits(name: str, args: Any, kwargs: dict[str, Any], *, on_gpu: bool, to_gpu: bool) -> None:
    if name in WAITS and on_gpu:
        # With a given size of the output, repeat_interleave knows it.
        if name != "repeat_interleave" or kwargs.get("output_size") is None:
            WATCH.wait({"_local_scalar_dense": "item"}.get(name, name))
    elif name in CPU_INDICES:
        indices = [index for index in args[1] if index is not None]
        if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
            WATCH.wait("boolean mask")
        elif any(not isinstance(index, GpuTensor) for index in indices):
            WATCH.wait("indices on the host")
    elif name in COPIES:
        source = args[1] if name == "copy_" else args[0]
        target_on_gpu = isinstance(args[0], GpuTensor) if name == "copy_" else to_gpu or kwargs.get("device") is None
        blocking = not (kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2]))
        if isinstance(source, GpuTensor):
            if not target_on_gpu and (blocking or (name == "copy_" and not args[0].is_pinned())):
                WATCH.wait("copy to the host")
        elif target_on_gpu and (blocking or not source.is_pinned()):
            WATCH.wait("copy to the device, " + ("blocking" if blocking else "pageable"))


# -- stand-ins: operators that have no kernel on the CPU ---------------------------------------------

_RNN_KINDS = {0: "rnn_relu", 1: "rnn_tanh", 2: "lstm", 3: "gru"}
_real_layers = {kind: getattr(torch._VF, kind) for kind in _RNN_KINDS.values()}  # type: ignore[attr-defined]


def _layer(kind: str, inputs: Any, first: Any, weights: Any, *settings: Any) -> Any:
    """`_VF.gru` and the like: on the GPU one operator, as cuDNN's.

    settings: biases, layers, dropout, training, bidirectional, batch first.
    """
    if not isinstance(inputs, GpuTensor):
        return _real_layers[kind](inputs, first, weights, *settings)
    hidden, cells = first if kind == "lstm" else (first, None)
    _, layers, dropout, training, both, batch_first = settings
    if torch.is_autocast_enabled("cuda"):
        low = torch.get_autocast_dtype("cuda")
        inputs, hidden = inputs.to(low), hidden.to(low)
        cells, weights = None if cells is None else cells.to(low), [weight.to(low) for weight in weights]
    formats = {tensor.dtype for tensor in (inputs, hidden, *weights)}
    if len(formats) > 1:
        raise RuntimeError(f"cuDNN's {kind} needs one dtype, but got {formats} at {place()}")
    mode = {kind: number for number, kind in _RNN_KINDS.items()}[kind]
    dropout_state = torch.zeros(8, dtype=torch.uint8, device=GPU) if dropout else None
    buffer = torch.empty(sum(weight.numel() for weight in weights), device=GPU, dtype=inputs.dtype)
    outputs, last, last_cells, _, _ = aten._cudnn_rnn(
        inputs, list(weights), len(weights) // layers, buffer, hidden, cells, mode, hidden.shape[-1], 0, layers,
        batch_first, dropout, training, both, [], dropout_state,
    )  # fmt: skip
    return (outputs, last, last_cells) if kind == "lstm" else (outputs, last)


def _compute_layer(
    inputs: Tensor, weights: list[Tensor], hidden: Tensor, cells: Tensor | None, mode: int, layers: int,
    batch_first: bool, dropout: float, training: bool, both: bool, seed: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    kind, settings = _RNN_KINDS[mode], (True, layers, dropout, training, both, batch_first)
    first = (hidden, cells) if kind == "lstm" else hidden
    with torch.random.fork_rng(devices=[]), torch.backends.mkldnn.flags(enabled=False, allow_tf32=None):
        torch.manual_seed(seed)
        found: tuple[Tensor, ...] = _real_layers[kind](inputs, first, weights, *settings)
        return found


def _cudnn_rnn(
    inputs: Tensor, weights: list[Tensor], stride: int, buffer: Any, hidden: Tensor, cells: Tensor | None, mode: int,
    size: int, projection: int, layers: int, batch_first: bool, dropout: float, training: bool, both: bool, *_: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    dtype, full = inputs.dtype, _in_fp32((inputs, list(weights), hidden, cells))
    seed = int(torch.randint(2**31, ())) if dropout and training else 0
    with torch.no_grad():
        outputs, *last = _compute_layer(*full, mode, layers, batch_first, dropout, training, both, seed)
    empty = torch.empty(0, dtype=dtype)
    states = [part.to(dtype) for part in last]
    # What cuDNN keeps for backward: gates and states, in the layer's format.
    kept = (weights[0].shape[0] // size + 2) * outputs.numel() * layers * dtype.itemsize if training else 0
    reserve = torch.zeros(8 + kept, dtype=torch.uint8)
    reserve[:8] = torch.tensor(list(seed.to_bytes(8, "little")), dtype=torch.uint8)
    return outputs.to(dtype), states[0], states[1] if len(states) > 1 else empty, reserve, torch.empty(0, dtype=dtype)


def _cudnn_rnn_backward(
    inputs: Tensor, weights: list[Tensor], stride: int, buffer: Any, hidden: Tensor, cells: Tensor | None,
    outputs: Tensor, grad_outputs: Tensor | None, grad_hidden: Tensor | None, grad_cells: Tensor | None, mode: int,
    size: int, projection: int, layers: int, batch_first: bool, dropout: float, training: bool, both: bool,
    sizes: Any, dropout_state: Any, reserve: Tensor, mask: list[bool],
) -> tuple[Any, ...]:  # fmt: skip
    if not training:
        raise RuntimeError("cudnn RNN backward can only be called in training mode")
    dtype = inputs.dtype
    leaves = tree_map(
        lambda leaf: leaf.detach().requires_grad_() if isinstance(leaf, Tensor) else leaf,
        _in_fp32((inputs, list(weights), hidden, cells)),
    )
    with _autograd():
        seed = int.from_bytes(reserve[:8].numpy().tobytes(), "little")
        found = _compute_layer(*leaves, mode, layers, batch_first, dropout, training, both, seed)
        grads = (grad_outputs, grad_hidden, grad_cells)[: len(found)]
        pairs = [(part, grad.float()) for part, grad in zip(found, grads, strict=True) if grad is not None]
        flat = [leaf for leaf in tree_leaves(leaves) if isinstance(leaf, Tensor)]
        got = torch.autograd.grad(
            [part for part, _ in pairs], flat, [grad for _, grad in pairs], materialize_grads=True, allow_unused=True
        )
    by_leaf = dict(zip(map(id, flat), (grad.to(dtype) for grad in got), strict=True))
    first, each, before, cell = leaves
    return by_leaf[id(first)], by_leaf[id(before)], None if cell is None else by_leaf[id(cell)], [
        by_leaf[id(weight)] for weight in each
    ]  # fmt: skip


_OUTSIDE = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()


@contextlib.contextmanager
def _autograd() -> Iterator[None]:
    """Inside, a stand-in can compute gradients: torch calls it below autograd."""
    with torch._C._ForceDispatchKeyGuard(*_OUTSIDE), torch.enable_grad():
        yield


def _in_fp32(values: Any) -> Any:
    return tree_map(lambda leaf: leaf.float() if isinstance(leaf, Tensor) else leaf, values)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, dropout: float, causal: bool, scale: float | None,
    seed: int,
) -> Tensor:  # fmt: skip
    """Attention of (B, H, T, D) in fp32, with dropout that a seed repeats."""
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    query, key, value = (part.float() for part in (query, key, value))
    scores = query @ key.transpose(-1, -2) * factor
    if bias is not None:
        scores = scores + bias.float()
    if causal:
        ones = torch.ones(scores.shape[-2:], dtype=torch.bool)
        scores = scores.masked_fill(~ones.tril(), float("-inf"))
    weights = scores.softmax(-1)
    if dropout:
        generator = torch.Generator().manual_seed(seed)
        kept = torch.rand(weights.shape, generator=generator) >= dropout
        weights = weights * kept / (1 - dropout)
    return weights @ value


def _attention_forward(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, dropout: float, causal: bool, scale: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    seed = int(torch.randint(2**31, ())) if dropout else 0
    out = _attention(query, key, value, bias, dropout, causal, scale, seed).to(query.dtype)
    # As the kernels: (B, T, H, D) in memory.
    out = out.transpose(1, 2).contiguous().transpose(1, 2)
    return out, query.new_zeros(query.shape[:3], dtype=torch.float32), torch.tensor(seed)


def _attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, dropout: float, causal: bool,
    scale: float | None, seed: Tensor,
) -> list[Tensor]:  # fmt: skip
    leaves = [part.detach().float().requires_grad_() for part in (query, key, value)]
    with _autograd():
        out = _attention(*leaves, bias, dropout, causal, scale, int(seed))
        found = torch.autograd.grad(out, leaves, grad.float())
    return [part.to(query.dtype) for part in found]


def _flash(
    query: Tensor, key: Tensor, value: Tensor, dropout: float = 0.0, causal: bool = False, debug: bool = False,
    *, scale: float | None = None,
) -> tuple[Any, ...]:  # fmt: skip
    if query.dtype not in (torch.float16, torch.bfloat16):
        raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
    out, sums, seed = _attention_forward(query, key, value, None, dropout, causal, scale)
    none = torch.empty(0, dtype=torch.int32)
    return out, sums, none, none, query.shape[2], key.shape[2], seed, torch.empty(0), torch.empty(0)


def _flash_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Any, sums: Any, starts: Any, ends: Any, queries: Any,
    keys: Any, dropout: float, causal: bool, seed: Tensor, offset: Any, *, scale: float | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    return tuple(_attention_backward(grad, query, key, value, None, dropout, causal, scale, seed))


def _efficient(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, sums: bool, dropout: float = 0.0,
    causal: bool = False, *, scale: float | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    out, logsumexp, seed = _attention_forward(query, key, value, bias, dropout, causal, scale)
    return out, logsumexp, seed, torch.tensor(0)


def _efficient_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, out: Any, sums: Any, seed: Tensor,
    offset: Any, dropout: float, mask: Any, causal: bool = False, *, scale: float | None = None,
) -> tuple[Any, ...]:  # fmt: skip
    return (*_attention_backward(grad, query, key, value, bias, dropout, causal, scale, seed), torch.empty(0))


STAND_INS: dict[str, Callable[..., Any]] = {
    "_cudnn_rnn": _cudnn_rnn,
    "_cudnn_rnn_backward": _cudnn_rnn_backward,
    "_scaled_dot_product_flash_attention": _flash,
    "_scaled_dot_product_flash_attention_backward": _flash_backward,
    "_scaled_dot_product_efficient_attention": _efficient,
    "_scaled_dot_product_efficient_attention_backward": _efficient_backward,
}


_real_attention = F.scaled_dot_product_attention


def _scaled_dot_product_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """One operator on the GPU: flash attention for low formats without a mask, else the memory-efficient kernel."""
    if not isinstance(query, GpuTensor):
        return _real_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    if torch.is_autocast_enabled("cuda"):
        query, key, value = (part.to(torch.get_autocast_dtype("cuda")) for part in (query, key, value))
    if enable_gqa and key.shape[1] != query.shape[1]:
        times = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(times, 1), value.repeat_interleave(times, 1)
    if attn_mask is None and query.dtype in (torch.float16, torch.bfloat16):
        return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, float("-inf"))
    sums = query.requires_grad or key.requires_grad or value.requires_grad
    found: Tensor = aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, sums, dropout_p, is_causal, scale=scale
    )[0]
    return found


# -- torch.cuda -----------------------------------------------------------------------------------------


class Stream:
    """A stream that runs everything at once."""

    device = GPU

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def wait_stream(self, _: Any) -> None: ...
    def wait_event(self, _: Any) -> None: ...
    def record_event(self, event: Any = None) -> Any:
        return event or Event()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        WATCH.wait("synchronize")


class Event:
    """An event that is always over; to wait for it is counted by itself."""

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def record(self, _: Any = None) -> None: ...
    def wait(self, _: Any = None) -> None: ...
    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        WATCH.wait_for_event()

    def elapsed_time(self, _: Any) -> float:
        return 1.0


_real_apply = torch.nn.Module._apply


def _apply(self: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.nn.Module:
    """`module.to`, which by default exchanges a parameter's memory alone; a wrapper is more than its memory."""
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        return _real_apply(self, *args, **kwargs)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


def _stand_in_for_torch_cuda() -> None:
    cuda: Any = torch.cuda
    stream = Stream()

    def synchronize(*_: Any) -> None:
        WATCH.wait("synchronize")

    def set_rng_state(state: Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)

    answers: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_lazy_init": lambda: None,
        "init": lambda: None,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda _: None,
        "get_device_capability": lambda *_: (9, 0),
        "get_device_name": lambda *_: NAME,
        "get_device_properties": lambda *_: collections.namedtuple("Properties", "name total_memory major minor")(
            NAME, MEMORY_BYTES, 9, 0
        ),
        "is_bf16_supported": lambda *_, **__: True,
        "mem_get_info": lambda *_: (MEMORY_BYTES, MEMORY_BYTES),
        "memory_allocated": lambda *_: 0,
        "memory_reserved": lambda *_: 0,
        "max_memory_allocated": lambda *_: 0,
        "max_memory_reserved": lambda *_: 0,
        "reset_peak_memory_stats": lambda *_: None,
        "empty_cache": lambda: None,
        "synchronize": synchronize,
        "manual_seed": lambda _: None,
        "manual_seed_all": lambda _: None,
        "get_rng_state": lambda *_: torch.get_rng_state(),
        "set_rng_state": set_rng_state,
        "current_stream": lambda *_: stream,
        "default_stream": lambda *_: stream,
        "stream": lambda _: contextlib.nullcontext(),
        "Stream": Stream,
        "Event": Event,
        "set_sync_debug_mode": WATCH.set_sync_debug_mode,
        "get_sync_debug_mode": lambda: 0,
    }
    for name, answer in answers.items():
        setattr(cuda, name, answer)
    for kind in _real_layers:
        setattr(torch._VF, kind, functools.partial(_layer, kind))  # type: ignore[attr-defined]
    F.scaled_dot_product_attention = _scaled_dot_product_attention
    # cuDNN's own layout of the weights, which nothing here needs.
    torch.backends.cudnn.is_acceptable = lambda _: False
    torch.nn.Module._apply = _apply  # type: ignore[method-assign]
    # torch.tensor([...], device="cuda") makes a tensor of the CPU and copies it.
    torch._C._set_only_lift_cpu_tensors(True)


_stand_in_for_torch_cuda()


@contextlib.contextmanager
def pretended() -> Iterator[Watch]:
    """Inside, device "cuda" exists, in threads that start inside too."""
    start = threading.Thread.run

    def run_in_mode(self: threading.Thread) -> None:
        with _Mode():
            start(self)

    threading.Thread.run = run_in_mode  # type: ignore[method-assign]
    try:
        with _Mode():
            WATCH.reset()
            yield WATCH
    finally:
        threading.Thread.run = start  # type: ignore[method-assign]
