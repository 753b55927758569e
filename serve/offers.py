"""The runs that may be asked for: found at the start, and again at each reload."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lm.checkpoint import CONFIG, MODEL, TOKENIZER, RunFolder, find_run, list_runs
from lm.errors import ConfigError, RunNotFoundError
from lm.registry import KERNELS
from lm.run import Run
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


def find_offers(options: ServeOptions, *, again: bool = False, may_be_empty: bool = False) -> dict[str, Offer]:
    """By name: the runs asked for, in that order, else every run in the runs folder, the newest first.

    Args:
        options: which runs.
        again: for a server that runs already, which goes on without runs that were deleted.
        may_be_empty: for a server on which the first run will be made.

    Raises:
        LMError: there are none, one does not exist or is not complete, or two have one name.
    """
    if options.runs:
        found = []
        for name in options.runs:
            try:
                found.append(Offer(*find_run(name, options.runs_dir)))
            except RunNotFoundError:
                if not again:
                    raise
    else:
        found = [Offer(folder, "best") for folder in list_runs(options.runs_dir)]
        found = [offer for offer in found if (offer.folder.path / MODEL).is_file()]
        if not found and not (again or may_be_empty):
            raise ConfigError(f"There is no run in {options.runs_dir} to serve: train one with: lm train FILE")
    offers: dict[str, Offer] = {}
    for offer in found:
        if offers.setdefault(offer.name, offer) != offer:
            raise ConfigError(f"Two runs are called {offer.name!r}: serve one of them.")
        for path in offer.files:
            if not path.is_file():
                raise ConfigError(f"Run {offer.name!r} cannot be served: {path} is missing.")
    return offers
