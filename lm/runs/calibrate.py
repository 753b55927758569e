"""What the calibration of a run needs: a temperature fitted on its validation text, and samples."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lm.corpora import Progress
from lm.device import TO_USE, enough_memory
from lm.evaluation.calibration import SampledEntropy, Temperature, fit_temperature, sampled_entropy
from lm.generation.options import SamplingOptions

if TYPE_CHECKING:
    from lm.runs.run import Run

SAMPLING = SamplingOptions(n=8, max_tokens=500, temperature=1.0, allow_unknown=True, seed=1)
"""Samples of the model's own distribution: at temperature 1, without a filter."""


def validation_ids(
    run: Run, *, corpus: Path | str | None = None, data_dir: Path | None = None, reading: Progress | None = None
) -> npt.NDArray[Any]:
    """The run's validation text as ids (N + 1,), the start token first.

    Args:
        run: the run.
        corpus: where the run's text is now, if it has moved.
        data_dir: folder of the named corpora.
        reading: called while the text is read.

    Raises:
        CorpusError: there is no text, or another one.
    """
    return run.own_text(corpus, split="valid", data_dir=data_dir, progress=reading).splits["valid"].ids


def run_temperature(
    run: Run, ids: npt.NDArray[Any], *, progress: Callable[[int, int], None] | None = None
) -> Temperature:
    """The temperature with the lowest loss on the run's validation text, which `validation_ids` gives."""
    with enough_memory(TO_USE):
        return fit_temperature(run.model, ids, "valid", progress=progress)


def run_samples(run: Run) -> SampledEntropy:
    """The entropy of the run's samples; the same for the same weights."""
    tokens: list[list[int]] = [[run.tokenizer.start_id] for _ in range(SAMPLING.n)]
    for event in run.events(run.request("", SAMPLING)):
        tokens[event.index] += event.tokens
    return sampled_entropy(run.model, [np.array(each) for each in tokens])
