"""An average of the weights over the last steps, which generalises better than the last weights do.

The average looks back on a fixed share of the steps so far, so that no length has to be known in advance: at step t the
new weights enter with 1 / (1 + share × t).

Sources: Polyak and Juditsky 1992; Shamir and Zhang 2013 (averages that forget the beginning).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from lm.models.base import host_array, shard_like
from lm.torch_private import foreach


class WeightAverage:
    """The running average of a model's parameters.

    Args:
        model: whose parameters are averaged, in fp32 whatever their format.
        share: of the steps so far that the average looks back on, 0 to 1.
        followed: the weights that training updates, in the order of the parameters; default: those themselves.
    """

    def __init__(self, model: nn.Module, share: float, followed: Sequence[Tensor] | None = None) -> None:
        self.share = share
        self._names = [name for name, _ in model.named_parameters()]
        self._parameters = list(model.parameters())
        self._followed = list(followed or self._parameters)
        self._average: list[Tensor] = [tensor.detach().float().clone() for tensor in self._followed]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after `step` updates."""
        foreach("lerp", self._average, [tensor.float() for tensor in self._followed], 1 / (1 + self.share * step))

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """The model has the averaged weights inside, in its own format, and its own again after."""
        own = [_held(parameter) for parameter in self._parameters]
        try:
            for parameter, average in zip(self._parameters, self._average, strict=True):
                _put(parameter, average.to(parameter.dtype))
            yield
        finally:
            for parameter, data in zip(self._parameters, own, strict=True):
                _put(parameter, data)

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """The average as host arrays, by parameter name; all processes must ask where it is spread over them."""
        return {name: host_array(tensor) for name, tensor in zip(self._names, self._average, strict=True)}

    def load_arrays(self, arrays: dict[str, npt.NDArray[Any]]) -> None:
        """Set the average from `arrays` of an equal model; KeyError or RuntimeError where they do not fit."""
        for name, tensor in zip(self._names, self._average, strict=True):
            tensor.copy_(shard_like(tensor, torch.from_numpy(np.array(arrays[name]))))


# FSDP looks for the weights that it has spread where they were: they are copied, and any others exchanged.


def _held(parameter: Tensor) -> Tensor:
    return parameter.detach().clone() if hasattr(parameter, "full_tensor") else parameter.data


@torch.no_grad()
def _put(parameter: Tensor, data: Tensor) -> None:
    if hasattr(parameter, "full_tensor"):
        parameter.copy_(data)
    else:
        parameter.data = data
