"""The choice of a sweep: the configuration with the lowest bits per byte of the validation split.

The choice reads the reports of the validation split alone. The test split is scored afterwards, once, for the chosen
configuration only: the lowest of many validation figures is too low by chance, and its test figure is not.
"""

from __future__ import annotations

import functools
import json
import math
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lm.comparison.compare import compare
from lm.comparison.result import Comparison
from lm.config import RunConfig
from lm.errors import CorpusError, RunError, RunNotFoundError
from lm.files import write_file
from lm.jobs.sweep_axes import Values, label
from lm.jobs.sweep_record import BEST, SweepFolder, TestScore
from lm.runs.curves import Curve, curves, with_bands
from lm.runs.run import Run
from lm.runs.run_folder import RunFolder

CHOSEN_BY = "valid"
"""The split that decides."""
SCORED_AT_END = "test"
MAX_COMPARED = 3
"""Configurations that are compared with the best one, itself included."""

OnScore = Callable[[str, int, int], None]
"""Called with what is scored, tokens done and tokens in all."""


@dataclass(frozen=True)
class Spread:
    """Figures of runs that differ by their seed alone."""

    figures: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Their mean."""
        return statistics.fmean(self.figures)

    @property
    def low(self) -> float:
        """The lowest."""
        return min(self.figures)

    @property
    def high(self) -> float:
        """The highest."""
        return max(self.figures)

    @property
    def deviation(self) -> float | None:
        """Their standard deviation, as a sample; None for one figure."""
        return statistics.stdev(self.figures) if len(self.figures) > 1 else None


@dataclass(frozen=True)
class ConfigurationResult:
    """The validation figures of one configuration."""

    number: int
    values: Values
    runs: tuple[str, ...]
    """Finished runs, by seed."""
    seeds: int
    """Runs of the sweep, finished or not."""
    valid: Spread | None
    """Bits per byte of the validation split; None: no run is finished."""

    @property
    def label(self) -> str:
        """The values in one line."""
        return label(self.values) or "one configuration"

    @property
    def is_complete(self) -> bool:
        """Whether every seed is finished."""
        return self.valid is not None and len(self.runs) == self.seeds

    def to_json(self) -> dict[str, Any]:
        """For --json."""
        content = asdict(self)
        if self.valid is not None:
            content["valid"] = {
                "mean": self.valid.mean, "min": self.valid.low, "max": self.valid.high,
                "standard_deviation": self.valid.deviation, "figures": list(self.valid.figures),
            }  # fmt: skip
        return content


def read_results(folder: SweepFolder) -> list[ConfigurationResult]:
    """The configurations of a sweep, best first; those without every seed are last.

    Raises:
        CorpusError: the runs were validated on different texts.
    """
    record, texts, found = folder.record, set(), []
    for configuration in record.configurations:
        own = [run for run in record.runs if run.configuration == configuration.number]
        names, figures = [], []
        for each in own:
            if each.status == "finished":
                report = _validation_report(folder.run_folder(each))
                if report is not None and report["bits_per_byte"] is not None:
                    names.append(each.run)
                    figures.append(float(report["bits_per_byte"]))
                    texts.add(report["text_sha256"])
        valid = Spread(tuple(figures)) if figures else None
        found.append(
            ConfigurationResult(configuration.number, configuration.values, tuple(names), len(own), valid)
        )  # fmt: skip
    if len(texts) > 1:
        raise CorpusError(
            f"The runs of sweep {record.name!r} were validated on different texts, so the corpus changed during the "
            "sweep: begin another one with --name."
        )
    return sorted(found, key=_rank)


def choose(results: Sequence[ConfigurationResult]) -> ConfigurationResult | None:
    """The configuration with the lowest mean; None: no configuration has every seed finished."""
    return min((each for each in results if each.is_complete), key=_rank, default=None)


def _rank(result: ConfigurationResult) -> tuple[bool, float, int]:
    return not result.is_complete, math.inf if result.valid is None else result.valid.mean, result.number


def _validation_report(folder: RunFolder) -> dict[str, Any] | None:
    """The only report that the choice reads; None: the run was deleted."""
    try:
        return Run(folder).reports().get(CHOSEN_BY)
    except RunNotFoundError:
        return None


def score_test(folder: SweepFolder, best: ConfigurationResult, progress: OnScore | None = None) -> TestScore | None:
    """Score the test split under the runs of the chosen configuration, and record it; a recorded score is read.

    Args:
        folder: of the sweep.
        best: from `choose`.
        progress: called with "scoring the test split", tokens done and tokens in all.

    Returns:
        None if the corpus has no test split.

    Raises:
        LMError: the text cannot be read again.
    """
    record = folder.record
    for known in record.test:
        if known.configuration == best.number:
            return known
    figures: dict[str, float | None] = {}
    data_dir = None if record.data_dir is None else Path(record.data_dir)
    for place, name in enumerate(best.runs):
        run = Run(folder.run_folder(next(each for each in record.runs if each.run == name)))
        if SCORED_AT_END not in run.record["corpus"]["splits"]:
            return None

        def show(done: int, total: int, place: int = place) -> None:
            if progress is not None:
                progress("scoring the test split", place * total + done, len(best.runs) * total)

        report = run.evaluate(SCORED_AT_END, progress=show, data_dir=data_dir)
        run.save_report(report)
        figures[name] = report.bits_per_byte
    score = TestScore(configuration=best.number, bits_per_byte=figures)
    folder.update(test=(*record.test, score))
    return score


def compare_best(
    folder: SweepFolder, results: Sequence[ConfigurationResult], progress: OnScore | None = None
) -> Comparison | None:
    """The best configurations compared on the validation split, as by `lm compare`: is the best better by chance?

    Args:
        folder: of the sweep.
        results: from `read_results`.
        progress: called with "comparing the best", tokens done and tokens in all.

    Returns:
        None if fewer than two configurations have every seed finished, or if the text is not here any more.
    """
    compared = [each for each in results if each.is_complete][:MAX_COMPARED]
    if len(compared) < 2:
        return None
    record = folder.record
    runs = [Run(RunFolder(folder.runs_dir / name)) for each in compared for name in each.runs]
    follow = None if progress is None else functools.partial(progress, "comparing the best")
    try:
        return compare(
            runs, split=CHOSEN_BY, against="best", progress=follow,
            data_dir=None if record.data_dir is None else Path(record.data_dir),
        )  # fmt: skip
    except CorpusError:
        return None


# -- curves -------------------------------------------------------------------------------------------------


def sweep_curves(
    folder: SweepFolder, metric: str = "bits_per_byte", by: str = "step", bands: str = "min-max"
) -> list[Curve]:
    """The curves of the finished runs, one for each configuration: the mean of its seeds, with a band.

    Curves of the validation split, or of training for a figure that has no split.

    Raises:
        ConfigError: no such metric, axis or kind of band.
        RunError: no finished run has a curve.
    """
    drawn = [
        run
        for run in sorted(folder.record.runs, key=lambda run: (run.configuration, run.seed))
        if run.status == "finished" and folder.run_folder(run).read_metrics()
    ]
    if not drawn:
        raise RunError(f"No finished run of sweep {folder.record.name!r} has a learning curve.")
    seeds = Counter(run.configuration for run in drawn)
    groups = {
        run.run: f"{run.configuration}: {label(folder.record.configuration(run.configuration).values)}"
        + (f" ({seeds[run.configuration]} seeds)" if seeds[run.configuration] > 1 else "")
        for run in drawn
    }
    found = curves([RunFolder(folder.runs_dir / name) for name in groups], metric, by)
    return with_bands([curve for curve in found if curve.split != "train"], groups, bands)


# -- the options of the best configuration ------------------------------------------------------------------


def write_best(folder: SweepFolder, best: ConfigurationResult) -> Path:
    """Write best.toml, which `lm train --config` takes; its path.

    Raises:
        LMError: a run cannot be read, or the file cannot be written.
    """
    assert best.valid is not None
    # From the run: what was chosen for the text is in it.
    first = next(each for each in folder.record.runs if each.run == best.runs[0])
    config = Run(folder.run_folder(first)).config
    comment = (
        f"The best of {len(folder.record.configurations)} configurations of the sweep {folder.record.name}: "
        f"{best.label}.\n"
        f"Validation: {best.valid.mean:.4f} bits per byte, the mean of {len(best.runs)} "
        f"{'run' if len(best.runs) == 1 else 'runs'}.\n"
        f"lm train CORPUS --config {BEST}"
    )
    path = folder.path / BEST
    write_file(path, options_toml(config, comment))
    return path


def options_toml(config: RunConfig, comment: str) -> str:
    """All options but the corpus's source, as TOML: with `lm train --config` they give the same configuration."""
    lines = [f"# {line}" for line in comment.splitlines()]
    for name, section in config.model_dump(mode="json").items():
        if not isinstance(section, dict):
            continue
        fields = {field: value for field, value in section.items() if (name, field) != ("corpus", "source")}
        lines += ["", f"[{name}]", *(f"{field} = {_toml(value)}" for field, value in fields.items())]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    """A JSON value in TOML; TOML has no null, so that is "none"."""
    if value is None:
        return '"none"'
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {_toml(part)}" for key, part in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    # Text, numbers and booleans are written as in JSON.
    return json.dumps(value, ensure_ascii=False)
