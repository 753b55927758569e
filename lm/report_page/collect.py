"""What the report page of a run shows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from lm.config import validate
from lm.copies import Copies
from lm.corpora import TokenSplit
from lm.corpora.answers import ANSWER, beginning
from lm.corpora.batches import conversation_bounds
from lm.corpora.text import Text
from lm.errors import CorpusError
from lm.evaluation.calibration import Calibration, CalibrationSums
from lm.evaluation.copying import CopyReport, copy_report
from lm.evaluation.report import Report
from lm.generation.options import SamplingOptions
from lm.generation.request import Request
from lm.runs.copying import index_training_text, split_text
from lm.runs.eval_extras import run_samples, run_temperature
from lm.runs.run import Run, TokenScore
from lm.runs.scoring import token_texts
from lm.tokenizers.turns import BLANK_LINE

MAP_TOKENS = 3000
"""Tokens of the surprise map."""
SAMPLE_TOKENS = 400
MEASURED_SAMPLES = 20
"""Samples whose copies are counted; the page shows the first ones."""


@dataclass(frozen=True)
class FromText:
    """What needs the text."""

    calibration: Calibration
    """Of the main text."""
    tokens: Sequence[TokenScore]
    """Its first tokens; those of a conversation that are context alone have NaN for nats."""
    copying: CopyReport | None = None
    """Of MEASURED_SAMPLES samples and as much of the validation text; None without a training text, and of
    conversations."""
    copies: Sequence[Copies] | None = None
    """Of the samples that are shown; None as `copying`."""


@dataclass(frozen=True)
class RunReport:
    """A run with its figures and texts."""

    facts: Mapping[str, Any]
    """As of `Run.facts`."""
    reports: Sequence[Report]
    """One a split, the main one first."""
    rows: Sequence[Mapping[str, Any]]
    """The lines of metrics.jsonl."""
    samples: Sequence[tuple[str, str]]
    """Prompts and texts."""
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


def _answers(run: Run, split: TokenSplit, options: SamplingOptions) -> Iterator[tuple[str, str]]:
    """The first questions of a split of conversations, and what the run answers; at most `options.n`."""
    assert split.marks is not None
    # A chat template has end tokens.
    stop = () if run.tokenizer.chat_template else (BLANK_LINE,)
    one = options.model_copy(update={"n": 1, "stop": stop})
    for begin, end in islice(zip(*conversation_bounds(split.marks), strict=True), options.n):
        asked = split.ids[begin : begin + int(np.argmax(split.marks[begin:end] == ANSWER))].tolist()
        answer = "".join(event.text for event in run.events(Request(tuple(asked), one)))
        yield "".join(token_texts(run.tokenizer, asked, names=True)).lstrip(), answer


def collect(
    run: Run,
    split: str | None = None,
    *,
    text: str | Text | None = None,
    name: str = "text",
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
        text: another text in place of the split; an imported run has no split.
        name: of that text.
        samples: number of texts to show.
        seed: of the first text.
        temperature: of the texts.
        progress: called with tokens scored and tokens in all.
        data_dir: folder of the named corpora.
        corpus: where the run's text is now, if it has moved.

    Raises:
        CorpusError: the text is not where it was, or has changed, and report.json has no figures of the split.
    """
    main = run.existing_split(split) if text is None else "text"
    reports = {
        name: validate(Report, report, where="report.json")
        for name, report in run.reports().items()
        if report["state"] == run.checkpoint
    }
    own, from_text, missing = None, None, None
    try:
        own = run.own_text(corpus, data_dir=data_dir)
    except CorpusError as error:
        if text is None and (corpus is not None or not any(report.split == main for report in reports.values())):
            raise
        missing = str(error)
    options = SamplingOptions(temperature=temperature, seed=seed, n=samples, max_tokens=SAMPLE_TOKENS)
    answers = own is not None and own.splits["valid"].marks is not None
    if own is not None and not answers:
        options = options.model_copy(update={"n": max(samples, MEASURED_SAMPLES)})
    if answers:
        assert own is not None
        texts = [*_answers(run, own.splits["valid"], options)]
    else:
        texts = [("", each) for each in run.samples(**options.model_dump())]
    if text is not None or own is not None:
        part = run.encode(name, text) if text is not None else own.splits[main] if own is not None else None
        assert part is not None
        sums = CalibrationSums(None if own is None else run_temperature(run, own))
        reports[main] = run.evaluate(
            None if text is not None else main, text=text, name=name, progress=progress, data_dir=data_dir,
            corpus=corpus, watchers=[sums.add],
        )  # fmt: skip
        index = None if own is None or answers else index_training_text(own)
        plain = [each for _, each in texts]
        from_text = FromText(
            calibration=sums.result(None if index is None else run_samples(run)),
            tokens=run.score_ids(*beginning(part, MAP_TOKENS)),
            copying=None if index is None or own is None
            else copy_report(index, plain, split_text(own, "valid"), split="valid", options=options),
            copies=None if index is None else [index.find(each) for each in plain[:samples]],
        )  # fmt: skip
    return RunReport(
        facts=run.facts(),
        reports=sorted(reports.values(), key=lambda report: report.split != main),
        rows=run.folder.read_metrics(),
        samples=texts[:samples],
        sampling=options.model_dump(),
        from_text=from_text,
        missing_text=missing if text is None else None,
    )
