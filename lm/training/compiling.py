"""The forward pass and loss of a step, compiled: `--compile`.

    inductor       torch.compile makes kernels of the whole pass and its backward pass; takes about a minute once
    cuda graphs    a recorded pass is replayed with one launch; for recurrent layers, which the compiler does not fuse

Parameters stay in the model, so names and files are those of a run that is not compiled. Optimizers are not compiled.
Compilation leaves random generators as they are, so a resumed run, which compiles again, gets the same numbers.

Sources: Ansel et al. 2024 (torch.compile); torch.cuda.make_graphed_callables.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lm.models.base import LanguageModel, State, TrainingLoss

Kind = Literal["inductor", "cuda graphs"]
BACKEND = "inductor"
"""Of torch.compile."""
COSTS: dict[Kind, float] = {"inductor": 60.0, "cuda graphs": 2.0}
"""Seconds that compilation may take, estimated."""
PAYS_AFTER = 4.0
"""A plan of this many times the cost is compiled: then even a gain of a third pays."""
MEASURED_STEPS = 20
"""Steps that tell how long a plan in steps takes."""
MAX_GRAPHS = 3
"""Recorded passes; each keeps the memory of its activations."""
_records: ContextVar[bool] = ContextVar("records", default=False)


def kind_for(model: LanguageModel) -> Kind:
    """How a model's step is compiled."""
    return "cuda graphs" if model.recurrent_tensors else "inductor"


def obstacle(kind: Kind, device: torch.device, *, processes: int, parts: int) -> str | None:
    """Why a step cannot be compiled; None if it can.

    Args:
        kind: of compilation.
        device: of the model.
        processes: that train together.
        parts: batches of a step.
    """
    if processes > 1:
        return "several processes train together"
    if kind == "cuda graphs" and device.type != "cuda":
        return f"a recurrent model is compiled to CUDA graphs, and the device is {device.type}"
    if kind == "cuda graphs" and parts > 1:
        return "CUDA graphs keep gradients at one address, and training.gradient_accumulation adds them up"
    return None


def pays(kind: Kind, seconds: float) -> tuple[bool, str]:
    """Whether compilation makes a plan of this many seconds shorter, and a sentence for the log."""
    least = COSTS[kind] * PAYS_AFTER
    if seconds >= least:
        how = "recorded as CUDA graphs" if kind == "cuda graphs" else "compiled, which takes about a minute"
        return True, f"The training step is {how}, because the plan takes {seconds:,.0f} s (--compile off prevents it)."
    return False, (
        f"The training step is not compiled: compilation pays for plans of {least:,.0f} s or more, and this one takes "
        f"{seconds:,.0f} s (--compile on forces it)."
    )


@dataclass(frozen=True)
class CompiledLoss(TrainingLoss):
    """A loss with the accuracy, which is computed in the same pass."""

    accuracy: Tensor | None = None
    """The share of targets with the highest logit; None if there are no logits."""


LossFunction = Callable[..., TrainingLoss]


def compiled(model: LanguageModel, kind: Kind, *, carries_state: bool) -> LossFunction:
    """The model's `training_loss`, to be called in `compiling`: there it is compiled.

    Args:
        model: in training mode.
        kind: of compilation.
        carries_state: whether a batch continues the one before; those that do not are too seldom for a graph.
    """
    return _by_inductor(model) if kind == "inductor" else _Graphs(model, carries_state=carries_state)


def _by_inductor(model: LanguageModel) -> LossFunction:
    """See `compiled`; for models whose state is not carried from batch to batch."""

    def compute(ids: Tensor, targets: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor | None]:
        return _numbers(model.training_loss(ids, targets, None, **options), targets)

    run: Callable[..., Any] = torch.compile(compute, backend=BACKEND)

    def loss(ids: Tensor, targets: Tensor, state: State | None = None, **options: Any) -> TrainingLoss:
        objective, nats, accuracy = run(ids, targets, options)
        return CompiledLoss(objective, nats, State({}), accuracy=accuracy)

    return loss


