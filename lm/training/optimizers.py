"""Optimizers, and their state as plain arrays.

Weight decay reaches matrices only: embeddings, biases and gains are spared. Under `muon`, torch's own Muon takes the
hidden matrices, and AdamW the embeddings, the output layer and everything that is no matrix.

Sources: Loshchilov and Hutter 2019 (AdamW); Jordan et al. 2024 (Muon).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.optim import Optimizer

from lm.config import TrainingConfig
from lm.models.base import LanguageModel


def make_optimizers(model: LanguageModel, config: TrainingConfig, *, fused: bool) -> list[Optimizer]:
    """The optimizers of a model; each group's peak learning rate is kept as its "peak_learning_rate"."""
    embeddings, edges = set(), set()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            embeddings.add(module.weight)
        if isinstance(module, nn.Linear) and module.out_features == model.vocab_size:
            edges.add(module.weight)
    decayed = [p for p in model.parameters() if p.ndim >= 2 and p not in embeddings]
    spared = [p for p in model.parameters() if p.ndim < 2 or p in embeddings]
    hidden = [p for p in decayed if p.ndim == 2 and p not in edges] if config.optimizer == "muon" else []
    chosen = set(hidden)
    groups = [
        {"params": [p for p in decayed if p not in chosen], "weight_decay": config.weight_decay},
        {"params": spared, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    optimizers: list[Optimizer] = []
    if config.optimizer == "sgd":
        optimizers.append(torch.optim.SGD(groups, lr=config.learning_rate, momentum=config.momentum))
    else:
        optimizers.append(torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=fused))
    if hidden:
        optimizers.append(
            torch.optim.Muon(
                hidden, lr=config.muon_learning_rate, momentum=config.momentum, weight_decay=config.weight_decay
            )
        )
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_learning_rate"] = group["lr"]
    return optimizers


def optimizer_arrays(optimizers: list[Optimizer]) -> dict[str, npt.NDArray[Any]]:
    """The moments of all optimizers as host arrays, named optimizer.parameter.moment."""
    arrays = {}
    for number, optimizer in enumerate(optimizers):
        for index, moments in optimizer.state_dict()["state"].items():
            for name, value in moments.items():
                if value is not None:
                    arrays[f"{number}.{index}.{name}"] = np.array(torch.as_tensor(value).detach().cpu().numpy())
    return arrays


def load_optimizer_arrays(optimizers: list[Optimizer], arrays: dict[str, npt.NDArray[Any]]) -> None:
    """Set the moments from `optimizer_arrays` of equally made optimizers."""
    for number, optimizer in enumerate(optimizers):
        content = optimizer.state_dict()
        content["state"] = {}
        for key, array in arrays.items():
            owner, index, name = key.split(".", 2)
            if int(owner) == number:
                content["state"].setdefault(int(index), {})[name] = torch.from_numpy(np.array(array))
        optimizer.load_state_dict(content)
