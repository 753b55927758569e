"""Batches for a GPU, made while a step runs.

    batch of the number ─► the model's host inputs ─► pinned memory        (in another thread, some batches ahead)
                                                          └─► the device, when the step begins, without a wait

A batch depends only on its number, so the order, a resume and the seeds are those of `lm.corpora.batches`.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch

from lm.corpora.batches import Batch, Batches
from lm.models.base import LanguageModel

AHEAD = 2
"""Batches that are made before they are needed."""


class Prefetch:
    """Makes batches with `Batch.pinned`, the next ones in another thread.

    Args:
        batches: of the training split.
        model: whose host inputs they need.
    """

    def __init__(self, batches: Batches, model: LanguageModel) -> None:
        self._batches, self._model = batches, model
        # The thread ends with this object, or with the program.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._made: dict[int, Future[Batch]] = {}

    def batch(self, index: int) -> Batch:
        """The batch of this number, from 0; the next ones are started."""
        self._made = {number: made for number, made in self._made.items() if index <= number <= index + AHEAD}
        for number in range(index, index + AHEAD + 1):
            if number not in self._made:
                self._made[number] = self._thread.submit(self._make, number)
        return self._made.pop(index).result()

    @torch.no_grad()
    def _make(self, index: int) -> Batch:
        batch = self._batches.batch(index)
        tensors = {"inputs": torch.from_numpy(batch.inputs), "targets": torch.from_numpy(batch.targets)}
        if batch.learned is not None:
            tensors["learned"] = torch.from_numpy(batch.learned)
        if self._model.host_context is not None:
            earlier = self._earlier(index, self._model.host_context)
            tensors |= self._model.host_inputs(batch.inputs, batch.targets, earlier)
        return replace(batch, pinned={name: tensor.pin_memory() for name, tensor in tensors.items()})

    def _earlier(self, index: int, count: int) -> npt.NDArray[np.int64] | None:
        """The last inputs (B, at most `count`) before a batch; None if it begins a text."""
        parts: list[npt.NDArray[np.int64]] = []
        missing, fresh = count, self._batches.batch(index).fresh
        while missing > 0 and not fresh:
            index -= 1
            before = self._batches.batch(index)
            parts.insert(0, before.inputs[:, -missing:])
            missing, fresh = missing - parts[0].shape[1], before.fresh
        return np.concatenate(parts, axis=1) if parts else None
