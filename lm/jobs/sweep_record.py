"""The record of a sweep: its folder `sweeps/NAME/` in the folder of the runs.

    sweep.json       what was asked, each configuration with all its options, each run with its status, the result
    best.toml        the options of the best configuration, for lm train --config
    curves.png       the validation curves

The runs are ordinary run folders of the folder of the runs, named NAME-01-s1: configuration 1, seed 1. The record
holds no figures of runs. They are read from the run folders.
"""

from __future__ import annotations

import contextlib
import datetime
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from lm.config import Options, RunConfig, validate
from lm.errors import ConfigError, CorruptRunError, LMError, RunExistsError, RunNotFoundError
from lm.files import FORMAT_VERSION, check_version, digest, read_json, write_file
from lm.jobs.new_run import check_new_run
from lm.registry import did_you_mean
from lm.runs.run_folder import CONFIG, RunFolder
from lm.version import __version__

SWEEPS, RECORD, BEST, CURVES = "sweeps", "sweep.json", "best.toml", "curves.png"

Status = Literal["waiting", "running", "finished", "failed", "stopped"]
ENDED = ("finished", "failed")
"""Of runs that a sweep does not train again."""


class SweepRun(Options):
    """One run of a sweep."""

    run: str = Field(description="Name of the run.")
    configuration: int = Field(ge=1, description="Number of its configuration.")
    seed: int = Field(description="Its training.seed.")
    status: Status = Field("waiting", description="waiting, running, finished, failed or stopped.")
    sentence: str | None = Field(None, description="Why it failed.")


class Configuration(Options):
    """One set of options."""

    number: int = Field(ge=1, description="From 1.")
    values: dict[str, Any] = Field(description="What differs between the configurations.")
    config: RunConfig = Field(description="All options, with the first seed.")


class TestScore(Options):
    """The test split under the runs of the best configuration."""

    configuration: int = Field(description="Number of the configuration.")
    bits_per_byte: dict[str, float | None] = Field(description="Of the test split, by run.")


class SweepRecord(Options):
    """The content of sweep.json."""

    format_version: int = FORMAT_VERSION
    inkling: str = __version__
    created: str = Field(description="UTC.")
    name: str = Field(description="Of the sweep.")
    corpus: str = Field(description="Name of the text.")
    asked: dict[str, Any] = Field(description="What the command asked for.")
    data_dir: str | None = Field(None, description="Folder of the named corpora.")
    configurations: tuple[Configuration, ...]
    runs: tuple[SweepRun, ...] = Field(description="In the order of training.")
    best: int | None = Field(None, description="Number of the chosen configuration; null: not chosen yet.")
    test: tuple[TestScore, ...] = Field((), description="Scores of the test split, in order.")

    @property
    def asked_sha256(self) -> str:
        """Hash of what was asked, by which the same command finds the sweep."""
        return digest(self.asked)

    def configuration(self, number: int) -> Configuration:
        """A configuration by its number."""
        return self.configurations[number - 1]

    def config_of(self, run: SweepRun) -> RunConfig:
        """All options of a run."""
        config = self.configuration(run.configuration).config
        return config.model_copy(update={"training": config.training.model_copy(update={"seed": run.seed})})

    @property
    def has_ended(self) -> bool:
        """Whether every run is finished or failed."""
        return all(run.status in ENDED for run in self.runs)


