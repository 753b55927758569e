"""What `lm eval` measures of a run in addition to the report: calibration, dynamic evaluation, a cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lm.corpora.answers import beginning
from lm.device import TO_USE, enough_memory
from lm.evaluation.adaptation import (
    AdaptationOptions,
    Learner,
    adapted_nats,
    check_adaptable,
    gradient_sizes,
    static_nats,
    tune,
)
from lm.evaluation.cache_model import MAX_TUNED, cached_nats, tune_cache
from lm.evaluation.calibration import MAX_FITTED, SampledEntropy, Temperature, fit_temperature, sampled_entropy
from lm.evaluation.perplexity import score
from lm.evaluation.report import bits_per_byte
from lm.generation.options import SamplingOptions

if TYPE_CHECKING:
    from lm.corpora import PreparedCorpus
    from lm.evaluation.report import Report
    from lm.runs.run import Run

SAMPLING = SamplingOptions(n=8, max_tokens=500, temperature=1.0, allow_unknown=True, ignore_eos=True, seed=1)
"""Samples of the model's own distribution: at temperature 1, without a filter."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class ChangingFigures:
    """The figures of a model that changes while it reads the text, and those of the model as it was trained."""

    method: str
    loss: float
    """Nats per token."""
    bits_per_byte: float | None
    """With the spelling cost, as in the report."""
    static_loss: float
    """Of the unchanged model, under the same context rule."""
    static_bits_per_byte: float | None
    options: dict[str, Any]
    """Of the method."""
    tuned_on: str
    """The text on which they were chosen."""
    tuned_tokens: int
    tuned_static_loss: float
    tuned_loss: float
    """Of that text."""
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """All figures as JSON values."""
        return asdict(self)


def tuned_on_itself(run: Run, report: Report) -> tuple[str, ...]:
    """A note, if the report is of the run's validation text, on which temperature, adaptation and cache are chosen."""
    if run.record["corpus"]["splits"]["valid"]["sha256"] != report.text_sha256:
        return ()
    return ("What is chosen on valid is measured on valid here, and looks better than on new text.",)


def run_temperature(
    run: Run, own: PreparedCorpus, *, stride: int | None = None, progress: Progress | None = None
) -> Temperature:
    """The temperature with the lowest loss on the start of the run's validation text, a split of `own`."""
    ids, marks = beginning(own.splits["valid"], MAX_FITTED)
    with enough_memory(TO_USE):
        return fit_temperature(run.model, ids, "valid", marks=marks, stride=stride, progress=progress)


def run_samples(run: Run) -> SampledEntropy:
    """The entropy of the run's samples; the same for the same weights."""
    tokens: list[list[int]] = [[run.tokenizer.start_id] for _ in range(SAMPLING.n)]
    for event in run.events(run.request("", SAMPLING)):
        tokens[event.index] += event.tokens
    return sampled_entropy(run.model, [np.array(each) for each in tokens])


def run_adapted(
    run: Run, own: PreparedCorpus, ids: npt.NDArray[Any], report: Report, *, progress: Progress | None = None
) -> ChangingFigures:
    """The figures of a text under dynamic evaluation.

    Args:
        run: its model is unchanged afterwards.
        own: the text of its training; rate and decay are chosen on the validation split.
        ids: (N + 1,) the scored text, the start token first.
        report: of that text.
        progress: called with tokens done and tokens in all, first for the choice, then for the text.
    """
    model = run.model
    with enough_memory(TO_USE):
        sizes = gradient_sizes(model, own.splits["train"].ids)
        tuned = tune(model, own.splits["valid"].ids, sizes, progress=progress)
        nats = adapted_nats(model, ids, sizes, tuned.options, progress=progress)
        # A carried state has one context rule, so that its static figure is the report's.
        static = report.loss
        if model.context_length is not None:
            static = float(static_nats(model, ids, tuned.options).mean())
    return ChangingFigures(
        "dynamic evaluation", *_figures(report, float(nats.mean())), *_figures(report, static),
        asdict(tuned.options), "valid", tuned.tokens, tuned.static_loss, tuned.loss,
        tuned_on_itself(run, report),
    )  # fmt: skip


def chat_learner(run: Run) -> Learner:
    """A learner of the run's model, in memory, for a chat; the engine must use `run.model`.

    Raises:
        ConfigError: the model has only counts.
        CorpusError: the training text, which gives the usual sizes of gradients, is not available.
    """
    check_adaptable(run.model, "lm chat without --learn")
    sizes = gradient_sizes(run.model, run.own_text().splits["train"].ids)
    return Learner(run.model, sizes, AdaptationOptions())


def run_cached(
    run: Run,
    own: PreparedCorpus,
    ids: npt.NDArray[Any],
    nats: npt.NDArray[Any],
    report: Report,
    *,
    stride: int | None = None,
    progress: Progress | None = None,
) -> ChangingFigures:
    """The figures of a text with a cache; arguments as `run_adapted`, and the nats (N,) of the text's tokens."""
    valid = own.splits["valid"].ids[: MAX_TUNED + 1]
    parts: list[npt.NDArray[Any]] = []
    with enough_memory(TO_USE):
        score(run.model, valid, stride=stride, each=parts.append, progress=progress)
    tuned = tune_cache(valid, np.concatenate(parts))
    return ChangingFigures(
        "cache", *_figures(report, float(cached_nats(ids, nats, tuned.options).mean())),
        *_figures(report, report.loss), asdict(tuned.options), "valid", tuned.tokens, tuned.static_loss, tuned.loss,
        tuned_on_itself(run, report),
    )  # fmt: skip


def _figures(report: Report, loss: float) -> tuple[float, float | None]:
    """Loss and bits per byte, from the loss."""
    return loss, bits_per_byte(report, loss)
