"""Attention: where each head looks, and what the division by sqrt(D) does.

    found = attention(run, text)
    found.maps[layer, head]              # (T, T) weights between the tokens `found.pieces`
    found.heads[0].distance              # mean distance from a query to its keys, in tokens

Statistics are means over all queries of the text that have a token before them. The text is cut into windows of the
model's context length, which the model reads one by one, as in training. Layers and heads are counted from 0.

**Entropy** of a query's weights, in nats: 0 if all weight is on one token, log n if n tokens get the same.
**Distance**: number of tokens between a query and a key, weighted. **First token**: weight on the first token of the
window, which a head often uses when it has nothing to look for.

**Scaling.** A product of a query and a key is a sum of D numbers, so it grows with sqrt(D). Without the division the
weights are close to a choice of one token, where the gradient of the softmax is nearly 0. For the same scores, with the
division and without, the view gives the entropy and the size of the gradient: the Frobenius norm of the Jacobian
diag(w) - w wᵀ of the softmax. It is 0 if one token has all weight, about 1/sqrt(n) if n tokens have the same, and at
most 1/2, if two tokens share the weight. In a trained model it can be larger without the division.

Shapes: T tokens of the maps.

Sources: Vaswani et al. 2017, section 3.2.1 (the scaling); Xiao et al. 2024, "Efficient Streaming Language Models with
Attention Sinks" (the first token).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from lm.corpora import TokenSplit
from lm.device import TO_USE, enough_memory
from lm.errors import ConfigError, CorpusError
from lm.inspection.subject import text_ids

if TYPE_CHECKING:
    from torch import Tensor

    from lm.models.base import AttentionMaps, LanguageModel
    from lm.runs.run import Run

PART = "attention"
"""The part of a model that this view needs."""
MIN_TOKENS = 2
MAP_TOKENS = 32
"""Tokens of the maps if no span is given: as many as a picture can name."""
MAX_WEIGHTS = 1 << 23
"""Weights of all layers and heads in memory at a time: 32 MB, and some times as much for the work."""
START = "<start>"
"""The piece of the start token."""


@dataclass(frozen=True)
class HeadStatistics:
    """Means of one head over the queries of a text."""

    layer: int
    head: int
    entropy: float
    """Nats."""
    distance: float
    """Tokens."""
    first: float
    """Weight on the first token of the window, from 0 to 1."""
    gradient: float
    """Norm of the Jacobian of the softmax."""
    unscaled_entropy: float
    """Nats; of the same scores without the division by sqrt(D)."""
    unscaled_gradient: float


@dataclass(frozen=True)
class Attention:
    """The attention of a model along a text."""

    run: str
    text: str
    """The text's name."""
    tokens: int
    window: int
    """Tokens that the model reads at a time."""
    head_size: int
    """D"""
    layers: tuple[int, ...]
    """Numbers of the layers that follow."""
    heads: tuple[HeadStatistics, ...]
    """All heads of these layers."""
    even_entropy: float
    """Entropy of a head that looks at all tokens equally, nats."""
    even_distance: float
    """Its distance, tokens."""
    first_token: int
    """Number of the first token of the maps; -1: the start token, which is before token 0."""
    pieces: tuple[str, ...]
    """(T,) the tokens of the maps, for display."""
    maps: npt.NDArray[np.float32]
    """(layers, heads, T, T) weights: of each query (row) on each key (column); rows sum to 1."""
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values; weights with 4 decimals."""
        return asdict(self) | {"maps": np.round(self.maps.astype(np.float64), 4).tolist()}


def attention(
    run: Run,
    text: str | TokenSplit,
    *,
    layer: int | None = None,
    head: int | None = None,
    span: tuple[int, int] | None = None,
    name: str = "text",
) -> Attention:
    """Where the heads of a run look along a text.

    Args:
        run: from `lm.load`.
        text: at least `MIN_TOKENS` tokens.
        layer: only this layer, counted from 0; None: all.
        head: only this head of each layer, counted from 0; None: all.
        span: first token and end of the maps, counted from 0; the model reads it alone. None: the start of the text.
        name: of the text.

    Raises:
        UnsupportedPartError: the model has no attention.
        ConfigError: it has no such layer or head, or the span is not in the text or longer than the model's window.
        CorpusError: the text is too short.
    """
    model = run.model
    model.require_part(PART)
    ids = text_ids(run, text, name)
    tokens = len(ids) - 1
    if tokens < MIN_TOKENS:
        raise CorpusError(f"{name} has {tokens} token, too few for attention: give at least {MIN_TOKENS} tokens.")
    with torch.inference_mode(), enough_memory(TO_USE):
        first = _maps(model, ids[None, :1])
        layers = _chosen("layer", layer, len(first), run.name)
        heads = _chosen("head", head, first[0].weights.shape[1], run.name)
        count, head_size = len(first) * first[0].weights.shape[1], first[0].head_size
        context = model.context_length or len(ids)
        window = min(context, len(ids), max(MIN_TOKENS, math.isqrt(MAX_WEIGHTS // count)))
        begin, end = _span(span, tokens, window)
        sums, queries = _statistics(model, ids, window, max(1, MAX_WEIGHTS // (count * window**2)), layers)
        shown = _maps(model, ids[None, begin + 1 : end + 1])
    notes = []
    if window < min(context, len(ids)):
        notes.append(f"windows of {window:,} tokens limit the memory: the context length is {context:,}")
    pieces = run.tokenizer.pieces(ids[begin + 1 : end + 1].tolist())
    means = (sums / queries).tolist()
    depth = np.concatenate([np.arange(1, size) for size in _window_sizes(len(ids), window)])
    return Attention(
        run=run.name,
        text=name,
        tokens=tokens,
        window=window,
        head_size=head_size,
        layers=layers,
        heads=tuple(
            HeadStatistics(number, each, *rows[each])
            for number, rows in zip(layers, means, strict=True)
            for each in heads
        ),
        even_entropy=float(np.log(depth + 1).mean()),
        even_distance=float(depth.mean() / 2),
        first_token=begin,
        pieces=tuple([START, *pieces[1:]] if begin < 0 else pieces),
        maps=np.stack([shown[number].weights[0, list(heads)].float().cpu().numpy() for number in layers]),
        notes=tuple(notes),
    )


def softmax_statistics(scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax (..., L) of scores (..., L), its entropy in nats (...,), and the norm of its Jacobian (...,)."""
    weights = scores.softmax(dim=-1)
    square = weights.square().sum(dim=-1)
    # Σ_ij (w_i [i = j] - w_i w_j)² = Σ w² - 2 Σ w³ + (Σ w²)²
    jacobian = square - 2 * weights.pow(3).sum(dim=-1) + square.square()
    return weights, torch.special.entr(weights).sum(dim=-1), jacobian.clamp(min=0).sqrt()


