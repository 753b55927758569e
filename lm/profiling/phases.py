"""The phases of a step, and the parts of a model at work in them, as a trainer's own steps run.

    data ─► forward ─► loss ─► backward ─► optimizer              (with accumulation, all but the last several times)

Nothing is run for show: a listener hears of the steps that the trainer makes. Parts are the calls of the model's
modules and what the model itself names (`lm.models.profiled_parts`), because the native kernels do the work of several
modules at once. No hook hangs on a module, since a module that bears one makes the model leave the kernels. Work is the
innermost part's alone, so the parts add up to the whole. In backward a part is at work while the nodes run that its
forward made.
"""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from lm.kernels import autograd as kernels
from lm.machine import wait
from lm.models.base import TrainingLoss
from lm.models.profiled_parts import LOSS, OUTPUT_AND_LOSS, watched_by
from lm.torch_private import after_backward, function_of_node
from lm.training.trainer import Trainer

PHASES = "data", "forward", "loss", "backward", "optimizer"
REST = "(between the parts)"
"""Who is at work where no part is: residual sums, masks, torch's own bookkeeping."""


class Listener:
    """Hears of a trainer's steps; to be subclassed."""

    def on_phase(self, name: str) -> None:
        """A phase begins, and the one before has ended."""

    def on_part(self, name: str) -> None:
        """Another part is at work."""


@dataclass
class Part:
    """What is known of a part after a step."""

    name: str
    shape: tuple[int, ...] | None = None
    """Of its output."""
    calls: int = 0
    native: bool = False
    """A native kernel did some of it."""
    parameters: set[int] = field(default_factory=set)
    """Places among the model's parameters; a shared one is where it was first used."""


class Watch:
    """Shows a trainer's steps to a listener.

    Args:
        trainer: whose `run_step` is watched.
        listener: who hears of it.
        backward: also follow the parts in backward, by hooks on all nodes of the graph; they keep it alive until the
            end of the step, so that memory is to be measured without.
    """

    def __init__(self, trainer: Trainer, listener: Listener, *, backward: bool) -> None:
        self.parts: dict[str, Part] = {}
        self._trainer, self._listener, self._backward = trainer, listener, backward
        self._stack: list[str] = []
        self._claimed: dict[Any, str] = {}
        self._numbers = {id(parameter): number for number, parameter in enumerate(trainer.model.parameters())}
        self._placed: set[int] = set()

    @contextlib.contextmanager
    def on(self) -> Iterator[Watch]:
        """Inside, the trainer's steps are watched."""
        model = self._trainer.model
        names = {module: name for name, module in model.named_modules() if name}

        def enter(module: nn.Module, inputs: Any) -> None:
            if module in names:
                self._enter(names[module], inputs)

        def leave(module: nn.Module, inputs: Any, output: Any) -> None:
            if module in names:
                self._leave(output)

        hooks = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave)]
        # What a step calls, whether one process trains or several.
        parallel = self._trainer.parallel
        parallel.training_loss = self._watched(parallel.training_loss)  # type: ignore[method-assign]
        try:
            yield self
        finally:
            del parallel.training_loss
            for hook in hooks:
                hook.remove()

    def step(self) -> None:
        """One watched step."""
        self._listener.on_phase("data")
        self._trainer.run_step()
        self._listener.on_phase("")
        self._claimed.clear()

    # -- forward ------------------------------------------------------------------------------------

    def _watched(self, plain: Callable[..., TrainingLoss]) -> Callable[..., TrainingLoss]:
        def training_loss(*args: Any, **kwargs: Any) -> TrainingLoss:
            self._listener.on_phase("forward")
            self._listener.on_part(REST)
            with watched_by(self._part):
                found = plain(*args, **kwargs)
            self._claim(found.objective, REST)
            self._follow(found.objective)
            return found

        return training_loss

    def _part(self, name: str, work: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name in (LOSS, OUTPUT_AND_LOSS):
            self._listener.on_phase("loss")
        self._enter(name, args)
        output = work(*args, **kwargs)
        self._leave(output)
        return output

    def _enter(self, name: str, inputs: Any) -> None:
        # What made the inputs is work of the part around this one.
        for tensor in _tensors(inputs):
            self._claim(tensor, self._at_work())
        self._stack.append(name)
        self._listener.on_part(name)

    def _leave(self, output: Any) -> None:
        name = self._stack.pop()
        part = self.parts.setdefault(name, Part(name))
        part.calls += 1
        for tensor in _tensors(output):
            if part.shape is None:
                part.shape = tuple(tensor.shape)
            self._claim(tensor, name)
        self._listener.on_part(self._at_work())

    def _at_work(self) -> str:
        return self._stack[-1] if self._stack else REST

    def _claim(self, tensor: Tensor, name: str) -> None:
        """The nodes that made a tensor are this part's, but for those that are another's already."""
        if not self._backward:
            return
        waiting = [tensor.grad_fn]
        part = self.parts.setdefault(name, Part(name))
        while waiting:
            node = waiting.pop()
            if node is None or node in self._claimed:
                continue
            if (parameter := getattr(node, "variable", None)) is not None:
                number = self._numbers.get(id(parameter))
                if number is not None and number not in self._placed:
                    self._placed.add(number)
                    part.parameters.add(number)
                continue
            self._claimed[node] = name
            made_by = function_of_node(node)
            part.native |= made_by is not None and made_by.__module__ == kernels.__name__
            waiting.extend(following for following, _ in node.next_functions)

    # -- backward -----------------------------------------------------------------------------------

    def _follow(self, objective: Tensor) -> None:
        listener = self._listener
        assert objective.grad_fn is not None

        def begin(_: Any) -> None:
            listener.on_phase("backward")
            listener.on_part(REST)
            after_backward(lambda: listener.on_phase("optimizer"))

        def at_work(name: str) -> Callable[..., None]:
            # What a hook returns would take the gradients' place.
            return lambda *gradients: listener.on_part(name)

        objective.grad_fn.register_prehook(begin)
        for node, name in self._claimed.items():
            node.register_prehook(at_work(name))
            node.register_hook(at_work(REST))


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, tuple | list):
        for each in output:
            yield from _tensors(each)


class Clock:
    """Moments on a device: what was asked for before a moment was done by then, and nobody waits for it meanwhile."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def now(self) -> Any:
        """This moment."""
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            return event
        wait(self._device)
        return time.perf_counter()

    def seconds(self, begin: Any, end: Any) -> float:
        """Between two moments, both of them past."""
        if self._device.type == "cuda":
            return float(begin.elapsed_time(end)) / 1000
        return float(end - begin)


class Times(Listener):
    """How long each phase took, and each part in it."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._clock = device, Clock(device)
        self._moments: list[tuple[Any, str, str]] = []
        self._phase = ""

    def on_phase(self, name: str) -> None:
        """See `Listener.on_phase`."""
        self._phase = name
        self._moments.append((self._clock.now(), name, REST))

    def on_part(self, name: str) -> None:
        """See `Listener.on_part`."""
        self._moments.append((self._clock.now(), self._phase, name))

    def take(self) -> dict[tuple[str, str], float]:
        """Seconds by phase and part since the last taking."""
        wait(self._device)
        spent: dict[tuple[str, str], float] = defaultdict(float)
        for (begin, phase, part), (end, *_) in zip(self._moments, self._moments[1:], strict=False):
            if phase:
                spent[phase, part] += self._clock.seconds(begin, end)
        self._moments.clear()
        return spent
