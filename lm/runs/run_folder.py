"""A run folder: its files, atomic writes, verified reads; and the search for runs by name.

    checkpoints/<run>/
        config.json          every option, the corpus and tokenizer hashes, the plan       (format_version)
        model.safetensors    the best weights
        tokenizer.json
        metrics.jsonl · film.jsonl · report.json · README.md · samples/ · states/ · events/
        note.txt             what its owner wrote about it
        steps/step-500/      other checkpoints
        members/1/           a member of an ensemble, as a run folder, until all are trained
        teacher/             the ensemble that teaches the run, as a run folder, until the run is complete
        last/                the last checkpoint, to resume from: model, optimizer, hidden state, state.json

Every weights file stores the hash of its tensors, and of its tokenizer and model options, so that files of different
runs are refused. A folder, like a file (`lm.files`), is written under a temporary name, synced and renamed: a kill
leaves the old or the new content. This module needs no torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock

from lm.config import DEFAULT_RUNS_DIR, expanded
from lm.errors import (
    ConfigError,
    CorruptRunError,
    RunError,
    RunExistsError,
    RunLockedError,
    RunNotFoundError,
    TokenizerError,
    VocabMismatchError,
)
from lm.files import (
    FORMAT_VERSION,
    Arrays,
    LazyTensor,
    check_place,
    check_version,
    digest,
    map_arrays,
    pack_arrays,
    read_arrays,
    read_json,
    sync_folder,
    umask,
    write_file,
    write_synced,
    write_tensors,
)
from lm.registry import did_you_mean
from lm.tokenizers.base import Tokenizer, load_tokenizer

CONFIG, MODEL, TOKENIZER, METRICS, REPORT, CARD, FILM = (
    "config.json", "model.safetensors", "tokenizer.json", "metrics.jsonl", "report.json", "README.md", "film.jsonl"
)  # fmt: skip
LAST, LAST_OLD, STEPS, SAMPLES, EVENTS, LOCK = "last", "last.old", "steps", "samples", "events", ".lock"
NOTE, MAX_NOTE_CHARACTERS = "note.txt", 4000
NAME = re.compile(r"\w[\w.+-]*")
"""The name of a run."""
MEMBERS = "members"
"""The folder of the members' run folders, until an ensemble is complete."""
TEACHER = "teacher"
"""The folder of the run that teaches a run with `training.student`, until that is complete."""
SNAPSHOTS = "states"
"""The folder of saved snapshots."""
DELETED = ".deleted-"
"""Prefix of the name of a run's folder while it is removed."""
PARTIAL = ".partial"
"""Suffix of the name of a run's folder while it is built."""
YOUNG_SECONDS = 2.0
"""A younger partial folder may not have its lock yet."""
LOCK_SECONDS = 0.5
"""How long a trainer waits for the lock; `is_training` of another process holds it for a moment."""
_RECORD: dict[str, Any] = {
    "tokenizer_sha256": str, "vocab_size": int, "parameters": int, "created": str, "inkling": str, "config.model": dict,
    "corpus.name": str, "corpus.key": str, "corpus.sha256": str, "corpus.notes": list, "corpus.splits": dict,
}  # fmt: skip
"""Required fields of `config.json`, with their types."""
_BELONGS = {
    "tokenizer_sha256": "the tokenizer", "model_sha256": "the model options", "base_sha256": "the base"
}  # fmt: skip
"""What the hashes in a weights file are of."""