@dataclass
class SweepFolder:
    """The folder of one sweep; each change is written at once."""

    path: Path
    record: SweepRecord = field(repr=False)

    @property
    def runs_dir(self) -> Path:
        """The folder of the runs."""
        return self.path.parent.parent

    def run_folder(self, run: SweepRun) -> RunFolder:
        """The folder of a run."""
        return RunFolder(self.runs_dir / run.run)

    def save(self) -> None:
        """Write sweep.json.

        Raises:
            RunError: the disk is full or read-only; the old file is unchanged.
        """
        content = self.record.model_dump(mode="json")
        write_file(self.path / RECORD, json.dumps(content, indent=1, ensure_ascii=False) + "\n")

    def update(self, **changes: Any) -> None:
        """Change fields of the record, and write it."""
        self.record = self.record.model_copy(update=changes)
        self.save()

    def set_status(self, place: int, status: Status, sentence: str | None = None) -> None:
        """Change the status of the run at a place in the queue, and write it."""
        runs = list(self.record.runs)
        runs[place] = runs[place].model_copy(update={"status": status, "sentence": sentence})
        self.update(runs=tuple(runs))

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the sweep for one process.

        Raises:
            RunLockedError: another process works on it.
        """
        with RunFolder(self.path).lock():
            yield


def sweep_names(runs_dir: Path) -> list[str]:
    """The names of the sweeps in a folder of runs, sorted."""
    return sorted(path.parent.name for path in (runs_dir / SWEEPS).glob(f"*/{RECORD}"))


def open_sweep(name: str, runs_dir: Path) -> SweepFolder:
    """A sweep by its name.

    Raises:
        RunNotFoundError: there is none; the message lists those there are.
        CorruptRunError, FormatVersionError: its record cannot be used.
    """
    path = runs_dir / SWEEPS / name
    if not (path / RECORD).is_file():
        names = sweep_names(runs_dir)
        known = f" Sweeps: {', '.join(names)}." if names else " There are none yet."
        raise RunNotFoundError(f"No sweep {name!r} in {runs_dir}.{did_you_mean(name, names)}{known}")
    content = read_json(path / RECORD)
    if not isinstance(content, dict) or not isinstance(content.get("format_version"), int):
        raise CorruptRunError(f"{path / RECORD} is not the record of a sweep: restore it from a copy.")
    check_version(content["format_version"], path / RECORD)
    try:
        return SweepFolder(path, validate(SweepRecord, content, where=RECORD))
    except ConfigError as error:
        raise CorruptRunError(f"{path / RECORD} was edited or damaged ({error}): restore it from a copy.") from None


def find_same(asked: Mapping[str, Any], runs_dir: Path) -> SweepFolder | None:
    """The sweep that the same command began; None: there is none."""
    wanted = digest(dict(asked))
    for name in sweep_names(runs_dir):
        # Another sweep that cannot be read is no reason to refuse this one.
        with contextlib.suppress(LMError):
            found = open_sweep(name, runs_dir)
            if found.record.asked_sha256 == wanted:
                return found
    return None


def new_sweep(
    name: str | None,
    runs_dir: Path,
    *,
    corpus: str,
    asked: dict[str, Any],
    configurations: list[Configuration],
    seeds: list[int],
    data_dir: Path | None,
) -> SweepFolder:
    """The folder of a new sweep with its queue; its record is written.

    The queue has all configurations with the first seed, then all with the second one: a sweep that is stopped early
    has the same seeds of every configuration.

    Args:
        name: of the sweep; None: the first free name made from the corpus.
        runs_dir: the folder of the runs.
        corpus: name of the text.
        asked: what the command asked for.
        configurations: those to train.
        seeds: of each configuration.
        data_dir: folder of the named corpora.

    Raises:
        ConfigError: the name is not valid.
        RunExistsError: the name of the sweep or of one of its runs is taken.
    """
    if (runs_dir / SWEEPS / CONFIG).is_file():
        raise RunExistsError(
            f"{runs_dir / SWEEPS} is a run, and the folder of that name is for sweeps: rename it, or use --runs-dir."
        )
    if name is None:
        base = f"{corpus}-sweep"
        candidates = (base if number == 1 else f"{base}-{number}" for number in range(1, 1_000_000))
        name = next(each for each in candidates if not _is_taken(each, runs_dir))
    elif (runs_dir / SWEEPS / name / RECORD).exists():
        raise RunExistsError(
            f"There is a sweep {name!r} of other options: choose another --name, or continue that one: lm sweep "
            f"--resume {name}"
        )
    digits = max(2, len(str(len(configurations))))
    runs = tuple(
        SweepRun(
            run=f"{name}-{configuration.number:0{digits}}-s{seed}", configuration=configuration.number, seed=seed
        )
        for seed in seeds
        for configuration in configurations
    )  # fmt: skip
    for run in runs:
        check_new_run(run.run, runs_dir)
    record = SweepRecord(
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), name=name, corpus=corpus,
        asked=asked, data_dir=None if data_dir is None else str(data_dir),
        configurations=tuple(configurations), runs=runs,
    )  # fmt: skip
    folder = SweepFolder(runs_dir / SWEEPS / name, record)
    folder.save()
    return folder


def _is_taken(name: str, runs_dir: Path) -> bool:
    return (runs_dir / SWEEPS / name).exists() or any(runs_dir.glob(f"{name}-*-s*"))
