"""The LanguageModel contract, which every model satisfies and all other code relies on.

Shapes: B batch, T time, V vocabulary.

    logits, state = model(ids)                 # ids (B, T) int64 → logits (B, T, V)
    logits, state = model(more_ids, state)     # the same logits as one pass over both

To add a model: one file here, with an options class, a subclass of `LanguageModel`, and the `REGISTERS` line.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from lm.config import Options
from lm.kernels.training import cross_entropy
from lm.models.profiled_parts import LOSS, part


class ModelOptions(Options):
    """Options that every model has."""

    type: str = Field(description="Registered name of the model.")


@dataclass(frozen=True)
class State:
    """What a model remembers of the text so far: hidden state or key-value cache, the same type for callers.

    Rows (axis 0) belong to independent texts, and can be selected and joined at any time.
    """

    tensors: dict[str, Tensor]
    """Each (B, ...); those named in `growing` are (B, L, ...), aligned at the end of the time axis."""
    growing: frozenset[str] = field(default_factory=frozenset)
    ragged: bool = False
    """True where rows may hold texts of different length; their number of valid positions is in "lengths"."""

    def detach(self) -> State:
        """The same values, cut from the graph: the border of truncated back-propagation through time."""
        return self._map(lambda tensor: tensor.detach())

    def to(self, device: torch.device | str) -> State:
        """The state on another device."""
        return self._map(lambda tensor: tensor.to(device))

    def select(self, rows: Tensor | Sequence[int]) -> State:
        """The state of some rows, in the order asked for; a row may be asked for twice."""
        index = torch.as_tensor(rows, dtype=torch.int64)
        return self._map(lambda tensor: tensor.index_select(0, index.to(tensor.device)))

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
    """What a training step gets from a batch."""

    objective: Tensor
    """What is minimised: a scalar in fp32 with a gradient."""
    nats: Tensor
    """Nats per token of this batch without smoothing or penalties: a scalar without gradient."""
    state: State
    logits: Tensor | None = None
    """(B, T, V) without gradient; None where they were never made."""


class LanguageModel(nn.Module, ABC):
    """A distribution over the next token, given the tokens before it."""

    Options: ClassVar[type[ModelOptions]]
    trained_by: ClassVar[Literal["gradient", "counting", "both"]] = "gradient"
    """By steps, by `fit` alone, or by steps after `fit`."""
    kind: ClassVar[str | None] = None
    """What to call it beside a score, where it is no network alone."""
    batching: ClassVar[Literal["streams", "random"]] = "streams"
    """How it is trained unless `training.batching` says otherwise."""

    notes: tuple[str, ...] = ()
    """What to know of what `fit` made of a text."""
    counted_tokens: int = 0
    """Tokens of the text that `fit` used."""
    loss_dtype: torch.dtype = torch.float32
    """That training computes softmax and loss in."""

    def __init__(self, options: Any, vocab_size: int) -> None:
        super().__init__()
        self.options = options
        self.vocab_size = vocab_size

    def __call__(self, ids: Any, *args: Any, **options: Any) -> Any:
        """See `forward`.

        Raises:
            TypeError: `ids` are no tensor of rows.
        """
        if not isinstance(ids, Tensor) or ids.ndim != 2:
            kind = f"{type(ids).__name__} of shape {tuple(getattr(ids, 'shape', [len(ids)]))}"
            raise TypeError(
                f"A model reads ids as an int64 tensor (B, T), one row a text; this is a {kind}. Of a text, "
                "run.score(text) and run.logits(text) give its tokens' nats and logits; of ids (N,), pass "
                "torch.tensor(ids, dtype=torch.int64)[None]."
            )
        return super().__call__(ids, *args, **options)

    @property
    def context_length(self) -> int | None:
        """The most tokens that a prediction may look back on; None for a carried state without limit."""
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

    def training_loss(
        self, ids: Tensor, targets: Tensor, state: State | None = None, *, label_smoothing: float = 0.0
    ) -> TrainingLoss:
        """The loss of a batch; a model overrides it where training sees more, or less, than the logits.

        Args:
            ids: (B, T) int64.
            targets: (B, T) int64: targets[b, t] follows ids[b, t].
            state: as for `forward`.
            label_smoothing: probability mass of the objective that is spread over all tokens.
        """
        logits, state = self(ids, state)
        objective, nats = part(LOSS, cross_entropies, logits, targets, label_smoothing, self.loss_dtype)
        return TrainingLoss(objective, nats, state, logits.detach())

    def fit(self, ids: npt.NDArray[Any]) -> None:
        """Learn from a whole split at once; only models that are trained by counting.

        Args:
            ids: (N + 1,) the start token, then the N tokens of the training split.
        """
        raise TypeError(f"{type(self).__name__} is trained by gradient")

    def num_parameters(self) -> int:
        """Numbers that training sets; a shared one counts once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def num_counts(self) -> int:
        """Counts that `fit` stores."""
        return 0

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """The weights as host arrays, by name, for saving; copies, safe from later steps; low precision as fp32.

        Where they are spread over processes they are gathered, so all processes must ask.
        """
        return {name: host_array(tensor) for name, tensor in self.state_dict().items()}

    def load_arrays(self, arrays: dict[str, npt.NDArray[Any]]) -> None:
        """Set the weights from `arrays`, which must match by name and shape (ValueError names what does not)."""
        own = self.state_dict()
        if missing := sorted(own.keys() ^ arrays.keys()):
            raise ValueError(f"weights and model differ in {', '.join(missing[:4])}")
        for name, tensor in own.items():
            if tuple(tensor.shape) != arrays[name].shape:
                raise ValueError(f"{name} is {arrays[name].shape} in the file, {tuple(tensor.shape)} in the model")
        self.load_state_dict(
            {name: spread_like(own[name], torch.from_numpy(np.array(array))) for name, array in arrays.items()}
        )


