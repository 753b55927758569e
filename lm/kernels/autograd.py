"""Native operations and functions with gradients for training on a CPU, each equal to one of torch.

    product, entropies                     torch.mm; cross-entropies and the gradients of their logits
    clip_grad_norm, adamw_step             torch.nn.utils.clip_grad_norm_, torch.optim.AdamW
    linear, linears                        F.linear; several of them over the same inputs
    rms_norm_rope, swiglu, attend          RMSNorm and rotary positions; silu(gate) · up; causal attention
    embed, dropout, cross_entropy          F.embedding, F.dropout, F.cross_entropy
    recurrent_layer, transformer_block     one layer of nn.GRU or nn.LSTM; a whole block of a Transformer

Tensors must be fp32 on the CPU (`lm.kernels.dispatch.usable`); linear, linears, swiglu and cross_entropy run on torch
otherwise. Results equal torch's within fp32 rounding. Sums have a fixed order, so the bits are the same for any number
of threads.

Under torch's autocast to bf16, on a CPU that has it, forward and backward round both operands of each product to bf16
and sum in fp32; everything else is as without (`lm.kernels.dispatch.products_in_bf16`).

Shapes: B batch, T time, E inputs, F outputs, H hidden or heads, D head size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lm.kernels.compiled import compiled
from lm.kernels.dispatch import (
    MIN_ROWS,
    buffers,
    in_its_format,
    isa_and_threads,
    stays_in_fp32,
    usable,
    used_isa_and_threads,
)


def _pointers(*tensors: Tensor | None) -> list[int]:
    """The addresses of tensors, which must outlive the call; 0 for None."""
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


def _set_pointers(run: Any, tensors: Mapping[str, Tensor | None]) -> None:
    for name, pointer in zip(tensors, _pointers(*tensors.values()), strict=True):
        setattr(run, name, pointer)


def _keep(ctx: Any, run: Any, memory: Tensor, *tensors: Tensor | None) -> None:
    """Save what backward needs, if there will be a backward pass."""
    if not any(ctx.needs_input_grad):
        buffers.give_back(memory)
        return
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)
    ctx.run, ctx.memory = run, memory


def _kept(ctx: Any) -> tuple[Any, Tensor]:
    """The pass and the memory that `_keep` saved; only once."""
    if ctx.memory is None:
        raise RuntimeError("The native layers support one backward pass only: backward overwrites the saved gates.")
    memory, ctx.memory = ctx.memory, None
    return ctx.run, memory


def apply(function: type[torch.autograd.Function], *arguments: Any) -> Tensor:
    """The output of a function, as a node of the graph."""
    output: Tensor = apply_all(function, *arguments)  # type: ignore[assignment]
    return output


def apply_all(function: type[torch.autograd.Function], *arguments: Any) -> tuple[Tensor, ...]:
    """The outputs of a function with several outputs."""
    call: Any = function.apply
    outputs: tuple[Tensor, ...] = call(*arguments)
    return outputs


def _seed(dropout: float) -> int:
    """A seed from torch's generator; 0 without a draw if nothing is dropped."""
    return int(torch.randint(2**62, ())) if dropout else 0


# -- operations without gradient ----------------------------------------------------------------------


def product(
    a: Tensor,
    b: Tensor,
    *,
    bias: Tensor | None = None,
    into: Tensor | None = None,
    adds: bool = True,
    way: tuple[str, int] | None = None,
) -> Tensor:
    """The product (N, M) of a (N, K) and b (K, M) with a bias (M,), or contiguous `into` (N, M) with it added.

    Args:
        adds: False: the product replaces what is in `into`.
        way: of an earlier `isa_and_threads`; None: as things are now.
    """
    result = a.new_empty(a.shape[0], b.shape[1]) if into is None else into
    (a, a_stride, a_transposed), (b, b_stride, b_transposed) = _row_major(a), _row_major(b)
    bias = None if bias is None else bias.contiguous()
    shape = len(result), a.shape[0 if a_transposed else 1], result.shape[1]
    adds = adds and into is not None
    compiled().product(
        *(a.data_ptr(), a_stride, a_transposed, b.data_ptr(), b_stride, b_transposed),
        *(result.data_ptr(), result.shape[1], shape, adds, *_pointers(bias), *(way or isa_and_threads())),
    )
    return result


