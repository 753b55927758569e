"""One run of a sweep, in a process: `python -m lm.jobs.sweep_process`.

stdin has a RunTask as one line of JSON, and stays open as long as the sweep runs. stdout has one line of JSON at the
end: {"event": "finished" | "interrupted" | "failed", "sentence": …, "is_disk_full": …}. The sweep follows the run by
its metrics.jsonl (`lm.jobs.follow`).

SIGTERM, and the end of the sweep, save the training and end the process; the same task continues it later.
"""

from __future__ import annotations

import errno
import json
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm.config import RunConfig, validate
from lm.errors import LMError
from lm.jobs.child_process import end_with_parent, take_stdout
from lm.runs.run_folder import CONFIG, MODEL, RunFolder
from lm.training.callbacks import Callback, End

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class RunTask:
    """What to train."""

    run: str
    runs_dir: str
    config: dict[str, Any]
    data_dir: str | None = None
    was_started: bool = False
    """Whether an earlier process of the sweep began this run, so that a folder of that name is its own."""


class _LastEnd(Callback):
    """Keeps how the training ended."""

    end: End | None = None

    def on_end(self, end: End) -> None:
        """See `Callback.on_end`."""
        self.end = end


def train_task(task: RunTask) -> bool:
    """Train a new run, or the rest of an interrupted one; whether it is complete.

    Raises:
        LMError: see `lm.train` and `lm.resume`.
    """
    from lm.jobs.train import resume, train
    from lm.models.training_method import training_method

    config = validate(RunConfig, task.config)
    runs_dir, folder = Path(task.runs_dir), RunFolder(Path(task.runs_dir) / task.run)
    data_dir = None if task.data_dir is None else Path(task.data_dir)
    last = _LastEnd()
    # A model that only counts has nothing to resume: it counts again.
    can_resume = not training_method(config).in_one_pass or (folder.path / MODEL).exists()
    has_begun = (folder.path / CONFIG).is_file() and can_resume
    if task.was_started and has_begun:
        resume(str(folder.path), runs_dir=runs_dir, callbacks=[last], data_dir=data_dir)
    else:
        train(
            config.corpus.source, config, name=task.run, runs_dir=runs_dir, overwrite=task.was_started,
            callbacks=[last], data_dir=data_dir,
        )  # fmt: skip
    return last.end is None or last.end.reason != "interrupted"


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error, or one that it comes from, is a full disk."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            return True
        error = error.__cause__ or error.__context__
    return False


def _interrupt(number: int, frame: object) -> None:
    """Signal handler before and after the steps, where the trainer has none."""
    raise KeyboardInterrupt


def main() -> None:
    """Train what stdin specifies."""
    task = RunTask(**json.loads(sys.stdin.readline()))
    out = take_stdout()
    result: dict[str, Any]
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _interrupt)
        end_with_parent()
        result = {"event": "finished" if train_task(task) else "interrupted"}
    except KeyboardInterrupt:
        result = {"event": "interrupted"}
    except (LMError, OSError, MemoryError) as error:
        sentence = str(error) or "The memory is not enough."
        result = {"event": "failed", "sentence": sentence, "is_disk_full": is_disk_full(error)}
    print(json.dumps(result), file=out, flush=True)


if __name__ == "__main__":
    main()
