"""Calibration: are the probabilities of a model right?

- **Bins.** Tokens are sorted into bins by the probability of the model's first choice (its confidence). In each bin,
  the mean confidence should equal the share of tokens where the first choice is right. The expected calibration error
  is the mean difference over the tokens. It is given for bins of equal width and for bins of equal mass (as many tokens
  in each).
- **Temperature.** The one number that, dividing all logits, gives the lowest loss; above 1 the model is too sure. It is
  fitted on validation text, and then applied to the scored text.
- **Entropy.** The nats that the model expects for each token, against the nats that the text has; and the nats of
  samples. Samples with more nats than the text drift away from it as they grow.

Sources: Guo et al. 2017 (error, temperature); Nguyen and O'Connor 2015 (bins of equal mass); Braverman et al. 2020
(entropy of samples).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch.nn.functional as F
from torch import Tensor

from lm.corpora.answers import ANSWER
from lm.evaluation.per_token import Scored
from lm.evaluation.perplexity import score
from lm.models.base import LanguageModel

BINS = 15
MAX_FITTED = 100_000
"""Tokens from the start of the validation text on which the temperature is fitted."""
MAX_STORED = 50_000_000
"""Logits that are stored for the fit; with more, each evaluation of the loss runs the model again."""
COLDEST, HOTTEST = 0.05, 20.0
"""Limits of the temperature."""
ENOUGH = 1e-7
"""Nats per token that a further step of the fit would gain at most."""
MAX_EVALUATIONS = 12

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Bin:
    """Tokens of similar confidence."""

    low: float
    high: float
    """The range of confidence."""
    tokens: int
    confidence: float
    """Mean probability of the first choice."""
    accuracy: float
    """Share of tokens where the first choice is right."""


@dataclass(frozen=True)
class Reliability:
    """Bins of one kind, without the empty ones."""

    bins: tuple[Bin, ...]
    error: float
    """Expected calibration error: mean of |confidence - accuracy| over the tokens."""


@dataclass(frozen=True)
class Temperature:
    """The temperature with the lowest loss on a text."""

    value: float
    text: str
    """The text that it was fitted on."""
    tokens: int
    """Of that text."""
    loss_before: float
    """Nats per token of that text at temperature 1."""
    loss_after: float
    """The same at this temperature."""


@dataclass(frozen=True)
class SampledEntropy:
    """Nats of texts that the model drew at temperature 1 without filters."""

    samples: int
    tokens: int
    """In all samples."""
    entropy: float
    """Mean entropy of the predictions, in nats per token."""
    standard_error: float
    """Of the entropy, over the samples."""


@dataclass(frozen=True)
class Calibration:
    """The calibration of a model on one text."""

    tokens: int
    equal_mass: Reliability
    equal_width: Reliability
    loss: float
    """Nats per token of the text."""
    expected_loss: float
    """Nats per token that the model expects: the mean entropy of its predictions."""
    temperature: Temperature | None = None
    loss_at_temperature: float | None = None
    """Nats per token of the text at that temperature."""
    error_at_temperature: float | None = None
    """Expected calibration error of bins of equal mass at that temperature."""
    samples: SampledEntropy | None = None
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """All figures as JSON values."""
        return asdict(self)


class CalibrationSums:
    """Collects what calibration needs while a text is scored; 9 bytes a token.

    Args:
        temperature: also measure at this temperature.
    """

    def __init__(self, temperature: Temperature | None = None) -> None:
        self._temperature = temperature
        self._hits: list[npt.NDArray[np.bool_]] = []
        self._confidences: tuple[list[Floats], list[Floats]] = [], []
        """At temperature 1, and at the fitted one."""
        self._entropy = self._nats = self._nats_at_temperature = 0.0

    def add(self, scored: Scored) -> None:
        """Add tokens: a watcher of `score`."""
        self._hits.append(scored.hit.cpu().numpy())
        self._confidences[0].append(scored.confidence.cpu().numpy())
        self._entropy += _sum(scored.entropy)
        self._nats += _sum(scored.nats)
        if self._temperature is not None:
            changed = replace(scored, logits=scored.logits / self._temperature.value)
            self._confidences[1].append(changed.confidence.cpu().numpy())
            self._nats_at_temperature += _sum(_losses(changed.logits, scored.targets))

    def result(self, samples: SampledEntropy | None = None, notes: Iterable[str] = ()) -> Calibration:
        """The calibration on all tokens."""
        hits, confidences = np.concatenate(self._hits), np.concatenate(self._confidences[0])
        tokens = len(hits)
        found = Calibration(
            tokens,
            equal_mass(confidences, hits),
            equal_width(confidences, hits),
            loss=self._nats / tokens,
            expected_loss=self._entropy / tokens,
            samples=samples,
            notes=tuple(notes),
        )
        if self._temperature is None:
            return found
        return replace(
            found,
            temperature=self._temperature,
            loss_at_temperature=self._nats_at_temperature / tokens,
            error_at_temperature=equal_mass(np.concatenate(self._confidences[1]), hits).error,
        )


# -- bins ---------------------------------------------------------------------------------------------


def equal_width(confidences: npt.NDArray[Any], hits: npt.NDArray[np.bool_], bins: int = BINS) -> Reliability:
    """Bins (0, 1/bins], (1/bins, 2/bins], …

    Args:
        confidences: (N,) probabilities of the first choices.
        hits: (N,) whether they are right.
        bins: number of bins; empty ones are left out.
    """
    numbers = np.clip(np.ceil(np.asarray(confidences, np.float64) * bins).astype(np.int64) - 1, 0, bins - 1)
    order = np.argsort(numbers, kind="stable")
    cuts = np.searchsorted(numbers[order], np.arange(1, bins))
    parts = enumerate(np.split(order, cuts))
    return _reliability([_bin(confidences[p], hits[p], n / bins, (n + 1) / bins) for n, p in parts if len(p)])


def equal_mass(confidences: npt.NDArray[Any], hits: npt.NDArray[np.bool_], bins: int = BINS) -> Reliability:
    """Bins with about as many tokens each, in order of confidence; tokens of equal confidence share a bin.

    Arguments as `equal_width`.
    """
    order = np.argsort(confidences, kind="stable")
    ranked = confidences[order]
    wanted = np.arange(1, bins) * len(ranked) // bins
    cuts = np.unique(np.searchsorted(ranked, ranked[wanted[wanted > 0] - 1], side="right"))
    parts = [part for part in np.split(order, cuts) if len(part)]
    return _reliability([_bin(confidences[p], hits[p], confidences[p[0]], confidences[p[-1]]) for p in parts])


def _bin(confidences: npt.NDArray[Any], hits: npt.NDArray[np.bool_], low: float, high: float) -> Bin:
    return Bin(float(low), float(high), len(hits), float(confidences.mean(dtype=np.float64)), float(hits.mean()))


def _reliability(bins: list[Bin]) -> Reliability:
    tokens = sum(each.tokens for each in bins)
    return Reliability(tuple(bins), sum(each.tokens * abs(each.confidence - each.accuracy) for each in bins) / tokens)


# -- temperature --------------------------------------------------------------------------------------


def fit_temperature(
    model: LanguageModel,
    ids: npt.NDArray[Any],
    name: str,
    *,
    marks: npt.NDArray[np.uint8] | None = None,
    stride: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Temperature:
    """The temperature with the lowest loss on a text.

    Args:
        model: in evaluation mode.
        ids: (N + 1,) the start token, then the N tokens; at most `MAX_FITTED` are useful.
        name: of the text, for the result.
        marks: (N + 1,) of conversations, of which the answers alone count.
        stride: of a window; default: half the context length.
        progress: called with tokens done and tokens in all, once or several times from the start.
    """
    tokens = len(ids) - 1 if marks is None else int(np.count_nonzero(marks == ANSWER))
    stored: list[tuple[Tensor, Tensor]] = []
    fits = tokens * model.vocab_size <= MAX_STORED

    def evaluate(inverse: float) -> tuple[float, float, float]:
        if stored:
            return _sums(stored, inverse)
        total = np.zeros(3)

        def add(scored: Scored) -> None:
            if fits:
                stored.append((scored.logits.clone(), scored.targets))
            total.__iadd__(_sums([(scored.logits, scored.targets)], inverse))

        score(model, ids, marks=marks, stride=stride, watchers=[add], progress=progress)
        loss, first, second = total.tolist()
        return loss, first, second

    inverse, before, after = minimise(evaluate, tokens)
    return Temperature(1 / inverse, name, tokens, before / tokens, after / tokens)


def minimise(evaluate: Callable[[float], tuple[float, float, float]], tokens: int) -> tuple[float, float, float]:
    """The inverse temperature with the lowest loss, the loss at temperature 1 and the lowest loss.

    The loss is convex in the inverse temperature: Newton's steps, halved in ratio where they leave the bracket.

    Args:
        evaluate: gives loss (a sum), first and second derivative at an inverse temperature.
        tokens: of the sum.
    """
    low, high = 1 / HOTTEST, 1 / COLDEST
    inverse = best = 1.0
    before = lowest = math.inf
    for number in range(MAX_EVALUATIONS):
        loss, first, second = evaluate(inverse)
        if number == 0:
            before = loss
        if loss < lowest:
            best, lowest = inverse, loss
        if first * first <= 2 * max(second, 0.0) * ENOUGH * tokens:
            break
        low, high = (inverse, high) if first < 0 else (low, inverse)
        step = inverse - first / second if second > 0 else math.nan
        inverse = step if low < step < high else math.sqrt(low * high)
    return best, before, lowest


def _sums(parts: Iterable[tuple[Tensor, Tensor]], inverse: float) -> tuple[float, float, float]:
    """The loss at an inverse temperature b, and its derivatives by b: sums over the tokens.

    With logits z and p = softmax(b z): loss log sum exp(b z) - b z_target, first E_p[z] - z_target, second Var_p[z].
    """
    total = np.zeros(3)
    for logits, targets in parts:
        # Differences to the largest logit; a logit of -inf has the probability 0 at every temperature.
        logits = logits - logits.amax(dim=-1, keepdim=True)
        probabilities = (inverse * logits).softmax(dim=-1)
        finite = logits.clamp(min=-1e30).masked_fill(probabilities == 0, 0)
        mean = (probabilities * finite).sum(dim=-1)
        variance = (probabilities * (finite - mean[:, None]).square()).sum(dim=-1)
        own = logits.gather(1, targets[:, None])[:, 0]
        losses = _losses(inverse * logits, targets)
        total += [_sum(each) for each in (losses, mean - own, variance)]
    loss, first, second = total.tolist()
    return loss, first, second


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits, targets, reduction="none")


def _sum(values: Tensor) -> float:
    """In float64, on the host: some devices lack it."""
    return float(values.cpu().double().sum())


# -- samples ------------------------------------------------------------------------------------------


def sampled_entropy(model: LanguageModel, samples: Iterable[npt.NDArray[Any]]) -> SampledEntropy:
    """The entropy of a model's predictions on its samples, the mean over all their tokens.

    Args:
        model: in evaluation mode.
        samples: (N + 1,) the start token, then the N tokens; at least two samples.
    """
    means, counts = [], []
    for ids in samples:
        entropies: list[float] = []

        def add(scored: Scored, into: list[float] = entropies) -> None:
            into.append(_sum(scored.entropy))

        score(model, ids, watchers=[add])
        means.append(sum(entropies) / (len(ids) - 1))
        counts.append(len(ids) - 1)
    error = float(np.std(means, ddof=1)) / math.sqrt(len(means))
    return SampledEntropy(len(means), sum(counts), float(np.average(means, weights=counts)), error)
