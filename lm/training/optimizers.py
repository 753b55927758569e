"""Optimizers, and their state as plain arrays.

Weight decay applies to matrices, except embeddings. With `muon`, torch's Muon updates the matrices of modules that
declare it, and AdamW everything else. Parameters that declare "row_adagrad", whose gradients are sparse, always use
`RowAdagrad`.

Sources: Loshchilov and Hutter 2019 (AdamW); Jordan et al. 2024 (Muon); Duchi et al. 2011 (Adagrad).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lm.config import TrainingConfig
from lm.kernels.autograd import adamw_step
from lm.kernels.compiled import native
from lm.kernels.dispatch import usable_for_all
from lm.models.base import LanguageModel, host_arrays, shard_like
from lm.torch_private import keep_compiler_away_from_optimizers, plain_step, sparse_rows
from lm.training.module_needs import module_needs

FP16_EPSILON = 1e-3
"""AdamW's epsilon with fp16 moments, where squares of gradients below 0.0024 are 0: it avoids a division by 0."""


class AdamW(torch.optim.AdamW):
    """Torch's AdamW, with the native kernel if it is usable."""

    # The decorated step would import torch's compiler, for more than a second.
    _step = plain_step(torch.optim.AdamW)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update all weights that have a gradient."""
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
        weights = [weight for group in self.param_groups for weight in group["params"] if weight.grad is not None]
        tensors = [each for weight in weights for each in (weight, weight.grad, *self.state[weight].values())]
        return usable_for_all("adamw", tensors)


keep_compiler_away_from_optimizers()


class RowAdagrad(Optimizer):
    """Adagrad with one rate for each row of a matrix, for sparse gradients: rows without a gradient cost nothing.

    The step of a row is lr · g / sqrt(sum of |g|² so far), at most lr: the first one is lr, the k-th about
    lr / sqrt(k), as in counting.
    """

    def __init__(self, params: Iterable[Tensor], lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update the rows that have a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["squares"] = parameter.new_zeros(len(parameter), 1)
                self._update(parameter, parameter.grad, state["squares"], group["lr"])

    def _update(self, parameter: Tensor, grad: Tensor, squares: Tensor, rate: float) -> None:
        if native() is not None and parameter.device.type == "cpu":
            # The same in one pass: with torch it takes a third of a small model's step.
            rows, grads = sparse_rows(grad)
            native().row_adagrad(
                parameter.detach().numpy(), squares.numpy(), rows.numpy(), grads.contiguous().numpy(), rate
            )
            # Torch does not see the change; a graph that needs the old values must raise an error, as always.
            torch.autograd.graph.increment_version(parameter)
            return
        grad = grad.coalesce()
        rows, grads = grad.indices()[0], grad.values()
        squares[rows] += grads.square().sum(dim=1, keepdim=True)
        parameter[rows] -= rate * grads / (squares[rows].sqrt() + 1e-10)


def make_optimizers(
    model: LanguageModel, config: TrainingConfig, *, fused: bool, masters: Mapping[Tensor, Tensor] | None = None
) -> list[Optimizer]:
    """The optimizers of a model; each group stores its peak learning rate as "peak_learning_rate".

    Args:
        model: whose parameters are updated.
        config: kinds and learning rates.
        fused: use torch's fused AdamW.
        masters: the tensors to update in place of some parameters.
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
    """The moments of all optimizers as `host_arrays`, named optimizer.parameter.moment."""
    return host_arrays(
        {
            f"{number}.{index}.{name}": torch.as_tensor(value)
            for number, optimizer in enumerate(optimizers)
            for index, moments in optimizer.state_dict()["state"].items()
            for name, value in moments.items()
            if value is not None
        }
    )


def load_optimizer_arrays(optimizers: list[Optimizer], arrays: dict[str, npt.NDArray[Any]]) -> None:
    """Set the moments from the `optimizer_arrays` of equal optimizers."""
    for number, optimizer in enumerate(optimizers):
        content = optimizer.state_dict()
        content["state"] = {}
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for key, array in arrays.items():
            owner, index, name = key.split(".", 2)
            if int(owner) == number:
                value = shard_like(parameters[int(index)], array)
                content["state"].setdefault(int(index), {})[name] = value
        optimizer.load_state_dict(content)
