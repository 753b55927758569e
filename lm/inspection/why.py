"""Why a token was predicted: how much of its log-probability came from each source of the model, and by layer.

    found = why(run, text)
    found.sources                        # ("network", "bias", "table 2", …, "counts 1", …, "mixing")
    found.terms[n]                       # (sources,) nats that each source added for token n
    found.log_probabilities[n]           # = found.baseline[n] + found.terms[n].sum()

The sum is exact. The baseline is log(1/V), what the uniform distribution gives every token; a positive term made the
token more likely. `lm.models.contributions` defines the terms, and says how the normalisation of the softmax is
divided: a source counts by how much it lifts the token above the mean token, on the way from the uniform distribution
to the model's. In a mixture of a network and counts, each part counts by its share of the token's probability; "mixing"
is the price of a gate that cannot know the token.

**By layer** (logit lens): the output layer applied to the residual stream after each block, for models that have one.
The first value is what the model would predict after its first block alone; the last is the model's prediction.

Tokens are predicted under the rule of `run.score`: with the state of all text before them, or in sliding windows.

Shapes: N tokens, S sources, L layers, M parts of a mixture.

Source: nostalgebraist 2020, "Interpreting GPT: the logit lens".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from lm.corpora import TokenSplit
from lm.device import TO_USE, enough_memory
from lm.evaluation.perplexity import pieces
from lm.inspection.subject import text_ids
from lm.models.contributions import UNIFORM

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from lm.models.base import Inspection, LanguageModel, State
    from lm.runs.run import Run

PART = "terms"
"""The part of a model that this view needs."""
MORE_PARTS = "layer_logits", "mixture"
"""Parts that it shows if the model has them."""
MAX_TOKENS = 100_000
LOGITS_AT_ONCE = 1 << 20
"""Of one part; at least those of one window. A model has up to some tens of parts."""
TOKENS_AT_ONCE = 1024

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Why:
    """The log-probability of each token of a text, divided among the sources of a model."""

    run: str
    text: str
    """The text's name."""
    pieces: tuple[str, ...]
    """(N,) the tokens, for display."""
    log_probabilities: Floats
    """(N,) nats, as `run.score` gives them, with the sign of a logarithm."""
    baseline: Floats
    """(N,) log(1/V); of an adaptive softmax, that of the token's part of the vocabulary."""
    sources: tuple[str, ...]
    terms: Floats
    """(N, S) nats."""
    layers: Floats
    """(N, L) log-probability after each layer; L is 0 if the model has no such layers."""
    parts: tuple[str, ...]
    """The distributions that the model mixes; empty if it has one."""
    weights: Floats
    """(N, M) weight of each part, before the token is known."""
    shares: Floats
    """(N, M) share of the token's probability that each part gave; rows sum to 1."""
    part_log_probabilities: Floats
    """(N, M) log-probability of the token in each part alone; -inf if it gives none."""
    notes: tuple[str, ...] = ()

    @property
    def totals(self) -> dict[str, float]:
        """Mean of each source's terms, nats per token. With the mean baseline, they sum to minus the loss."""
        return dict(zip(self.sources, self.terms.mean(axis=0).tolist(), strict=True))

    @property
    def layer_gains(self) -> Floats:
        """(N, L) nats that each layer added to the layer before it; the first, to the baseline."""
        return np.diff(self.layers, axis=1, prepend=self.baseline[:, None])

    @property
    def loss(self) -> float:
        """Mean nats per token."""
        return -float(self.log_probabilities.mean())

    def to_json(self) -> dict[str, Any]:
        """Plain values; -inf is None."""

        def rows(values: Floats, names: Sequence[str]) -> list[dict[str, float | None]]:
            plain = [[round(value, 6) if np.isfinite(value) else None for value in row] for row in values.tolist()]
            return [dict(zip(names, row, strict=True)) for row in plain]

        layers = [str(number) for number in range(self.layers.shape[1])]
        fields = {
            "terms": rows(self.terms, self.sources),
            "layers": rows(self.layers, layers),
            "weights": rows(self.weights, self.parts),
            "shares": rows(self.shares, self.parts),
            "part_log_probabilities": rows(self.part_log_probabilities, self.parts),
        }
        tokens = [
            {"token": piece, "log_probability": value, "baseline": baseline}
            | {key: each[number] for key, each in fields.items() if each[number]}
            for number, (piece, value, baseline) in enumerate(
                zip(self.pieces, self.log_probabilities.tolist(), self.baseline.tolist(), strict=True)
            )
        ]
        return {
            "run": self.run,
            "text": self.text,
            "loss": self.loss,
            "baseline": float(self.baseline.mean()),
            "totals": self.totals,
            "layer_gains": self.layer_gains.mean(axis=0).tolist(),
            "shares": dict(zip(self.parts, self.shares.mean(axis=0).tolist(), strict=True)),
            "tokens": tokens,
            "notes": list(self.notes),
        }


