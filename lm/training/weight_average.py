"""An average of the last weights, which generalises better than the last weights.

The average covers a fixed share of the steps so far, so no length must be known in advance: at step t the new weights
enter with the factor 1 / (1 + share × t).

Sources: Polyak and Juditsky 1992; Shamir and Zhang 2013 (averages that forget the beginning).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor, nn

from lm.models.base import host_arrays, shard_like
from lm.torch_private import foreach, foreach_differences


class WeightAverage:
    """The running average of a model's parameters.

    Args:
        model: whose parameters are averaged, in fp32 whatever their format; frozen ones stay as they are.
        share: of the steps so far that the average covers, 0 to 1.
        trained: the weights that training updates, in the order of these parameters; default: the parameters.
    """

    def __init__(self, model: nn.Module, share: float, trained: Sequence[Tensor] | None = None) -> None:
        self.share = share
        named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        self._names = [name for name, _ in named]
        self._parameters = [parameter for _, parameter in named]
        self._trained = list(trained or self._parameters)
        self._average: list[Tensor] = [tensor.detach().float().clone() for tensor in self._trained]
        self._updates: Tensor | None = None

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Add the weights after `step` updates."""
        foreach("lerp", self._average, [tensor.float() for tensor in self._trained], 1 / (1 + self.share * step))

    @torch.no_grad()
    def update_where(self, allowed: Tensor, updates: int) -> None:
        """`update` on the device, where nobody has read yet whether the weights were changed.

        Args:
            allowed: whether they were: a bool scalar on the device.
            updates: the number of updates before, in the first call; later calls count on the device.
        """
        if self._updates is None:
            self._updates = torch.full((), float(updates), device=allowed.device)
        self._updates = self._updates + allowed
        weight = allowed / (1 + self.share * self._updates)
        steps = foreach_differences([tensor.detach().float() for tensor in self._trained], self._average)
        foreach("mul", steps, weight)
        foreach("add", self._average, steps)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the model has the averaged weights, in its own format."""
        own = [_read(parameter) for parameter in self._parameters]
        try:
            for parameter, average in zip(self._parameters, self._average, strict=True):
                _set(parameter, average.to(parameter.dtype))
            yield
        finally:
            for parameter, data in zip(self._parameters, own, strict=True):
                _set(parameter, data)

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """The average by parameter name; see `host_arrays`."""
        return host_arrays(dict(zip(self._names, self._average, strict=True)))

    def load_arrays(self, arrays: dict[str, npt.NDArray[Any]]) -> None:
        """Set the average from the `arrays` of an equal model; KeyError or RuntimeError if they do not fit."""
        self._updates = None
        for name, tensor in zip(self._names, self._average, strict=True):
            tensor.copy_(shard_like(tensor, arrays[name]))


# FSDP needs sharded weights at their addresses, so those are copied; other weights are exchanged.


def _read(parameter: Tensor) -> Tensor:
    return parameter.detach().clone() if hasattr(parameter, "full_tensor") else parameter.data


@torch.no_grad()
def _set(parameter: Tensor, data: Tensor) -> None:
    if hasattr(parameter, "full_tensor"):
        parameter.copy_(data)
    else:
        parameter.data = data
