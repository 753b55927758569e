"""Looking into a forward pass: how large activations are, and where a number stopped being one.

A pass for looking leaves no trace: no gradient, and the random generators are where they were.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
from torch import Tensor

from lm.models.base import LanguageModel, State, whole

LOGITS = "logits"
"""What the model's own output is called."""


def activations(
    model: LanguageModel,
    ids: Tensor,
    state: State | None,
    computing: contextlib.AbstractContextManager[None],
) -> list[tuple[str, float]]:
    """The largest absolute value of each output of a module, in the order they are computed; then the logits.

    Args:
        model: in the mode that it is looked at in.
        ids: (B, T) int64, on the model's device.
        state: that the pass begins from.
        computing: what it runs in.

    Returns:
        NaN or infinite where a value is.
    """
    found: list[tuple[str, Tensor]] = []

    def look(name: str) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.numel():
                found.append((name, torch.linalg.vector_norm(tensor, torch.inf).float()))

        return hook

    hooks = [module.register_forward_hook(look(name)) for name, module in model.named_modules() if name]
    generators = [ids.device] if ids.device.type == "cuda" else []
    try:
        with torch.no_grad(), torch.random.fork_rng(generators), computing:
            look(LOGITS)(model, (), model(ids, state))
    finally:
        for hook in hooks:
            hook.remove()
    names, values = zip(*found, strict=True)
    # One wait for the device, not one a module.
    return list(zip(names, torch.stack(values).tolist(), strict=True))


def first_nonfinite(
    model: LanguageModel,
    ids: Tensor,
    state: State | None = None,
    computing: contextlib.AbstractContextManager[None] | None = None,
) -> str | None:
    """Where a value is not finite: the first weight or, all weights being well, the first module's output."""
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(whole(parameter)).all()):
            return f"the weight {name}"
    largest = activations(model, ids, state, computing or contextlib.nullcontext())
    bad = next((name for name, value in largest if not math.isfinite(value)), None)
    return None if bad is None else "the logits" if bad == LOGITS else f"the output of {bad}"
