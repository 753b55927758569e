"""Sweeps: the same training with different options and seeds, as a queue of ordinary runs.

ask ──► configurations ──► queue of runs ──► results ──► choice by validation ──► best.toml, test split once

lm.jobs.sweep_axes      options and values of a search
lm.jobs.sweep_record    the folder of a sweep
lm.jobs.sweep_queue     the runs, in processes
lm.jobs.sweep_choice    results and choice
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lm.comparison.result import Comparison
from lm.config import CorpusConfig, RunConfig, given_sections, runs_folder
from lm.corpora import Corpus, Progress
from lm.device import pick_device
from lm.errors import ConfigError
from lm.host import usable_threads
from lm.jobs.autoconfig import Family, TokenKind
from lm.jobs.prepare import open_text, prepare_job
from lm.jobs.resolve import ResolvedRequest, TrainRequest, resolve
from lm.jobs.sweep_axes import CHOICES, SET_BY_SWEEP, Axis, Values, draw, grid, label, parse_axes
from lm.jobs.sweep_choice import (
    ConfigurationResult,
    OnScore,
    choose,
    compare_best,
    read_results,
    score_test,
    write_best,
)
from lm.jobs.sweep_queue import OnUpdate, run_queue, threads_of
from lm.jobs.sweep_record import Configuration, SweepFolder, TestScore, find_same, new_sweep, open_sweep
from lm.training.plan import DEFAULT_MINUTES

MAX_SEEDS = 100
_LONG: Any = {"differences": {"__all__": {"places", "passages_a", "passages_b"}}}
"""Parts of a comparison that --json leaves out."""
LENGTHS = ("minutes", "max_steps", "epochs")


@dataclass(frozen=True, kw_only=True)
class SweepRequest:
    """What a caller asks of a new sweep."""

    corpus: str
    """A source as in `CorpusConfig.source`."""
    over: Mapping[str, str | Sequence[Any]]
    """Axis → values, or a text as in `lm.jobs.sweep_axes`."""
    seeds: int = 3
    random: int | None = None
    """Configurations that random search draws; None: all of the grid."""
    preset: str | None = None
    family: Family | None = None
    tokens: TokenKind | None = None
    neural: bool = False
    file: Path | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """Options of all runs; see `TrainRequest`."""
    name: str | None = None
    """Of the sweep; None: made from the corpus."""
    runs_dir: Path
    data_dir: Path | None = None
    progress: Progress | None = None


@dataclass(frozen=True)
class SweepResult:
    """What a sweep gave."""

    folder: SweepFolder
    configurations: tuple[ConfigurationResult, ...]
    """Best first."""
    best: ConfigurationResult | None
    """None: no configuration has every seed finished."""
    best_file: Path | None
    """best.toml of the sweep, which `lm train --config` takes."""
    comparison: Comparison | None
    """The best configurations on the validation split; None: there is one only, or the text is not here any more."""
    test: TestScore | None
    """The test split under the runs of the best; None: there is no test split, or no best."""

    @property
    def name(self) -> str:
        """The name of the sweep."""
        return self.folder.record.name

    def to_json(self) -> dict[str, Any]:
        """For --json."""
        record = self.folder.record
        return {
            "sweep": self.name,
            "path": str(self.folder.path),
            "configurations": [each.to_json() for each in self.configurations],
            "runs": [run.model_dump(mode="json") for run in record.runs],
            "best": None if self.best is None else self.best.number,
            "best_file": None if self.best_file is None else str(self.best_file),
            "comparison": None if self.comparison is None else self.comparison.model_dump(mode="json", exclude=_LONG),
            "test": None if self.test is None else self.test.bits_per_byte,
            "test_scores": len(record.test),
        }


def sweep(
    corpus: str | Path,
    over: Mapping[str, str | Sequence[Any]],
    *,
    seeds: int = 3,
    random: int | None = None,
    minutes: float | None = None,
    epochs: float | None = None,
    max_steps: int | None = None,
    preset: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    jobs: int = 1,
    name: str | None = None,
    runs_dir: Path | str | None = None,
    data_dir: Path | None = None,
    on_update: OnUpdate | None = None,
) -> SweepResult:
    """Train all configurations of a search with several seeds, and choose one by its validation figures.

    The same call continues a sweep that was interrupted.

    Args:
        corpus: what `CorpusConfig.source` may be.
        over: option → values, such as {"preset": ["gru-char", "lstm-char"], "training.learning_rate": [1e-3, 3e-3]}.
            With `random`, a text LOW..HIGH is a range.
        seeds: runs of each configuration, with the seeds training.seed, training.seed + 1, …
        random: draw this many configurations; None: the grid of all values.
        minutes, epochs, max_steps: length of each run, as in `lm.train`.
        preset: of all runs.
        overrides: options of all runs, "section.field" → value.
        jobs: runs at the same time. They share the CPU threads.
        name: of the sweep; None: made from the corpus.
        runs_dir: folder of the runs; default: INKLING_RUNS, else checkpoints.
        data_dir: folder of named corpora.
        on_update: called several times a second with the progress of all runs.

    Raises:
        LMError: an option is wrong (nothing is trained then), or the disk is full. A run that fails is recorded, and
            the sweep continues.
        KeyboardInterrupt: after the running trainings are saved.
    """
    given = {"minutes": minutes, "epochs": epochs, "max_steps": max_steps}
    changes = {f"training.{field}": value for field, value in given.items() if value is not None}
    request = SweepRequest(
        corpus=str(corpus), over=over, seeds=seeds, random=random, preset=preset,
        overrides={**changes, **(overrides or {})}, name=name, runs_dir=runs_folder(runs_dir), data_dir=data_dir,
    )  # fmt: skip
    folder = prepare_sweep(request, jobs=jobs)
    return run_sweep(folder, jobs=jobs, on_update=on_update)


def prepare_sweep(request: SweepRequest, *, jobs: int = 1) -> SweepFolder:
    """The folder of a sweep, with all configurations checked: a new one, or the one that the same request began.

    Raises:
        LMError: an option, the text or a name is wrong; nothing was written.
    """
    if not 1 <= request.seeds <= MAX_SEEDS:
        raise ConfigError(f"--seeds {request.seeds}: give 1 to {MAX_SEEDS}.")
    if request.random is not None and request.random < 1:
        raise ConfigError(f"--random {request.random}: give the number of configurations to draw, 1 or more.")
    check_jobs(jobs)
    axes = parse_axes(request.over)
    if not axes:
        raise ConfigError("What varies? Write: lm sweep CORPUS --over training.learning_rate=1e-3,3e-3")
    _check_common(request, axes)
    sections = _common_sections(request)
    of_corpus = {f"corpus.{name}": value for name, value in sections.get("corpus", {}).items() if name != "source"}
    corpus = open_text(resolve(TrainRequest(corpus=request.corpus, overrides=of_corpus, **_where(request))))
    asked = _asked(request, corpus, axes)
    if (known := find_same(asked, request.runs_dir)) is not None and request.name in (None, known.record.name):
        return known
    seed = sections.get("training", {}).get("seed", 1)
    configurations = _configurations(request, axes, corpus, threads_of(jobs), seed)
    first = configurations[0].config.training.seed
    return new_sweep(
        request.name, request.runs_dir, corpus=corpus.name, asked=asked, configurations=configurations,
        seeds=list(range(first, first + request.seeds)), data_dir=request.data_dir,
    )  # fmt: skip


def resume_sweep(name: str, runs_dir: Path, *, retry: bool = False) -> SweepFolder:
    """A sweep by its name; `retry`: its failed runs are trained again.

    Raises:
        RunNotFoundError, CorruptRunError: there is no such sweep, or its record cannot be used.
    """
    folder = open_sweep(name, runs_dir)
    if retry:
        for place, run in enumerate(folder.record.runs):
            if run.status == "failed":
                folder.set_status(place, "stopped")
    return folder


def run_sweep(
    folder: SweepFolder,
    *,
    jobs: int = 1,
    on_update: OnUpdate | None = None,
    on_score: OnScore | None = None,
) -> SweepResult:
    """Train the runs that are left, choose the best configuration, and score the test split for it alone.

    Args:
        folder: from `prepare_sweep` or `resume_sweep`.
        jobs: runs at the same time.
        on_update: shows the progress of the runs.
        on_score: called with what is scored after the last run, tokens done and tokens in all.

    Raises:
        LMError: see `sweep`.
        KeyboardInterrupt: after the running trainings are saved.
    """
    check_jobs(jobs)
    with folder.lock():
        run_queue(folder, jobs=jobs, on_update=on_update)
        results = read_results(folder)
        best = choose(results)
        if best is None:
            return SweepResult(folder, tuple(results), None, None, None, None)
        if folder.record.best != best.number:
            folder.update(best=best.number)
        path = write_best(folder, best)
        comparison = compare_best(folder, results, on_score)
        return SweepResult(folder, tuple(results), best, path, comparison, score_test(folder, best, on_score))


def check_jobs(jobs: int) -> None:
    """Refuse a number of processes below 1.

    Raises:
        ConfigError: it is.
    """
    if jobs < 1:
        raise ConfigError(f"--jobs {jobs}: give the number of runs at the same time, 1 or more.")


def notes(folder: SweepFolder, jobs: int) -> list[str]:
    """What makes the runs of a sweep less comparable, in sentences."""
    configs = [each.config for each in folder.record.configurations]
    found = []
    threads = threads_of(jobs)
    if any(config.training.minutes is not None for config in configs):
        shared = {str(pick_device(config.training.device)) for config in configs} - {"cpu"}
        if jobs > 1 and shared:
            found.append(
                f"{jobs} runs at the same time share {', '.join(sorted(shared))}: equal minutes are not equal work. "
                "Use --jobs 1, or --epochs."
            )
        elif jobs * threads > usable_threads():
            found.append(
                f"{jobs} runs at the same time need {jobs * threads} threads, and there are {usable_threads()}: equal "
                "minutes are not equal work, and the figures depend on what else runs. Use --jobs 1, or --epochs."
            )
        elif jobs > 1:
            found.append(
                f"{jobs} runs at the same time have {threads} {'thread' if threads == 1 else 'threads'} each: compare "
                "their minutes with each other only, not with runs that had the machine for themselves."
            )
    sizes = {each.training.batch_size * each.row_length * each.training.gradient_accumulation for each in configs}
    if len(sizes) > 1 and all(config.training.max_steps is not None for config in configs):
        found.append(
            f"A step has {min(sizes):,} to {max(sizes):,} tokens, so equal steps are not equal text: --epochs gives "
            "each run the same text."
        )
    return found


# -- what was asked -----------------------------------------------------------------------------------------


def _where(request: SweepRequest) -> dict[str, Any]:
    return {"runs_dir": request.runs_dir, "data_dir": request.data_dir, "progress": request.progress}


def _common_sections(request: SweepRequest) -> dict[str, dict[str, Any]]:
    """The options of all runs that the file and the overrides give, by section."""
    found: dict[str, dict[str, Any]] = {}
    for layer in given_sections(request.file, request.overrides):
        for name, fields in layer.items():
            if isinstance(fields, dict):
                found.setdefault(name, {}).update(fields)
    return found


def _check_common(request: SweepRequest, axes: Sequence[Axis]) -> None:
    """Refuse options that are both an axis and given for all runs, and those that a sweep sets."""
    given = {"preset": request.preset, "family": request.family, "tokens": request.tokens}
    for axis in axes:
        if given.get(axis.name) is not None or axis.name in request.overrides:
            raise ConfigError(f"--over {axis.name} varies what another option sets for all runs: give one of them.")
    for path, why in SET_BY_SWEEP.items():
        if path != "training.seed" and request.overrides.get(path) not in (None, "none", False, "false"):
            raise ConfigError(f"{path}={request.overrides[path]}: a sweep does not take it ({why}).")


def _asked(request: SweepRequest, corpus: Corpus, axes: Sequence[Axis]) -> dict[str, Any]:
    """What identifies a sweep: everything but its name and the number of jobs."""
    return {
        "corpus": corpus.source, "preset": request.preset, "family": request.family, "tokens": request.tokens,
        "neural": request.neural, "options": _common_sections(request),
        "over": {axis.name: list(axis.bounds or axis.values) for axis in axes},
        "ranges": [axis.name for axis in axes if axis.bounds is not None],
        "random": request.random, "seeds": request.seeds,
    }  # fmt: skip


def _configurations(
    request: SweepRequest, axes: Sequence[Axis], corpus: Corpus, threads: int, seed: Any
) -> list[Configuration]:
    """All configurations of the search, with all their options, without repeated ones; `seed` is that of the draws."""
    wanted = grid(axes) if request.random is None else draw(axes, request.random, seed)
    for axis in axes:
        if axis.bounds is not None:
            # Both ends, so that a range is refused whatever is drawn from it.
            for share in (0.0, 1.0):
                _resolved(request, {**wanted[0], axis.name: axis.at(share)})
    resolved = [(values, _resolved(request, values)) for values in wanted]
    found: dict[str, Configuration] = {}
    for values, each in resolved:
        config = _complete(each, corpus, threads)
        key = config.model_dump_json()
        if key not in found:
            found[key] = Configuration(number=len(found) + 1, values=values, config=config)
    return list(found.values())


def _resolved(request: SweepRequest, values: Values) -> ResolvedRequest:
    """The checked options of one configuration.

    Raises:
        ConfigError: with the values before the sentence.
    """
    chosen = {"preset": request.preset, "family": request.family, "tokens": request.tokens} | {
        name: values[name] for name in CHOICES if name in values
    }
    options = {name: value for name, value in values.items() if name not in CHOICES}
    asked = TrainRequest(
        corpus=request.corpus, **chosen, neural=request.neural, file=request.file,
        overrides={**request.overrides, **options}, **_where(request),
    )  # fmt: skip
    try:
        return resolve(asked)
    except ConfigError as error:
        raise ConfigError(f"With {label(values)}: {error}") from None


def _complete(resolved: ResolvedRequest, corpus: Corpus, threads: int) -> RunConfig:
    """All options, so that runs differ by their seed alone: a default model is chosen once, not by each run."""
    config = resolved.config
    if resolved.over_default is not None:
        import torch

        before = torch.get_num_threads()
        # The speed that the rule measures is that of a run.
        torch.set_num_threads(threads)
        try:
            config = prepare_job(replace(resolved, request=replace(resolved.request, corpus=corpus)), corpus).config
        finally:
            torch.set_num_threads(before)
    training = config.training
    if all(getattr(training, name) is None for name in LENGTHS):
        training = training.model_copy(update={"minutes": DEFAULT_MINUTES})
    where: CorpusConfig = config.corpus.model_copy(update={"source": corpus.source})
    return config.model_copy(update={"corpus": where, "training": training})