def why(run: Run, text: str | TokenSplit, *, name: str = "text") -> Why:
    """Divide the log-probability of each token of a text among the sources of a run's model.

    Args:
        run: from `lm.load`.
        text: any text with a token; a very long one is cut, and a note says so.
        name: of the text.

    Raises:
        UnsupportedPartError: the model does not say where its predictions come from.
        CorpusError: the text has no token.
    """
    model = run.model
    model.require_part(PART)
    ids = text_ids(run, text, name)
    found = len(ids) - 1
    ids = ids[: MAX_TOKENS + 1]
    with torch.inference_mode(), enough_memory(TO_USE):
        names, mixed, columns = _divide(model, ids)
    sources = tuple(source for source in names if source != UNIFORM)
    terms = columns["terms"]
    used = [index for index, source in enumerate(names) if source != UNIFORM]
    log_weights, part_logs = columns["log_weights"], columns["part_logs"]
    return Why(
        run=run.name,
        text=name,
        pieces=tuple(run.tokenizer.pieces(ids[1:].tolist())),
        log_probabilities=columns["logs"][:, 0],
        baseline=terms[:, names.index(UNIFORM)],
        sources=sources,
        terms=terms[:, used],
        layers=columns["layers"],
        parts=mixed,
        weights=np.exp(log_weights),
        shares=_shares(log_weights + part_logs),
        part_log_probabilities=part_logs,
        notes=() if found <= MAX_TOKENS else (f"only the first {MAX_TOKENS:,} of {found:,} tokens are used",),
    )


def _divide(
    model: LanguageModel, ids: npt.NDArray[np.int64]
) -> tuple[tuple[str, ...], tuple[str, ...], dict[str, Floats]]:
    """Names of the terms, names of the mixed parts, and columns (N, …) of the text's tokens by name."""
    asked = [PART, *(part for part in MORE_PARTS if part in model.inspectable())]
    device = next(model.parameters(), torch.empty(0)).device
    at_once = min(TOKENS_AT_ONCE, max(1, LOGITS_AT_ONCE // model.vocab_size))
    names: tuple[str, ...] = ()
    mixed: tuple[str, ...] = ()
    found: dict[str, list[Floats]] = {}
    state: State | None = None
    for piece in pieces(ids, model.context_length, at_once):
        inputs = torch.from_numpy(piece.inputs).to(device)
        seen = model.inspect(inputs, None if piece.fresh else state, parts=asked)
        state = seen.state
        names, mixed = tuple(seen.terms), tuple(seen.mixture)
        for key, values in _columns(seen, torch.from_numpy(piece.targets).to(device)).items():
            scored = values[:, piece.skip :].flatten(0, 1)
            found.setdefault(key, []).append(scored.cpu().double().numpy())
    return names, mixed, {key: np.concatenate(parts) for key, parts in found.items()}


def _columns(seen: Inspection, targets: Tensor) -> dict[str, Tensor]:
    """Of each target (B, T): what the parts of the model say of it, (B, T, …)."""

    def of_target(values: Sequence[Tensor]) -> Tensor:
        index = targets[..., None]
        columns = [each.gather(-1, index) for each in values]
        return torch.cat(columns, dim=-1) if columns else torch.empty(*targets.shape, 0, device=targets.device)

    mixture = seen.mixture.values()
    none = torch.empty(*targets.shape, 0, device=targets.device)
    return {
        "logs": of_target([seen.logits.float().log_softmax(dim=-1)]),
        "terms": of_target(list(seen.terms.values())),
        "layers": of_target([each.float().log_softmax(dim=-1) for each in seen.layer_logits]),
        "log_weights": torch.stack([part.weight.log() for part in mixture], dim=-1) if mixture else none,
        "part_logs": of_target([part.log_probabilities for part in mixture]),
    }


def _shares(logs: Floats) -> Floats:
    """(N, M) shares of the sum of exp(logs) in each row."""
    if not logs.shape[1]:
        return logs
    weights = np.exp(logs - logs.max(axis=1, keepdims=True))
    shares: Floats = weights / weights.sum(axis=1, keepdims=True)
    return shares
