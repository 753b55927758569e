"""What the report page of a run shows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm.config import validate
from lm.errors import CorpusError
from lm.evaluation.report import Report
from lm.generation.options import SamplingOptions
from lm.runs.run import Run, TokenScore

MAP_TOKENS = 3000
"""Tokens of the surprise map."""
SAMPLE_TOKENS = 400


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
    tokens: Sequence[TokenScore]
    """The first tokens of the main split; none without its text."""
    missing_text: str | None
    """Why the text could not be read."""

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
    """Measure a run and write samples with it; what is measured already is read from its report.json.

    Args:
        run: any run.
        split: the main split; None: test if there is one, else valid.
        samples: number of texts.
        seed: of the first text.
        temperature: of the texts.
        progress: called with tokens scored and tokens in all, if the split was not measured yet.
        data_dir: folder of the named corpora.
        corpus: where the run's text is now, if it has moved.

    Raises:
        CorpusError: the text is needed for the figures of the main split and is not where it was, or has changed.
    """
    main = run.existing_split(split)
    saved = {
        name: validate(Report, report, where="report.json")
        for name, report in run.reports().items()
        if report["state"] == run.checkpoint
    }
    if not any(report.split == main for report in saved.values()):
        saved[main] = run.evaluate(main, progress=progress, data_dir=data_dir, corpus=corpus)
    reports = sorted(saved.values(), key=lambda report: report.split != main)
    tokens: list[TokenScore] = []
    missing_text = None
    try:
        part = run.own_text(corpus, split=main, data_dir=data_dir).splits[main]
        tokens = run.score_ids(part.ids[: MAP_TOKENS + 1])
    except CorpusError as error:
        if corpus is not None:
            raise
        missing_text = str(error)
    options = SamplingOptions(temperature=temperature, seed=seed, n=samples, max_tokens=SAMPLE_TOKENS)
    return RunReport(
        facts=run.facts(),
        reports=reports,
        rows=run.folder.read_metrics(),
        samples=run.samples(**options.model_dump()),
        sampling=options.model_dump(),
        tokens=tokens,
        missing_text=missing_text,
    )