# -- the folder -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunFolder:
    """One run on disk."""

    path: Path
    base: tuple[RunFolder, str] | None = None
    """The folder and checkpoint of the base that RUN+ADAPTER names; None: an adapter finds its base itself."""

    @property
    def name(self) -> str:
        """The name of the folder; of an adapter with a named base, RUN+ADAPTER."""
        if self.base is None:
            return self.path.name
        base, checkpoint = self.base
        return f"{base.name}{'' if checkpoint == 'best' else f'@{checkpoint}'}+{self.path.name}"

    @property
    def argument(self) -> str:
        """The run in a printed command, quoted for a shell: its name if that is enough, else its path."""
        places = self.path, *(() if self.base is None else (self.base[0].path,))
        usual = all(path.parent in (DEFAULT_RUNS_DIR, shipped_folder()) for path in places)
        return shlex.quote(self.name if usual else str(self.path))

    # -- making ---------------------------------------------------------------------------------

    def create(self, record: dict[str, Any], tokenizer: Tokenizer, *, overwrite: bool = False) -> None:
        """Make the folder, with its configuration and tokenizer.

        Raises:
            RunExistsError: the folder is not empty, and `overwrite` is False or it is not a run.
        """
        self.check_replaceable(overwrite=overwrite)
        sweep_partial_runs(self.path.parent)
        if self.taken:
            # config.json last: after a kill the folder is still a run, which --overwrite may replace.
            for old in sorted(self._content(), key=lambda entry: entry.name == CONFIG):
                shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()
        write_file(self.path / TOKENIZER, tokenizer.to_json())
        self.write_record({"tokenizer_sha256": tokenizer.sha256, "vocab_size": tokenizer.vocab_size, **record})

    def check_replaceable(self, *, overwrite: bool = False) -> None:
        """Check that the name is free, or that of a run that may be replaced.

        Raises:
            RunExistsError: it is taken, and `overwrite` is False, or it is not a run or a shipped one.
        """
        if not self.taken:
            return
        if self._holds_foreign_model:
            raise RunExistsError(
                f"{self.path} is a model in the format of transformers, not a run: choose another --name."
            )
        if not (overwrite and ((self.path / CONFIG).is_file() or self._half_made)):
            raise RunExistsError(
                f"{self.path} exists already: choose another --name, or add --overwrite to replace that run."
            )
        if self.shipped:
            raise RunExistsError(f"{self.path} is shipped with Inkling and read-only: choose another --name.")

    @contextlib.contextmanager
    def built(self, *, overwrite: bool = False) -> Iterator[RunFolder]:
        """A temporary folder, which becomes this run if the block ends without an error; else it is removed.

        Raises:
            RunExistsError: as `check_replaceable`.
            RunLockedError: the run to replace is in training.
            RunError: the folder cannot be written.
        """
        self.check_replaceable(overwrite=overwrite)
        sweep_partial_runs(self.path.parent)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # No run has such a name, so that no other process lists it.
            partial = Path(tempfile.mkdtemp(prefix=f".{self.name}.", suffix=PARTIAL, dir=self.path.parent))
        except OSError as error:
            raise RunError(f"Cannot write {self.path}: {error.strerror or error}.") from None
        # The lock ends with the process, so that another one can see that the folder was left.
        building = filelock.FileLock(partial / LOCK, timeout=0)
        try:
            building.acquire()
            yield RunFolder(partial)
            sync_folder(partial)
            (partial / LOCK).unlink(missing_ok=True)
            partial.chmod(0o777 & ~umask())
            aside = None
            if self.taken:
                with self.lock():
                    aside = self._move_aside("replace")
            partial.rename(self.path)
            sync_folder(self.path.parent)
            if aside is not None:
                shutil.rmtree(aside, ignore_errors=True)
        except (OSError, RunError) as error:
            # An error of a file names it in the temporary folder.
            cause = error if isinstance(error, OSError) else error.__cause__
            if not isinstance(cause, OSError):
                raise
            raise RunError(f"Cannot write {self.path}: {cause.strerror or cause}.") from None
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            building.release()

    def check_new(self, *, overwrite: bool = False) -> None:
        """Check, before long work, that a new run can be made here.

        Raises:
            RunExistsError: the name is taken.
            RunError: the folder cannot be made.
        """
        if self.taken and not overwrite:
            raise RunExistsError(
                f"{self.path} exists already: choose another --name, add --overwrite to replace that run, or resume "
                f"it: lm train --resume {self.argument}"
            )
        check_place(self.path / CONFIG)

    @property
    def taken(self) -> bool:
        """Whether the folder exists and is not empty; the lock of a killed process does not count."""
        return self.path.exists() and (not self.path.is_dir() or any(self._content()))

    @property
    def _half_made(self) -> bool:
        """Whether it holds only the files that a kill in `create` leaves."""
        return self.path.is_dir() and all(
            entry.name == TOKENIZER or entry.name.endswith(".partial") for entry in self._content()
        )

    @property
    def _holds_foreign_model(self) -> bool:
        """Whether the folder is a model in the format of transformers, perhaps the only copy that the user has."""
        try:
            found = json.loads((self.path / CONFIG).read_text("utf-8"))
        except (OSError, ValueError, RecursionError):
            return False
        return isinstance(found, dict) and "model_type" in found and "format_version" not in found

    def _content(self) -> list[Path]:
        return [entry for entry in self.path.iterdir() if entry.name != LOCK]

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run for one trainer; freed when the process ends, however it ends.

        Raises:
            RunLockedError: another process holds it.
        """
        lock = filelock.FileLock(self.path / LOCK, timeout=LOCK_SECONDS)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except filelock.Timeout:
            raise RunLockedError(
                f"{self.path} is being trained by another process: wait for it, stop it, or choose another --name."
            ) from None
        except OSError as error:
            raise RunError(f"Cannot write to {self.path}: {error.strerror or error}.") from None
        try:
            yield
        finally:
            # A job that was refused before it made its run leaves nothing. The folder is removed while the lock is
            # held: the next process makes its own.
            if self.path.is_dir() and not any(self._content()):
                shutil.rmtree(self.path, ignore_errors=True)
            lock.release()

    @property
    def is_training(self) -> bool:
        """Whether a trainer holds the lock of the run; False if this process may not test it."""
        if not (self.path / LOCK).exists():
            return False
        try:
            with filelock.FileLock(self.path / LOCK, timeout=0):
                return False
        except filelock.Timeout:
            return True
        except OSError:
            return False

    def sweep(self) -> None:
        """Remove the partial files that a kill left. The caller must hold the lock."""
        for left in self.path.rglob(".*.partial"):
            with contextlib.suppress(OSError):
                if left.is_file():
                    left.unlink()

    def delete(self) -> None:
        """Remove the run with everything in its folder; the first step, a rename, is atomic.

        Raises:
            RunNotFoundError: there is no run here.
            RunLockedError: it is in training.
            RunError: it is shipped, is a link, or cannot be renamed.
        """
        self._check_own("deleted")
        with self.lock():
            self._move_aside("delete")
        for left in self.path.parent.glob(f"{DELETED}*"):
            shutil.rmtree(left, ignore_errors=True)

    def _move_aside(self, what: str) -> Path:
        """Give the folder a name that no run has, so that what a kill leaves of it is not listed.

        The next deletion removes it.

        Raises:
            RunError: it cannot be renamed.
        """
        aside = self.path.with_name(f"{DELETED}{os.urandom(6).hex()}")
        try:
            self.path.rename(aside)
        except OSError as error:
            raise RunError(f"Cannot {what} {self.path}: {error.strerror or error}.") from None
        return aside

    def rename(self, name: str) -> RunFolder:
        """Give the run another name, in one step; returns its new folder.

        Raises:
            ConfigError: the name is not valid.
            RunExistsError: the name is taken.
            RunNotFoundError: there is no run here.
            RunLockedError: it is in training.
            RunError: it is shipped, is a link, or cannot be renamed.
        """
        if not NAME.fullmatch(name):
            raise ConfigError(
                f"{name!r} is no name for a run: use letters, digits and . _ + -. Begin with a letter or a digit."
            )
        target = RunFolder(self.path.with_name(name))
        self._check_own("renamed")
        with self.lock():
            if os.path.lexists(target.path):
                raise RunExistsError(f"There is already a run or a file named {name!r}: choose another name.")
            try:
                self.path.rename(target.path)
            except OSError as error:
                raise RunError(f"Cannot rename {self.path}: {error.strerror or error}.") from None
        return target

    def _check_own(self, what: str) -> None:
        """Check that this is a run of the user."""
        if not (self.path / CONFIG).is_file():
            raise RunNotFoundError(f"{self.path} is not a run. See them with: lm list")
        if self.shipped:
            raise RunError(f"{self.path} is shipped with Inkling and read-only: it cannot be {what}.")
        if self.path.is_symlink():
            advice = "remove the link by hand" if what == "deleted" else "change that folder"
            raise RunError(f"{self.path} is a link to another folder: {advice}.")

    def read_note(self) -> str:
        """What the owner of the run wrote about it; "" if nothing, or if it cannot be read."""
        with contextlib.suppress(OSError):
            return (self.path / NOTE).read_text("utf-8", errors="replace")
        return ""

    def write_note(self, note: str) -> None:
        """Replace the note; an empty one is removed.

        Raises:
            ConfigError: it is too long.
            RunNotFoundError: there is no run here.
            RunError: it is shipped, is a link, or the file cannot be written.
        """
        if len(note) > MAX_NOTE_CHARACTERS:
            raise ConfigError(f"The note has {len(note):,} characters: the limit is {MAX_NOTE_CHARACTERS:,}.")
        self._check_own("given a note")
        if note.strip():
            write_file(self.path / NOTE, note.strip() + "\n")
            return
        try:
            (self.path / NOTE).unlink(missing_ok=True)
        except OSError as error:
            raise RunError(f"Cannot delete {self.path / NOTE}: {error.strerror or error}.") from None

    def files(self) -> list[tuple[Path, int]]:
        """All files with their sizes in bytes; a file that vanishes meanwhile, as in a run in training, is left out."""
        found = []
        for path in sorted(self.path.rglob("*")):
            with contextlib.suppress(OSError):
                if path.is_file() and path.name != LOCK:
                    found.append((path, path.stat().st_size))
        return found

    # -- configuration ----------------------------------------------------------------------------

    def write_record(self, record: dict[str, Any]) -> None:
        """Write `config.json`, with its own hash."""
        # Through JSON and back, so that the hash is of the values as they will be read.
        content = json.loads(json.dumps({"format_version": FORMAT_VERSION, **record}))
        content.pop("sha256", None)
        content["sha256"] = digest(content)
        write_file(self.path / CONFIG, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    def read_record(self) -> dict[str, Any]:
        """The content of `config.json`.

        Raises:
            CorruptRunError, FormatVersionError: it cannot be used.
        """
        record = read_json(self.path / CONFIG)
        if not isinstance(record, dict) or not isinstance(record.get("format_version"), int):
            if isinstance(record, dict) and "model_type" in record:
                raise CorruptRunError(
                    f"{self.path} is a model in the format of transformers, and no run yet: lm import {self.argument}"
                )
            raise CorruptRunError(f"{self.path / CONFIG} is not the configuration of a run: restore it from a copy.")
        check_version(record["format_version"], self.path / CONFIG)
        for field, kind in _RECORD.items():
            value: Any = record
            for part in field.split("."):
                value = value.get(part) if isinstance(value, dict) else None
            if not isinstance(value, kind):
                raise CorruptRunError(f"{self.path / CONFIG} has no proper {field!r}: restore it from a copy.")
        for name, part in record["corpus"]["splits"].items():
            if not (isinstance(part, dict) and part.keys() >= {"sha256", "tokens", "characters"}):
                raise CorruptRunError(
                    f"{self.path / CONFIG} has no proper 'corpus.splits.{name}': restore it from a copy."
                )
        if record.pop("sha256", None) != digest(record):
            raise CorruptRunError(
                f"{self.path / CONFIG} fails its hash, so it was edited or damaged: restore it from a copy. To train "
                f"with other options, give them to a new run that starts from this one: --init {self.argument}."
            )
        return record

    @property
    def shipped(self) -> bool:
        """Whether the run comes with Inkling; such a run is read-only."""
        with contextlib.suppress(RunError):
            return bool(self.read_record().get("shipped", False))
        return False

    def read_tokenizer(self) -> Tokenizer:
        """The run's tokenizer, checked against the hash in `config.json`.

        Raises:
            VocabMismatchError: the model was trained with another tokenizer.
        """
        record = self.read_record()
        try:
            tokenizer = load_tokenizer(self.path / TOKENIZER)
        except TokenizerError as error:
            raise CorruptRunError(str(error)) from None
        if tokenizer.sha256 != record.get("tokenizer_sha256"):
            raise VocabMismatchError(
                f"Run {self.name!r}: {TOKENIZER} ({tokenizer.vocab_size} tokens) is not the tokenizer that the model "
                f"was trained with ({record.get('vocab_size')} tokens). Restore the {TOKENIZER} saved with this run."
            )
        return tokenizer

    # -- weights ----------------------------------------------------------------------------------

    def _belongs(self, record: dict[str, Any]) -> dict[str, str]:
        belongs = {"tokenizer_sha256": record["tokenizer_sha256"], "model_sha256": digest(record["config"]["model"])}
        if record.get("base") is not None:
            belongs["base_sha256"] = record["base"]["weights_sha256"]
        return belongs

    def pack_weights(self, arrays: Arrays, **facts: Any) -> bytes:
        """The bytes of a weights file of this run, with `facts` (step, valid_loss, …) in its header."""
        return pack_arrays(arrays, {**facts, **self._belongs(self.read_record())})

    def write_best(self, arrays: Arrays, **facts: Any) -> None:
        """Replace the best weights."""
        write_file(self.path / MODEL, self.pack_weights(arrays, **facts))

    def write_tensors(self, tensors: Mapping[str, LazyTensor], **facts: Any) -> None:
        """Write the best weights tensor by tensor, in their own formats."""
        write_tensors(self.path / MODEL, tensors, {**facts, **self._belongs(self.read_record())})

    def write_step(self, name: str, arrays: Arrays, **facts: Any) -> None:
        """Write a checkpoint under steps/<name>/."""
        write_file(self.path / STEPS / name / MODEL, self.pack_weights(arrays, **facts))

    def weights_path(self, checkpoint: str) -> Path:
        """The weights file of a checkpoint: "best", "last", or a folder under steps/.

        Raises:
            RunNotFoundError: no such checkpoint; the message lists those there are.
        """
        if checkpoint == "best":
            return self.path / MODEL
        if checkpoint == LAST:
            return self._last() / MODEL
        if checkpoint not in self.kept_checkpoints():
            known = ["best", *([LAST] if self.has_last() else []), *self.kept_checkpoints()]
            raise RunNotFoundError(
                f"Run {self.name!r} has no checkpoint {checkpoint!r}.{did_you_mean(checkpoint, known)} "
                f"Checkpoints: {', '.join(known)}."
            )
        return self.path / STEPS / checkpoint / MODEL

    def kept_checkpoints(self) -> list[str]:
        """Names under steps/, in training order."""
        found = (self.path / STEPS).glob(f"*-*/{MODEL}")
        return sorted(
            (path.parent.name for path in found),
            key=lambda name: (name.split("-")[0], int(re.sub(r"\D", "", name) or 0)),
        )

    def drop_step(self, name: str) -> None:
        """Remove a checkpoint under steps/."""
        shutil.rmtree(self.path / STEPS / name, ignore_errors=True)

    def read_weights(self, checkpoint: str = "best") -> tuple[Arrays, dict[str, Any]]:
        """Weights of a checkpoint and their facts, checked against the run's tokenizer and model options.

        Raises:
            CorruptRunError, VocabMismatchError, RunNotFoundError: they cannot be used.
        """
        path = self.weights_path(checkpoint)
        if not path.exists() and any((self.path / name).is_dir() for name in (MEMBERS, TEACHER)):
            raise RunNotFoundError(
                f"Run {self.name!r} has no weights yet, because some members of the ensemble are not trained: train "
                f"them with: lm train --resume {self.argument}"
            )
        arrays, facts = self._read_own(path)
        return arrays, {name: facts[name] for name in ("step", "valid_loss", "epoch") if name in facts}

    def _read_own(self, path: Path, *, mapped: bool = False) -> tuple[Arrays, dict[str, Any]]:
        """Tensors and facts of a file, checked against the run's tokenizer and model options."""
        arrays, facts = map_arrays(path) if mapped else read_arrays(path)
        for name, expected in self._belongs(self.read_record()).items():
            if facts.get(name) != expected:
                raise VocabMismatchError(
                    f"{path} was not trained with {_BELONGS[name]} in this folder: the files were mixed up or {CONFIG} "
                    "was edited. Restore the files saved together."
                )
        return arrays, facts

    # -- the last checkpoint ------------------------------------------------------------------------

    def _last(self) -> Path:
        # Between the two renames of write_last only last.old exists.
        return self.path / (LAST if (self.path / LAST).is_dir() else LAST_OLD)

    def has_last(self) -> bool:
        """Whether training can be resumed."""
        return self._last().is_dir()

    def write_last(self, files: Mapping[str, bytes]) -> None:
        """Replace `last/` atomically by a folder of these files.

        Raises:
            RunError: the disk is full or read-only; the old `last/` is unchanged.
        """
        partial, target, old = self.path / f".{LAST}.partial", self.path / LAST, self.path / LAST_OLD
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            for name, content in files.items():
                write_synced(partial / name, content)
            sync_folder(partial)
            if target.is_dir():
                shutil.rmtree(old, ignore_errors=True)
                target.rename(old)
            partial.rename(target)
            sync_folder(self.path)
            shutil.rmtree(old, ignore_errors=True)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise RunError(
                f"Cannot write {target}: {error.strerror or error}. The last checkpoint is untouched."
            ) from error

    def read_last(self, *, mapped: bool = False) -> tuple[dict[str, Any], dict[str, Arrays]]:
        """`state.json`, and the tensors of each safetensors file of `last/` by file stem, all checked.

        Args:
            mapped: the tensors are views of the files, whose hashes are not checked.

        Raises:
            RunNotFoundError: the run has nothing to resume from.
            CorruptRunError: a file is damaged.
        """
        values = self.read_state()
        tensors = {}
        for name in values["files"]:
            tensors[name], _ = self._read_own(self._last() / f"{name}.safetensors", mapped=mapped)
        return values, tensors

    def read_state(self) -> dict[str, Any]:
        """`state.json` of `last/`, checked.

        Raises:
            RunNotFoundError, CorruptRunError: as `read_last`.
        """
        folder = self._last()
        if not folder.is_dir():
            raise RunNotFoundError(
                f"Run {self.name!r} has no last/ folder, so it cannot be resumed; --init can start from it."
            )
        values: dict[str, Any] = read_json(folder / "state.json")
        stored = values.pop("sha256", None) if isinstance(values, dict) else None
        if stored is None or stored != digest(values):
            raise CorruptRunError(f"{folder / 'state.json'} fails its hash, so it was edited or damaged: restore it.")
        return values

    def pack_state(self, values: dict[str, Any]) -> bytes:
        """The bytes of `state.json`, with its own hash."""
        return (json.dumps({**values, "sha256": digest(values)}, indent=1) + "\n").encode()

    # -- metrics and film -----------------------------------------------------------------------------

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """Add one line to metrics.jsonl.

        Raises:
            RunError: the disk is full or read-only.
        """
        _append_row(self.path / METRICS, row)

    def read_metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, without a line that a kill cut short."""
        return _read_rows(self.path / METRICS)

    def cut_metrics(self, step: int) -> None:
        """Drop lines after `step`, also of film.jsonl; training resumes there and writes them again."""
        for name in (METRICS, FILM):
            path = self.path / name
            if path.exists():
                _write_rows(path, [row for row in _read_rows(path) if row["step"] <= step])

    def write_metrics(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Replace all lines of metrics.jsonl."""
        _write_rows(self.path / METRICS, rows)

    def append_film(self, row: Mapping[str, Any]) -> None:
        """Add one line to film.jsonl: what the weights of a step write.

        Raises:
            RunError: the disk is full or read-only.
        """
        _append_row(self.path / FILM, row)

    def write_film(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Replace all lines of film.jsonl; without lines there is no file."""
        if rows:
            _write_rows(self.path / FILM, rows)

    def read_film(self) -> list[dict[str, Any]]:
        """The lines of film.jsonl, without a line that a kill cut short."""
        return _read_rows(self.path / FILM)


def sweep_partial_runs(runs_dir: Path) -> None:
    """Remove the partial folders whose process is gone: a kill left them. Those in use are locked."""
    for left in runs_dir.glob(f".*{PARTIAL}"):
        # OSError: it is gone, not ours, or on a file system without locks. Then it stays.
        with contextlib.suppress(OSError, filelock.Timeout):
            if left.is_dir() and time.time() - left.stat().st_mtime > YOUNG_SECONDS:
                with filelock.FileLock(left / LOCK, timeout=0):
                    shutil.rmtree(left, ignore_errors=True)


# -- files of lines -----------------------------------------------------------------------------------


def _append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Add one line of JSON.

    Raises:
        RunError: the disk is full or read-only.
    """
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    except OSError as error:
        raise RunError(f"Cannot write {path}: {error.strerror or error}.") from error


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """The lines that have a step; one that a kill cut short is left out. Empty if there is no file."""
    rows = []
    with contextlib.suppress(FileNotFoundError):
        for line in path.read_text("utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                row = json.loads(line)
                if isinstance(row, dict) and isinstance(row.get("step"), int):
                    rows.append(row)
    return rows


def _write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Replace all lines."""
    write_file(path, "".join(json.dumps(row) + "\n" for row in rows))


# -- finding runs -------------------------------------------------------------------------------------


def shipped_folder() -> Path:
    """Folder of the shipped runs: package data in a wheel, `checkpoints/` in a checkout."""
    packaged = Path(__file__).parents[1] / "shipped"
    return packaged if packaged.is_dir() else Path(__file__).parents[2] / "checkpoints"


def list_runs(runs_dir: Path) -> list[RunFolder]:
    """All runs: the user's, newest first, then the shipped ones."""
    own: list[RunFolder] = []
    shipped: dict[str, RunFolder] = {}
    for folder in dict.fromkeys((runs_dir, shipped_folder())):
        if not folder.is_dir():
            continue
        for path in folder.iterdir():
            # Not Path.is_file, which raises for a folder without permission.
            # A hidden folder is a run that is being made, or the rest of a deleted one.
            if path.name.startswith(".") or not os.path.isfile(path / CONFIG):
                continue
            run = RunFolder(path)
            if run.shipped:
                shipped.setdefault(run.name, run)
            elif folder == runs_dir:
                own.append(run)
    names = {run.name for run in own}
    own.sort(key=lambda run: max(_mtime(run.path / CONFIG), _mtime(run.path / MODEL)), reverse=True)
    return own + [shipped[name] for name in sorted(shipped) if name not in names]


def check_runs_dir(runs_dir: Path) -> None:
    """Refuse a given folder of runs that does not exist; without this check, only shipped runs would be found.

    Raises:
        RunNotFoundError: there is no such folder.
    """
    if runs_dir != DEFAULT_RUNS_DIR and not runs_dir.is_dir():
        raise RunNotFoundError(
            f"There is no folder {runs_dir} with runs: check --runs-dir and INKLING_RUNS, or train one with: "
            f"{_train_one(runs_dir)}"
        )


def _train_one(runs_dir: Path) -> str:
    """The command that trains a run in a folder."""
    return "lm train FILE" + ("" if runs_dir == DEFAULT_RUNS_DIR else f" --runs-dir {shlex.quote(str(runs_dir))}")


def _mtime(path: Path) -> float:
    """0 for a file that does not exist."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def find_run(name: str | None, runs_dir: Path) -> tuple[RunFolder, str]:
    """The folder and checkpoint of NAME, PATH, NAME@last or NAME@step-500; None is the newest run.

    RUN+ADAPTER is an adapter over a base that is named, each with a checkpoint if it is not the best. A run whose own
    name has a plus is found first.

    Raises:
        RunNotFoundError: no such run; the message lists those there are.
    """
    runs = list_runs(runs_dir)
    if name is None:
        check_runs_dir(runs_dir)
        if not runs:
            raise RunNotFoundError(f"There is no run in {runs_dir}: train one with: {_train_one(runs_dir)}")
        return runs[0], "best"
    found = _find(name, runs_dir, runs) or _find_pair(name, runs_dir, runs)
    if found is not None:
        return found
    base = name.rpartition("@")[0] or name
    if expanded(base).is_dir():
        raise RunNotFoundError(f"{base} is a folder without {CONFIG}, so it is not a run. See them with: lm list")
    names = [run.name for run in runs]
    known = (
        f" Runs: {', '.join(names[:8])}." if names else f" There are none yet: train one with: {_train_one(runs_dir)}"
    )
    raise RunNotFoundError(f"No run {base!r} in {runs_dir}.{did_you_mean(base, names)}{known}")


def _find(name: str, runs_dir: Path, runs: Sequence[RunFolder]) -> tuple[RunFolder, str] | None:
    """The folder and checkpoint of a name that means one run."""
    # The whole name first: a path may contain an @.
    before, _, after = name.rpartition("@")
    for base, checkpoint in ((name, "best"), (before, after or "best")):
        for candidate in (runs_dir / base, expanded(base)) if base else ():
            if (candidate / CONFIG).is_file():
                return RunFolder(candidate.resolve() if candidate.name in ("", "..") else candidate), checkpoint
        for run in runs:
            if run.name == base:
                return run, checkpoint
    return None


def _find_pair(name: str, runs_dir: Path, runs: Sequence[RunFolder]) -> tuple[RunFolder, str] | None:
    """The adapter of RUN+ADAPTER over its base, and the adapter's checkpoint.

    Raises:
        RunNotFoundError: one of the two is there, and the other is no run, or no adapter.
    """
    for plus in (index for index, character in enumerate(name) if character == "+"):
        left, right = name[:plus], name[plus + 1 :]
        base, adapter = (_find(part, runs_dir, runs) if part else None for part in (left, right))
        if base is None and adapter is None:
            continue
        if base is None or adapter is None:
            raise RunNotFoundError(
                f"{name} names a run and its adapter, and there is no run {(left if base is None else right)!r} in "
                f"{runs_dir}. See them with: lm list"
            )
        folder, checkpoint = adapter
        if folder.read_record().get("base") is None:
            raise RunNotFoundError(
                f"{name}: {folder.name!r} is a whole model, not an adapter. Train an adapter with: lm train FILE "
                f"--init {left} --lora 8"
            )
        return RunFolder(folder.path, base), checkpoint
    return None
