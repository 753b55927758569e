"""All calls of the native kernels for training: operations without gradient, and torch.autograd.Functions.

    product, entropies         torch.mm; cross-entropies with the gradients of their logits
    clip_grad_norm, adamw_step torch.nn.utils.clip_grad_norm_, torch.optim.AdamW
    Recurrent, Linears, …      forward and backward of the layers in `lm.kernels.layers`

All tensors are fp32 on the CPU: callers ask `lm.kernels.dispatch` first. Results equal torch's within fp32 rounding.
Sums have a fixed order, so the bits are the same for any number of threads.

A recurrent layer is one native call forward and one backward:

    inputs (B, T, E) ─► products with all inputs ─► step by step: product with the hidden state, gates ─► (B, T, H)

Backward keeps the gradients of all gates and computes each weight gradient as one product over all steps. If the
inputs are rows of a small embedding, the input products are computed once for each token instead of each position.

Shapes: B batch, T time, E inputs, H hidden or heads, D head size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lm.kernels.compiled import compiled
from lm.kernels.dispatch import buffers, isa_and_threads

BACKWARD_TWICE = "The native layers support one backward pass only, because backward overwrites the saved gates."


def _pointers(*tensors: Tensor | None) -> list[int]:
    """The addresses of tensors, which must outlive the call; 0 for None."""
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


def _set_pointers(run: Any, tensors: Mapping[str, Tensor | None]) -> None:
    """Set the addresses of a native pass by name."""
    for name, tensor in tensors.items():
        setattr(run, name, 0 if tensor is None else tensor.data_ptr())


# -- operations without gradient ----------------------------------------------------------------------


def product(a: Tensor, b: Tensor, *, bias: Tensor | None = None, into: Tensor | None = None) -> Tensor:
    """A matrix product without gradient.

    Args:
        a: (N, K).
        b: (K, M).
        bias: (M,), added to every row; not with `into`.
        into: (N, M), contiguous; the product is added to it.

    Returns:
        (N, M), `into` if that is given.
    """
    result = a.new_empty(a.shape[0], b.shape[1]) if into is None else into
    (a, a_stride, a_transposed), (b, b_stride, b_transposed) = _row_major(a), _row_major(b)
    bias = None if bias is None else bias.contiguous()
    shape = len(result), a.shape[0 if a_transposed else 1], result.shape[1]
    compiled().product(
        *(a.data_ptr(), a_stride, a_transposed, b.data_ptr(), b_stride, b_transposed),
        *(result.data_ptr(), result.shape[1], shape, into is not None, *_pointers(bias), *isa_and_threads()),
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
    """Cross-entropies and the gradients of their logits in one pass.

    Args:
        logits: (N, V), contiguous.
        targets: (N,) int64.
        into: (N, V), contiguous, filled with the gradients: softmax minus one-hot; may be `logits`.
        weight: factor of the gradients.
        d_bias: (V,), contiguous; the gradients of all rows are added to it.

    Returns:
        (N,) nats.

    Raises:
        IndexError: a target is not in 0 … V - 1.
    """
    # A copy made here must live until the call is over.
    targets, nats = targets.contiguous(), logits.new_empty(len(logits))
    arguments = *_pointers(logits, targets), *logits.shape, weight, *_pointers(into, nats, d_bias)
    compiled().entropies(*arguments, *isa_and_threads())
    return nats


def clip_grad_norm(grads: Sequence[Tensor], max_norm: float) -> float:
    """Scale contiguous gradients in place so that their common norm is at most `max_norm`.

    Returns:
        The norm before; if it is not finite the gradients are unchanged.
    """
    arrays = [(grad.data_ptr(), grad.numel()) for grad in grads]
    norm: float = compiled().norm(arrays, *isa_and_threads())
    if max_norm < norm < math.inf:
        compiled().scale(arrays, max_norm / (norm + 1e-6), *isa_and_threads())
    return norm


def adamw_step(weights: Sequence[Tensor], states: Sequence[Mapping[str, Tensor]], group: Mapping[str, Any]) -> None:
    """One AdamW update of weights by their gradients.

    Args:
        weights: with gradients; `usable_for_all` holds for them, their gradients and their states.
        states: one for each weight, as in torch.optim.AdamW: step, exp_avg and exp_avg_sq.
        group: lr, betas, eps and weight_decay.
    """
    arrays = [
        (*_pointers(weight, weight.grad, state["exp_avg"], state["exp_avg_sq"], state["step"]), weight.numel())
        for weight, state in zip(weights, states, strict=True)
    ]
    compiled().adamw(arrays, group["lr"], *group["betas"], group["eps"], group["weight_decay"], *isa_and_threads())
    # Torch did not see the changes; it must refuse a graph that still needs the old values.
    torch.autograd.graph.increment_version(weights)


# -- functions with gradient --------------------------------------------------------------------------


def call(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """The function's result, as a node of the autograd graph."""
    apply: Any = function.apply
    return apply(*arguments)


