"""The largest activations of a forward pass, and the first number that is not finite.

These passes leave gradients and random generators unchanged.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
from torch import Tensor

from lm.models.base import LanguageModel, State, whole

LOGITS = "logits"
"""The name of the model's own output."""


def activations(
    model: LanguageModel, ids: Tensor, state: State | None, computing: contextlib.AbstractContextManager[None]
) -> list[tuple[str, float]]:
    """The largest absolute value of each module's output, in the order of computation; then that of the logits.

    Args:
        model: in training or evaluation mode.
        ids: (B, T) int64, on the model's device.
        state: the input state of the pass.
        computing: the context of the pass.

    Returns:
        Names and values; NaN or infinite if a number of the output is.
    """
    found: list[tuple[str, Tensor]] = []

    def measure(name: str) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.numel():
                found.append((name, torch.linalg.vector_norm(tensor, torch.inf).float()))

        return hook

    hooks = [module.register_forward_hook(measure(name)) for name, module in model.named_modules() if name]
    generators = [ids.device] if ids.device.type == "cuda" else []
    try:
        with torch.no_grad(), torch.random.fork_rng(generators), computing:
            measure(LOGITS)(model, (), model(ids, state))
    finally:
        for hook in hooks:
            hook.remove()
    names, values = zip(*found, strict=True)
    # One wait for the device, not one per module.
    return list(zip(names, torch.stack(values).tolist(), strict=True))


def first_nonfinite(
    model: LanguageModel, ids: Tensor, state: State | None, computing: contextlib.AbstractContextManager[None]
) -> str | None:
    """The first weight that is not finite or, if all are, the first module with such an output; None if there is none.

    For the arguments see `activations`.
    """
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(whole(parameter)).all()):
            return f"the weight {name}"
    bad = next((name for name, value in activations(model, ids, state, computing) if not math.isfinite(value)), None)
    return None if bad is None else "the logits" if bad == LOGITS else f"the output of {bad}"
