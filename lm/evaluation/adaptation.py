"""Dynamic evaluation: the model scores a segment of the text, then learns from it, then scores the next one.

Each token is scored before the model learns from it. The figures show how well a model adapts to a text, and are not
comparable with those of a model that stays as it is (static figures).

A step divides each gradient by its usual size, the root of its mean square over training text, and pulls each weight
back to its trained value:

    w ← w - rate · g / (rms + floor) + decay · (trained - w)

Tables with sparse gradients have one usual size for all rows, and steps that are `TABLE_STEPS` times as long; only rows
with a gradient move. Rate and decay are chosen on validation text. The weights are restored afterwards.

Sources: Krause et al. 2018, "Dynamic evaluation of neural sequence models"; Krause et al. 2019.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from lm.device import deterministic
from lm.errors import ConfigError
from lm.evaluation.perplexity import Piece, pieces
from lm.models.base import LanguageModel, State

SEGMENT = 32
"""Tokens that are scored, and then learned, together."""
RATES = 5e-5, 1e-4, 2e-4, 4e-4, 8e-4
DECAYS = 0.0, 1e-3, 4e-3, 1.6e-2
MEASURED_SEGMENTS = 128
"""Of the training text, for the usual sizes of gradients."""
MAX_TUNED = 10_000
"""Tokens from the start of the validation text on which rate and decay are chosen."""
TABLE_STEPS = 10.0
FLOOR = 0.1
"""The floor, as a share of the mean usual size of a tensor."""

Ids = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class AdaptationOptions:
    """How a model learns from what it has scored."""

    rate: float = 2e-4
    decay: float = 1e-3
    segment: int = SEGMENT
    """Tokens of a segment."""


@dataclass(frozen=True)
class Tuning:
    """The options with the lowest loss on validation text."""

    options: AdaptationOptions
    tokens: int
    """Of the validation text."""
    static_loss: float
    """Nats per token of that text without learning, under the same context rule."""
    loss: float


class Learner:
    """A model that learns from segments of a text; the trained weights return at the end of the block.

        with Learner(model, sizes, options) as learner:
            nats = learner.read(piece)

    Args:
        model: its mode and device stay as they are.
        sizes: of `gradient_sizes`.
        options: of the steps.
    """

    def __init__(self, model: LanguageModel, sizes: Sequence[Tensor | None], options: AdaptationOptions) -> None:
        self.model, self._sizes, self._options = model, sizes, options
        self._parameters = _parameters(model)
        self._trained = [parameter.detach().clone() for parameter in self._parameters]
        self._state: State | None = None
        self._text: list[int] = []
        """What `read_on` has read; with a limited context its end."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.restore()

    @torch.no_grad()
    def restore(self) -> None:
        """Set the trained weights again, and start with an empty text."""
        self._state, self._text = None, []
        for parameter, trained in zip(self._parameters, self._trained, strict=True):
            parameter.copy_(trained)

    def read(self, piece: Piece) -> Floats:
        """Score a piece of the text in one row, then learn from it; the nats (N,) of its scored tokens."""
        nats, self._state = _forward(self.model, piece, self._state)
        _backward(nats)
        self._step()
        return nats.detach().cpu().double().numpy()

    def read_on(self, tokens: Sequence[int]) -> Floats:
        """Score the next tokens of a text, and learn from them segment by segment; their nats (N,).

        Args:
            tokens: (N,); the first call begins with the start token, which is not scored.
        """
        context, segment = self.model.context_length, self._options.segment
        parts: list[Floats] = []
        for begin in range(0, len(tokens), segment):
            new = tokens[begin : begin + segment]
            is_first = not self._text
            self._text += new
            scored = len(new) - is_first
            if not scored:
                continue
            # With a state, only the new tokens are read; else as many of those before them as the context holds.
            read = scored if context is None else min(max(context, scored), len(self._text) - 1)
            ids = np.array(self._text[-read - 1 :])[None]
            fresh = context is not None or self._state is None
            parts.append(self.read(Piece(ids[:, :-1], ids[:, 1:], skip=read - scored, fresh=fresh)))
            self._text = self._text[-max(context or 0, 1) :]
        return np.concatenate(parts) if parts else np.empty(0)

    @torch.no_grad()
    def _step(self) -> None:
        rate, decay = self._options.rate, self._options.decay
        for parameter, trained, size in zip(self._parameters, self._trained, self._sizes, strict=True):
            grad, parameter.grad = parameter.grad, None
            if grad is None or size is None:
                continue
            if grad.is_sparse:
                grad = grad.coalesce()
                rows = grad.indices()[0]
                moved = parameter[rows] - TABLE_STEPS * rate * grad.values() / size
                parameter[rows] = moved + decay * (trained[rows] - moved)
            else:
                parameter.sub_(rate * grad / size)
                parameter.lerp_(trained, decay)


def check_adaptable(model: LanguageModel, instead: str) -> None:
    """Check that a model has weights that can learn.

    Args:
        model: any model.
        instead: what the user can do if not.

    Raises:
        ConfigError: it has only counts.
    """
    if not _parameters(model):
        raise ConfigError(f"A model of {model.kind} has no weights that learn from a text: use {instead}.")


