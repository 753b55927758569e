"""Finding where a number stopped being one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lm.models.base import LanguageModel


def first_nonfinite(model: LanguageModel, inputs: Any, device: torch.device) -> str:
    """Where a value stopped being finite: the first weight or, all weights being well, the first module's output."""
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            return f"first in the weight {name}"
    found: list[str] = []

    def look(name: str) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            if isinstance(tensor, Tensor) and not bool(torch.isfinite(tensor).all()):
                found.append(name)

        return hook

    hooks = [module.register_forward_hook(look(name)) for name, module in model.named_modules() if name]
    try:
        with torch.no_grad():
            model(torch.from_numpy(inputs).to(device))
    finally:
        for hook in hooks:
            hook.remove()
    return (
        f"first in the output of {found[0]}"
        if found
        else "weights and outputs are finite in fp32: a gradient or a lower precision overflowed"
    )
