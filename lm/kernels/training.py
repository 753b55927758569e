"""Native layers for training on a CPU, each beside the one of torch that it equals.

    layer                              one layer of nn.GRU or nn.LSTM
    Embedding                          nn.Embedding
    Linear, linear, linears            nn.Linear, F.linear, several of them over the same inputs
    RMSNorm, rms_norm_rope         nn.RMSNorm, the same with rotary positions
    swiglu, attend, Dropout            silu(gate) · up, causal scaled_dot_product_attention, nn.Dropout
    block                              all of these, as a whole block of a Transformer
    cross_entropy                      F.cross_entropy
    product, entropies                 torch.mm, cross-entropies with their slopes, both without gradient
    clipped, adamw_step                clip_grad_norm_, torch.optim.AdamW

All are for fp32 on the CPU (`usable`) and leave everything else to torch. Outputs and gradients equal torch's within
fp32 rounding. Sums have one order: the same bits for any number of threads.

A recurrent layer:

    inputs (B, T, E) ─► products with all inputs ─► step by step: product with the hidden state, gates ─► (B, T, H)

The whole layer is one call forward and one backward; backward keeps the gradients of all gates and makes each weight
gradient as one product over all steps. Where the inputs are looked up in an embedding of few tokens, the products with
the inputs are made once a token instead of once a position.

Shapes: B batch, T time, E inputs, H hidden, V vocabulary.
"""

from __future__ import annotations

import functools
import logging
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lm.kernels.base import compiled, native

log = logging.getLogger(__name__)

R = TypeVar("R")

KINDS = (
    "gru", "lstm", "embedding", "linear", "dropout", "norm", "swiglu", "attention", "block", "entropy", "clip", "adamw",
)  # fmt: skip

FEWEST_STEPS, FEWEST_ROWS = 8, 64
"""Shorter texts and smaller matrices are torch's: the weights are arranged anew in each call."""


def usable(kind: str, inputs: Tensor) -> bool:
    """Whether a layer of this kind runs here: in fp32 on the CPU.

    Says once, as a warning, that this install has no kernels.
    """
    if kind not in KINDS or inputs.device.type != "cpu":
        return False
    if inputs.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return False
    return _installed()


def usable_for_all(kind: str, tensors: Sequence[Tensor]) -> bool:
    """Whether work of this kind, over tensors that are changed where they lie, runs here."""
    plain = all(
        (type(each) is Tensor or type(each) is nn.Parameter)
        and each.dtype is torch.float32
        and each.is_cpu
        and each.is_contiguous()
        for each in tensors
    )
    return kind in KINDS and plain and _installed()


def _installed() -> bool:
    if native() is None:
        _tell_what_is_missing()
        return False
    return True


def keep_in_fp32(weight: Tensor) -> None:
    """Let products with a weight run in fp32 also where its module is not called, and under autocast."""
    weight.stays_in_fp32 = True  # type: ignore[attr-defined]


def stays_in_fp32(weight: Tensor) -> bool:
    """Whether `keep_in_fp32` was said of a weight."""
    return getattr(weight, "stays_in_fp32", False)


def in_its_format(weight: Tensor, call: Callable[..., R], *inputs: Any) -> R:
    """`call(*inputs)`; of a weight that stays in fp32, with inputs in fp32 (also in lists) and without autocast."""
    if not stays_in_fp32(weight):
        return call(*inputs)
    with torch.autocast(weight.device.type, enabled=False):
        return call(*cast_floats(inputs, torch.float32))


