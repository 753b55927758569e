"""What test_sharded.py checks of a sharded model, in two processes that torchrun starts.

torchrun --nproc-per-node 2 sharded.py TEXT FOLDER

leaves FOLDER/facts.json: the figures of rank 0, and under "other" those of rank 1.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lm.models.base import whole
from lm.runs.run_folder import RunFolder
from lm.training import distributed, last_checkpoint
from lm.training.last_checkpoint import TrainProgress
from lm.training.train_step import StepBatches, TrainStep
from tests.training import processes


class MadeBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that are made inside, also of those that are gone again."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if _plain(leaf)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if _plain(leaf) and leaf.untyped_storage().data_ptr() not in before:
                self.count += leaf.untyped_storage().nbytes()
        return result


def _plain(leaf: Any) -> bool:
    return type(leaf) is torch.Tensor and leaf.device.type == "cpu"


def made(work: Callable[[], Any]) -> tuple[Any, int]:
    """The result of `work`, and the bytes of tensors that it made and of arrays that it held at once."""
    tracemalloc.start()
    with MadeBytes() as tensors:
        found = work()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return found, tensors.count + peak


def make_step(text: Path, path: Path) -> tuple[TrainStep, StepBatches]:
    """A step of two parts and its batches, of a model whose weights are large beside everything else."""
    trainer = processes.open_trainer(text, path, "transformer-shard", more={"model.hidden_size": 128})
    return trainer.step, trainer.batches


def grad_norm(step: TrainStep, batches: StepBatches) -> float:
    return step.run(batches.of_step(1), 1.0).grad_norm


def main() -> None:
    text, folder = map(Path, sys.argv[1:])
    # As on a machine with a GPU.
    torch._C._get_accelerator = lambda check=False: torch.device("cuda")  # type: ignore[attr-defined]
    facts: dict[str, Any] = {}
    with distributed.joined() as world:
        step, batches = make_step(text, folder / "one")
        facts["devices"] = sorted({str(parameter.device_mesh.device_type) for parameter in step.model.parameters()})
        plain, calls = step.loss_function, []

        def fails_at_second_part(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            found = plain(*args, **kwargs)
            return dataclasses.replace(found, nats=found.nats * np.nan) if len(calls) == 2 else found

        step.loss_function = fails_at_second_part
        skipped = step.run(batches.of_step(0), 1.0)
        step.loss_function = plain
        facts["skipped"] = skipped.problem
        facts["after a skip"] = grad_norm(step, batches)
        run = RunFolder(folder / "one")
        facts["whole"] = 3 * 4 * sum(parameter.numel() for parameter in step.model.parameters())
        write, facts["saving"] = made(lambda: last_checkpoint.snapshot(run, step, TrainProgress(step=1)))
        facts["arrays"] = sum(map(len, step.weights().values()))
        write()
        if world.is_rank0:
            run.write_best(run.read_last()[1]["model"], step=1, valid_loss=2.0)
        world.barrier()
        other, others = make_step(text, folder / "two")
        facts["straight"] = grad_norm(other, others)
        _, facts["loading"] = made(lambda: last_checkpoint.load(run, other))
        sums = [[float(whole(w.detach()).double().sum()) for w in each.mixed.trained] for each in (step, other)]
        facts["restored"] = sums[0] == sums[1]
        every = world.all_gather(facts)
        if world.is_rank0:
            (folder / "facts.json").write_text(json.dumps({**every[0], "other": every[1]}), "utf-8")


if __name__ == "__main__":
    main()
