"""An average of the weights over the last steps, which generalises better than the last weights do.

The average looks back on a fixed share of the steps so far, so that no length has to be known in advance: at step t the
new weights enter with 1 / (1 + share × t).

Sources: Polyak and Juditsky 1992; Shamir and Zhang 2013 (averages that forget the beginning).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from lm.models.base import spread_like, whole


class WeightAverage:
    """The running average of a model's parameters.

    Args:
        model: whose parameters are followed.
        share: of the steps so far that the average looks back on, 0 to 1.
    """

    def __init__(self, model: nn.Module, share: float) -> None:
        self.share = share
        self._names = [name for name, _ in model.named_parameters()]
        self._followed: list[nn.Parameter] = list(model.parameters())
        self._average: list[Tensor] = [parameter.detach().clone() for parameter in self._followed]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after `step` updates."""
        torch._foreach_lerp_(self._average, list(self._followed), 1 / (1 + self.share * step))

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """The model has the averaged weights inside, and its own again after."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        # By values: weights that are spread over processes (FSDP) stay where the others look for them.
        for parameter, average in zip(self._followed, self._average, strict=True):
            own = parameter.clone()
            parameter.copy_(average)
            average.copy_(own)

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """The average as host arrays, by parameter name; all processes must ask where it is spread over them."""
        pairs = zip(self._names, self._average, strict=True)
        return {name: np.array(whole(tensor).cpu().numpy()) for name, tensor in pairs}

    def load_arrays(self, arrays: dict[str, npt.NDArray[Any]]) -> None:
        """Set the average from `arrays` of an equal model; KeyError or RuntimeError where they do not fit."""
        for name, tensor in zip(self._names, self._average, strict=True):
            tensor.copy_(spread_like(tensor, torch.from_numpy(np.array(arrays[name]))))