def cast_floats(value: Any, dtype: torch.dtype) -> Any:
    """Tensors of floats in `dtype`, also in tuples and lists; all else as it is."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    return type(value)(cast_floats(part, dtype) for part in value) if isinstance(value, tuple | list) else value


def worth_looking_up(vocab_size: int, positions: int) -> bool:
    """Whether products once a token take less time than once a position."""
    return 2 * vocab_size < positions


def layer(
    kind: str, inputs: Tensor, weights: Sequence[Tensor], first: Sequence[Tensor] | None, *, ids: Tensor | None = None
) -> tuple[Tensor, ...]:
    """One layer over texts of the same length, with gradients for everything but `ids`.

    Args:
        kind: gru or lstm.
        inputs: (B, T, E); with `ids`, the embedding (V, E) that they are looked up in.
        weights: weight_ih, weight_hh, bias_ih, bias_hh, as torch's layers hold them.
        first: the hidden state before the first step (B, H), and the LSTM's cell; None: zeros.
        ids: (B, T) int64, all below V.

    Returns:
        The outputs (B, T, H), then the hidden state after the last step (B, H), and the LSTM's cell.

    Raises:
        IndexError: an id lies outside the embedding.
    """
    hidden, cell = (*(first or ()), None, None)[:2]
    apply: Any = _Layer.apply
    found: tuple[Tensor, ...] = apply(kind == "lstm", inputs, ids, *weights, hidden, cell)
    return found if kind == "lstm" else found[:2]


def linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`, natively where that is usable: (..., E) with a weight (F, E) → (..., F)."""
    if stays_in_fp32(weight):
        return in_its_format(weight, F.linear, inputs, weight, bias)
    if inputs.numel() < FEWEST_ROWS * inputs.shape[-1] or not usable("linear", inputs):
        return F.linear(inputs, weight, bias)
    apply: Any = _Linears.apply
    found: tuple[Tensor, ...] = apply(inputs, bias, weight)
    return found[0]


def linears(inputs: Tensor, layers: Sequence[nn.Linear]) -> tuple[Tensor, ...]:
    """The outputs of several layers without bias over the same inputs, natively in one go where that is usable."""
    if inputs.numel() < FEWEST_ROWS * inputs.shape[-1] or not usable("linear", inputs):
        return tuple(layer(inputs) for layer in layers)
    apply: Any = _Linears.apply
    found: tuple[Tensor, ...] = apply(inputs, None, *(layer.weight for layer in layers))
    return found


def attend(queries: Tensor, keys: Tensor, values: Tensor, dropout: float = 0.0) -> Tensor:
    """Causal attention (B, T, H, D), where "attention" is `usable`; H is a multiple of the keys' and values' heads."""
    apply: Any = _Attention.apply
    found: Tensor = apply(dropout, _seed(dropout), queries, keys, values)
    return found


