"""Named snapshots: the state of a model after a text, saved in the run folder.

`decoder.Snapshot` holds the arrays of one slot. Here such arrays get a name and a safetensors file with a hashed header
(the commands of `lm state`). A file belongs to the weights and the tokenizer that made it. Any decoder can use it.
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
    """The arrays after a text, with the facts that are needed to continue it."""

    unread: tuple[int, ...]
    """The last tokens of the text, at least one. A request reads them first: it needs the logits after them."""
    tokens: int
    """Number of tokens of the whole text."""
    snapshot: Snapshot = field(default_factory=Snapshot)
    """The arrays before `unread`."""


class Snapshots:
    """The named snapshots of one run: a folder with one file each."""

    def __init__(self, folder: Path, run: str, argument: str | None = None, **belongs: str) -> None:
        """Open a folder, which may not exist yet.

        Args:
            folder: of the files.
            run: name of the run.
            argument: the run as an argument of a command; None: its name.
            **belongs: hashes, by name, that a file must have: of the weights and the tokenizer.
        """
        self._folder = folder
        self._run = run
        self._argument = run if argument is None else argument
        self._belongs = belongs

    def names(self) -> list[str]:
        """The names, sorted."""
        return sorted(path.stem for path in self._folder.glob("*.safetensors") if _NAME.fullmatch(path.stem))

    def check(self, name: str) -> None:
        """Check that a snapshot can be saved with this name.

        Raises:
            ConfigError, RunError: as `save`.
        """
        check_place(self._path(name))

    def facts(self, name: str) -> dict[str, Any]:
        """The facts in a file, with "bytes" and "usable"; only these two if the file is damaged."""
        path = self._path(name)
        facts = read_facts(path)
        return {**facts, "bytes": path.stat().st_size, "usable": self._fits(facts)}

    def save(self, name: str, state: NamedSnapshot, **facts: Any) -> Path:
        """Save a snapshot; replaces one of the same name.

        Raises:
            ConfigError: the name is not a portable file name.
            RunError: the disk is full or read-only.
        """
        snapshot = state.snapshot
        arrays = {_PREFIX + key: np.asarray(array) for key, array in snapshot.arrays.items()}
        arrays[_WINDOW] = np.array(snapshot.window, dtype=np.int32)
        known = {"growing": sorted(snapshot.growing), "unread": list(state.unread), "tokens": state.tokens}
        write_file(self._path(name), pack_arrays(arrays, {**facts, **known, **self._belongs}))
        return self._path(name)

    def read(self, name: str) -> NamedSnapshot:
        """Load a snapshot.

        Raises:
            RunNotFoundError: the run has no snapshot of this name.
            CorruptRunError: the file is damaged.
            RunError: the snapshot was made with other weights or another tokenizer.
        """
        path = self._existing(name)
        arrays, facts = read_arrays(path)
        if not self._fits(facts):
            raise RunError(
                f"Snapshot {name!r} was made with other weights than those of run {self._run!r}, which were probably "
                f"trained further since. Make it again with: lm state save {self._argument} --text FILE {name}"
            )
        try:
            window = tuple(arrays.pop(_WINDOW).tolist())
            held = {key.removeprefix(_PREFIX): array for key, array in arrays.items()}
            snapshot = Snapshot(held, frozenset(facts["growing"]), window)
            return NamedSnapshot(tuple(map(int, facts["unread"])), int(facts["tokens"]), snapshot)
        except (KeyError, TypeError, ValueError):
            raise CorruptRunError(f"{path} is not a snapshot of a run: delete it, or save it again.") from None

    def delete(self, name: str) -> None:
        """Delete a snapshot.

        Raises:
            RunNotFoundError: the run has no snapshot of this name.
        """
        self._existing(name).unlink()

    def _fits(self, facts: dict[str, Any]) -> bool:
        return all(facts.get(key) == value for key, value in self._belongs.items())

    def _path(self, name: str) -> Path:
        if not _NAME.fullmatch(name):
            raise ConfigError(
                f"Snapshot {name!r}: use letters, digits, '.', '_' and '-', beginning with a letter or digit."
            )
        return self._folder / f"{name}.safetensors"

    def _existing(self, name: str) -> Path:
        path = self._path(name)
        if not path.is_file():
            names = self.names()
            known = f" Snapshots: {', '.join(names[:8])}." if names else " It has none yet: lm state save makes one."
            raise RunNotFoundError(f"Run {self._run!r} has no snapshot {name!r}.{did_you_mean(name, names)}{known}")
        return path
