"""Optimizers, and their state as plain arrays.

Weight decay reaches matrices only: embeddings, biases and gains are spared. Under `muon`, torch's own Muon takes the
hidden matrices, and AdamW the embeddings, the output layer and everything that is no matrix. Context tables, whose
gradients are sparse, always learn by `RowAdagrad`.

Sources: Loshchilov and Hutter 2019 (AdamW); Jordan et al. 2024 (Muon); Duchi et al. 2011 (Adagrad).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lm.config import TrainingConfig
from lm.kernels.autograd import adamw_step
from lm.kernels.compiled import native
from lm.kernels.dispatch import usable_for_all
from lm.models.base import LanguageModel, host_array, shard_like
from lm.torch_private import keep_compiler_away_from_optimizers, plain_step, sparse_rows
from lm.training.module_needs import module_needs

FP16_EPSILON = 1e-3
"""AdamW's epsilon over fp16 moments: squares of gradients below 0.0024 are 0 there, and nothing may be divided by 0."""


class AdamW(torch.optim.AdamW):
    """Torch's, natively where that is usable."""

    # Its own step would import torch's compiler, for more than a second.
    _step = plain_step(torch.optim.AdamW)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update of all weights that have a gradient."""
        if closure is not None or not self.defaults["fused"] or not self._native():
            return self._step(closure)
        for group in self.param_groups:
            updated = [weight for weight in group["params"] if weight.grad is not None]
            for weight in updated:
                if not self.state[weight]:
                    moments = {name: torch.zeros_like(weight) for name in ("exp_avg", "exp_avg_sq")}
                    self.state[weight] = {"step": torch.zeros(()), **moments}
            adamw_step(updated, [self.state[weight] for weight in updated], group)
        return None

    def _native(self) -> bool:
        tensors = [
            tensor
            for group in self.param_groups
            for weight in group["params"]
            if weight.grad is not None
            for tensor in (weight, weight.grad, *self.state[weight].values())
        ]
        return usable_for_all("adamw", tensors)


keep_compiler_away_from_optimizers()


class RowAdagrad(Optimizer):
    """Adagrad with one rate for each row of a matrix, for sparse gradients: rows that were not met cost nothing.

    A row's step is lr · g / sqrt(sum of |g|² so far), never longer than lr: the first sight of a context counts in
    full, the k-th about 1 / sqrt(k), as in counting.
    """

    def __init__(self, params: Iterable[Tensor], lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of the rows that the gradients name."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["squares"] = parameter.new_zeros(len(parameter), 1)
                self._update(parameter, parameter.grad, state["squares"], group["lr"])

    def _update(self, parameter: Tensor, gradient: Tensor, squares: Tensor, rate: float) -> None:
        if native() is not None and parameter.device.type == "cpu":
            # The same in one pass: torch's way takes a third of a small model's step.
            rows, slopes = sparse_rows(gradient)
            native().row_adagrad(
                parameter.detach().numpy(), squares.numpy(), rows.numpy(), slopes.contiguous().numpy(), rate
            )
            # Torch has not seen the change; a graph that still needs the old values must be refused, as always.
            torch.autograd.graph.increment_version(parameter)
            return
        gradient = gradient.coalesce()
        rows, slopes = gradient.indices()[0], gradient.values()
        squares[rows] += slopes.square().sum(dim=1, keepdim=True)
        parameter[rows] -= rate * slopes / (squares[rows].sqrt() + 1e-10)


def make_optimizers(
    model: LanguageModel, config: TrainingConfig, *, fused: bool, masters: Mapping[Tensor, Tensor] | None = None
) -> list[Optimizer]:
    """The optimizers of a model; each group's peak learning rate is kept as its "peak_learning_rate".

    Args:
        model: whose parameters are updated.
        config: which optimizers, and how fast.
        fused: whether AdamW is torch's fused one.
        masters: of some parameters, what is updated in their place.
    """
    kinds = {parameter: needs.optimizer_kind for parameter, needs in module_needs(model).items()}
    embeddings = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    by_rows = [p for p, kind in kinds.items() if kind == "row_adagrad"]
    others = [p for p, kind in kinds.items() if kind != "row_adagrad"]
    decayed = [p for p in others if p.ndim >= 2 and p not in embeddings]
    not_decayed = [p for p in others if p.ndim < 2 or p in embeddings]
    uses_muon = config.optimizer == "muon"
    matrices = [p for p in decayed if p.ndim == 2 and kinds[p] == "muon"] if uses_muon else []
    own, in_muon = masters or {}, set(matrices)

    def updated(parameters: Iterable[Tensor]) -> list[Tensor]:
        return [own.get(p, p) for p in parameters]

    groups = [
        {"params": updated(p for p in decayed if p not in in_muon), "weight_decay": config.weight_decay},
        {"params": updated(not_decayed), "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    optimizers: list[Optimizer] = []
    if config.optimizer == "sgd":
        optimizers.append(torch.optim.SGD(groups, lr=config.learning_rate, momentum=config.momentum))
    else:
        low = any(tensor.dtype == torch.float16 for tensor in updated(model.parameters()))
        epsilon = FP16_EPSILON if low else 1e-8
        optimizers.append(AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=epsilon, fused=fused))
    if matrices:
        rate, decay = config.muon_learning_rate, config.weight_decay
        optimizers.append(torch.optim.Muon(updated(matrices), lr=rate, momentum=config.momentum, weight_decay=decay))
    if by_rows:
        optimizers.append(RowAdagrad(by_rows, lr=config.table_learning_rate))
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
                    arrays[f"{number}.{index}.{name}"] = host_array(torch.as_tensor(value))
    return arrays


def load_optimizer_arrays(optimizers: list[Optimizer], arrays: dict[str, npt.NDArray[Any]]) -> None:
    """Set the moments from `optimizer_arrays` of equally made optimizers."""
    for number, optimizer in enumerate(optimizers):
        content = optimizer.state_dict()
        content["state"] = {}
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for key, array in arrays.items():
            owner, index, name = key.split(".", 2)
            if int(owner) == number:
                value = shard_like(parameters[int(index)], torch.from_numpy(np.array(array)))
                content["state"].setdefault(int(index), {})[name] = value
        optimizer.load_state_dict(content)
