"""What the report page of a run shows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm.config import validate
from lm.copies import Copies
from lm.errors import CorpusError
from lm.evaluation.calibration import Calibration, CalibrationSums
from lm.evaluation.copying import CopyReport, copy_report
from lm.evaluation.report import Report
from lm.generation.options import SamplingOptions
from lm.runs.copying import index_training_text, split_text
from lm.runs.eval_extras import run_samples, run_temperature
from lm.runs.run import Run, TokenScore

MAP_TOKENS = 3000
"""Tokens of the surprise map."""
SAMPLE_TOKENS = 400
MEASURED_SAMPLES = 20
"""Samples whose copies are counted; the page shows the first ones."""


@dataclass(frozen=True)
class FromText:
    """What needs the run's text."""

    calibration: Calibration
    """Of the main split."""
    copying: CopyReport
    """Of MEASURED_SAMPLES samples and as much of the validation text."""
    copies: Sequence[Copies]
    """Of the samples that are shown."""
    tokens: Sequence[TokenScore]
    """The first tokens of the main split."""


@dataclass(frozen=True)
class RunReport:
    """A run with its figures and texts."""

    facts: Mapping[str, Any]
    """As of `Run.facts`."""
    reports: Sequence[Report]
    """One a split, the main one first."""
    rows: Sequence[Mapping[str, Any]]
    """The lines of metrics.jsonl."""
    samples: Sequence[str]
    sampling: Mapping[str, Any]
    """The options of the samples."""
    from_text: FromText | None
    """None if the text could not be read."""
    missing_text: str | None
    """Why not."""

    @property
    def main(self) -> Report:
        """The report that the first lines and the map are about."""
        return self.reports[0]


def collect(
    run: Run,
    split: str | None = None,
    *,
    samples: int = 3,
    seed: int = 1,
    temperature: float = 0.8,
    progress: Callable[[int, int], None] | None = None,
    data_dir: Path | None = None,
    corpus: Path | str | None = None,
) -> RunReport:
    """Measure a run and write samples with it. Without the run's text, the figures are those of its report.json.

    Args:
        run: any run.
        split: the main split; None: test if there is one, else valid.
        samples: number of texts to show.
        seed: of the first text.
        temperature: of the texts.
        progress: called with tokens scored and tokens in all.
        data_dir: folder of the named corpora.
        corpus: where the run's text is now, if it has moved.

    Raises:
        CorpusError: the text is not where it was, or has changed, and report.json has no figures of the split.
    """
    main = run.existing_split(split)
    reports = {
        name: validate(Report, report, where="report.json")
        for name, report in run.reports().items()
        if report["state"] == run.checkpoint
    }
    options = SamplingOptions(
        temperature=temperature, seed=seed, n=max(samples, MEASURED_SAMPLES), max_tokens=SAMPLE_TOKENS
    )
    texts = run.samples(**options.model_dump())
    from_text, missing = None, None
    try:
        own = run.own_text(corpus, data_dir=data_dir)
        sums = CalibrationSums(run_temperature(run, own))
        reports[main] = run.evaluate(main, progress=progress, data_dir=data_dir, corpus=corpus, watchers=[sums.add])
        index = index_training_text(own)
        from_text = FromText(
            calibration=sums.result(run_samples(run)),
            copying=copy_report(index, texts, split_text(own, "valid"), split="valid", options=options),
            copies=[index.find(text) for text in texts[:samples]],
            tokens=run.score_ids(own.splits[main].ids[: MAP_TOKENS + 1]),
        )
    except CorpusError as error:
        if corpus is not None or not any(report.split == main for report in reports.values()):
            raise
        missing = str(error)
    return RunReport(
        facts=run.facts(),
        reports=sorted(reports.values(), key=lambda report: report.split != main),
        rows=run.folder.read_metrics(),
        samples=texts[:samples],
        sampling=options.model_dump(),
        from_text=from_text,
        missing_text=missing,
    )