def _row_major(matrix: Tensor) -> tuple[Tensor, int, bool]:
    """A matrix or its transpose with contiguous rows, the stride of its rows, and whether it is the transpose."""
    stride, step = matrix.stride()
    if step == 1 and stride >= matrix.shape[1]:
        return matrix, stride, False
    if stride == 1 and step >= matrix.shape[0]:
        return matrix.T, step, True
    return matrix.contiguous(), matrix.shape[1], False


def entropies(
    logits: Tensor, targets: Tensor, *, into: Tensor, weight: float = 1.0, d_bias: Tensor | None = None
) -> Tensor:
    """The cross-entropies (N,) of contiguous logits (N, V) at targets (N,) int64; IndexError for one outside 0 … V - 1.

    Args:
        into: (N, V), contiguous, filled with `weight` times the gradients (softmax minus one-hot); may be `logits`.
        d_bias: (V,), contiguous; the gradients of all rows are added to it.
    """
    # A copy made here must live until the call is over.
    targets, nats = targets.contiguous(), logits.new_empty(len(logits))
    arguments = *_pointers(logits, targets), *logits.shape, weight, *_pointers(into, nats, d_bias)
    compiled().entropies(*arguments, *isa_and_threads())
    return nats


def clip_grad_norm(grads: Sequence[Tensor], max_norm: float) -> float:
    """Scale contiguous gradients in place to a common norm of at most `max_norm`, unless that is not finite.

    Returns:
        The norm before.
    """
    arrays = [(grad.data_ptr(), grad.numel()) for grad in grads]
    norm: float = compiled().norm(arrays, *used_isa_and_threads())
    if max_norm < norm < math.inf:
        compiled().scale(arrays, max_norm / (norm + 1e-6), *used_isa_and_threads())
    return norm


def adamw_step(weights: Sequence[Tensor], states: Sequence[Mapping[str, Tensor]], group: Mapping[str, Any]) -> None:
    """One update of weights by their gradients, with the states and the parameter group of torch.optim.AdamW."""
    arrays = [
        (*_pointers(weight, weight.grad, state["exp_avg"], state["exp_avg_sq"], state["step"]), weight.numel())
        for weight, state in zip(weights, states, strict=True)
    ]
    compiled().adamw(arrays, group["lr"], *group["betas"], group["eps"], group["weight_decay"], *used_isa_and_threads())
    # Torch did not see the changes; it must refuse a graph that still needs the old values.
    torch.autograd.graph.increment_version(weights)


# -- functions with gradient --------------------------------------------------------------------------


def linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`: (..., E) with a weight (F, E) → (..., F)."""
    if stays_in_fp32(weight):
        return in_its_format(weight, F.linear, inputs, weight, bias)
    if inputs.numel() < MIN_ROWS * inputs.shape[-1] or not usable("linear", inputs):
        return F.linear(inputs, weight, bias)
    return apply_all(_Linears, inputs, bias, weight)[0]


def linears(inputs: Tensor, layers: Sequence[nn.Linear]) -> tuple[Tensor, ...]:
    """The outputs of several layers over the same inputs; one call for all if none has a bias or an adapter."""
    if (
        any(layer.bias is not None or getattr(layer, "adapters", None) is not None for layer in layers)
        or inputs.numel() < MIN_ROWS * inputs.shape[-1]
        or not usable("linear", inputs)
    ):
        return tuple(layer(inputs) for layer in layers)
    return apply_all(_Linears, inputs, None, *(layer.weight for layer in layers))


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, bias: Tensor | None, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(inputs, *weights)
        ctx.way = isa_and_threads()
        rows = inputs.flatten(0, -2)
        shape = inputs.shape[:-1]
        return tuple(product(rows, weight.T, bias=bias).view(*shape, len(weight)) for weight in weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        inputs, *weights = ctx.saved_tensors
        rows = inputs.flatten(0, -2)
        d_rows = d_bias = None
        d_weights: list[Tensor | None] = []
        for number, (grad, weight) in enumerate(zip(grads, weights, strict=True)):
            if grad is None:
                d_weights.append(None)
                continue
            d_outputs = grad.flatten(0, -2)
            if ctx.needs_input_grad[0]:
                d_rows = product(d_outputs, weight, into=d_rows, way=ctx.way)
            if ctx.needs_input_grad[1]:
                d_bias = d_outputs.sum(0)
            # Frozen weights need no gradient, which is a third of the work.
            d_weights.append(product(d_outputs.T, rows, way=ctx.way) if ctx.needs_input_grad[2 + number] else None)
        return None if d_rows is None else d_rows.view(inputs.shape), d_bias, *d_weights


def rms_norm_rope(
    inputs: Tensor, weight: Tensor | None, epsilon: float, rotation: tuple[Tensor, Tensor] | None
) -> Tensor:
    """RMSNorm with a weight (D,), if any, then rotation, if any, of (..., H, D).

    Args:
        rotation: cosines and sines (..., 1, D/2); dimension i is paired with i + D/2.
    """
    return apply(_NormRope, inputs, weight, epsilon, *(rotation or (None, None)))


class _NormRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor | None, epsilon: float, *rotation: Tensor | None) -> Tensor:
        inputs = inputs.contiguous()
        cosines, sines = (None if table is None else table.contiguous() for table in rotation)
        width = inputs.shape[-1]
        heads = 1 if cosines is None else inputs.shape[-2]
        outputs = torch.empty_like(inputs)
        scales = None if weight is None else inputs.new_empty(inputs.numel() // width)
        ctx.save_for_backward(inputs, weight, cosines, sines, scales)
        ctx.shape = inputs.numel() // width // heads, heads, width, epsilon
        ctx.way = isa_and_threads()
        pointers = _pointers(inputs, weight, cosines, sines, outputs, scales, None, None, None)
        compiled().norms(*ctx.shape, pointers, *ctx.way)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight, cosines, sines, scales = ctx.saved_tensors
        grad, d_inputs = grads[0].contiguous(), torch.empty_like(inputs)
        d_weight = None if weight is None else torch.zeros_like(weight)
        pointers = _pointers(inputs, weight, cosines, sines, None, scales, grad, d_inputs, d_weight)
        compiled().norms(*ctx.shape, pointers, *ctx.way)
        return d_inputs, d_weight, None, None, None


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up, of the same shape."""
    if not usable("swiglu", gate):
        return F.silu(gate) * up
    return apply(_SwiGLU, gate, up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        outputs = torch.empty_like(gate)
        ctx.way = isa_and_threads()
        compiled().gated(*_pointers(gate, up, None), gate.numel(), *_pointers(outputs, None), *ctx.way)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grad, d_gate, d_up = grads[0].contiguous(), torch.empty_like(gate), torch.empty_like(up)
        compiled().gated(*_pointers(gate, up, grad), gate.numel(), *_pointers(d_gate, d_up), *ctx.way)
        return d_gate, d_up


def attend(queries: Tensor, keys: Tensor, values: Tensor, dropout: float = 0.0) -> Tensor:
    """Causal attention (B, T, H, D) of queries (B, T, H, D) to keys and values (B, T, G, D); H is a multiple of G."""
    return apply(_Attention, dropout, _seed(dropout), queries, keys, values)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dropout: float, seed: int, *parts: Tensor) -> Tensor:
        queries, keys, values = (part.contiguous() for part in parts)
        batch, time, heads, width = queries.shape
        outputs, sums = torch.empty_like(queries), queries.new_empty(batch, heads, time)
        ctx.save_for_backward(queries, keys, values, sums)
        ctx.settings = (batch, time, heads, keys.shape[2], width), seed, dropout
        ctx.way = isa_and_threads()
        shape, *dropping = ctx.settings
        pointers = _pointers(queries, keys, values, outputs, sums, None, None, None, None)
        compiled().attention(shape, pointers, *dropping, *ctx.way)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys, values, sums = ctx.saved_tensors
        grad = grads[0].contiguous()
        d_inputs = torch.empty_like(queries), torch.empty_like(keys), torch.empty_like(values)
        pointers = _pointers(queries, keys, values, None, sums, grad, *d_inputs)
        shape, *dropping = ctx.settings
        compiled().attention(shape, pointers, *dropping, *ctx.way)
        return None, None, *d_inputs


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The mean cross-entropy of logits (N, V) and targets (N,) int64: a scalar, in nats."""
    if not usable("entropy", logits):
        return F.cross_entropy(logits, targets)
    return apply(_CrossEntropy, logits, targets)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        d_logits = torch.empty_like(logits, memory_format=torch.contiguous_format)
        nats = entropies(logits.contiguous(), targets, into=d_logits, weight=1 / len(logits))
        ctx.save_for_backward(d_logits)
        return nats.mean()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (d_logits,) = ctx.saved_tensors
        factor = float(grads[0])
        return d_logits if factor == 1 else d_logits * factor, None


def embed(ids: Tensor, weight: Tensor) -> Tensor:
    """Rows of an embedding: ids (...) int64 and weight (V, E) → (..., E); IndexError for an id outside it.

    Raises:
        RuntimeError: the ids are not on the CPU, where the weight is.
    """
    _on_cpu(ids)
    return apply(_Embed, ids, weight)


def _on_cpu(ids: Tensor) -> None:
    if not ids.is_cpu:
        raise RuntimeError(f"Expected all tensors to be on the same device, but the ids are on {ids.device}.")


class _Embed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor) -> Tensor:
        ids, weight = ids.contiguous(), weight.contiguous()
        rows = weight.new_empty(*ids.shape, weight.shape[1])
        ctx.save_for_backward(ids)
        ctx.shape, ctx.way = weight.shape, isa_and_threads()
        _look_up(ids, weight.shape, weight, rows, ctx.way, back=False)
        return rows

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        (ids,) = ctx.saved_tensors
        d_weight = torch.zeros(ctx.shape)
        _look_up(ids, ctx.shape, grads[0].contiguous(), d_weight, ctx.way, back=True)
        return None, d_weight


def _look_up(
    ids: Tensor, shape: torch.Size, source: Tensor, target: Tensor, way: tuple[str, int], *, back: bool
) -> None:
    compiled().look_up(ids.data_ptr(), ids.numel(), *shape, *_pointers(source, target), back, *way)


def dropout(inputs: Tensor, p: float) -> Tensor:
    """Dropout, any shape; a draw of torch's generator seeds the mask, which is computed again in backward."""
    return apply(_Dropout, inputs, p, _seed(p))


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, rate: float, seed: int) -> Tensor:
        ctx.settings = rate, seed, isa_and_threads()
        return _drop(inputs, *ctx.settings)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _drop(grads[0], *ctx.settings), None, None


def _drop(inputs: Tensor, rate: float, seed: int, way: tuple[str, int]) -> Tensor:
    inputs = inputs.contiguous()
    outputs = torch.empty_like(inputs)
    compiled().drop(*_pointers(inputs, outputs), inputs.numel(), seed, rate, *way)
    return outputs


def recurrent_layer(
    kind: str, inputs: Tensor, weights: Sequence[Tensor], first: Sequence[Tensor] | None, *, ids: Tensor | None = None
) -> tuple[Tensor, ...]:
    """One layer of a GRU or LSTM, with one native call forward and one backward.

    Args:
        kind: gru or lstm.
        inputs: (B, T, E); with `ids` (B, T), the embedding (V, E) whose rows are the inputs. The input products are
            then computed once for each token of the vocabulary. IndexError for an id outside it.
        weights: weight_ih, weight_hh, bias_ih, bias_hh, as in torch's layers.
        first: the hidden state (B, H) before the first step, and the LSTM's cell state; None: zeros.

    Returns:
        The outputs (B, T, H), the last hidden state (B, H), and the LSTM's last cell state.
    """
    # A state or inputs from torch's layers under autocast may be low.
    inputs = inputs.float()
    hidden, cell = (*(part.float() for part in first or ()), None, None)[:2]
    outputs = apply_all(_Recurrent, kind == "lstm", inputs, ids, *weights, hidden, cell)
    return outputs if kind == "lstm" else outputs[:2]


class _Recurrent(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, lstm: bool, inputs: Tensor, ids: Tensor | None, *parts: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        inputs = inputs if inputs.stride(-1) == 1 else inputs.contiguous()
        ids = None if ids is None else ids.contiguous()
        weight_ih, weight_hh, bias_ih, bias_hh, hidden, cell = (
            None if part is None else part.contiguous() for part in parts
        )
        assert weight_ih is not None and weight_hh is not None
        batch, time = (inputs if ids is None else ids).shape[:2]
        size = weight_hh.shape[1]
        outputs = inputs.new_empty(batch, time, size)
        last_hidden = inputs.new_empty(batch, size)
        last_cell = inputs.new_empty(batch, size) if lstm else None
        memory = buffers.take(time * batch * (6 if lstm else 4) * -(-size // 16) * 16)
        run = compiled().Sequence()
        run.lstm, run.batch, run.time, run.inputs, run.hidden = lstm, batch, time, inputs.shape[-1], size
        if ids is None:
            run.x_row, run.x_step = inputs.stride(0), inputs.stride(1)
        else:
            _on_cpu(ids)
            inputs = inputs.contiguous()
            run.ids, run.vocab_size = ids.data_ptr(), len(inputs)
        _set_pointers(run, {
            "x": inputs, "weight_ih": weight_ih, "weight_hh": weight_hh, "bias_ih": bias_ih, "bias_hh": bias_hh,
            "first_hidden": hidden, "first_cell": cell, "outputs": outputs, "last_hidden": last_hidden,
            "last_cell": last_cell, "memory": memory,
        })  # fmt: skip
        ctx.way = isa_and_threads()
        compiled().forward(run, *ctx.way)
        _keep(ctx, run, memory, inputs, ids, weight_ih, weight_hh, bias_ih, bias_hh, hidden, cell, outputs)
        return outputs, last_hidden, last_cell

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        run, memory = _kept(ctx)
        inputs, _, weight_ih, weight_hh, bias_ih, bias_hh, hidden, cell, _ = ctx.saved_tensors
        needed = ctx.needs_input_grad
        d_outputs, d_last_hidden, d_last_cell = (None if grad is None else grad.contiguous() for grad in grads)
        if d_outputs is not None:
            run.d_row, run.d_step = d_outputs.stride(0), d_outputs.stride(1)
        d_inputs = torch.empty(inputs.shape) if needed[1] else None
        d_weights = [torch.empty_like(weight) for weight in (weight_ih, weight_hh, bias_ih, bias_hh)]
        d_hidden = torch.empty_like(hidden) if needed[7] else None
        d_cell = torch.empty_like(cell) if needed[8] else None
        _set_pointers(run, {
            "d_outputs": d_outputs, "d_last_hidden": d_last_hidden, "d_last_cell": d_last_cell, "d_x": d_inputs,
            "d_weight_ih": d_weights[0], "d_weight_hh": d_weights[1], "d_bias_ih": d_weights[2],
            "d_bias_hh": d_weights[3], "d_first_hidden": d_hidden, "d_first_cell": d_cell,
        })  # fmt: skip
        compiled().backward(run, *ctx.way)
        buffers.give_back(memory)
        return None, d_inputs, None, *d_weights, d_hidden, d_cell


def transformer_block(
    inputs: Tensor,
    weights: Sequence[Tensor | None],
    rotation: tuple[Tensor, Tensor],
    *,
    heads: int,
    kv_heads: int,
    epsilon: float,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """A Transformer block from the start of texts, with one native call forward and one backward.

    Args:
        inputs: (B, T, E).
        weights: in the order of `_Block.NAMES`; None for a norm that the block does not have.
        rotation: cosines and sines (B, T, 1, D/2).
        heads: query heads, a multiple of `kv_heads`.
        dropout: probability for attention weights and for both branches.

    Returns:
        The outputs (B, T, E), keys and values (B, T, kv_heads, D).
    """
    settings = heads, kv_heads, epsilon, dropout, tuple(_seed(dropout) for _ in range(3))
    outputs, keys, values = apply_all(_Block, settings, *rotation, inputs, *weights)
    return outputs, keys, values


class _Block(torch.autograd.Function):
    NAMES = (
        "input_norm", "query", "key", "value", "query_norm", "key_norm", "output", "mlp_norm", "gate", "up", "down",
    )  # fmt: skip
    """The weights, in the order of `forward`."""

    @staticmethod
    def forward(
        ctx: Any, settings: Any, cosines: Tensor, sines: Tensor, inputs: Tensor, *weights: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        heads, kv_heads, epsilon, dropout, seeds = settings
        inputs, cosines, sines = inputs.contiguous(), cosines.contiguous(), sines.contiguous()
        weights = tuple(None if weight is None else weight.contiguous() for weight in weights)
        batch, time, size = inputs.shape
        width = 2 * cosines.shape[-1]
        outputs = torch.empty_like(inputs)
        keys, values = (inputs.new_empty(batch, time, kv_heads, width) for _ in range(2))
        run = compiled().BlockPass()
        run.batch, run.time, run.size, run.heads, run.kv_heads, run.width = batch, time, size, heads, kv_heads, width
        gate = weights[_Block.NAMES.index("gate")]
        assert gate is not None
        run.inner, run.epsilon, run.drop = len(gate), epsilon, dropout
        run.attention_seed, run.mixed_seed, run.mlp_seed = seeds
        _set_pointers(run, {
            "x": inputs, "cosines": cosines, "sines": sines, "y": outputs, "keys": keys, "values": values,
            **dict(zip(_Block.NAMES, weights, strict=True)),
        })  # fmt: skip
        memory = buffers.take(compiled().block_memory(run))
        _set_pointers(run, {"memory": memory})
        ctx.way = isa_and_threads()
        compiled().block(run, *ctx.way)
        _keep(ctx, run, memory, inputs, cosines, sines, keys, values, *weights)
        return outputs, keys, values

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        run, memory = _kept(ctx)
        inputs, _, _, keys, values, *weights = ctx.saved_tensors
        dy = torch.zeros_like(inputs) if grads[0] is None else grads[0].contiguous()
        # Gradients that arrive at keys and values from outside, which is rare: those of attention are added to them.
        run.adds = grads[1] is not None or grads[2] is not None
        empty = torch.zeros_like if run.adds else torch.empty_like
        d_keys, d_values = (
            empty(part) if grad is None else grad.clone(memory_format=torch.contiguous_format)
            for part, grad in zip((keys, values), grads[1:], strict=True)
        )
        d_inputs = torch.empty_like(inputs)
        # The gradients of norms are added to, all others are set.
        d_weights = [
            None if weight is None else torch.zeros_like(weight) if weight.ndim == 1 else torch.empty_like(weight)
            for weight in weights
        ]
        named = {f"d_{name}": grad for name, grad in zip(_Block.NAMES, d_weights, strict=True)}
        _set_pointers(run, {"dy": dy, "d_keys": d_keys, "d_values": d_values, "dx": d_inputs, **named})
        compiled().block(run, *ctx.way)
        buffers.give_back(memory)
        return None, None, None, d_inputs, *d_weights
