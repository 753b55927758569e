"""The LanguageModel contract between models and all other code.

Shapes: B batch, T time, V vocabulary.

    logits, state = model(ids)                 # ids (B, T) int64 → logits (B, T, V)
    logits, state = model(more_ids, state)     # the same logits as one pass over both

To add a model: one file here, with an options class, a subclass of `LanguageModel`, and the `REGISTERS` line.

A module declares the needs of its parameters (not of its submodules'), as attributes of its class or by `declare`:

    optimizer_kind    "adamw" (default); "muon": matrices, if training.optimizer=muon; "row_adagrad": sparse gradients
    stays_fp32        True (default False): fp32 at every level of mixed precision
    shardable         False (default True): the parameters cannot be spread over processes
    adapts            names of its matrices that may get LoRA adapters (`lm.models.lora`); default: none

Optimizers, precision and distributed training read these attributes and know no module by name.

What happens inside a model is read by parts (`lm.inspection`):

    model.inspectable()                                   # ("inputs", "hidden", "gates", "candidates")
    seen = model.inspect(ids, parts=["hidden"])           # logits as forward's, and hidden states with their graph
    grads = seen.gradients(loss, ["hidden"])              # {"hidden": (B, T, H) a layer}
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Self, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from lm.config import Options
from lm.errors import UnsupportedExportError, UnsupportedPartError
from lm.kernels.autograd import cross_entropy
from lm.kernels.dispatch import only_torch
from lm.models.adapter_weights import is_adapter
from lm.models.huggingface import HuggingFaceModel
from lm.models.layout import Stage, Symbol
from lm.models.profiled_parts import LOSS, run_part
from lm.models.target_scores import TargetScores, scores_of
from lm.models.training_method import TrainingMethod
from lm.torch_private import shallow_copy

M = TypeVar("M", bound=nn.Module)


def declare(module: M, **needs: Any) -> M:
    """The module, after it has declared these needs of its parameters."""
    for name, value in needs.items():
        setattr(module, name, value)
    return module


class ModelOptions(Options):
    """Options that every model has."""

    type: str = Field(description="Registered name of the model.")

    @property
    def bf16_on_cpu(self) -> bool:
        """Whether `--precision auto` takes bf16 on a CPU whose native kernels have it.

        True for models that these kernels train, if their loss was shown to be within 0.002 nats of that in fp32
        (`benchmarks/bf16.py`).
        """
        return False


@dataclass(frozen=True)
class State:
    """A model's memory of the text so far: hidden state or key-value cache.

    Rows (axis 0) belong to independent texts, and can be selected and joined at any time.
    """

    tensors: dict[str, Tensor]
    """Each (B, ...); those named in `growing` are (B, L, ...), aligned at the end of the time axis. Integers are tokens
    (-1 before the start of the text), but "lengths" are numbers of positions."""
    growing: frozenset[str] = field(default_factory=frozenset)
    ragged: bool = False
    """Whether rows may have different numbers of valid positions, which are in "lengths"."""
    reserved: bool = False
    """Whether the tensors named in `growing` are buffers: a row has its "lengths" positions first, then room, in which
    `forward` writes the new ones."""

    def detach(self) -> State:
        """The same values without autograd graph, for truncated back-propagation through time."""
        return self._map(lambda tensor: tensor.detach())

    def to(self, device: torch.device | str) -> State:
        """The state on another device."""
        return self._map(lambda tensor: tensor.to(device))

    def select(self, rows: Tensor | Sequence[int]) -> State:
        """The state of these rows, in this order; a row may be repeated."""
        index = torch.as_tensor(rows, dtype=torch.int64)
        device = next(iter(self.tensors.values())).device
        if device.type == "cuda" and index.is_cpu:
            # Then the host does not wait for the copy.
            index = index.pin_memory()
        index = index.to(device, non_blocking=True)
        return self._map(lambda tensor: tensor.index_select(0, index))

    @staticmethod
    def join(states: Sequence[State]) -> State:
        """The rows of several states of one model as one batch; shorter caches are padded in front."""
        first = states[0]
        spans = {state.tensors[name].shape[1] for state in states for name in state.growing}
        longest = max(spans, default=0)
        joined = {}
        for name in first.tensors:
            parts = [state.tensors[name] for state in states]
            if name in first.growing:
                parts = [F.pad(part, (0, 0) * (part.ndim - 2) + (longest - part.shape[1], 0)) for part in parts]
            joined[name] = torch.cat(parts)
        return replace(first, tensors=joined, ragged=len(spans) > 1 or any(state.ragged for state in states))

    def _map(self, change: Callable[[Tensor], Tensor]) -> State:
        return replace(self, tensors={name: change(tensor) for name, tensor in self.tensors.items()})


@dataclass(frozen=True)
class TrainingLoss:
    """The loss of a batch."""

    objective: Tensor
    """The minimised scalar, in fp32 with a gradient."""
    nats: Tensor
    """Nats per token, without smoothing or penalties: a scalar without gradient."""
    state: State
    logits: Callable[[], Tensor] | None = None
    """Gives the logits (B, T, V) without gradient, for metrics; None if they are not computed."""


@dataclass(frozen=True)
class AttentionMaps:
    """The attention of one layer: B rows, T queries, L keys (all positions up to the last query)."""

    scores: Tensor
    """(B, heads, T, L): products of queries and keys, before the division by sqrt(D) and before softmax; -inf at later
    positions."""
    weights: Tensor
    """(B, heads, T, L): each row sums to 1; 0 at later positions."""
    outputs: Tensor
    """(B, T, E): what the layer adds to the residual stream."""
    head_size: int
    """D: the width of a query and of a key."""


@dataclass(frozen=True)
class MixturePart:
    """One distribution of a mixture: p(token) is the sum over the parts of weight · probability."""

    weight: Tensor
    """(B, T), from 0 to 1; those of all parts sum to 1."""
    log_probabilities: Tensor
    """(B, T, V); -inf where the part gives a token no probability."""


@dataclass(frozen=True)
class Inspection:
    """The parts of a model that `LanguageModel.inspect` was asked for; the others are empty.

    All tensors are in the graph of `logits`. Tuples have one entry a layer, the first layer first.
    """

    logits: Tensor
    """(B, T, V), as `forward` gives them."""
    state: State
    """After the last token, as `forward` gives it."""
    inputs: Tensor | None = None
    """(B, T, E): the embeddings, as the first layer gets them."""
    hidden: tuple[Tensor, ...] = ()
    """(B, T, H) each: hidden states; in a Transformer the residual stream after each block."""
    cells: tuple[Tensor, ...] = ()
    """(B, T, H) each: the cell states of an LSTM."""
    gates: tuple[dict[str, Tensor], ...] = ()
    """By name, (B, T, H) each, from 0 (closed) to 1 (open)."""
    candidates: tuple[Tensor, ...] = ()
    """(B, T, H) each: the outputs of tanh that become the state, or that a gate adds to it."""
    attention: tuple[AttentionMaps, ...] = ()
    contributions: dict[str, Tensor] = field(default_factory=dict)
    """By name, (B, T, V) each; they sum to the logits."""
    terms: dict[str, Tensor] = field(default_factory=dict)
    """By name, (B, T, V) each; they sum to the log-probabilities. See `lm.models.contributions`."""
    mixture: dict[str, MixturePart] = field(default_factory=dict)
    """By name, the distributions that the model mixes."""
    layer_logits: tuple[Tensor, ...] = ()
    """(B, T, V) each: the output layer applied to `hidden`."""
    steps: Mapping[str, Sequence[Sequence[Tensor]]] = field(default_factory=dict)
    """By part and layer: T tensors (B, H), from which later time steps were computed.

    A recurrent model has them for "hidden" and "cells": the stacked tensors of these parts have no later time step in
    their graph.
    """

    def gradients(self, loss: Tensor, parts: Sequence[str]) -> dict[str, tuple[Tensor, ...]]:
        """The gradients of a scalar with respect to "inputs", "hidden" and "cells": by part, (B, T, H) a layer.

        They include all paths through later time steps and layers. Frees the graph.
        """
        nodes: dict[str, list[Sequence[Tensor]]] = {}
        for part in parts:
            values = getattr(self, part)
            whole_layers = [values] if isinstance(values, Tensor) else values
            nodes[part] = [*self.steps[part]] if part in self.steps else [(value,) for value in whole_layers]
        flat = [node for layers in nodes.values() for layer in layers for node in layer]
        grads = iter(torch.autograd.grad(loss, flat, allow_unused=True, materialize_grads=True))
        found = {}
        for part, layers in nodes.items():
            each = [[next(grads) for _ in layer] for layer in layers]
            found[part] = tuple(torch.stack(steps, dim=1) if part in self.steps else steps[0] for steps in each)
        return found


class LanguageModel(nn.Module, ABC):
    """A distribution over the next token, given the tokens before it."""

    Options: ClassVar[type[ModelOptions]]
    trained_by: ClassVar[Literal["gradient", "counting", "both", "members"]] = "gradient"
    """A value of `TrainingMethod`."""
    equal_blocks: ClassVar[tuple[str, str] | None] = None
    """Of equal blocks, each with the output of the one before: the option with their number, and the name of the list
    of modules. They compute alike and need the same memory. None: the model has no such blocks."""

    kind: str | None = None
    """A label for reports; None for a neural network."""
    batching: Literal["streams", "random"] = "streams"
    """The default of `training.batching`."""
    recurrent_tensors: tuple[str, ...] = ()
    """Tensors (B, layers, H) of the state that each step computes from their values one step before; none in a
    Transformer."""
    notes: tuple[str, ...] = ()
    """Notes of `fit` for reports."""
    counted_tokens: int = 0
    """Tokens of the text that `fit` used."""
    loss_dtype: torch.dtype = torch.float32
    """The dtype of softmax and loss in training."""
    host_context: int | None = None
    """The largest number of earlier tokens that `host_inputs` reads; None: the model has no host inputs."""

    def __init__(self, options: Any, vocab_size: int) -> None:
        super().__init__()
        self.options = options
        self.vocab_size = vocab_size

    def __call__(self, ids: Any, *args: Any, **options: Any) -> Any:
        """See `forward`.

        Raises:
            TypeError: `ids` is not a tensor with two axes.
        """
        if not isinstance(ids, Tensor) or ids.ndim != 2:
            kind = f"{type(ids).__name__} of shape {tuple(getattr(ids, 'shape', [len(ids)]))}"
            raise TypeError(
                f"A model reads ids as an int64 tensor (B, T), one row a text; this is a {kind}. For a text, call "
                "run.score(text) or run.logits(text); for ids (N,), pass torch.tensor(ids, dtype=torch.int64)[None]."
            )
        return super().__call__(ids, *args, **options)

    @classmethod
    def training_method(cls) -> TrainingMethod:
        """How models of this class are trained: what `trained_by` means."""
        return TrainingMethod(cls.trained_by)

    @property
    def context_length(self) -> int | None:
        """The largest number of tokens that a prediction depends on; None: no limit."""
        return None

    @abstractmethod
    def forward(self, ids: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Logits of the token after each token, and the state after the last.

        Args:
            ids: (B, T) int64, T >= 1.
            state: of B rows, from an earlier call; None at the start of a text.

        Returns:
            logits (B, T, V) float, and the state of B rows. Feeding a text in chunks gives the logits of one pass.
        """

    @torch.inference_mode()
    def first_state(self) -> State:
        """The state of one row before its first token: `forward` with it gives the logits of `forward` without."""
        state: State = self(next(self.parameters(), torch.empty(0)).new_zeros((1, 1), dtype=torch.int64))[1]
        tensors = {}
        for name, tensor in state.tensors.items():
            empty = tensor[:, :0] if name in state.growing else tensor
            is_token = not tensor.is_floating_point() and name.rpartition("/")[-1] != "lengths"
            tensors[name] = torch.full_like(empty, -1 if is_token else 0)
        return replace(state, tensors=tensors)

    def with_layers(self, count: int) -> Self | None:
        """The model with the first `count` of its `equal_blocks` alone, its weights shared; None: it has no more."""
        if self.equal_blocks is None:
            return None
        _, name = self.equal_blocks
        if len(getattr(self, name)) <= count:
            return None
        twin = shallow_copy(self)
        setattr(twin, name, getattr(self, name)[:count])
        return twin

    def traceable(self) -> contextlib.AbstractContextManager[None]:
        """Inside, `forward` with a state is made of torch's operations alone if it runs under `only_torch`."""
        return contextlib.nullcontext()

    def training_loss(
        self,
        ids: Tensor,
        targets: Tensor,
        state: State | None = None,
        *,
        label_smoothing: float = 0.0,
        soft_targets: Tensor | None = None,
        host_inputs: Mapping[str, Tensor] | None = None,
        learned: Tensor | None = None,
    ) -> TrainingLoss:
        """The loss of a batch; overridden if the objective is more than the cross-entropy, or needs fewer logits.

        Args:
            ids: (B, T) int64.
            targets: (B, T) int64: targets[b, t] follows ids[b, t].
            state: as for `forward`.
            label_smoothing: probability mass of the objective that is spread over all tokens.
            soft_targets: (B, T, V) probabilities of the tokens, which the objective uses in place of `targets`.
            host_inputs: the result of `host_inputs`, on the model's device; None: the model computes what it needs
                there, and on a GPU the host may wait for it.
            learned: (P,) int64, places of the targets that count, in the flat targets; None: all. The loss is the mean
                over them, and `TrainingLoss.logits` are theirs, (1, P, V).
        """
        logits, state = self(ids, state)
        if learned is not None:
            logits, targets = at_places(logits, learned), targets.flatten()[learned][None]
        smoothing, soft = label_smoothing, soft_targets
        objective, nats = run_part(LOSS, cross_entropies, logits, targets, smoothing, self.loss_dtype, soft)
        return TrainingLoss(objective, nats, state, logits.detach)

    def target_scores(self, ids: Tensor, targets: Tensor, state: State | None = None) -> tuple[TargetScores, State]:
        """The scores of targets, and the state after `ids`; overridden if that needs fewer logits than `forward`.

        Args:
            ids: (B, T) int64.
            targets: (R, S) int64 after the last S tokens of the first R rows.
            state: as for `forward`.

        Returns:
            The scores of the R · S targets, and the state of B rows.
        """
        logits, state = self(ids, state)
        return scores_of(scored_part(logits, targets).flatten(0, 1), targets.flatten()), state

    @property
    def logits_per_target(self) -> int:
        """Logits that `target_scores` has in memory for each token."""
        return self.vocab_size

    def host_inputs(
        self, ids: npt.NDArray[np.int64], targets: npt.NDArray[np.int64], earlier: npt.NDArray[np.int64] | None = None
    ) -> dict[str, Tensor]:
        """What the host computes from a batch before its step, for `training_loss`; only if `host_context` is not None.

        Another thread may call it during a step. It does not change the model.

        Args:
            ids: (B, T) the inputs of the batch.
            targets: (B, T).
            earlier: (B, L) the inputs of each row before `ids`, L <= `host_context`, the newest last; None: there are
                none, or the batch resets the state.

        Returns:
            Tensors on the CPU, by name.
        """
        return {}

    def held_out_logits(self, ids: Tensor, targets: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """As `forward`, for the text that the model was trained on: its counts leave out each target's own occurrence.

        Args:
            ids: (B, T) int64.
            targets: (B, T) int64: targets[b, t] follows ids[b, t].
            state: as for `forward`.
        """
        logits, after = self(ids, state)
        return logits, after

    def inspectable(self) -> tuple[str, ...]:
        """The parts that `inspect` can give: names of fields of `Inspection`."""
        return ()

    def inspect(self, ids: Tensor, state: State | None = None, *, parts: Collection[str] = ()) -> Inspection:
        """The logits and state of `forward`, and parts of the computation; on torch's operations, differentiable.

        Args:
            ids: (B, T) int64, T >= 1.
            state: as for `forward`.
            parts: some of `inspectable()`.

        Returns:
            With logits that differ from `forward`'s by rounding alone. Dropout is as in `forward`: call `eval()` first.

        Raises:
            UnsupportedPartError: the model lacks a part.
        """
        for part in parts:
            self.require_part(part)
        with only_torch():
            return self._inspect(ids, state, frozenset(parts))

    def require_part(self, part: str) -> None:
        """Check that the model has a part.

        Raises:
            UnsupportedPartError: it does not.
        """
        *others, last = self.inspectable() or ("nothing to inspect",)
        if part not in (*others, last):
            has = f"{', '.join(others)} and {last}" if others else last
            raise UnsupportedPartError(f"A model of type {self.options.type} has no {part}. It has {has}.")

    def _inspect(self, ids: Tensor, state: State | None, parts: frozenset[str]) -> Inspection:
        """`inspect` of parts that the model has; overridden by models that have parts."""
        return Inspection(*self(ids, state))

    def symbols(self) -> dict[str, Symbol]:
        """The letters of this model's shapes; B and T are the caller's."""
        return {"V": Symbol(self.vocab_size, "tokens of the vocabulary")}

    def layout(self) -> tuple[Stage, ...]:
        """The stages of a step in order, with each parameter once; matrix products as in `inspect`.

        A model that does not override it has its parameters in one stage, in numbers alone.
        """
        shapes = {name: tuple(map(str, parameter.shape)) for name, parameter in self.named_parameters()}
        return (Stage("model", "", shapes, {"logits": ("B", "T", "V")}),)

    def to_huggingface(self) -> HuggingFaceModel:
        """The model under the names of transformers.

        Raises:
            UnsupportedExportError: no class of transformers computes what this model computes.
        """
        raise UnsupportedExportError(
            f"{self.options.type} models have no class in transformers and no architecture in llama.cpp. Export to "
            "onnx or html, or train one that has: --preset transformer-subword or transformer-char-plain."
        )

    def fit(self, ids: npt.NDArray[Any]) -> None:
        """Count a whole split, before any step; a network has nothing to count.

        Args:
            ids: (N + 1,) the start token, then the N tokens of the training split.
        """

    def fit_bytes(self, ids: npt.NDArray[Any]) -> int:
        """The memory of the host that `fit` needs for these ids at its peak, estimated in less than a second."""
        return 0

    def fitted(self) -> Any:
        """What `fit` made, for `use_fitted` of an equal model, which shares it."""
        return None

    def use_fitted(self, fitted: Any) -> None:
        """Take what `fit` of an equal model made, in place of a call of `fit`."""

    def num_parameters(self) -> int:
        """Trained numbers; shared ones count once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def num_counts(self) -> int:
        """Number of counts that `fit` stored."""
        return 0

    @property
    def has_adapters(self) -> bool:
        """Whether the weights are frozen under adapters (`lm.models.lora`)."""
        return any(is_adapter(name) for name, _ in self.named_parameters())

    def saved_tensors(self) -> dict[str, Tensor]:
        """The tensors that a run saves, by name: the weights; of a model with adapters, those alone."""
        own = self.state_dict()
        return {name: tensor for name, tensor in own.items() if is_adapter(name)} or own

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Copies of `saved_tensors` as host arrays, by name; see `host_arrays`."""
        return host_arrays(self.saved_tensors())

    def load_arrays(self, arrays: dict[str, npt.NDArray[Any]]) -> None:
        """Set `saved_tensors`.

        Raises:
            ValueError: names or shapes differ from the model's.
        """
        own = self.saved_tensors()
        if missing := sorted(own.keys() ^ arrays.keys()):
            raise ValueError(f"weights and model differ in {', '.join(missing[:4])}")
        for name, tensor in own.items():
            if tuple(tensor.shape) != arrays[name].shape:
                raise ValueError(f"{name} is {arrays[name].shape} in the file, {tuple(tensor.shape)} in the model")
        with torch.no_grad():
            # One after the other: all of them together would be one more copy of the model.
            for name, tensor in own.items():
                tensor.copy_(shard_like(tensor, arrays[name]))


def host_arrays(tensors: Mapping[str, Tensor]) -> dict[str, npt.NDArray[Any]]:
    """Copies on the host; bf16 (which numpy lacks) and fp16 become fp32 without loss.

    Sharded tensors are gathered one by one to rank 0, and other processes leave them out: all must call this.
    """
    found = {}
    for name, tensor in tensors.items():
        own = _gathered(tensor.detach())
        if own is not None:
            low = own.dtype in (torch.bfloat16, torch.float16)
            found[name] = np.array((own.float() if low else own).cpu().numpy())
    return found


def _gathered(tensor: Any) -> Tensor | None:
    """The whole of a sharded tensor in rank 0, None in other processes; any other tensor unchanged."""
    if not hasattr(tensor, "full_tensor"):
        return tensor  # type: ignore[no-any-return]
    import torch.distributed as dist

    begin, end, each = _own_rows(tensor)
    group, rank = tensor.device_mesh.get_group(), tensor.device_mesh.get_rank()
    # Processes send the same number of rows; rank 0 cuts the padding off.
    part = tensor.to_local().new_zeros((each, *tensor.shape[1:]))
    part[: end - begin] = tensor.to_local()
    if rank != 0:
        dist.gather(part, dst=0, group=group)
        return None
    every: Tensor = part.new_empty((each * tensor.device_mesh.size(), *tensor.shape[1:]))
    dist.gather(part, list(every.split(each)), dst=0, group=group)
    return every[: len(tensor)]


def _own_rows(tensor: Any) -> tuple[int, int, int]:
    """First and last + 1 of this process's rows of a sharded tensor, and the most rows of a process."""
    (placement,) = tensor.placements
    assert placement.is_shard(0), "FSDP spreads tensors by their rows"
    rows = len(tensor)
    each = -(-rows // tensor.device_mesh.size())
    begin = min(rows, each * tensor.device_mesh.get_local_rank())
    return begin, min(rows, begin + each), each


def whole(tensor: Any) -> Tensor:
    """The whole of a sharded tensor (a DTensor of FSDP); any other tensor unchanged."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # type: ignore[no-any-return]


def shard_like(example: Any, array: npt.NDArray[Any]) -> Tensor:
    """An array as a tensor, sharded like `example`: a copy of this process's rows alone.

    The whole array if `example` is not sharded or has another shape.
    """
    if not hasattr(example, "full_tensor") or array.shape != example.shape:
        return torch.from_numpy(np.array(array))
    from torch.distributed.tensor import DTensor

    begin, end, _ = _own_rows(example)
    own = torch.from_numpy(np.array(array[begin:end])).to(example.device)
    return DTensor.from_local(
        own, example.device_mesh, example.placements, run_check=False, shape=example.shape, stride=example.stride()
    )


def at_places(values: Tensor, places: Tensor) -> Tensor:
    """The vectors (1, P, E) at places (P,) of the flat (B · T,) values (B, T, E)."""
    # Unlike that of an index, the gradient of this lookup is deterministic.
    return F.embedding(places, values.flatten(0, 1))[None]


def scored_part(values: Tensor, targets: Tensor) -> Tensor:
    """Those of values (B, T, ...) that belong to targets (R, S): the last S of the first R rows."""
    rows, length = targets.shape
    return values[:rows, values.shape[1] - length :]


def cross_entropies(
    logits: Tensor,
    targets: Tensor,
    label_smoothing: float,
    dtype: torch.dtype = torch.float32,
    soft_targets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The objective of logits (B, T, V) and targets (B, T), and the nats per token: two scalars in fp32.

    The objective has label smoothing, and `soft_targets` (B, T, V) in place of targets if they are given. It is
    computed in `dtype`. The nats have none of these, and no gradient.
    """
    flat, flat_targets = logits.to(dtype).flatten(0, 1), targets.flatten()
    if soft_targets is not None:
        soft = soft_targets.to(dtype).flatten(0, 1)
        objective = F.cross_entropy(flat, soft, label_smoothing=label_smoothing).float()
        return objective, F.cross_entropy(flat.detach().float(), flat_targets)
    if label_smoothing == 0 and dtype == torch.float32:
        objective = cross_entropy(flat, flat_targets)
        return objective, objective.detach()
    objective = F.cross_entropy(flat, flat_targets, label_smoothing=label_smoothing).float()
    return objective, F.cross_entropy(flat.detach().float(), flat_targets)


def build_model(section: Any, vocab_size: int, *, seed: int | None = None) -> LanguageModel:
    """A model with fresh weights.

    Args:
        section: the `model` section of a configuration (`lm.config.Section`).
        vocab_size: V of the tokenizer.
        seed: of the weights; None: torch's generator as it is.
    """
    from lm.registry import MODELS

    options = section.resolve("model")
    if seed is not None:
        torch.manual_seed(seed)
    cls: Any = MODELS.resolve(section.type)
    model: LanguageModel = cls(options, vocab_size)
    return model
