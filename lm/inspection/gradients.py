"""Gradients through time: how much a state k steps ago changes the loss now.

For sampled positions t of a text, with L_t the loss of the token after t and h_{t-k} a layer's hidden state:

1. the norm of dL_t/dh_{t-k} for k = 0, 1, …, through the model's graph, so over all paths;
2. the largest singular values of the recurrent Jacobian: of a layer's state by its state one step before, with the
   layer's input fixed. The state of an LSTM is its hidden state and its cell state together;
3. how far gates are open, and the share of tanh outputs that are saturated.

A factor below 1 a step lets gradients vanish: the model cannot learn what needs longer memory.

    found = gradients([fresh("gru-char", text), fresh("lstm-char", text)], steps=64)
    found.models[0].main.median          # (65,)

Each position is the last one of a window of text that begins with the state of the text before it. A Transformer has no
such state: its window is its context, and L_t reaches h_{t-k} by attention.

Shapes: P positions, K steps, B windows at once, W tokens of a window, H hidden, S values of a layer's state.

Sources: Hochreiter 1991; Bengio, Simard and Frasconi 1994; Pascanu, Mikolov and Bengio 2013.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lm.device import TO_USE, enough_memory
from lm.errors import ConfigError, CorpusError
from lm.inspection.subject import Subject
from lm.models.base import Inspection, LanguageModel, State

Floats = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]

POSITIONS = 256
STEPS = 64
"""The largest lag by default, if the contexts of the models allow it."""
JACOBIAN_POSITIONS = 16
"""Fewer for wide layers: see `MAX_JACOBIAN_WORK`."""
MAX_JACOBIAN_WORK = 2e9
"""Positions times the third power of the values of a layer's state: some seconds."""
SINGULAR_VALUES = 5
MAX_TOKENS = 20_000
"""Of a longer text, the first tokens are used."""
MAX_STEPS = 4096
SATURATED = 0.97
"""Above this absolute value tanh has less than 6 % of the derivative that it has at 0."""
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
LAG_PARTS = ("cells", "hidden", "inputs")
"""The parts whose gradients are measured, if the model has them; those that keep most first."""
LOSS_SCALE = 2.0**64
"""Keeps gradients that are small in float32's range; norms are divided by it."""
_TOKENS_AT_ONCE, _LOGITS_AT_ONCE = 2048, 1 << 22
"""Of the windows in memory at a time; at least one window."""


@dataclass(frozen=True)
class LagNorms:
    """Norms of dL_t/dh_{t-k} of one layer, over the positions t; entry k is for lag k."""

    part: str
    """hidden, cells or inputs (the embeddings)."""
    layer: int
    """From 0."""
    median: Floats
    """(K + 1,)"""
    lower: Floats
    """(K + 1,): a quarter of the positions is below."""
    upper: Floats
    """(K + 1,): a quarter of the positions is above."""

    @property
    def factor_per_step(self) -> float:
        """The mean factor (geometric) of the median from one lag to the next; 0 if the median at lag K is 0.

        It begins at lag 1, because lag 0 also has the direct path from the state to the loss.
        """
        first = min(1, len(self.median) - 2)
        begin, end = self.median[first], self.median[-1]
        return float((end / begin) ** (1 / (len(self.median) - 1 - first))) if begin > 0 and end > 0 else 0.0


@dataclass(frozen=True)
class JacobianValues:
    """Singular values of the recurrent Jacobian of one layer."""

    layer: int
    largest: Floats
    """(positions, up to 5), falling."""


@dataclass(frozen=True)
class GateOpenness:
    """Values of one gate, from 0 (closed) to 1 (open), over positions and units."""

    layer: int
    gate: str
    mean: float
    quantiles: tuple[float, ...]
    """At `QUANTILES`."""


@dataclass(frozen=True)
class SaturatedShare:
    """The share of a layer's tanh outputs whose absolute value is above `SATURATED`."""

    layer: int
    share: float


