"""Metrics for TensorBoard, under the run's `events/`: numbers as scalars, strings as text."""

from __future__ import annotations

import contextlib
import math
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lm.errors import RunError
from lm.training.callbacks import Callback, Row, Start

MAX_NATS = 88
"""Above it, a perplexity does not fit into TensorBoard's float32 and is left out."""


class TensorBoard(Callback):
    """Writes every value of every metrics line; a resume deletes later points."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: Any = None

    def on_start(self, start: Start) -> None:
        """Open the event file."""
        from torch.utils.tensorboard.writer import SummaryWriter

        with self._disk_errors():
            self._writer = SummaryWriter(str(self._folder), purge_step=start.step + 1)
        self._hook, threading.excepthook = threading.excepthook, self._thread_failed

    def on_log(self, row: Row) -> None:
        """Write the values of the line at its step."""
        perplexities = {
            f"{split}_perplexity": math.exp(row[f"{split}_loss"])
            for split in ("train", "valid")
            if row.get(f"{split}_loss") is not None and row[f"{split}_loss"] < MAX_NATS
        }
        with self._disk_errors():
            for name, value in (row | perplexities).items():
                group = name.split("_")[0] if name.startswith(("train_", "valid_")) else "training"
                label = f"{group}/{name.removeprefix(f'{group}_')}"
                if name != "step" and isinstance(value, int | float):
                    self._writer.add_scalar(label, value, row["step"])
                elif name == "sample" and value is not None:
                    # TensorBoard shows Markdown, which leaves indented lines as they are.
                    self._writer.add_text(name, textwrap.indent(value, "    ", lambda _: True), row["step"])
                elif isinstance(value, str):
                    self._writer.add_text(label, value, row["step"])

    def close(self) -> None:
        """Close the event file."""
        if self._writer is not None:
            try:
                with self._disk_errors():
                    self._writer.close()
            finally:
                threading.excepthook = self._hook

    def _thread_failed(self, failed: threading.ExceptHookArgs) -> None:
        """Print no traceback for a disk error of TensorBoard's thread: the next call raises it too."""
        if not (isinstance(failed.exc_value, OSError) and type(failed.thread).__module__.startswith("tensorboard.")):
            self._hook(failed)

    @contextlib.contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunError(f"Cannot write to {self._folder}: {error.strerror or error}.") from error
