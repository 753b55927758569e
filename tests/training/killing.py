"""`lm train` as a process of its own that is killed (SIGKILL) in a named phase or at any moment, and what it leaves.

The look-outs that know the phases are put around functions of the real program, in the child process alone: what is
tested is what is shipped, with no hook in it for tests.
"""

from __future__ import annotations

import contextlib
import functools
import mmap
import multiprocessing
import os
import pathlib
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lm.runs.run_folder import CONFIG, MODEL, RunFolder

SAVING = ("packing", "half a file", "syncing", "renaming", "renamed")
LAST = ("packing", "half a file", "syncing", "old set aside", "between the renames", "old removed")
PHASES = (
    "", "start and end", "step", "evaluation", "line of metrics", "copying",
    *(f"{what}: {moment}" for what in ("best", "kept") for moment in SAVING), *(f"last: {moment}" for moment in LAST),
)  # fmt: skip
"""Where a process may be found; the first means: none of the others."""
AIMED = PHASES[2:]
"""Where it can be made to die."""
TIMEOUT_SECONDS = 120
PRELOADED = [
    "cli.program", "cli.progress", "lm.jobs.train", "lm.generation.engine", "lm.generation.sampler",
    "torch.utils.tensorboard.writer",
]  # fmt: skip
TRAINER, WRITER = 0, 1
"""Bytes of the board: the phase that the training thread and the writing thread are in."""


# -- in the child -------------------------------------------------------------------------------------


class LookOut:
    """Shows on the board where each thread is, and kills the process where it was told to.

    Args:
        board: a file of two bytes.
        phase: die when it is entered …
        number: … for this time; 0: never.
    """

    def __init__(self, board: Path, phase: str, number: int) -> None:
        with board.open("r+b") as file:
            self._board = mmap.mmap(file.fileno(), 2)
        self._phase, self._left = phase, number
        self._threads = threading.local()

    def dies_in(self, phase: str) -> bool:
        """Count an entry into a phase; whether it is the one to die in."""
        if phase == self._phase:
            self._left -= 1
            return self._left == 0
        return False

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    @contextlib.contextmanager
    def inside(self, phase: str) -> Iterator[None]:
        stack = self._threads.__dict__.setdefault("stack", [""])
        stack.append(phase)
        self._show(phase)
        try:
            if self.dies_in(phase):
                self.die()
            yield
        finally:
            stack.pop()
            self._show(stack[-1])

    def _show(self, phase: str) -> None:
        thread = WRITER if threading.current_thread().name.startswith("saving") else TRAINER
        self._board[thread] = PHASES.index(phase)

    @contextlib.contextmanager
    def writing(self, what: str) -> Iterator[None]:
        """Inside, files are written for `what`."""
        self._threads.what = what
        try:
            yield
        finally:
            self._threads.what = None

    def moment(self, moment: str) -> str:
        """The name of a moment of saving, by what is being saved."""
        what = getattr(self._threads, "what", None)
        name = f"{what}: {moment}"
        return name if name in PHASES else "start and end"

    def around(self, owner: Any, name: str, phase: Callable[[], str]) -> None:
        """Whoever is in this function is in this phase."""
        original = getattr(owner, name)

        @functools.wraps(original)
        def watched(*args: Any, **options: Any) -> Any:
            with self.inside(phase()):
                return original(*args, **options)

        setattr(owner, name, watched)