def _numbers(found: TrainingLoss, targets: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Objective, nats and accuracy."""
    if found.logits is None:
        return found.objective, found.nats, None
    return found.objective, found.nats, (found.logits().argmax(dim=-1) == targets).float().mean()


class _Graphs:
    """See `compiled`. In `compiling`, calls record a graph for each shape of batches; others run without one."""

    def __init__(self, model: LanguageModel, *, carries_state: bool) -> None:
        self._model, self._carries_state = model, carries_state
        self._recorded: dict[Any, _Pass] = {}

    def __call__(self, ids: Tensor, targets: Tensor, state: State | None = None, **options: Any) -> TrainingLoss:
        """See `LanguageModel.training_loss`."""
        inputs = _Inputs.of(ids, targets, state, options)
        key = tuple((name, tensor.shape, tensor.dtype) for name, tensor in inputs.tensors.items())
        known = self._recorded.get(key)
        if known is None:
            known = _Pass(self._model, inputs)
            wanted = (state is not None) == self._carries_state
            if wanted and _records.get() and len(self._recorded) < MAX_GRAPHS:
                known.record(inputs)
                self._recorded[key] = known
        return known.loss(inputs)


@dataclass(frozen=True)
class _Inputs:
    """The arguments of a pass: tensors by name, and the rest."""

    tensors: dict[str, Tensor]
    state: State | None
    options: dict[str, Any]

    @classmethod
    def of(cls, ids: Tensor, targets: Tensor, state: State | None, options: dict[str, Any]) -> _Inputs:
        tensors, rest = {"ids": ids, "targets": targets}, dict(options)
        for name, tensor in ({} if state is None else state.tensors).items():
            tensors[f"{STATE}{name}"] = tensor
        for name, tensor in (rest.pop("host_inputs", None) or {}).items():
            tensors[f"{HOST}{name}"] = tensor
        if (soft := rest.pop("soft_targets", None)) is not None:
            tensors["soft_targets"] = soft
        return cls(tensors, state, rest)

    def with_tensors(self, values: tuple[Tensor, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of `training_loss`, with these tensors in place of the own ones."""
        named = dict(zip(self.tensors, values, strict=True))
        state = None if self.state is None else replace(self.state, tensors=_part(named, STATE))
        options = {**self.options, "soft_targets": named.get("soft_targets")}
        if host := _part(named, HOST):
            options["host_inputs"] = host
        return (named["ids"], named["targets"], state), options


STATE, HOST = "state ", "host "


def _part(named: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): each for name, each in named.items() if name.startswith(prefix)}


class _Pass(nn.Module):
    """A pass from tensors to tensors, which a graph can record: objective, nats, then the state's."""

    def __init__(self, model: LanguageModel, inputs: _Inputs) -> None:
        super().__init__()
        self.model = model
        self._inputs = replace(inputs, tensors=dict.fromkeys(inputs.tensors))  # type: ignore[arg-type]
        self._found: TrainingLoss | None = None

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        """The numbers, for the values of all input tensors."""
        arguments, options = self._inputs.with_tensors(values)
        # A recorded graph writes to these tensors each time, so `logits` gives those of the last pass.
        self._found = found = self.model.training_loss(*arguments, **options)
        return found.objective, found.nats, *(tensor.detach() for tensor in found.state.tensors.values())

    def record(self, inputs: _Inputs) -> None:
        """Record the pass and its backward pass."""
        with _without_autocast_cache():
            # The recorded pass overwrites its inputs.
            samples = tuple(tensor.detach().clone() for tensor in inputs.tensors.values())
            # It replaces `forward`.
            torch.cuda.make_graphed_callables(self, samples, allow_unused_input=True)

    def loss(self, inputs: _Inputs) -> TrainingLoss:
        """The loss of inputs with the recorded shapes."""
        objective, nats, *state = self(*inputs.tensors.values())
        assert self._found is not None
        # The next pass writes its results to the same memory.
        copies = dict(zip(self._found.state.tensors, (tensor.detach().clone() for tensor in state), strict=True))
        after = replace(self._found.state, tensors=copies)
        return TrainingLoss(objective, nats.detach().clone(), after, self._found.logits)


@contextlib.contextmanager
def compiling(device: torch.device) -> Iterator[None]:
    """Inside, compiled losses are compiled by their calls; random generators are as before afterwards."""
    token = _records.set(True)
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []), warnings.catch_warnings():
            # Notices of the compiler about its own work.
            warnings.simplefilter("ignore")
            yield
    finally:
        _records.reset(token)


@contextlib.contextmanager
def _without_autocast_cache() -> Iterator[None]:
    """Inside, autocast casts weights in each use, as a recorded pass must."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)
