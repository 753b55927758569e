"""An optimizer step that a flag on the device can forbid: the host knows later whether it was made.

Torch's fused optimizers read the flag `found_inf` themselves, and ours that declare `skips_by_flag`. Around others,
weights and moments are copied and put back.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from lm.torch_private import foreach, foreach_norms, optimizer_flags, sparse_rows


def gradient_norms(grads: Sequence[Tensor]) -> Tensor:
    """The norm of each gradient (P,) in fp32, on their device."""
    return torch.stack(foreach_norms(grads))


def guarded_step(optimizer: Optimizer, factor: Tensor, allowed: Tensor) -> None:
    """Multiply the gradients by a factor and update the weights; change nothing if it is not allowed.

    Args:
        optimizer: whose weights have gradients.
        factor: of the gradients, a scalar in fp32 on their device.
        allowed: a bool scalar on the same device.
    """
    skip = (~allowed).float()
    with optimizer_flags(optimizer, 1 / factor, skip) as is_fused:
        if is_fused:
            optimizer.step()
            return
    weights = [weight for group in optimizer.param_groups for weight in group["params"] if weight.grad is not None]
    _scale([_numbers(weight.grad) for weight in weights], factor)
    if getattr(optimizer, "skips_by_flag", False):
        optimizer.found_inf = skip  # type: ignore[attr-defined]
        optimizer.step()
        del optimizer.found_inf  # type: ignore[attr-defined]
        return
    before = _tensors(optimizer, weights)
    copies = {key: tensor.clone() for key, tensor in before.items()}
    optimizer.step()
    for key, tensor in _tensors(optimizer, weights).items():
        # A moment that this step made was 0 before it.
        old = copies[key] if key in copies else torch.zeros_like(tensor)
        tensor.copy_(torch.where(allowed, tensor, old))


def _scale(grads: Sequence[Tensor], factor: Tensor) -> None:
    """Multiply gradients in place by a scalar in fp32; its rounding to fp16 would have few digits."""
    for grad in grads:
        if grad.dtype != factor.dtype:
            grad.copy_(grad.to(factor.dtype) * factor)
    if full := [grad for grad in grads if grad.dtype == factor.dtype]:
        foreach("mul", full, factor)


def _numbers(grad: Tensor) -> Tensor:
    return sparse_rows(grad)[1] if grad.is_sparse else grad


def _tensors(optimizer: Optimizer, weights: Sequence[Tensor]) -> dict[tuple[int, str], Tensor]:
    """The weights and their moments, by number of the weight and name."""
    found = {(number, ""): weight.detach() for number, weight in enumerate(weights)}
    for number, weight in enumerate(weights):
        moments = optimizer.state.get(weight, {})
        found |= {(number, name): value for name, value in moments.items() if isinstance(value, Tensor)}
    return found