def _maps(model: LanguageModel, ids: npt.NDArray[np.int64]) -> tuple[AttentionMaps, ...]:
    device = next(model.parameters()).device
    return model.inspect(torch.from_numpy(ids).to(device), parts=(PART,)).attention


def _chosen(what: str, number: int | None, count: int, run: str) -> tuple[int, ...]:
    """The numbers of the chosen layers or heads."""
    if number is None:
        return tuple(range(count))
    if not 0 <= number < count:
        each = " a layer" if what == "head" else ""
        has = f"1 {what}{each}, number 0" if count == 1 else f"{count} {what}s{each}, 0 to {count - 1}"
        raise ConfigError(f"{what} {number}: {run} has {has}.")
    return (number,)


def _span(span: tuple[int, int] | None, tokens: int, window: int) -> tuple[int, int]:
    """First token and end of the maps; the start token is number -1."""
    if span is None:
        return -1, min(tokens, window - 1, MAP_TOKENS - 1)
    begin, end = span
    if not 0 <= begin < end <= tokens:
        raise ConfigError(f"span {begin} to {end}: give a first token and an end between 0 and {tokens:,}.")
    if end - begin > window:
        raise ConfigError(f"span {begin} to {end}: give at most {window:,} tokens, which the model reads at a time.")
    return begin, end


def _window_sizes(length: int, window: int) -> list[int]:
    """Sizes of the windows of a text; a last one of one token is left out."""
    whole, rest = divmod(length, window)
    return [window] * whole + [rest] * (rest > 1)


def _statistics(
    model: LanguageModel, ids: npt.NDArray[np.int64], window: int, rows: int, layers: tuple[int, ...]
) -> tuple[npt.NDArray[np.float64], int]:
    """Sums (layers, heads, 6) over the queries that have a token before them, and their number."""
    sizes = _window_sizes(len(ids), window)
    whole = sizes.count(window)
    batches = [
        ids[begin * window : min(begin + rows, whole) * window].reshape(-1, window) for begin in range(0, whole, rows)
    ]
    batches += [ids[None, whole * window :]] * (len(sizes) - whole)
    sums: npt.NDArray[np.float64] | float = 0.0
    for batch in batches:
        maps = _maps(model, batch)
        sums = sums + np.stack([_sums(maps[number]) for number in layers])
    assert not isinstance(sums, float)
    return sums, sum(sizes) - len(sizes)


def _sums(maps: AttentionMaps) -> npt.NDArray[np.float64]:
    """(heads, 6): the sums of one layer, in the order of the fields of `HeadStatistics`."""
    # The first query has nothing to choose from.
    scores = maps.scores[:, :, 1:].float()
    weights, entropy, gradient = softmax_statistics(scores / maps.head_size**0.5)
    _, unscaled_entropy, unscaled_gradient = softmax_statistics(scores)
    places = torch.arange(scores.shape[-1], device=scores.device, dtype=torch.float32)
    distance = places[1:] - weights @ places
    each = entropy, distance, weights[..., 0], gradient, unscaled_entropy, unscaled_gradient
    return torch.stack([values.cpu().double().sum(dim=(0, 2)) for values in each], dim=-1).numpy()