class Linears(torch.autograd.Function):
    """Several linear layers without bias over the same inputs, or one layer with bias."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, bias: Tensor | None, *weights: Tensor) -> tuple[Tensor, ...]:
        """(..., E), (F,), (F, E)s → (..., F)s."""
        ctx.save_for_backward(inputs, *weights)
        rows = inputs.flatten(0, -2)
        shape = inputs.shape[:-1]
        return tuple(product(rows, weight.T, bias=bias).view(*shape, len(weight)) for weight in weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """See `torch.autograd.Function`."""
        inputs, *weights = ctx.saved_tensors
        rows = inputs.flatten(0, -2)
        d_rows = d_bias = None
        d_weights: list[Tensor | None] = []
        for grad, weight in zip(grads, weights, strict=True):
            if grad is None:
                d_weights.append(None)
                continue
            d_outputs = grad.flatten(0, -2)
            if ctx.needs_input_grad[0]:
                d_rows = product(d_outputs, weight, into=d_rows)
            if ctx.needs_input_grad[1]:
                d_bias = d_outputs.sum(0)
            d_weights.append(product(d_outputs.T, rows))
        return None if d_rows is None else d_rows.view(inputs.shape), d_bias, *d_weights


class NormRope(torch.autograd.Function):
    """RMSNorm, rotary positions, or both: see `lm.kernels.layers.rms_norm_rope`."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor | None, epsilon: float, *rotation: Tensor | None) -> Tensor:
        """(..., H, D), (D,), and cosines and sines (..., 1, D/2) → (..., H, D)."""
        inputs = inputs.contiguous()
        cosines, sines = (None if table is None else table.contiguous() for table in rotation)
        width = inputs.shape[-1]
        heads = 1 if cosines is None else inputs.shape[-2]
        outputs = torch.empty_like(inputs)
        scales = None if weight is None else inputs.new_empty(inputs.numel() // width)
        ctx.save_for_backward(inputs, weight, cosines, sines, scales)
        ctx.shape = inputs.numel() // width // heads, heads, width, epsilon
        pointers = _pointers(inputs, weight, cosines, sines, outputs, scales, None, None, None)
        compiled().norms(*ctx.shape, pointers, *isa_and_threads())
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """See `torch.autograd.Function`."""
        inputs, weight, cosines, sines, scales = ctx.saved_tensors
        grad, d_inputs = grads[0].contiguous(), torch.empty_like(inputs)
        d_weight = None if weight is None else torch.zeros_like(weight)
        pointers = _pointers(inputs, weight, cosines, sines, None, scales, grad, d_inputs, d_weight)
        compiled().norms(*ctx.shape, pointers, *isa_and_threads())
        return d_inputs, d_weight, None, None, None


class SwiGLU(torch.autograd.Function):
    """silu(gate) · up."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        """Any shape, the same for both."""
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        outputs = torch.empty_like(gate)
        gate_at, up_at, at = _pointers(gate, up, outputs)
        compiled().gated(gate_at, up_at, 0, gate.numel(), at, 0, *isa_and_threads())
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        """See `torch.autograd.Function`."""
        gate, up = ctx.saved_tensors
        # Held by name until the call is over.
        grad, d_gate, d_up = grads[0].contiguous(), torch.empty_like(gate), torch.empty_like(up)
        *inputs_at, d_gate_at, d_up_at = _pointers(gate, up, grad, d_gate, d_up)
        compiled().gated(*inputs_at, gate.numel(), d_gate_at, d_up_at, *isa_and_threads())
        return d_gate, d_up


class Attention(torch.autograd.Function):
    """Causal attention: see `lm.kernels.layers.attend`."""

    @staticmethod
    def forward(ctx: Any, dropout: float, seed: int, *parts: Tensor) -> Tensor:
        """Queries, keys and values (B, T, H, D) → (B, T, H, D)."""
        queries, keys, values = (part.contiguous() for part in parts)
        batch, time, heads, width = queries.shape
        outputs, sums = torch.empty_like(queries), queries.new_empty(batch, heads, time)
        ctx.save_for_backward(queries, keys, values, sums)
        ctx.settings = (batch, time, heads, keys.shape[2], width), seed, dropout
        shape, *dropping = ctx.settings
        pointers = _pointers(queries, keys, values, outputs, sums, None, None, None, None)
        compiled().attention(shape, pointers, *dropping, *isa_and_threads())
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """See `torch.autograd.Function`."""
        queries, keys, values, sums = ctx.saved_tensors
        grad = grads[0].contiguous()
        d_inputs = torch.empty_like(queries), torch.empty_like(keys), torch.empty_like(values)
        pointers = _pointers(queries, keys, values, None, sums, grad, *d_inputs)
        shape, *dropping = ctx.settings
        compiled().attention(shape, pointers, *dropping, *isa_and_threads())
        return None, None, *d_inputs


class CrossEntropy(torch.autograd.Function):
    """The mean cross-entropy, whose gradient forward computes too."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        """(N, V) and (N,) → a scalar."""
        d_logits = torch.empty_like(logits, memory_format=torch.contiguous_format)
        nats = entropies(logits.contiguous(), targets, into=d_logits, weight=1 / len(logits))
        ctx.save_for_backward(d_logits)
        return nats.mean()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """See `torch.autograd.Function`."""
        (d_logits,) = ctx.saved_tensors
        factor = float(grads[0])
        return d_logits if factor == 1 else d_logits * factor, None


class EmbeddingRows(torch.autograd.Function):
    """Rows of an embedding, with a dense gradient."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor) -> Tensor:
        """(...) int64 and (V, E) → (..., E)."""
        ids, weight = ids.contiguous(), weight.contiguous()
        rows = weight.new_empty(*ids.shape, weight.shape[1])
        ctx.save_for_backward(ids)
        ctx.shape = weight.shape
        EmbeddingRows._call(ids, weight.shape, weight, rows, back=False)
        return rows

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        """See `torch.autograd.Function`."""
        (ids,) = ctx.saved_tensors
        d_weight = torch.zeros(ctx.shape)
        EmbeddingRows._call(ids, ctx.shape, grads[0].contiguous(), d_weight, back=True)
        return None, d_weight

    @staticmethod
    def _call(ids: Tensor, shape: torch.Size, source: Tensor, target: Tensor, *, back: bool) -> None:
        ids_at, *pointers = _pointers(ids, source, target)
        compiled().look_up(ids_at, ids.numel(), *shape, *pointers, back, *isa_and_threads())


class Dropout(torch.autograd.Function):
    """Dropout by a mask that `seed` determines; it is computed again in backward and never stored."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, rate: float, seed: int) -> Tensor:
        """Any shape."""
        ctx.rate, ctx.seed = rate, seed
        return Dropout._call(inputs, rate, seed)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """See `torch.autograd.Function`."""
        return Dropout._call(grads[0], ctx.rate, ctx.seed), None, None

    @staticmethod
    def _call(inputs: Tensor, rate: float, seed: int) -> Tensor:
        inputs = inputs.contiguous()
        outputs = torch.empty_like(inputs)
        compiled().drop(*_pointers(inputs, outputs), inputs.numel(), seed, rate, *isa_and_threads())
        return outputs


class Block(torch.autograd.Function):
    """A whole Transformer block: see `lm.kernels.layers.transformer_block`."""

    NAMES = (
        "input_norm", "query", "key", "value", "query_norm", "key_norm", "output", "mlp_norm", "gate", "up", "down",
    )  # fmt: skip
    """The weights, in the order of `forward`."""

    @staticmethod
    def forward(
        ctx: Any, settings: Any, cosines: Tensor, sines: Tensor, inputs: Tensor, *weights: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs (B, T, E) → outputs (B, T, E), keys and values (B, T, kv_heads, D)."""
        heads, kv_heads, epsilon, dropout, seeds = settings
        inputs, cosines, sines = inputs.contiguous(), cosines.contiguous(), sines.contiguous()
        weights = tuple(None if weight is None else weight.contiguous() for weight in weights)
        batch, time, size = inputs.shape
        width = 2 * cosines.shape[-1]
        outputs = torch.empty_like(inputs)
        keys, values = (inputs.new_empty(batch, time, kv_heads, width) for _ in range(2))
        run = compiled().BlockPass()
        run.batch, run.time, run.size, run.heads, run.kv_heads, run.width = batch, time, size, heads, kv_heads, width
        gate = weights[Block.NAMES.index("gate")]
        assert gate is not None
        run.inner, run.epsilon, run.drop = len(gate), epsilon, dropout
        run.attention_seed, run.mixed_seed, run.mlp_seed = seeds
        _set_pointers(run, {
            "x": inputs, "cosines": cosines, "sines": sines, "y": outputs, "keys": keys, "values": values,
            **dict(zip(Block.NAMES, weights, strict=True)),
        })  # fmt: skip
        memory = buffers.take(compiled().block_memory(run))
        _set_pointers(run, {"memory": memory})
        compiled().block(run, *isa_and_threads())
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(inputs, cosines, sines, keys, values, *weights)
            ctx.set_materialize_grads(False)
            ctx.run, ctx.memory = run, memory
        else:
            buffers.give_back(memory)
        return outputs, keys, values

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """See `torch.autograd.Function`."""
        if ctx.memory is None:
            raise RuntimeError(BACKWARD_TWICE)
        inputs, _, _, keys, values, *weights = ctx.saved_tensors
        run, memory, ctx.memory = ctx.run, ctx.memory, None
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
        named = {f"d_{name}": grad for name, grad in zip(Block.NAMES, d_weights, strict=True)}
        _set_pointers(run, {"dy": dy, "d_keys": d_keys, "d_values": d_values, "dx": d_inputs, **named})
        compiled().block(run, *isa_and_threads())
        buffers.give_back(memory)
        return None, None, None, d_inputs, *d_weights


class Recurrent(torch.autograd.Function):
    """One layer of a GRU or LSTM: see `lm.kernels.layers.recurrent_layer`."""

    @staticmethod
    def forward(
        ctx: Any, lstm: bool, inputs: Tensor, ids: Tensor | None, *parts: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Inputs (B, T, E), or ids (B, T) and an embedding (V, E) → outputs (B, T, H), last states (B, H)."""
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
            inputs = inputs.contiguous()
            run.ids, run.vocab_size = ids.data_ptr(), len(inputs)
        _set_pointers(run, {
            "x": inputs, "weight_ih": weight_ih, "weight_hh": weight_hh, "bias_ih": bias_ih, "bias_hh": bias_hh,
            "first_hidden": hidden, "first_cell": cell, "outputs": outputs, "last_hidden": last_hidden,
            "last_cell": last_cell, "memory": memory,
        })  # fmt: skip
        compiled().forward(run, *isa_and_threads())
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(inputs, ids, weight_ih, weight_hh, bias_ih, bias_hh, hidden, cell, outputs)
            ctx.set_materialize_grads(False)
            ctx.run, ctx.memory = run, memory
        else:
            buffers.give_back(memory)
        return outputs, last_hidden, last_cell

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """See `torch.autograd.Function`."""
        if ctx.memory is None:
            raise RuntimeError(BACKWARD_TWICE)
        inputs, _, weight_ih, weight_hh, bias_ih, bias_hh, hidden, cell, _ = ctx.saved_tensors
        run, memory, ctx.memory = ctx.run, ctx.memory, None
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
        compiled().backward(run, *isa_and_threads())
        buffers.give_back(memory)
        return None, d_inputs, None, *d_weights, d_hidden, d_cell
