"""The weights of LoRA adapters: their names, and how they join those of the base. Needs no torch.

layers.0.self_attn.q_proj.weight                 (F, E)   of the base
layers.0.self_attn.q_proj.adapters.weight.down   (R, E)   of its adapter
layers.0.self_attn.q_proj.adapters.weight.up     (F, R)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

Arrays = dict[str, npt.NDArray[Any]]

ADAPTERS, DOWN, UP = "adapters", "down", "up"


def is_adapter(name: str) -> bool:
    """Whether a tensor of this name belongs to an adapter."""
    return f".{ADAPTERS}." in name


def adapted_matrix(name: str) -> str:
    """The name of the base's matrix, from the name of a tensor of its adapter."""
    return name.rpartition(".")[0].replace(f".{ADAPTERS}.", ".")


def merged(base: Mapping[str, npt.NDArray[Any]], adapters: Mapping[str, npt.NDArray[Any]], scale: float) -> Arrays:
    """The weights of the base with W + scale · up · down in place of each adapted matrix W.

    Args:
        base: its weights; matrices without an adapter are shared, not copied.
        adapters: the tensors of an adapter run.
        scale: `TrainingConfig.lora_scale`.

    Returns:
        The adapted matrices in float32.

    Raises:
        ValueError: an adapter does not fit the base.
    """
    found = dict(base)
    for name, down in adapters.items():
        if not name.endswith(f".{DOWN}"):
            continue
        matrix = adapted_matrix(name)
        up = adapters.get(name.removesuffix(DOWN) + UP)
        whole = base.get(matrix)
        if whole is None or up is None or whole.shape != (len(up), down.shape[1]) or up.shape[1] != len(down):
            raise ValueError(f"the adapter {name} does not fit the matrix {matrix} of the base")
        added = np.matmul(up, down)
        added *= np.float32(scale)
        added += whole
        found[matrix] = added
    return found