def put_up(look_out: LookOut) -> None:
    """Look-outs around all that `PHASES` names."""
    from lm import files
    from lm.runs import run_folder
    from lm.training import last_checkpoint, trainer
    from lm.training.train_step import TrainStep

    for owner, name, phase in (
        (TrainStep, "start", "step"), (trainer, "validate", "evaluation"), (TrainStep, "checkpoint", "copying"),
    ):  # fmt: skip
        look_out.around(owner, name, lambda phase=phase: phase)
    for owner, name, what in (
        (run_folder.RunFolder, "write_best", "best"), (run_folder.RunFolder, "write_step", "kept"),
        (last_checkpoint, "_write", "last"),
    ):  # fmt: skip
        _about(look_out, owner, name, what)
    look_out.around(run_folder, "pack_arrays", lambda: look_out.moment("packing"))
    look_out.around(os, "fsync", lambda: look_out.moment("syncing"))
    look_out.around(pathlib.Path, "replace", lambda: look_out.moment("renaming"))
    # The old one set aside, the new one in its place: two renames in turn.
    moments = {run_folder.LAST: "old set aside", f".{run_folder.LAST}.partial": "between the renames"}
    rename = pathlib.Path.rename

    def renaming(path: Path, target: Path) -> Any:
        with look_out.inside(look_out.moment(moments.get(path.name, "renaming"))):
            return rename(path, target)

    pathlib.Path.rename = renaming  # type: ignore[method-assign, assignment]
    rmtree = shutil.rmtree

    def removing(path: Path, *args: Any, **options: Any) -> None:
        # Also before the write, of what an earlier kill left.
        if path.name == run_folder.LAST_OLD and path.exists() and not (path.parent / ".last.partial").exists():
            with look_out.inside(look_out.moment("old removed")):
                return rmtree(path, *args, **options)
        return rmtree(path, *args, **options)

    shutil.rmtree = removing  # type: ignore[assignment]
    sync_folder, write_synced, append = files.sync_folder, files.write_synced, run_folder.RunFolder.append_metrics

    def synced(folder: Path) -> None:
        # write_file syncs the folder once the file is in its place.
        with look_out.inside(look_out.moment("renamed")):
            sync_folder(folder)

    def written(path: Path, content: bytes) -> None:
        if look_out.dies_in(look_out.moment("half a file")):
            path.write_bytes(content[: len(content) // 2])
            look_out.die()
        write_synced(path, content)

    def appended(folder: Any, row: Any) -> None:
        if look_out.dies_in("line of metrics"):
            with (folder.path / run_folder.METRICS).open("a") as file:
                file.write('{"step": 7, "train_lo')
            look_out.die()
        append(folder, row)

    files.sync_folder = synced
    files.write_synced = run_folder.write_synced = written  # type: ignore[attr-defined]
    run_folder.RunFolder.append_metrics = appended  # type: ignore[method-assign]


def _about(look_out: LookOut, owner: Any, name: str, what: str) -> None:
    original = getattr(owner, name)

    @functools.wraps(original)
    def watched(*args: Any, **options: Any) -> Any:
        with look_out.writing(what):
            return original(*args, **options)

    setattr(owner, name, watched)


def lm(folder: Path, board: Path, output: Path, phase: str, number: int, arguments: tuple[str, ...]) -> None:
    """What the child does: `lm` with these arguments, under look-outs."""
    from cli import main as program

    os.chdir(folder)
    with output.open("wb") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    put_up(LookOut(board, phase, number))
    sys.argv = ["lm", *arguments]
    program.main()


# -- in the test ----------------------------------------------------------------------------------------


@dataclass
class Killer:
    """Runs `lm` in `folder` and kills it; counts in which phases it died."""

    folder: Path
    hits: Counter[str] = field(default_factory=Counter)
    kills: int = 0

    def __post_init__(self) -> None:
        # Each is a process of its own, forked from one that has nothing but the imports behind it: a tenth of a
        # second in place of three.
        self._processes: Any = multiprocessing.get_context("forkserver")
        self._processes.set_forkserver_preload(PRELOADED)

    def run(self, *arguments: str, phase: str = "", number: int = 0, seconds: float | None = None) -> tuple[int, str]:
        """Exit code (-9 for a kill) and what was printed.

        Args:
            *arguments: of `lm`.
            phase: die in it, when it is entered …
            number: … for this time.
            seconds: or so long after training began, wherever it is.
        """
        board, output = self.folder / "board", self.folder / "output"
        board.write_bytes(b"\0\0")
        process = self._processes.Process(target=lm, args=(self.folder, board, output, phase, number, arguments))
        process.start()
        if seconds is not None:
            while process.is_alive() and not any(board.read_bytes()):
                time.sleep(0.002)
            process.join(seconds)
            process.kill()
        process.join(TIMEOUT_SECONDS)
        assert process.exitcode is not None, f"{phase or seconds}: still running after {TIMEOUT_SECONDS} s"
        if process.exitcode == -signal.SIGKILL:
            self.kills += 1
            # Aimed kills count where they were aimed at, the others in each phase that a thread was in.
            self.hits.update({phase} if phase else {PHASES[place] for place in board.read_bytes()} - {""})
        return process.exitcode, output.read_text("utf-8")

    def kill(self, train: tuple[str, ...], name: str, phase: str = "", number: int = 1, **when: float) -> bool:
        """Kill a run that begins, or goes on where the last kill left it; what is left is whole. False: it finished."""
        run = RunFolder(self.folder / "checkpoints" / name)
        arguments = ("--resume", name) if (run.path / CONFIG).exists() else train
        code, said = self.run("train", *arguments, phase=phase, number=number, **when)
        assert code in (-signal.SIGKILL, 0), said
        if (run.path / CONFIG).exists():
            if run.has_last():
                run.read_last()
            if (run.path / MODEL).exists():
                run.read_weights()
            for state in run.kept_checkpoints():
                run.read_weights(state)
        return code != 0