@dataclass(frozen=True)
class ModelGradients:
    """All measures of one model."""

    name: str
    tokens: int
    """Of the text that was used."""
    positions: int
    norms: tuple[LagNorms, ...]
    jacobians: tuple[JacobianValues, ...]
    """Empty without a recurrent state."""
    gates: tuple[GateOpenness, ...]
    """Empty without gates."""
    saturated: tuple[SaturatedShare, ...]
    """Empty without tanh outputs."""

    @property
    def main(self) -> LagNorms:
        """The norms to compare models by: of the last layer whose earlier states change the loss.

        This is a recurrent model's last layer: its cell state, if it has one, because that is what an LSTM keeps. In a
        Transformer the outputs of the last block change only the loss of their own position.
        """
        for part in LAG_PARTS:
            changing = [norms for norms in self.norms if norms.part == part and norms.median[1:].any()]
            if changing:
                return changing[-1]
        return self.norms[-1]


@dataclass(frozen=True)
class Gradients:
    """The measures of several models."""

    steps: int
    """The largest lag K."""
    models: tuple[ModelGradients, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values; arrays become lists."""
        plain: dict[str, Any] = _plain(asdict(self))
        for found, model in zip(plain["models"], self.models, strict=True):
            found["main"] = {"part": model.main.part, "layer": model.main.layer}
            for norms, measured in zip(found["norms"], model.norms, strict=True):
                norms["factor_per_step"] = measured.factor_per_step
        return plain | {"quantiles": list(QUANTILES), "saturated_above": SATURATED}


def gradients(subjects: Sequence[Subject], *, steps: int | None = None, positions: int = POSITIONS) -> Gradients:
    """Measure models, each on its own tokens.

    Args:
        subjects: models with texts (`lm.inspection.subject`).
        steps: the largest lag K; None: `STEPS`, or as many as the shortest context allows.
        positions: at most this many positions t, evenly over the text.

    Raises:
        UnsupportedPartError: a model has no hidden states.
        ConfigError: `steps` is out of bounds, or a model's context is shorter.
        CorpusError: a text is too short.
        DeviceError: the memory is not enough.
    """
    if steps is None:
        contexts = [each.model.context_length for each in subjects if each.model.context_length is not None]
        steps = max(1, min([STEPS, *(context - 1 for context in contexts)]))
    if not 1 <= steps <= MAX_STEPS:
        raise ConfigError(f"steps {steps}: give a number from 1 to {MAX_STEPS:,}.")
    if positions < 1:
        raise ConfigError(f"positions {positions}: give 1 or more.")
    with enough_memory(TO_USE):
        return Gradients(steps, tuple(_measure(subject, steps, positions) for subject in subjects))


def _measure(subject: Subject, steps: int, positions: int) -> ModelGradients:
    model, ids = subject.model, subject.ids[: MAX_TOKENS + 1]
    model.require_part("hidden")
    ends = _positions(subject.name, len(ids) - 1, steps, model.context_length, positions)
    window = model.context_length or steps + 1
    window = min(window, int(ends[0]) + 1)
    parts = [part for part in LAG_PARTS if part in model.inspectable()]
    seen = Samples(parts)
    rows = max(1, min(_TOKENS_AT_ONCE, _LOGITS_AT_ONCE // model.vocab_size) // window)
    with evaluating(model), torch.enable_grad():
        windows = [*_windows(model, ids, ends, window)]
        for begin in range(0, len(windows), rows):
            seen.add(model, *_stack(windows[begin : begin + rows]), steps)
        jacobians = _jacobians(model, seen.states, seen.next_ids)
    return ModelGradients(
        name=subject.name,
        tokens=len(ids) - 1,
        positions=len(ends),
        norms=seen.lag_norms(),
        jacobians=jacobians,
        gates=seen.gate_openness(),
        saturated=seen.saturated_shares(),
    )


# -- windows of the text --------------------------------------------------------------------------------


def _positions(name: str, tokens: int, steps: int, context: int | None, count: int) -> Ids:
    """The sampled positions t, rising. Position t has the inputs up to ids[t], and predicts ids[t + 1].

    Raises:
        ConfigError: the context is too short.
        CorpusError: the text is too short.
    """
    if context is not None and steps >= context:
        raise ConfigError(f"{name} depends on {context} tokens: {steps} steps are too many; at most {context - 1}.")
    if tokens <= steps:
        raise CorpusError(
            f"The text has {tokens:,} tokens for {name}: {steps} steps need {steps + 1} or more. Give a longer text, "
            "or fewer steps."
        )
    first = min(max(steps, (context or 1) - 1), tokens - 1)
    return np.unique(np.linspace(first, tokens - 1, min(count, tokens - first)).round().astype(np.int64))


def _windows(model: LanguageModel, ids: Ids, ends: Ids, window: int) -> Iterator[tuple[Tensor, State | None]]:
    """For each position the W + 1 ids of its window and its target, and the state before the window."""
    device = next(model.parameters()).device
    text = torch.from_numpy(ids).to(device)
    begins = (ends - window + 1).tolist()
    state: State | None = None
    for before, begin in pairwise((0, *begins)):
        if model.context_length is None and begin > before:
            with torch.no_grad():
                _, state = model(text[before:begin][None], state)
        yield text[begin : begin + window + 1], state


def _stack(batch: Sequence[tuple[Tensor, State | None]]) -> tuple[Tensor, State | None]:
    """Ids (B, W + 1), and the states of B rows."""
    ids = torch.stack([row for row, _ in batch])
    states = [state for _, state in batch]
    if all(state is None for state in states):
        return ids, None
    some = next(state for state in states if state is not None)
    # The start of a text is a state of zeros, except for the tokens before it.
    return ids, State.join([state or _start(some) for state in states])


def _start(like: State) -> State:
    """The state before the first token."""
    tensors = {
        name: torch.zeros_like(tensor) if tensor.is_floating_point() else torch.full_like(tensor, -1)
        for name, tensor in like.tensors.items()
    }
    return State(tensors)


@contextlib.contextmanager
def evaluating(model: LanguageModel) -> Iterator[None]:
    """Inside, the model is in evaluation mode."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


# -- norms, gates and tanh at the positions -------------------------------------------------------------


class Samples:
    """Collects the measures of batches of windows."""

    def __init__(self, parts: Sequence[str]) -> None:
        self.parts = parts
        self.states: list[State] = []
        """After each position, of one row each."""
        self.next_ids: list[Tensor] = []
        """(1,) the token that follows."""
        self._norms: dict[tuple[str, int], list[Floats]] = {}
        self._gates: dict[tuple[int, str], list[npt.NDArray[np.float32]]] = {}
        self._tanh: dict[int, list[npt.NDArray[np.float32]]] = {}

    def add(self, model: LanguageModel, ids: Tensor, state: State | None, steps: int) -> None:
        """Measure one batch.

        Args:
            model: in evaluation mode.
            ids: (B, W + 1): windows, each with its target at the end.
            state: before the windows.
            steps: the largest lag.
        """
        more = [part for part in ("gates", "candidates") if part in model.inspectable()]
        seen = model.inspect(ids[:, :-1], state, parts=[*self.parts, *more])
        loss = -seen.logits[:, -1].float().log_softmax(dim=-1).gather(1, ids[:, -1:]).sum()
        # The loss of a row depends on no other row: one backward gives the gradients of all.
        for part, layers in seen.gradients(loss * LOSS_SCALE, self.parts).items():
            for layer, grads in enumerate(layers):
                norms = grads[:, -steps - 1 :].cpu().double().norm(dim=-1).flip(1) / LOSS_SCALE
                self._norms.setdefault((part, layer), []).append(norms.numpy())
        self._add_values(seen)
        self.next_ids += ids[:, -1:].unbind()
        self.states += [seen.state.select([row]).detach() for row in range(len(ids))]

    def _add_values(self, seen: Inspection) -> None:
        for layer, gates in enumerate(seen.gates):
            for name, values in gates.items():
                self._gates.setdefault((layer, name), []).append(_last(values))
        for layer, values in enumerate(seen.candidates):
            self._tanh.setdefault(layer, []).append(_last(values))

    def lag_norms(self) -> tuple[LagNorms, ...]:
        """Of all parts and layers."""
        found = []
        for (part, layer), norms in self._norms.items():
            lower, median, upper = np.quantile(np.concatenate(norms), (0.25, 0.5, 0.75), axis=0)
            found.append(LagNorms(part, layer, median, lower, upper))
        return tuple(found)

    def gate_openness(self) -> tuple[GateOpenness, ...]:
        """Of all layers and gates."""
        found = []
        for (layer, gate), parts in self._gates.items():
            values = np.concatenate(parts)
            quantiles = tuple(float(value) for value in np.quantile(values, QUANTILES))
            found.append(GateOpenness(layer, gate, float(values.mean(dtype=np.float64)), quantiles))
        return tuple(found)

    def saturated_shares(self) -> tuple[SaturatedShare, ...]:
        """Of all layers."""
        shares = {
            layer: float((np.abs(np.concatenate(parts)) > SATURATED).mean()) for layer, parts in self._tanh.items()
        }
        return tuple(SaturatedShare(layer, share) for layer, share in shares.items())


def _last(values: Tensor) -> npt.NDArray[np.float32]:
    """(B, W, H) → (B, H) at the last position."""
    last: npt.NDArray[np.float32] = values[:, -1].detach().float().cpu().numpy()
    return last


# -- the recurrent Jacobian -----------------------------------------------------------------------------


def _jacobians(model: LanguageModel, states: Sequence[State], next_ids: Sequence[Tensor]) -> tuple[JacobianValues, ...]:
    """Singular values at positions evenly among those with these states, which are before the tokens `next_ids`."""
    if not model.recurrent_tensors:
        return ()
    width = sum(states[0].tensors[name].shape[-1] for name in model.recurrent_tensors)
    count = int(min(JACOBIAN_POSITIONS, len(states), max(2, MAX_JACOBIAN_WORK // width**3)))
    chosen = np.unique(np.linspace(0, len(states) - 1, count).round().astype(int))
    values: dict[int, list[Floats]] = {}
    for index in chosen:
        for layer, jacobian in enumerate(recurrent_jacobians(model, next_ids[index][None], states[index])):
            largest = torch.linalg.svdvals(jacobian[0])[:SINGULAR_VALUES]
            values.setdefault(layer, []).append(largest.cpu().double().numpy())
    return tuple(JacobianValues(layer, np.stack(each)) for layer, each in values.items())


def recurrent_jacobians(model: LanguageModel, ids: Tensor, state: State) -> tuple[Tensor, ...]:
    """The Jacobian of each layer's state after one token by its state before it.

    Args:
        model: with recurrent tensors.
        ids: (B, 1) int64.
        state: before the token.

    Returns:
        A tensor (B, S, S) a layer: row i has the derivatives of value i. S is H; of an LSTM 2 H, the
        hidden state first.
    """
    names = model.recurrent_tensors
    with torch.enable_grad():
        before = {name: state.tensors[name].detach().requires_grad_() for name in names}
        seen = model.inspect(ids, State({**state.tensors, **before}, state.growing, state.ragged))
        found = []
        for layer in range(before[names[0]].shape[1]):
            after = torch.cat([seen.state.tensors[name][:, layer] for name in names], dim=1)
            one_hot = torch.eye(after.shape[1], dtype=after.dtype, device=after.device)
            outer = one_hot[:, None].expand(-1, len(ids), -1)
            grads = torch.autograd.grad(after, [*before.values()], outer, is_grads_batched=True, retain_graph=True)
            found.append(torch.cat([grad[:, :, layer] for grad in grads], dim=2).transpose(0, 1))
    return tuple(found)


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, tuple | list) else value
