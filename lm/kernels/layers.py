"""Modules of torch.nn that run natively where the kernels support the inputs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lm.kernels import autograd
from lm.kernels.dispatch import usable


class Embedding(nn.Embedding):
    """`nn.Embedding`; its gradient is sparse on the CPU alone, and not in compiled code.

    On a GPU the host would wait for the number of rows of a sparse gradient, and Apple's GPUs have none.
    """

    def forward(self, ids: Tensor) -> Tensor:
        """(...) int64 → (..., E); IndexError for an id outside the vocabulary."""
        if self.sparse and (not self.weight.is_cpu or torch.compiler.is_compiling()):
            return F.embedding(ids, self.weight, self.padding_idx)
        if self.sparse or self.padding_idx is not None or not usable("embedding", self.weight):
            return super().forward(ids)
        return autograd.embed(ids, self.weight)


class Linear(nn.Linear):
    """`nn.Linear`, plus the output of its adapter, if it has one (`lm.models.lora`)."""

    adapters: nn.ModuleDict | None

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias)
        self.register_module("adapters", None)

    def forward(self, inputs: Tensor) -> Tensor:
        """(..., E) → (..., F)."""
        outputs = autograd.linear(inputs, self.weight, self.bias)
        if self.adapters is None:
            return outputs
        added: Tensor = self.adapters["weight"](inputs)
        return outputs + added


def is_adapted(module: nn.Module) -> bool:
    """Whether a module computes more than its weight says: it has adapters."""
    return getattr(module, "adapters", None) is not None


class Dropout(nn.Dropout):
    """`nn.Dropout`; natively with one draw of torch's generator, which seeds the mask."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Any shape."""
        if not self.training or self.p == 0 or not usable("dropout", inputs):
            return super().forward(inputs)
        return autograd.dropout(inputs, self.p)


class RMSNorm(nn.RMSNorm):
    """`nn.RMSNorm` with a weight over the last axis."""

    def forward(self, inputs: Tensor) -> Tensor:
        """(..., E) → (..., E)."""
        if not usable("norm", inputs):
            return super().forward(inputs)
        assert self.eps is not None
        return autograd.rms_norm_rope(inputs, self.weight, self.eps, None)
