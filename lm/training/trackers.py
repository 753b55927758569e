"""The values of a training in a tracker: Weights & Biases, MLflow or Trackio, through their own libraries.

Names and steps are those of metrics.jsonl; the configuration and the final report are logged too. One thread
calls the library, so that a slow server does not slow the training. A tracker that fails gets no more values, and the
training continues.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
import queue
import shutil
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path, PureWindowsPath
from typing import Any, TypeVar

from lm.config import RunConfig
from lm.errors import ConfigError, MissingExtraError
from lm.files import write_file
from lm.training.callbacks import Callback, Row, Start

PROJECT = "inkling"
"""The project or experiment, unless the library's own variable names another one."""
FILE = "tracker.json"
"""In the run folder: tracker and id of the tracked run, which a resume continues."""
MIN_FREE_BYTES = 1 << 20
"""Of the disk to which Weights & Biases writes."""
MAX_WAIT_SECONDS = 60
"""At the end, for values that are not sent yet."""

T = TypeVar("T")
_log = logging.getLogger(__name__)


class Library(ABC):
    """The calls of a tracker's library. Its errors are of any type."""

    package: str
    remedy = "Correct it"
    """What to do if it cannot start."""

    @abstractmethod
    def open(self, run: str, config: Mapping[str, Any], id_: str | None) -> str:
        """Begin a tracked run, or continue that of an id; its id."""

    @abstractmethod
    def log(self, values: Mapping[str, float], step: int) -> None:
        """Add values at a step."""

    @abstractmethod
    def summarize(self, values: Mapping[str, float], step: int) -> None:
        """Add the figures of the final report."""

    @abstractmethod
    def close(self, *, failed: bool) -> None:
        """End the tracked run."""


class WandB(Library):
    """Weights & Biases; WANDB_PROJECT, WANDB_MODE and its other variables count."""

    package = "wandb"
    remedy = "Correct it, set WANDB_MODE=offline to work without an account"

    def open(self, run: str, config: Mapping[str, Any], id_: str | None) -> str:
        """See `Library.open`."""
        import wandb

        folder = os.environ.get("WANDB_DIR") or "."
        if os.path.isdir(folder) and shutil.disk_usage(folder).free < MIN_FREE_BYTES:
            # It would start, and lose the values without an error.
            raise OSError(f"{os.path.abspath(folder)} has no space left")
        self._run = wandb.init(
            project=None if "WANDB_PROJECT" in os.environ else PROJECT, name=run, config=dict(config), id=id_,
            resume="allow" if id_ else None,
            # What the training prints stays as it is.
            settings=wandb.Settings(console="off"),
        )  # fmt: skip
        return str(self._run.id)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """See `Library.log`."""
        self._run.log(dict(values), step=step)

    def summarize(self, values: Mapping[str, float], step: int) -> None:
        """See `Library.summarize`."""
        self._run.summary.update(dict(values))

    def close(self, *, failed: bool) -> None:
        """See `Library.close`."""
        self._run.finish(exit_code=int(failed))


