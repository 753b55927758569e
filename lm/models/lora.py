"""LoRA: fine-tuning with the weights of a model frozen, and a thin product added to its matrices.

    y = W x + scale · up (down x)            W (F, E) frozen; down (R, E) and up (F, R) trained, R small

A module declares the matrices that may get an adapter, as `adapts`. `layers.Linear` adds the output of its adapter; a
recurrent cell uses W + scale · up · down in place of W. `up` is zero at first, so the model starts as its base.

    model = build_model(...); model.load_arrays(...)        # the base
    add_adapters(model, config.training)                    # frozen, and `model.arrays()` has the adapters alone

Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models".
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lm.config import RunConfig, TrainingConfig
from lm.errors import ConfigError
from lm.kernels import autograd, layers
from lm.models.base import LanguageModel, build_model
from lm.registry import did_you_mean


class LowRank(nn.Module):
    """The adapter of one matrix (F, E).

    Args:
        matrix: that is adapted; gives shape and device.
        rank: R.
        scale: factor of the product.
        dropout: probability for the inputs of `down`.
    """

    optimizer_kind = "adamw"

    def __init__(self, matrix: Tensor, rank: int, scale: float, dropout: float) -> None:
        super().__init__()
        rows, columns = matrix.shape
        self.scale, self.dropout = scale, dropout
        self.down = nn.Parameter(torch.empty(rank, columns, device=matrix.device))
        self.up = nn.Parameter(torch.zeros(rows, rank, device=matrix.device))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, inputs: Tensor) -> Tensor:
        """scale · up (down x): (..., E) → (..., F)."""
        if self.training and self.dropout:
            inputs = F.dropout(inputs, self.dropout)
        return autograd.linear(autograd.linear(inputs, self.down) * self.scale, self.up)

    def product(self) -> Tensor:
        """scale · up · down: (F, E)."""
        return (self.up * self.scale) @ self.down


def add_adapters(model: LanguageModel, training: TrainingConfig) -> LanguageModel:
    """Freeze a model and give it the adapters of the options; without `training.lora` it stays as it is.

    Args:
        model: with the weights of the base, in fp32. It is changed.
        training: the options.

    Returns:
        The model.

    Raises:
        ConfigError: the model has no matrix that may get an adapter, or not those of `training.lora_modules`.
    """
    if training.lora is None:
        return model
    places = _places(model, training)
    for parameter in model.parameters():
        # Not `requires_grad_`: see `lm.training.module_needs.trainable_on_meta`.
        parameter.requires_grad = False
    for module, matrix in places:
        if not layers.is_adapted(module):
            module.adapters = nn.ModuleDict()
        adapters: Any = module.adapters
        weight: Tensor = getattr(module, matrix)
        adapters[matrix] = LowRank(weight, training.lora, training.lora_scale, training.lora_dropout)
    return model


def with_adapter(module: nn.Module, matrix: str) -> Tensor:
    """A weight of a module, with the product of its adapter added to it, if it has one."""
    weight: Tensor = getattr(module, matrix)
    adapters: Any = getattr(module, "adapters", None)
    if adapters is None or matrix not in adapters:
        return weight
    added: Tensor = adapters[matrix].product()
    return weight + added


def trainable_model(config: RunConfig, vocab_size: int) -> LanguageModel:
    """A model with fresh weights, and with the adapters of the options, if there are any."""
    model = build_model(config.model, vocab_size, seed=config.training.seed)
    return add_adapters(model, config.training)


def _places(model: LanguageModel, training: TrainingConfig) -> list[tuple[nn.Module, str]]:
    """The modules that get adapters, each with the name of a matrix."""
    kind, wanted = model.options.type, training.lora_modules
    places = [
        (name.split("."), module, str(matrix))
        for name, module in model.named_modules()
        for matrix in getattr(module, "adapts", ())
    ]
    if not places or not model.training_method().takes_adapters:
        raise ConfigError(
            f"--lora: a model of type {kind} gets no adapters; transformer, gru, lstm and rnn models do. To train all "
            "weights, leave --lora out."
        )
    if training.lora_dropout and not all(isinstance(module, layers.Linear) for _, module, _ in places):
        raise ConfigError(
            f"training.lora_dropout={training.lora_dropout:g}: the adapters of a {kind} have no dropout: leave it out."
        )
    for name in wanted:
        if not any(name in (*path, matrix) for path, _, matrix in places):
            known = dict.fromkeys(path[-1] if matrix == "weight" else matrix for path, _, matrix in places)
            raise ConfigError(
                f"training.lora_modules: this {kind} has no {name!r} that may get an adapter."
                f"{did_you_mean(name, known)} Names: {', '.join(known)}."
            )
    chosen = [
        (module, matrix) for path, module, matrix in places if not wanted or not {*path, matrix}.isdisjoint(wanted)
    ]
    largest = max(min(getattr(module, matrix).shape) for module, matrix in chosen)
    if training.lora is not None and training.lora > largest:
        raise ConfigError(
            f"--lora {training.lora:,}: no matrix that gets an adapter has a rank above {largest:,}, so give a number "
            "up to that; 4 to 64 are usual."
        )
    return chosen