def block(
    inputs: Tensor,
    weights: Sequence[Tensor | None],
    rotation: tuple[Tensor, Tensor],
    *,
    heads: int,
    kv_heads: int,
    epsilon: float,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """A block of a Transformer over whole texts, where "block" is `usable`: one call forward and one backward.

    Args:
        inputs: (B, T, E).
        weights: of the first norm, queries, keys, values, the queries' and keys' norms (or None), the attention's
            output, the second norm, gate, up and down.
        rotation: cosines and sines (B, T, 1, D/2).
        heads: of the queries, G times those of keys and values.
        kv_heads: heads of keys and values.
        epsilon: of the norms.
        dropout: of attention weights and both branches.

    Returns:
        The outputs (B, T, E), keys and values (B, T, kv_heads, D).
    """
    apply: Any = _Block.apply
    settings = heads, kv_heads, epsilon, dropout, tuple(_seed(dropout) for _ in range(3))
    found: tuple[Tensor, Tensor, Tensor] = apply(settings, *rotation, inputs, *weights)
    return found


def _seed(dropout: float) -> int:
    """One draw of torch's generator, where there is anything to drop."""
    return int(torch.randint(2**62, ())) if dropout else 0


class Embedding(nn.Embedding):
    """`nn.Embedding`, natively where that is usable."""

    def forward(self, ids: Tensor) -> Tensor:
        """(...) int64 → (..., E); IndexError for an id outside the vocabulary."""
        if self.sparse or self.padding_idx is not None or not usable("embedding", self.weight):
            return super().forward(ids)
        apply: Any = _LookUp.apply
        found: Tensor = apply(ids, self.weight)
        return found


class Linear(nn.Linear):
    """`nn.Linear`, natively where that is usable."""

    def forward(self, inputs: Tensor) -> Tensor:
        """(..., E) → (..., F)."""
        return linear(inputs, self.weight, self.bias)


class Dropout(nn.Dropout):
    """`nn.Dropout`, natively where that is usable: one draw of torch's generator seeds a mask that is never stored."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Any shape."""
        if not self.training or self.p == 0 or not usable("dropout", inputs):
            return super().forward(inputs)
        apply: Any = _Dropout.apply
        found: Tensor = apply(inputs, self.p, _seed(self.p))
        return found


class RMSNorm(nn.RMSNorm):
    """`nn.RMSNorm` with a weight over the last axis, natively where that is usable."""

    def forward(self, inputs: Tensor) -> Tensor:
        """(..., E) → (..., E)."""
        if not usable("norm", inputs):
            return super().forward(inputs)
        assert self.eps is not None
        return rms_norm_rope(inputs, self.weight, self.eps, None)


def rms_norm_rope(
    inputs: Tensor, weight: Tensor | None, epsilon: float, rotation: tuple[Tensor, Tensor] | None
) -> Tensor:
    """RMSNorm and rotary positions over the last axis in one pass, where "norm" is `usable`.

    Args:
        inputs: (..., H, D).
        weight: (D,) of the norm; None: no norm.
        epsilon: added to the mean square.
        rotation: cosines and sines (..., 1, D/2); dimension i is paired with i + D/2. None: no rotation.
    """
    apply: Any = _Norms.apply
    found: Tensor = apply(inputs, weight, epsilon, *(rotation or (None, None)))
    return found


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up, of the same shape, natively where that is `usable`."""
    if not usable("swiglu", gate):
        return F.silu(gate) * up
    apply: Any = _SwiGLU.apply
    found: Tensor = apply(gate, up)
    return found


class _Norms(torch.autograd.Function):
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
        compiled().norms(
            *ctx.shape, _at(inputs, weight, cosines, sines, outputs, scales, None, None, None), *_machine()
        )
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight, cosines, sines, scales = ctx.saved_tensors
        grad, d_inputs = grads[0].contiguous(), torch.empty_like(inputs)
        d_weight = None if weight is None else torch.zeros_like(weight)
        at = _at(inputs, weight, cosines, sines, None, scales, grad, d_inputs, d_weight)
        compiled().norms(*ctx.shape, at, *_machine())
        return d_inputs, d_weight, None, None, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        outputs = torch.empty_like(gate)
        gate_at, up_at, at = _at(gate, up, outputs)
        compiled().gated(gate_at, up_at, 0, gate.numel(), at, 0, *_machine())
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
        gate_at, up_at, slope_at, d_gate_at, d_up_at = _at(gate, up, grads[0].contiguous(), d_gate, d_up)
        compiled().gated(gate_at, up_at, slope_at, gate.numel(), d_gate_at, d_up_at, *_machine())
        return d_gate, d_up


def _at(*tensors: Tensor | None) -> list[int]:
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


class _Linears(torch.autograd.Function):
    """Several linear layers without bias over the same inputs, or one with."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, bias: Tensor | None, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(inputs, *weights)
        rows = inputs.flatten(0, -2)
        shape = inputs.shape[:-1]
        return tuple(product(rows, weight.T, bias=bias).view(*shape, len(weight)) for weight in weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        inputs, *weights = ctx.saved_tensors
        rows = inputs.flatten(0, -2)
        d_rows = d_bias = None
        d_weights: list[Tensor | None] = []
        for grad, weight in zip(grads, weights, strict=True):
            if grad is None:
                d_weights.append(None)
                continue
            slope = grad.flatten(0, -2)
            if ctx.needs_input_grad[0]:
                d_rows = product(slope, weight, into=d_rows)
            if ctx.needs_input_grad[1]:
                d_bias = slope.sum(0)
            d_weights.append(product(slope.T, rows))
        return None if d_rows is None else d_rows.view(inputs.shape), d_bias, *d_weights


def product(a: Tensor, b: Tensor, *, bias: Tensor | None = None, into: Tensor | None = None) -> Tensor:
    """A product of fp32 matrices on the CPU, without gradient.

    Args:
        a: (N, K).
        b: (K, M).
        bias: (M,), added to every row; not with `into`.
        into: (N, M), contiguous, that the product is added to.
    """
    found = a.new_empty(a.shape[0], b.shape[1]) if into is None else into
    (a, a_step, a_turned), (b, b_step, b_turned) = _in_memory(a), _in_memory(b)
    bias = None if bias is None else bias.contiguous()
    offset = 0 if bias is None else bias.data_ptr()
    shape = len(found), a.shape[0 if a_turned else 1], found.shape[1]
    compiled().product(
        *(a.data_ptr(), a_step, a_turned, b.data_ptr(), b_step, b_turned),
        *(found.data_ptr(), found.shape[1], shape, into is not None, offset, *_machine()),
    )
    return found


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The mean cross-entropy of logits (N, V) at targets (N,) int64, natively where "entropy" is `usable`."""
    if not usable("entropy", logits):
        return F.cross_entropy(logits, targets)
    apply: Any = _CrossEntropy.apply
    found: Tensor = apply(logits, targets)
    return found


def entropies(
    logits: Tensor, targets: Tensor, *, into: Tensor, weight: float = 1.0, d_bias: Tensor | None = None
) -> Tensor:
    """Cross-entropies on the CPU, with their slopes, in one pass.

    Args:
        logits: (N, V), contiguous, in fp32.
        targets: (N,) int64.
        into: (N, V), contiguous, for the slopes: the distribution, less one at the target; may be the logits.
        weight: that the slopes are multiplied by.
        d_bias: (V,), contiguous; the slopes of all rows are added to it.

    Returns:
        (N,) nats.

    Raises:
        IndexError: a target lies outside the logits.
    """
    # Held until the call is over: a copy that nobody holds is freed.
    targets, nats = targets.contiguous(), logits.new_empty(len(logits))
    at = *_at(logits, targets), *logits.shape, weight, *_at(into, nats, d_bias)
    compiled().entropies(*at, *_machine())
    return nats


def clipped(gradients: Sequence[Tensor], most: float) -> float:
    """The norm of all gradients together, on the CPU in fp32 and contiguous; a longer one is brought to `most`.

    One that is not finite leaves them as they are.
    """
    arrays = [(gradient.data_ptr(), gradient.numel()) for gradient in gradients]
    norm: float = compiled().norm(arrays, *_machine())
    if most < norm < math.inf:
        compiled().scale(arrays, most / (norm + 1e-6), *_machine())
    return norm


def adamw_step(weights: Sequence[Tensor], states: Sequence[Mapping[str, Tensor]], group: Mapping[str, Any]) -> None:
    """AdamW's update of weights by their gradients.

    Args:
        weights: where "adamw" is usable for them, their gradients and moments.
        states: of each weight, as torch.optim.AdamW keeps it: step, exp_avg and exp_avg_sq.
        group: lr, betas, eps and weight_decay.
    """
    arrays = [
        (*_at(weight, weight.grad, state["exp_avg"], state["exp_avg_sq"], state["step"]), weight.numel())
        for weight, state in zip(weights, states, strict=True)
    ]
    compiled().adamw(arrays, group["lr"], *group["betas"], group["eps"], group["weight_decay"], *_machine())
    # Torch has not seen the changes; a graph that still needs the old values must be refused, as always.
    torch.autograd.graph.increment_version(weights)


def _in_memory(matrix: Tensor) -> tuple[Tensor, int, bool]:
    """A matrix with contiguous rows, their distance, and whether it is the transposed one."""
    step, next_one = matrix.stride()
    if next_one == 1 and step >= matrix.shape[1]:
        return matrix, step, False
    if step == 1 and next_one >= matrix.shape[0]:
        return matrix.T, next_one, True
    return matrix.contiguous(), matrix.shape[1], False


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dropout: float, seed: int, *parts: Tensor) -> Tensor:
        queries, keys, values = (part.contiguous() for part in parts)
        batch, time, heads, width = queries.shape
        outputs, sums = torch.empty_like(queries), queries.new_empty(batch, heads, time)
        ctx.save_for_backward(queries, keys, values, sums)
        ctx.settings = (batch, time, heads, keys.shape[2], width), seed, dropout
        shape, *dropping = ctx.settings
        at = _at(queries, keys, values, outputs, sums, None, None, None, None)
        compiled().attention(shape, at, *dropping, *_machine())
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys, values, sums = ctx.saved_tensors
        slopes = torch.empty_like(queries), torch.empty_like(keys), torch.empty_like(values)
        at = _at(queries, keys, values, None, sums, grads[0].contiguous(), *slopes)
        shape, *dropping = ctx.settings
        compiled().attention(shape, at, *dropping, *_machine())
        return None, None, *slopes


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        slopes = torch.empty_like(logits, memory_format=torch.contiguous_format)
        nats = entropies(logits.contiguous(), targets, into=slopes, weight=1 / len(logits))
        ctx.save_for_backward(slopes)
        return nats.mean()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (slopes,) = ctx.saved_tensors
        factor = float(grads[0])
        return slopes if factor == 1 else slopes * factor, None


class _LookUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor) -> Tensor:
        ids, weight = ids.contiguous(), weight.contiguous()
        found = weight.new_empty(*ids.shape, weight.shape[1])
        ctx.save_for_backward(ids)
        ctx.shape = weight.shape
        _look_up(ids, weight.shape, weight, found)
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        (ids,) = ctx.saved_tensors
        d_weight = torch.zeros(ctx.shape)
        _look_up(ids, ctx.shape, grads[0].contiguous(), d_weight, back=True)
        return None, d_weight


def _look_up(ids: Tensor, shape: torch.Size, from_: Tensor, to: Tensor, *, back: bool = False) -> None:
    ids_at, from_at, to_at = _at(ids, from_, to)
    compiled().look_up(ids_at, ids.numel(), *shape, from_at, to_at, back, *_machine())


class _Block(torch.autograd.Function):
    NAMES = (
        "input_norm", "query", "key", "value", "query_norm", "key_norm", "output", "mlp_norm", "gate", "up", "down",
    )  # fmt: skip

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
        _place(run, {
            "x": inputs, "cosines": cosines, "sines": sines, "y": outputs, "keys": keys, "values": values,
            **dict(zip(_Block.NAMES, weights, strict=True)),
        })  # fmt: skip
        memory = _memory.take(compiled().block_memory(run))
        _place(run, {"memory": memory})
        compiled().block(run, *_machine())
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(inputs, cosines, sines, keys, values, *weights)
            ctx.set_materialize_grads(False)
            ctx.run, ctx.memory = run, memory
        else:
            _memory.give(memory)
        return outputs, keys, values

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if ctx.memory is None:
            raise RuntimeError("The native layers go backward once: the gradients have taken the place of the gates.")
        inputs, _, _, keys, values, *weights = ctx.saved_tensors
        run, memory, ctx.memory = ctx.run, ctx.memory, None
        dy = torch.zeros_like(inputs) if grads[0] is None else grads[0].contiguous()
        # Those of keys and values as such, to which attention's are added; hardly ever any.
        run.adds = grads[1] is not None or grads[2] is not None
        empty = torch.zeros_like if run.adds else torch.empty_like
        d_keys, d_values = (
            empty(part) if grad is None else grad.clone(memory_format=torch.contiguous_format)
            for part, grad in zip((keys, values), grads[1:], strict=True)
        )
        d_inputs = torch.empty_like(inputs)
        # Slopes of norms are added to.
        slopes = [
            None if weight is None else torch.zeros_like(weight) if weight.ndim == 1 else torch.empty_like(weight)
            for weight in weights
        ]
        named = {f"d_{name}": slope for name, slope in zip(_Block.NAMES, slopes, strict=True)}
        _place(run, {"dy": dy, "d_keys": d_keys, "d_values": d_values, "dx": d_inputs, **named})
        compiled().block(run, *_machine())
        _memory.give(memory)
        return None, None, None, d_inputs, *slopes


def _place(run: Any, tensors: Mapping[str, Tensor | None]) -> None:
    """Tell a pass where its tensors lie."""
    for name, tensor in tensors.items():
        setattr(run, name, 0 if tensor is None else tensor.data_ptr())


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, rate: float, seed: int) -> Tensor:
        ctx.rate, ctx.seed = rate, seed
        return _drop(inputs, rate, seed)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _drop(grads[0], ctx.rate, ctx.seed), None, None


def _drop(inputs: Tensor, rate: float, seed: int) -> Tensor:
    inputs = inputs.contiguous()
    outputs = torch.empty_like(inputs)
    compiled().drop(inputs.data_ptr(), outputs.data_ptr(), inputs.numel(), seed, rate, *_machine())
    return outputs


class _Layer(torch.autograd.Function):
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
        memory = _memory.take(time * batch * (6 if lstm else 4) * -(-size // 16) * 16)
        run = compiled().Sequence()
        run.lstm, run.batch, run.time, run.inputs, run.hidden = lstm, batch, time, inputs.shape[-1], size
        if ids is None:
            run.x_row, run.x_step = inputs.stride(0), inputs.stride(1)
        else:
            inputs = inputs.contiguous()
            run.ids, run.vocab_size = ids.data_ptr(), len(inputs)
        _place(run, {
            "x": inputs, "weight_ih": weight_ih, "weight_hh": weight_hh, "bias_ih": bias_ih, "bias_hh": bias_hh,
            "first_hidden": hidden, "first_cell": cell, "outputs": outputs, "last_hidden": last_hidden,
            "last_cell": last_cell, "memory": memory,
        })  # fmt: skip
        compiled().forward(run, *_machine())
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(inputs, ids, weight_ih, weight_hh, bias_ih, bias_hh, hidden, cell, outputs)
            ctx.set_materialize_grads(False)
            ctx.run, ctx.memory = run, memory
        else:
            _memory.give(memory)
        return outputs, last_hidden, last_cell

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if ctx.memory is None:
            raise RuntimeError("The native layers go backward once: the gradients have taken the place of the gates.")
        inputs, _, weight_ih, weight_hh, bias_ih, bias_hh, hidden, cell, _ = ctx.saved_tensors
        run, memory, ctx.memory = ctx.run, ctx.memory, None
        wanted = ctx.needs_input_grad
        d_outputs, d_last_hidden, d_last_cell = (None if grad is None else grad.contiguous() for grad in grads)
        if d_outputs is not None:
            run.d_row, run.d_step = d_outputs.stride(0), d_outputs.stride(1)
        d_inputs = torch.empty(inputs.shape) if wanted[1] else None
        d_weights = [torch.empty_like(weight) for weight in (weight_ih, weight_hh, bias_ih, bias_hh)]
        d_hidden = torch.empty_like(hidden) if wanted[7] else None
        d_cell = torch.empty_like(cell) if wanted[8] else None
        _place(run, {
            "d_outputs": d_outputs, "d_last_hidden": d_last_hidden, "d_last_cell": d_last_cell, "d_x": d_inputs,
            "d_weight_ih": d_weights[0], "d_weight_hh": d_weights[1], "d_bias_ih": d_weights[2],
            "d_bias_hh": d_weights[3], "d_first_hidden": d_hidden, "d_first_cell": d_cell,
        })  # fmt: skip
        compiled().backward(run, *_machine())
        _memory.give(memory)
        return None, d_inputs, None, *d_weights, d_hidden, d_cell


isa: str | None = None
"""The instruction set; None: the best here."""


def _machine() -> tuple[str, int]:
    return isa or _best(), torch.get_num_threads()


@functools.cache
def _best() -> str:
    name: str = compiled().instruction_sets()[0]
    return name


class _Memory(threading.local):
    """Large buffers that forward fills and backward frees, kept for the next step: fresh pages cost milliseconds."""

    def __init__(self) -> None:
        self._spare: list[Tensor] = []

    def take(self, count: int) -> Tensor:
        for index, buffer in enumerate(self._spare):
            if len(buffer) >= count:
                return self._spare.pop(index)
        if self._spare:
            self._spare.pop()
        return torch.empty(count)

    def give(self, buffer: Tensor) -> None:
        self._spare.append(buffer)

    def forget(self) -> None:
        self._spare.clear()


_memory = _Memory()


def forget_buffers() -> None:
    """Give back the memory that is kept for the next step."""
    _memory.forget()


@functools.cache
def _tell_what_is_missing() -> None:
    if not compiled():
        log.warning(
            "This install has no native kernels (no C++ compiler was found when it was made): GRU and LSTM train on "
            "torch's own layers, more slowly."
        )
