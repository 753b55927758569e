"""Named states: what a model holds after a text, kept in a file beside the run, to go on from at once.

A state is a safetensors file with the house's hashed header. It belongs to the weights and the tokenizer that made it,
not to a decoder: any decoder goes on from it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lm.errors import ConfigError, CorruptRunError, RunError, RunNotFoundError
from lm.files import check_place, pack_arrays, read_arrays, read_facts, write_file
from lm.generation.decoder import Snapshot
from lm.registry import did_you_mean

_PREFIX = "state."
_WINDOW = "window"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class NamedSnapshot:
    """A text that a model has read, and can go on from."""

    unread: tuple[int, ...]
    """The last tokens of the text, at least one, which are read first: what follows them is then known."""
    tokens: int
    """Tokens of the text in all."""
    snapshot: Snapshot = field(default_factory=Snapshot)
    """What was held before `unread`."""


class Snapshots:
    """The named states of one run."""

    def __init__(self, folder: Path, run: str, argument: str | None = None, **belongs: str) -> None:
        """See the states in a folder.

        Args:
            folder: where the files lie, or will.
            run: the run's name.
            argument: how a command names the run; None: by its name.
            **belongs: hashes of what a state must have been made with, by name; kept in its file.
        """
        self._folder = folder
        self._run = run
        self._argument = run if argument is None else argument
        self._belongs = belongs

    def names(self) -> list[str]:
        """All there are, sorted."""
        return sorted(path.stem for path in self._folder.glob("*.safetensors") if _NAME.fullmatch(path.stem))

    def check(self, name: str) -> None:
        """See that a state could be saved under a name.

        Raises:
            ConfigError, RunError: as `save`.
        """
        check_place(self._path(name))

    def facts(self, name: str) -> dict[str, Any]:
        """What a state's file tells of it, with "bytes" and "usable"; empty facts where it is damaged."""
        path = self._path(name)
        facts = read_facts(path)
        return {**facts, "bytes": path.stat().st_size, "usable": self._fits(facts)}

    def save(self, name: str, state: NamedSnapshot, **facts: Any) -> Path:
        """Write a state, in place of an earlier one of its name.

        Raises:
            ConfigError: the name is none that a file can have everywhere.
            RunError: the disk is full or read-only.
        """
        snapshot = state.snapshot
        arrays = {_PREFIX + key: np.asarray(array) for key, array in snapshot.arrays.items()}
        arrays[_WINDOW] = np.array(snapshot.window, dtype=np.int32)
        known = {"growing": sorted(snapshot.growing), "unread": list(state.unread), "tokens": state.tokens}
        write_file(self._path(name), pack_arrays(arrays, {**facts, **known, **self._belongs}))
        return self._path(name)

    def read(self, name: str) -> NamedSnapshot:
        """A state, known to belong to this run's weights and tokenizer.

        Raises:
            RunNotFoundError: there is none of this name.
            CorruptRunError: the file is damaged.
            RunError: it was made with other weights.
        """
        path = self._existing(name)
        arrays, facts = read_arrays(path)
        if not self._fits(facts):
            raise RunError(
                f"State {name!r} was made with other weights than those of run {self._run!r}, which were probably "
                f"trained on since. Make it again with: lm state save {self._argument} --text FILE {name}"
            )
        try:
            window = tuple(arrays.pop(_WINDOW).tolist())
            held = {key.removeprefix(_PREFIX): array for key, array in arrays.items()}
            snapshot = Snapshot(held, frozenset(facts["growing"]), window)
            return NamedSnapshot(tuple(map(int, facts["unread"])), int(facts["tokens"]), snapshot)
        except (KeyError, TypeError, ValueError):
            raise CorruptRunError(f"{path} is not a state of a run: delete it, or save it again.") from None

    def delete(self, name: str) -> None:
        """Remove a state.

        Raises:
            RunNotFoundError: there is none of this name.
        """
        self._existing(name).unlink()

    def _fits(self, facts: dict[str, Any]) -> bool:
        return all(facts.get(key) == value for key, value in self._belongs.items())

    def _path(self, name: str) -> Path:
        if not _NAME.fullmatch(name):
            raise ConfigError(
                f"State {name!r}: use letters, digits, '.', '_' and '-', beginning with a letter or digit."
            )
        return self._folder / f"{name}.safetensors"

    def _existing(self, name: str) -> Path:
        path = self._path(name)
        if not path.is_file():
            names = self.names()
            known = f" Snapshots: {', '.join(names[:8])}." if names else " It has none yet: lm state save makes one."
            raise RunNotFoundError(f"Run {self._run!r} has no state {name!r}.{did_you_mean(name, names)}{known}")
        return path
