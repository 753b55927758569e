"""The memory of tensors: each block with its begin, its end and its purpose.

    with TensorMemory(device) as memory:
        step = TrainStep(model, config)
        memory.owner = "cell.l0"           # the owner of the next blocks
        …
    memory.now, memory.peak                # bytes

Blocks are the storages of tensors that torch's operators return; views of one storage count once. Memory that a kernel
allocates and frees within one call is not seen. This works on every device; on a CPU the allocator has no counters.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lm.torch_private import storages, tree_tensors

Kind = Literal["weights", "optimizer", "gradients", "kept", "other"]
KINDS: dict[Kind, str] = {
    "weights": "weights and their copies",
    "optimizer": "optimizer's moments",
    "gradients": "gradients",
    "kept": "kept for backward",
    "other": "temporary: logits, carried state, intermediate results",
}
"""The purposes of memory, in the order in which a picture stacks them."""


@dataclass(eq=False)
class Block:
    """The memory of one storage."""

    size: int
    owner: str
    made: float
    """Seconds, as from `time.perf_counter`."""
    freed: float | None = None


class TooMuchMemory(Exception):  # noqa: N818
    """Tensors would exceed the limit; raised before anything is written to the new one."""


class TensorMemory(TorchDispatchMode):
    """Tracks the memory of all tensors that this thread and its backward passes make on one device.

    Args:
        device: whose tensors are counted.
        limit: bytes; a tensor beyond it raises `TooMuchMemory`. None: no limit.
    """

    def __init__(self, device: torch.device, *, limit: float | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device, self.limit = device, limit
        self.owner = ""
        """Stored with each new block."""
        self.now = 0
        """Bytes that tensors hold."""
        self.peak = 0
        """The largest `now`; set it to `now` to restart."""
        self.blocks: list[Block] = []
        self._live: dict[int, Block] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Else torch's compiler is imported, which takes seconds.
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and count the memory of its result."""
        result = func(*args, **(kwargs or {}))
        # An older tensor that is first seen now, through a view, is not new.
        inputs = {key for tensor in tree_tensors((args, kwargs)) for key, _ in storages(tensor)}
        for tensor in tree_tensors(result):
            self._count(tensor, inputs)
        return result

    def blocks_of(self, tensors: Iterable[Tensor]) -> list[Block]:
        """The blocks that hold these tensors."""
        keys = [key for tensor in tensors for key, _ in storages(tensor)]
        return [self._live[key] for key in keys if key in self._live]

    def live(self) -> list[Block]:
        """All blocks that are held now."""
        return list(self._live.values())

    def _count(self, tensor: Tensor, inputs: set[int]) -> None:
        if tensor.device.type != self.device.type:
            return
        for key, storage in storages(tensor):
            size = storage.nbytes()
            if size and key not in self._live and key not in inputs:
                block = Block(size, self.owner, time.perf_counter())
                self.blocks.append(block)
                self._live[key] = block
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._free, key).atexit = False
        if self.limit is not None and self.now > self.limit:
            raise TooMuchMemory

    def _free(self, key: int) -> None:
        block = self._live.pop(key)
        block.freed = time.perf_counter()
        self.now -= block.size


def timeline(blocks: Iterable[tuple[Block, Kind]], begin: float, end: float) -> list[tuple[float, dict[Kind, int]]]:
    """Bytes of each kind at `begin`, and after each change until `end`."""
    changes: list[tuple[float, Kind, int]] = []
    for block, kind in blocks:
        if block.made <= end and (block.freed is None or block.freed > begin):
            changes.append((max(block.made, begin), kind, block.size))
            if block.freed is not None and block.freed <= end:
                changes.append((block.freed, kind, -block.size))
    held: dict[Kind, int] = dict.fromkeys(KINDS, 0)
    found = {begin: dict(held)}
    for moment, kind, change in sorted(changes, key=lambda each: each[0]):
        held[kind] += change
        found[moment] = dict(held)
    return list(found.items())


def state_tensors(optimizers: Iterable[torch.optim.Optimizer]) -> list[Tensor]:
    """All tensors in the state of optimizers."""
    states = [state for optimizer in optimizers for state in optimizer.state.values()]
    return [value for state in states for value in state.values() if isinstance(value, Tensor)]


def gradients(model: nn.Module) -> list[Tensor]:
    """The gradients that a model's parameters have now."""
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