class MLflow(Library):
    """MLflow; MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME and its other variables count."""

    package = "mlflow"

    def open(self, run: str, config: Mapping[str, Any], id_: str | None) -> str:
        """See `Library.open`."""
        import mlflow
        from mlflow.entities import Param

        self._client = mlflow.MlflowClient()
        if id_ is not None:
            self._client.update_run(id_, status="RUNNING")
            self._id = id_
            return id_
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = self._client.get_experiment_by_name(name)
        experiment_id = self._client.create_experiment(name) if experiment is None else experiment.experiment_id
        self._id = str(self._client.create_run(experiment_id, run_name=run).info.run_id)
        params = [Param(key, str(value)) for key, value in config.items()]
        # At most 100 in one call.
        for start in range(0, len(params), 100):
            self._client.log_batch(self._id, params=params[start : start + 100])
        return self._id

    def log(self, values: Mapping[str, float], step: int) -> None:
        """See `Library.log`."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self._id, metrics=[Metric(key, value, now, step) for key, value in values.items()])

    def summarize(self, values: Mapping[str, float], step: int) -> None:
        """See `Library.summarize`."""
        self.log(values, step)

    def close(self, *, failed: bool) -> None:
        """See `Library.close`."""
        self._client.set_terminated(self._id, "FAILED" if failed else "FINISHED")


class Trackio(Library):
    """Trackio; TRACKIO_DIR, TRACKIO_SPACE_ID and its other variables count."""

    package = "trackio"

    def open(self, run: str, config: Mapping[str, Any], id_: str | None) -> str:
        """See `Library.open`."""
        import trackio

        # A name is all that finds a run again, so each one has its own, also of runs with equal names.
        name = f"{run}-{time.strftime('%Y%m%d-%H%M%S')}" if id_ is None else id_
        self._run: Any = trackio.init(
            PROJECT, name=name, config=dict(config), resume="allow" if id_ else "never", embed=False,
            auto_log_cpu=False, auto_log_gpu=False,
        )  # fmt: skip
        return str(self._run.name)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """See `Library.log`."""
        self._run.log(dict(values), step=step)

    def summarize(self, values: Mapping[str, float], step: int) -> None:
        """See `Library.summarize`."""
        self.log(values, step)

    def close(self, *, failed: bool) -> None:
        """See `Library.close`."""
        self._run.finish()


LIBRARIES: Mapping[str, type[Library]] = {"wandb": WandB, "mlflow": MLflow, "trackio": Trackio}
"""By value of `training.log_to`."""


def check_tracker(name: str | None) -> None:
    """Check that the library of a tracker is installed; None: there is no tracker.

    Raises:
        MissingExtraError: it is not.
    """
    if name is not None and importlib.util.find_spec(LIBRARIES[name].package) is None:
        raise MissingExtraError(
            f"--log-to {name} needs {LIBRARIES[name].package}: pip install '.[trackers]' in a checkout of Inkling."
        )


@contextlib.contextmanager
def tracked(config: RunConfig, folder: Path, *, continues: bool) -> Iterator[Tracker | None]:
    """The callback of the tracker that `config` names, which ends after the block; None: it names none.

    Args:
        config: of the run.
        folder: of the run; it may not exist yet.
        continues: continue the tracked run that the folder names.

    Raises:
        MissingExtraError: the library is not installed.
        ConfigError: the tracker cannot start.
    """
    name = config.training.log_to
    if name is None:
        yield None
        return
    check_tracker(name)
    # Libraries log to files: on a full disk, the module logging would print a traceback for each line.
    logging.raiseExceptions = False
    tracker = Tracker(name, LIBRARIES[name](), config, folder, continues=continues)
    try:
        yield tracker
    except BaseException:
        tracker.end(failed=True)
        raise
    tracker.end(failed=False)


class Tracker(Callback):
    """Sends the lines of metrics.jsonl to a tracker.

    Args:
        name: of the tracker.
        library: its calls.
        config: of the run.
        folder: of the run; it may not exist yet.
        continues: continue the tracked run that the folder names.

    Raises:
        ConfigError: the tracker cannot start.
    """

    def __init__(self, name: str, library: Library, config: RunConfig, folder: Path, *, continues: bool) -> None:
        self._name, self._library, self._file = name, library, folder / FILE
        self._step = 0
        self._has_failed = False
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        # A daemon, as a library may wait for a server for minutes.
        self._thread = threading.Thread(target=self._work, name=f"tracker-{name}", daemon=True)
        self._thread.start()
        known = _read(self._file) if continues else {}
        id_ = known.get("id") if known.get("tracker") == name else None
        opened = self._call(lambda: library.open(folder.name, flat(config), id_))
        try:
            with _stdout_for_results():
                self._id = opened.result()
        except Exception as error:
            self._jobs.put(None)
            raise ConfigError(
                f"The tracker {name} cannot start: {_sentence(error)} {library.remedy}, or leave --log-to out."
            ) from None

    def on_start(self, start: Start) -> None:
        """Record the tracked run in the run folder, which is there now."""
        write_file(self._file, json.dumps({"tracker": self._name, "id": self._id}, indent=2) + "\n")

    def on_log(self, row: Row) -> None:
        """Send the numbers of the line at its step."""
        self._step = row["step"]
        values, step = numbers(row), self._step
        values.pop("step")
        self._guarded(lambda: self._library.log(values, step))

    def report(self, report: Mapping[str, Any]) -> None:
        """Send the figures of the final report, as report/NAME."""
        values, step = {f"report/{name}": value for name, value in numbers(report).items()}, self._step
        self._guarded(lambda: self._library.summarize(values, step))

    def end(self, *, failed: bool) -> None:
        """End the tracked run; wait for what is not sent yet, but not for a server that does not answer."""
        self._guarded(lambda: self._library.close(failed=failed))
        self._jobs.put(None)
        with _stdout_for_results():
            self._thread.join(MAX_WAIT_SECONDS)
        if self._thread.is_alive():
            _log.warning("%s has not taken all values after %d seconds.", self._name, MAX_WAIT_SECONDS)

    def _guarded(self, call: Callable[[], None]) -> None:
        """Let the thread call the library, unless that failed before."""

        def guarded() -> None:
            if self._has_failed:
                return
            try:
                call()
            except Exception as error:
                self._has_failed = True
                _log.warning(
                    "%s failed and gets no more values; the training continues: %s", self._name, _sentence(error)
                )

        self._call(guarded)

    def _call(self, call: Callable[[], T]) -> Future[T]:
        """Let the thread call; the result."""
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(call())
            except BaseException as error:
                future.set_exception(error)

        self._jobs.put(run)
        return future

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()


def _stdout_for_results() -> contextlib.AbstractContextManager[Any]:
    """Send to stderr what a library prints as it starts or ends, while this thread waits for it."""
    return contextlib.redirect_stdout(sys.stderr)


def numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """The numbers among the values."""
    return {
        name: value for name, value in values.items() if isinstance(value, int | float) and not isinstance(value, bool)
    }


def flat(config: RunConfig) -> dict[str, Any]:
    """The options as "section.field" → value, as --set writes them, but files without their folder; else text."""
    found: dict[str, Any] = {}
    for section, options in config.model_dump(mode="json").items():
        for name, value in options.items() if isinstance(options, Mapping) else [("", options)]:
            key = f"{section}.{name}" if name else section
            if isinstance(value, str):
                value = _without_folder(value)
            found[key] = value if isinstance(value, int | float | str) or value is None else json.dumps(value)
    return found


def _without_folder(text: str) -> str:
    """The name of a file without its folder, which is private; other texts as they are."""
    is_path = ("/" in text or "\\" in text) and "://" not in text and not text.startswith("hf:")
    return PureWindowsPath(text).name if is_path else text


def _read(file: Path) -> dict[str, Any]:
    """The tracked run that the folder names; empty if there is none."""
    try:
        known = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _sentence(error: Exception) -> str:
    """The first line of an error, as a sentence."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".") + "."