def gradient_sizes(
    model: LanguageModel, ids: Ids, *, segment: int = SEGMENT, segments: int = MEASURED_SEGMENTS
) -> list[Tensor | None]:
    """The usual size of each parameter's gradients, with the floor added; None: it has no gradient.

    Args:
        model: with trained weights.
        ids: (N + 1,) training text, the start token first.
        segment: tokens of a segment.
        segments: how many segments are read, from the start.
    """
    parameters = _parameters(model)
    squares: list[Tensor | None] = [None] * len(parameters)
    counts = [0] * len(parameters)
    state: State | None = None
    for piece in _segments(model, ids[: segment * segments + 1], segment):
        nats, state = _forward(model, piece, state)
        _backward(nats)
        for number, parameter in enumerate(parameters):
            grad, parameter.grad = parameter.grad, None
            if grad is None:
                continue
            square = grad.coalesce().values().square().mean() if grad.is_sparse else grad.square()
            before = squares[number]
            squares[number] = square if before is None else before + square
            counts[number] += 1
    roots = [None if total is None else (total / n).sqrt() for total, n in zip(squares, counts, strict=True)]
    # Without any gradient, nothing is divided by 0: the step is 0.
    return [None if root is None else root + FLOOR * root.mean() + 1e-12 for root in roots]


def adapted_nats(
    model: LanguageModel,
    ids: Ids,
    sizes: Sequence[Tensor | None],
    options: AdaptationOptions,
    *,
    progress: Progress | None = None,
) -> Floats:
    """The nats (N,) of a text whose segments are learned after they are scored; the same call gives the same bits.

    Args:
        model: with trained weights, which return afterwards.
        ids: (N + 1,) the start token, then the N tokens.
        sizes: of `gradient_sizes`.
        options: of the steps.
        progress: called with tokens done and tokens in all.
    """
    parts: list[Floats] = []
    done = 0
    with Learner(model, sizes, options) as learner:
        for piece in _segments(model, ids, options.segment):
            parts.append(learner.read(piece))
            done += len(parts[-1])
            if progress is not None:
                progress(done, len(ids) - 1)
    return np.concatenate(parts)


def static_nats(model: LanguageModel, ids: Ids, options: AdaptationOptions) -> Floats:
    """The nats (N,) of a text without learning, under the context rule of `adapted_nats`."""
    state: State | None = None
    parts = []
    with torch.inference_mode():
        for piece in _segments(model, ids, options.segment):
            nats, state = _forward(model, piece, state)
            parts.append(nats.cpu().double().numpy())
    return np.concatenate(parts)


def tune(
    model: LanguageModel,
    ids: Ids,
    sizes: Sequence[Tensor | None],
    *,
    segment: int = SEGMENT,
    progress: Progress | None = None,
) -> Tuning:
    """The rate, and then the decay, with the lowest loss on the first `MAX_TUNED` tokens of a validation text.

    Args:
        model: with trained weights.
        ids: (N + 1,) the start token, then the N tokens.
        sizes: of `gradient_sizes`.
        segment: tokens of a segment.
        progress: called with tokens done and tokens in all, of all trials.
    """
    ids = ids[: MAX_TUNED + 1]
    tokens, trials = len(ids) - 1, len(RATES) + len(DECAYS) - 1
    losses: dict[AdaptationOptions, float] = {}

    def loss_of(options: AdaptationOptions) -> float:
        if options not in losses:
            before = len(losses) * tokens

            def trial_progress(done: int, _: int) -> None:
                if progress is not None:
                    progress(before + done, trials * tokens)

            loss = float(adapted_nats(model, ids, sizes, options, progress=trial_progress).mean())
            # Steps that are too long end in NaN.
            losses[options] = loss if math.isfinite(loss) else math.inf
        return losses[options]

    rate = min(RATES, key=lambda each: loss_of(AdaptationOptions(each, DECAYS[1], segment)))
    decay = min(DECAYS, key=lambda each: loss_of(AdaptationOptions(rate, each, segment)))
    chosen = AdaptationOptions(rate, decay, segment)
    static = float(static_nats(model, ids, chosen).mean())
    return Tuning(chosen, tokens, static, losses[chosen])


def _parameters(model: LanguageModel) -> list[Tensor]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _segments(model: LanguageModel, ids: Ids, segment: int) -> Iterator[Piece]:
    """Pieces in one row, in the order of the text; the first window of a limited context is longer than a segment."""
    return pieces(ids, model.context_length, segment, stride=segment)


def _forward(model: LanguageModel, piece: Piece, state: State | None) -> tuple[Tensor, State]:
    """The nats (N,) of a piece's scored tokens, with their graph; and the state after it."""
    device = next(model.parameters()).device
    inputs, targets = (torch.from_numpy(ids.astype(np.int64)).to(device) for ids in (piece.inputs, piece.targets))
    was_training = model.training
    model.eval()
    try:
        with deterministic(device):
            logits, after = model(inputs, None if piece.fresh else state)
            scored = logits[:, piece.skip :].float().flatten(0, 1)
            nats = F.cross_entropy(scored, targets[:, piece.skip :].flatten(), reduction="none")
    finally:
        model.train(was_training)
    return nats, after.detach()


def _backward(nats: Tensor) -> None:
    with deterministic(nats.device):
        nats.mean().backward()
