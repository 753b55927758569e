"""Optimizers, and their state as plain arrays.

Weight decay applies to matrices, except embeddings. With `muon`, Muon updates the matrices of modules that declare it,
and AdamW everything else. Parameters that declare "row_adagrad", of which a step uses few rows, always use
`RowAdagrad`.

On a GPU no step waits for the device. Rates may be scalar tensors, and a step leaves all as it is if the optimizer's
attribute `found_inf`, a scalar tensor as in torch's fused AdamW, is not 0.

Sources: Loshchilov and Hutter 2019 (AdamW); Jordan et al. 2024 (Muon); Duchi et al. 2011 (Adagrad).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
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
from lm.torch_private import foreach, keep_compiler_away_from_optimizers, plain_step, sparse_rows
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
        # The native kernel cannot skip a step by a flag.
        flagged = getattr(self, "found_inf", None) is not None
        if closure is not None or flagged or not self.defaults["fused"] or not self._native():
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
        if not self.param_groups[0]["params"][0].is_cpu:
            return False
        weights = [weight for group in self.param_groups for weight in group["params"] if weight.grad is not None]
        tensors = [each for weight in weights for each in (weight, weight.grad, *self.state[weight].values())]
        return usable_for_all("adamw", tensors)


keep_compiler_away_from_optimizers()


class Muon(torch.optim.Muon):
    """Torch's Muon; on a GPU with batched products over all matrices of one shape.

    Torch updates one matrix after the other, with about 25 operators each: for small matrices most of the time is their
    launch. The batched step has as many operators for each shape.

    Args:
        batched: use the batched step; its results differ by rounding alone.
    """

    _step = plain_step(torch.optim.Muon)

    def __init__(self, params: Iterable[Tensor], *, batched: bool, **options: Any) -> None:
        super().__init__(params, **options)
        self.batched = self.skips_by_flag = batched

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update all matrices that have a gradient."""
        if closure is not None or not self.batched:
            return self._step(closure)
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for weight in group["params"]:
                if weight.grad is not None:
                    by_shape.setdefault(weight.shape, []).append(weight)
            for weights in by_shape.values():
                self._update(weights, group)
        return None

    def _update(self, weights: list[Tensor], group: Mapping[str, Any]) -> None:
        """One step of matrices (M, N) of one shape."""
        momentum, rate = group["momentum"], group["lr"]
        for weight in weights:
            if not self.state[weight]:
                self.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
        moments = [self.state[weight]["momentum_buffer"] for weight in weights]
        grads = [weight.grad for weight in weights if weight.grad is not None]
        if (found_inf := getattr(self, "found_inf", None)) is not None:
            # A moment that moves to itself stays, and a rate of 0 changes no weight.
            grads = [torch.where(found_inf > 0, *pair) for pair in zip(moments, grads, strict=True)]
            rate = rate * (1 - found_inf)
        foreach("lerp", moments, grads, 1 - momentum)
        averages = torch.stack(moments)
        if group["nesterov"]:
            averages = torch.stack(grads).lerp_(averages, momentum)
        rows, columns = weights[0].shape
        updates = orthogonalised(averages, group["ns_coefficients"], group["ns_steps"], group["eps"])
        updates = updates.to(weights[0].dtype) * (-rate * max(1, rows / columns) ** 0.5)
        foreach("mul", weights, 1 - rate * group["weight_decay"])
        foreach("add", weights, list(updates.unbind()))


def orthogonalised(matrices: Tensor, coefficients: Sequence[float], steps: int, epsilon: float) -> Tensor:
    """About the nearest matrices with orthonormal rows or columns, by Newton-Schulz iterations in bf16.

    Args:
        matrices: (G, M, N).
        coefficients: a, b, c of an iteration x → a x + b x³ + c x⁵ of the singular values.
        steps: number of iterations.
        epsilon: the least norm that a matrix is divided by at first.

    Source: Jordan et al. 2024 (Muon); the same computation as in torch.optim.Muon.
    """
    a, b, c = coefficients
    found = matrices.bfloat16()
    # The products of the shorter axis are smaller.
    is_tall = matrices.shape[1] > matrices.shape[2]
    found = found.mT if is_tall else found
    # bf16 norms of single matrices, as torch computes them.
    found = found / found.norm(dim=(1, 2), keepdim=True).clamp(min=epsilon)
    for _ in range(steps):
        gram = found @ found.mT
        found = torch.baddbmm(found, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), found, beta=a)
    return found.mT.contiguous() if is_tall else found


