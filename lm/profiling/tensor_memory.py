"""Where the memory of tensors goes: every block from its making to its end, and what it was for.

    with TensorMemory(device) as memory:
        trainer = make()
        memory.owner = "cell.l0"           # who makes the blocks that come now
        …
    memory.now, memory.peak                # bytes
    memory.timeline(kinds)                 # bytes of each kind after each change

Blocks are the storages of tensors that torch's operators give out, views of one storage counted once; what a kernel
takes and returns within one call is not seen. This is the same on every device, and on a CPU the only way to know:
there the allocator keeps no counters.
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
    "other": "in passing: logits, carried state, intermediate results",
}
"""What memory is for, in the order in which a picture stacks it."""


@dataclass(eq=False)
class Block:
    """The memory of one storage."""

    size: int
    owner: str
    """Who made it."""
    made: float
    """Seconds, as `time.perf_counter` counts them."""
    freed: float | None = None


class TooMuchMemory(Exception):  # noqa: N818
    """Tensors would take more than they may; raised before what is new was written to, so that it was never taken."""


class TensorMemory(TorchDispatchMode):
    """Follows the memory of all tensors that are made on one device, in this thread and its backward passes.

    Args:
        device: whose tensors are counted.
        limit: bytes that tensors may hold; what goes beyond raises `TooMuchMemory`. None: no limit.
    """

    def __init__(self, device: torch.device, *, limit: float | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device, self.limit = device, limit
        self.owner = ""
        """Who is at work: noted with each block."""
        self.now = 0
        """Bytes that tensors hold."""
        self.peak = 0
        """The most of it; set it to `now` to count from here."""
        self.blocks: list[Block] = []
        self._live: dict[int, Block] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Else torch's compiler is imported, which takes seconds and has nothing to do here.
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and note the memory of what it gives."""
        result = func(*args, **(kwargs or {}))
        # What was there before anyone looked, and is only seen in another way now, is not new.
        given = {key for tensor in tree_tensors((args, kwargs)) for key, _ in storages(tensor)}
        for tensor in tree_tensors(result):
            self._note(tensor, given)
        return result

    def blocks_of(self, tensors: Iterable[Tensor]) -> list[Block]:
        """The blocks that hold these tensors."""
        keys = [key for tensor in tensors for key, _ in storages(tensor)]
        return [self._live[key] for key in keys if key in self._live]

    def live(self) -> list[Block]:
        """All blocks that are held now."""
        return list(self._live.values())

    def _note(self, tensor: Tensor, given: set[int]) -> None:
        if tensor.device.type != self.device.type:
            return
        for key, storage in storages(tensor):
            size = storage.nbytes()
            if size and key not in self._live and key not in given:
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
    """Bytes of each kind after each change between two moments; the first entry is what was held at `begin`."""
    changes: list[tuple[float, Kind, int]] = []
    for block, kind in blocks:
        if block.made <= end and (block.freed is None or block.freed > begin):
            changes.append((max(block.made, begin), kind, block.size))
            if block.freed is not None and block.freed <= end:
                changes.append((block.freed, kind, -block.size))
    held: dict[Kind, int] = dict.fromkeys(KINDS, 0)
    found = [(begin, dict(held))]
    for moment, kind, change in sorted(changes, key=lambda each: each[0]):
        held[kind] += change
        if moment == found[-1][0]:
            found[-1] = (moment, dict(held))
        else:
            found.append((moment, dict(held)))
    return found


def state_tensors(optimizers: Iterable[torch.optim.Optimizer]) -> list[Tensor]:
    """All tensors that optimizers keep between steps."""
    return [
        value
        for optimizer in optimizers
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    ]


def gradients(model: nn.Module) -> list[Tensor]:
    """The gradients that a model's parameters have now."""
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
