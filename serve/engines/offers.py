"""The runs that may be asked for: found at the start, and again at each reload."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from lm.errors import ConfigError, CorruptRunError, LMError, RunNotFoundError
from lm.files import read_facts
from lm.registry import KERNELS
from lm.runs.run import Run
from lm.runs.run_folder import CONFIG, TOKENIZER, RunFolder, find_run, list_runs
from serve.settings import ServeOptions


@dataclass(frozen=True)
class Offer:
    """A run that may be asked for."""

    folder: RunFolder
    state: str

    @property
    def name(self) -> str:
        """The model's id."""
        return self.folder.name if self.state == "best" else f"{self.folder.name}@{self.state}"

    @property
    def files(self) -> tuple[Path, ...]:
        """What makes the model."""
        return self.folder.path / CONFIG, self.folder.path / TOKENIZER, self.folder.weights_path(self.state)

    def fingerprint(self) -> tuple[object, ...]:
        """Another one after the run was trained again."""
        stats = [path.stat() for path in self.files]
        return tuple((each.st_ino, each.st_size, each.st_mtime_ns) for each in stats)

    @property
    def created(self) -> int:
        """When its weights were written, in Unix seconds."""
        return int(self.files[-1].stat().st_mtime)

    def memory_bytes(self, options: ServeOptions) -> int:
        """What it takes: its weights as read and as laid out for decoding, states, and its cache of prompts.

        Raises:
            LMError, OSError: its files cannot be read.
        """
        model = Run(self.folder, self.state).config.model
        state = KERNELS.resolve(model.type).slot_bytes(model.model_dump()) if model.type in KERNELS.names() else 0
        states = min(int(options.state_memory), options.max_batch * state)
        return 2 * self.files[-1].stat().st_size + states + int(options.prefix_cache)

    def check(self, options: ServeOptions) -> None:
        """Look at its files, but for the numbers in its weights: what is wrong there is known once it is loaded.

        Raises:
            Exception: of any type: the files may hold anything.
        """
        config, tokenizer, weights = self.files
        for path in (config, tokenizer, weights):
            if not path.is_file():
                training = path == weights and self.folder.is_training
                reason = "is not there yet: the run is being trained" if training else "is missing"
                raise ConfigError(f"{path} {reason}.")
        self.memory_bytes(options)
        self.folder.read_tokenizer()
        if not read_facts(weights):
            raise CorruptRunError(f"{weights} is damaged: restore it from a copy, or train again.")

    def reason(self, error: Exception) -> str:
        """Why it cannot be loaded, for clients: without the place of its folder."""
        return _sentence(error).replace(f"{self.folder.path}/", "")


def _sentence(error: Exception) -> str:
    return str(error) if isinstance(error, LMError) else f"{type(error).__name__}: {error}"


class Found(NamedTuple):
    """What is in the runs folder, by the models' names."""

    offers: dict[str, Offer]
    skipped: dict[str, str]
    """Why a run is not offered."""


def find_offers(options: ServeOptions, *, again: bool = False, may_be_empty: bool = False) -> Found:
    """The runs asked for, in that order, else every run in the runs folder, the newest first.

    Runs that cannot be loaded are skipped, except at the start one that was asked for by name.

    Args:
        options: which runs.
        again: for a server that runs already, which needs no run to be there.
        may_be_empty: for a server on which the first run will be made.

    Raises:
        LMError: there are none, one that was asked for does not exist or cannot be loaded, or two have one name.
    """
    if options.runs:
        listed = []
        for name in options.runs:
            try:
                listed.append(Offer(*find_run(name, options.runs_dir)))
            except RunNotFoundError:
                if not again:
                    raise
    else:
        listed = [Offer(folder, "best") for folder in list_runs(options.runs_dir)]
    offers: dict[str, Offer] = {}
    skipped: dict[str, str] = {}
    for offer in dict.fromkeys(listed):
        if offer.name in offers or offer.name in skipped:
            raise ConfigError(f"Two runs are called {offer.name!r}: serve one of them.")
        try:
            offer.check(options)
        except Exception as error:
            if options.runs and not again:
                if isinstance(error, RunNotFoundError):
                    raise
                raise ConfigError(f"Run {offer.name!r} cannot be served: {_sentence(error)}") from None
            skipped[offer.name] = offer.reason(error)
        else:
            offers[offer.name] = offer
    if not (offers or options.runs or again or may_be_empty):
        raise ConfigError(f"There is no run in {options.runs_dir} to serve: train one with: lm train FILE")
    return Found(offers, skipped)