class RowAdagrad(Optimizer):
    """Adagrad with one rate for each row of a matrix, which leaves rows without a gradient as they are.

    The step of a row is lr · g / sqrt(sum of |g|² so far), at most lr: the first one is lr, the k-th about
    lr / sqrt(k), as in counting. With sparse gradients, rows without a gradient cost nothing. With dense ones, as on a
    GPU, a step reads and writes the whole matrix, and does not wait for the number of its rows.
    """

    def __init__(self, params: Iterable[Tensor], lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @property
    def skips_by_flag(self) -> bool:
        """Whether a step changes nothing if `found_inf` says so: with dense gradients."""
        every = [parameter.grad for group in self.param_groups for parameter in group["params"]]
        return not any(grad is not None and grad.is_sparse for grad in every)

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
        if grad.is_sparse and native() is not None and parameter.device.type == "cpu":
            # The same in one pass: with torch it takes a third of a small model's step.
            rows, grads = sparse_rows(grad)
            native().row_adagrad(
                parameter.detach().numpy(), squares.numpy(), rows.numpy(), grads.contiguous().numpy(), rate
            )
            # Torch does not see the change; a graph that needs the old values must raise an error, as always.
            torch.autograd.graph.increment_version(parameter)
            return
        if not grad.is_sparse:
            if (found_inf := getattr(self, "found_inf", None)) is not None:
                grad = torch.where(found_inf > 0, 0, grad)
            norms = torch.linalg.vector_norm(grad, dim=1, keepdim=True)
            squares.addcmul_(norms, norms)
            # A row of zeros changes neither its sum nor its weights.
            parameter.addcdiv_(grad, (squares.sqrt() + 1e-10) / -rate)
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
        model: whose parameters are updated, but for those that are frozen under adapters.
        config: kinds and learning rates.
        fused: use torch's fused AdamW, and on a GPU its fused SGD.
        masters: the tensors to update in place of some parameters.
    """
    # Weights under adapters are frozen: they have no moments.
    kinds = {
        parameter: needs.optimizer_kind for parameter, needs in module_needs(model).items() if parameter.requires_grad
    }
    embeddings = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    by_rows = [p for p, kind in kinds.items() if kind == "row_adagrad"]
    others = [p for p, kind in kinds.items() if kind != "row_adagrad"]
    decayed = [p for p in others if p.ndim >= 2 and p not in embeddings]
    not_decayed = [p for p in others if p.ndim < 2 or p in embeddings]
    uses_muon = config.optimizer == "muon"
    matrices = [p for p in decayed if p.ndim == 2 and kinds[p] == "muon"] if uses_muon else []
    own, in_muon = masters or {}, set(matrices)
    on_gpu = next(model.parameters()).device.type != "cpu"

    def updated(parameters: Iterable[Tensor]) -> list[Tensor]:
        return [own.get(p, p) for p in parameters]

    groups = [
        {"params": updated(p for p in decayed if p not in in_muon), "weight_decay": config.weight_decay},
        {"params": updated(not_decayed), "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    optimizers: list[Optimizer] = []
    if config.optimizer == "sgd":
        # On a CPU torch's own choice.
        whole = True if fused and on_gpu else None
        optimizers.append(torch.optim.SGD(groups, lr=config.learning_rate, momentum=config.momentum, fused=whole))
    else:
        low = any(tensor.dtype == torch.float16 for tensor in updated(kinds))
        epsilon = FP16_EPSILON if low else 1e-8
        optimizers.append(AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=epsilon, fused=fused))
    if matrices:
        rate, decay = config.muon_learning_rate, config.weight_decay
        muon = updated(matrices)
        optimizers.append(Muon(muon, batched=on_gpu, lr=rate, momentum=config.momentum, weight_decay=decay))
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
