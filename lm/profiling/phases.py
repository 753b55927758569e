"""The phases of a training step, and the parts of a model that run in them.

    data ─► forward ─► loss ─► backward ─► optimizer              (with accumulation, all but the last several times)

Parts are the calls of the model's modules, and the parts that the model names itself (`lm.models.profiled_parts`),
because a native kernel does the work of several modules at once. Modules get no hooks: a module with a hook does not
use the native kernels. Work belongs to the innermost part, so the parts add up to the whole step. In backward a part
runs while the autograd nodes of its forward run.
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
from lm.models.profiled_parts import LOSS, OUTPUT_AND_LOSS, observe_parts
from lm.profiling.trial import Trial
from lm.torch_private import after_backward, function_of_node

PHASES = "data", "forward", "loss", "backward", "optimizer"
REST = "(between the parts)"
"""The work of no part: residual sums, masks, torch's own bookkeeping."""


class Listener:
    """Receives the events of watched steps; override the methods."""

    def on_phase(self, name: str) -> None:
        """A phase begins, and the one before has ended."""

    def on_part(self, name: str) -> None:
        """Another part runs."""


@dataclass
class Part:
    """Facts about a part, after a step."""

    name: str
    shape: tuple[int, ...] | None = None
    """Of its output."""
    calls: int = 0
    native: bool = False
    """Whether a native kernel does some of its work."""
    parameters: set[int] = field(default_factory=set)
    """Indices among the model's parameters; a shared one belongs to its first user."""


class Watch:
    """Sends the phases and parts of a trial's steps to a listener.

    Args:
        trial: whose steps are watched.
        listener: receives the events.
        backward: also follow the parts in backward, by hooks on all nodes of the graph. They keep it alive until the
            end of the step, so measure memory without.
    """

    def __init__(self, trial: Trial, listener: Listener, *, backward: bool) -> None:
        self.parts: dict[str, Part] = {}
        self._trial, self._listener, self._backward = trial, listener, backward
        self._stack: list[str] = []
        self._owners: dict[Any, str] = {}
        """The part of each autograd node."""
        self._numbers = {id(parameter): number for number, parameter in enumerate(trial.step.model.parameters())}
        self._assigned: set[int] = set()

    @contextlib.contextmanager
    def on(self) -> Iterator[Watch]:
        """Inside, steps can be watched."""
        step = self._trial.step
        names = {module: name for name, module in step.model.named_modules() if name}

        def enter(module: nn.Module, inputs: Any) -> None:
            if module in names:
                self._enter(names[module], inputs)

        def leave(module: nn.Module, inputs: Any, output: Any) -> None:
            if module in names:
                self._leave(output)

        hooks = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave)]
        plain, step.loss_function = step.loss_function, self._watched(step.loss_function)
        try:
            yield self
        finally:
            step.loss_function = plain
            for hook in hooks:
                hook.remove()

    def step(self, *, with_metrics: bool = False) -> None:
        """One watched step."""
        self._listener.on_phase("data")
        self._trial.run_step(with_metrics=with_metrics)
        self._listener.on_phase("")
        self._owners.clear()

    # -- forward ------------------------------------------------------------------------------------

    def _watched(self, plain: Callable[..., TrainingLoss]) -> Callable[..., TrainingLoss]:
        def loss_function(*args: Any, **kwargs: Any) -> TrainingLoss:
            self._listener.on_phase("forward")
            self._listener.on_part(REST)
            with observe_parts(self._part):
                found = plain(*args, **kwargs)
            self._own(found.objective, REST)
            self._follow(found.objective)
            return found

        return loss_function

    def _part(self, name: str, work: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name in (LOSS, OUTPUT_AND_LOSS):
            self._listener.on_phase("loss")
        self._enter(name, args)
        output = work(*args, **kwargs)
        self._leave(output)
        return output

    def _enter(self, name: str, inputs: Any) -> None:
        # The nodes of the inputs belong to the part around this one.
        for tensor in _tensors(inputs):
            self._own(tensor, self._current())
        self._stack.append(name)
        self._listener.on_part(name)

    def _leave(self, output: Any) -> None:
        name = self._stack.pop()
        part = self.parts.setdefault(name, Part(name))
        part.calls += 1
        for tensor in _tensors(output):
            if part.shape is None:
                part.shape = tuple(tensor.shape)
            self._own(tensor, name)
        self._listener.on_part(self._current())

    def _current(self) -> str:
        return self._stack[-1] if self._stack else REST

    def _own(self, tensor: Tensor, name: str) -> None:
        """Give a part the nodes that made a tensor, except those that another part has already."""
        if not self._backward:
            return
        waiting = [tensor.grad_fn]
        part = self.parts.setdefault(name, Part(name))
        while waiting:
            node = waiting.pop()
            if node is None or node in self._owners:
                continue
            if (parameter := getattr(node, "variable", None)) is not None:
                number = self._numbers.get(id(parameter))
                if number is not None and number not in self._assigned:
                    self._assigned.add(number)
                    part.parameters.add(number)
                continue
            self._owners[node] = name
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

        def notify(name: str) -> Callable[..., None]:
            # A hook's return value would replace the gradients, so it returns None.
            return lambda *gradients: listener.on_part(name)

        objective.grad_fn.register_prehook(begin)
        for node, name in self._owners.items():
            node.register_prehook(notify(name))
            node.register_hook(notify(REST))


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, tuple | list):
        for each in output:
            yield from _tensors(each)


class Times(Listener):
    """The time of each phase, and of each part in it. On CUDA it uses events, so that nothing waits for the GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._moments: list[tuple[Any, str, str]] = []
        self._phase = ""

    def on_phase(self, name: str) -> None:
        """See `Listener.on_phase`."""
        self._phase = name
        self.on_part(REST)

    def on_part(self, name: str) -> None:
        """See `Listener.on_part`."""
        self._moments.append((self._now(), self._phase, name))

    def take(self) -> dict[tuple[str, str], float]:
        """Seconds by phase and part since the last call."""
        wait(self._device)
        spent: dict[tuple[str, str], float] = defaultdict(float)
        for (begin, phase, part), (end, *_) in zip(self._moments, self._moments[1:], strict=False):
            if phase:
                spent[phase, part] += self._seconds(begin, end)
        self._moments.clear()
        return spent

    def _now(self) -> Any:
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            # Without a stream it would be that of the current device, which is the first one.
            event.record(torch.cuda.current_stream(self._device))
            return event
        wait(self._device)
        return time.perf_counter()

    def _seconds(self, begin: Any, end: Any) -> float:
        return float(begin.elapsed_time(end)) / 1000 if self._device.type == "cuda" else float(end - begin)