def host_array(tensor: Tensor) -> npt.NDArray[Any]:
    """A copy on the host; bf16, which numpy does not have, and fp16 as fp32, which holds all their values."""
    tensor = whole(tensor.detach()).cpu()
    return np.array((tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor).numpy())


def whole(tensor: Any) -> Tensor:
    """A tensor that is spread over processes (a DTensor, as FSDP makes them) as one; any other as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # type: ignore[no-any-return]


def spread_like(example: Any, tensor: Tensor) -> Tensor:
    """This process's part of a tensor that all have whole, spread as `example` is; the tensor where that is not."""
    if not hasattr(example, "full_tensor") or tensor.shape != example.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    tensor = tensor.to(example.device)
    return distribute_tensor(tensor, example.device_mesh, example.placements, src_data_rank=None)


def cross_entropies(
    logits: Tensor, targets: Tensor, label_smoothing: float, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """From logits (B, T, V) and targets (B, T): what is minimised, computed in `dtype`, and true nats per token.

    Both are in fp32; the nats are without smoothing or gradient.
    """
    flat, wanted = logits.to(dtype).flatten(0, 1), targets.flatten()
    if label_smoothing == 0 and dtype == torch.float32:
        objective = cross_entropy(flat, wanted)
        return objective, objective.detach()
    objective = F.cross_entropy(flat, wanted, label_smoothing=label_smoothing).float()
    return objective, F.cross_entropy(flat.detach().float(), wanted)


def build_model(section: Any, vocab_size: int, *, seed: int | None = None) -> LanguageModel:
    """A model with fresh weights.

    Args:
        section: the `model` section of a configuration (`lm.config.Section`).
        vocab_size: V of the tokenizer.
        seed: seed of the weights; None leaves torch's generator where it is.
    """
    from lm.registry import MODELS

    options = section.resolve("model")
    if seed is not None:
        torch.manual_seed(seed)
    cls: Any = MODELS.resolve(section.type)
    model: LanguageModel = cls(options, vocab_size)
    return model
