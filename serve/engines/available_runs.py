"""The runs that a server offers. It lists them at the start and at each reload."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from lm.errors import ConfigError, CorruptRunError, LMError, RunNotFoundError
from lm.files import read_facts
from lm.registry import KERNELS
from lm.runs.adapters import find_base
from lm.runs.run import Run
from lm.runs.run_folder import CONFIG, TOKENIZER, RunFolder, find_run, list_runs
from serve.settings import ServeOptions


@dataclass(frozen=True)
class AvailableRun:
    """A checkpoint that a server can load."""

    folder: RunFolder
    checkpoint: str

    @property
    def name(self) -> str:
        """The model's id."""
        return self.folder.name if self.checkpoint == "best" else f"{self.folder.name}@{self.checkpoint}"

    @property
    def files(self) -> tuple[Path, ...]:
        """Configuration, tokenizer and weights; of an adapter, also the weights of its base if they are there."""
        own = self.folder.path / CONFIG, self.folder.path / TOKENIZER, self.folder.weights_path(self.checkpoint)
        base = self._base
        return own if base is None else (*own, base[0].weights_path(base[1]))

    @property
    def _base(self) -> tuple[RunFolder, str] | None:
        """The base of an adapter; None: the run is not an adapter, or its base is not there."""
        with contextlib.suppress(LMError):
            return find_base(self.folder)
        return None

    @property
    def pair(self) -> str | None:
        """RUN+ADAPTER, another name of an adapter; None: the run is not an adapter, or its base is not there."""
        base = self._base
        return None if base is None else AvailableRun(RunFolder(self.folder.path, base), self.checkpoint).name

    def fingerprint(self) -> tuple[object, ...]:
        """Changes when the run is trained again."""
        stats = [path.stat() for path in self.files]
        return tuple((each.st_ino, each.st_size, each.st_mtime_ns) for each in stats)

    @property
    def created(self) -> int:
        """Unix time of the weights, in seconds."""
        return int(self.folder.weights_path(self.checkpoint).stat().st_mtime)

    def memory_bytes(self, options: ServeOptions) -> int:
        """Estimated memory: weights as read and as laid out for decoding, states, and the prefix cache.

        An adapter is added to a copy of its base when it is loaded.

        Raises:
            LMError, OSError: its files cannot be read.
        """
        model = Run(self.folder, self.checkpoint).config.model
        state = KERNELS.resolve(model.type).slot_bytes(model.model_dump()) if model.type in KERNELS.names() else 0
        states = min(int(options.state_memory), options.max_batch * state)
        weights = sum(path.stat().st_size for path in self.files[2:])
        return 2 * weights + states + int(options.prefix_cache)

    def check(self, options: ServeOptions) -> None:
        """Check the files, except the numbers in the weights: a load checks those.

        Raises:
            Exception: of any type, because damaged files may hold anything.
        """
        config, tokenizer, weights, *_ = self.files
        for path in (config, tokenizer, weights):
            if not path.is_file():
                training = path == weights and self.folder.is_training
                reason = "is not there yet: the run is being trained" if training else "is missing"
                raise ConfigError(f"{path} {reason}.")
        find_base(self.folder)
        self.memory_bytes(options)
        self.folder.read_tokenizer()
        if not read_facts(weights):
            raise CorruptRunError(f"{weights} is damaged: restore it from a copy, or train again.")

    def reason(self, error: Exception) -> str:
        """Why it cannot be loaded, for clients: without the path of the runs folder."""
        return _sentence(error).replace(f"{self.folder.path}/", "")


def _sentence(error: Exception) -> str:
    return str(error) if isinstance(error, LMError) else f"{type(error).__name__}: {error}"


class FoundRuns(NamedTuple):
    """The runs of a server, by model name."""

    runs: dict[str, AvailableRun]
    skipped: dict[str, str]
    """Why a run is not available."""


def find_runs(options: ServeOptions, *, again: bool = False, may_be_empty: bool = False) -> FoundRuns:
    """The named runs in their order, or every run in the runs folder, the newest first.

    Runs that cannot be loaded are skipped. A run that is named at the start must load.

    Args:
        options: the runs folder and the names.
        again: for a running server, which may have no run.
        may_be_empty: for a server that makes its first run.

    Raises:
        LMError: there is no run, a named run does not exist or does not load, or two runs have one name.
    """
    if options.runs:
        listed = []
        for name in options.runs:
            try:
                listed.append(AvailableRun(*find_run(name, options.runs_dir)))
            except RunNotFoundError:
                if not again:
                    raise
    else:
        listed = [AvailableRun(folder, "best") for folder in list_runs(options.runs_dir)]
    runs: dict[str, AvailableRun] = {}
    skipped: dict[str, str] = {}
    for run in dict.fromkeys(listed):
        if run.name in runs or run.name in skipped:
            raise ConfigError(f"Two runs have the name {run.name!r}: serve one of them.")
        try:
            run.check(options)
        except Exception as error:
            if options.runs and not again:
                if isinstance(error, RunNotFoundError):
                    raise
                raise ConfigError(f"Run {run.name!r} cannot be served: {_sentence(error)}") from None
            skipped[run.name] = run.reason(error)
        else:
            runs[run.name] = run
    if not (runs or options.runs or again or may_be_empty):
        raise ConfigError(f"There is no run in {options.runs_dir}: train one with lm train FILE.")
    return FoundRuns(runs, skipped)
