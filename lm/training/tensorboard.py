"""Every metric as a TensorBoard scalar, under the run's `events/`."""

from __future__ import annotations

from pathlib import Path

from lm.training.callbacks import Callback, End, Row, Start


class TensorBoard(Callback):
    """Writes each numeric value of each metrics line; after a resume, what came later is purged."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def on_start(self, start: Start) -> None:
        """Open the event file."""
        from torch.utils.tensorboard.writer import SummaryWriter

        self._writer = SummaryWriter(str(self._folder), purge_step=start.step + 1)  # type: ignore[no-untyped-call]

    def on_log(self, row: Row) -> None:
        """Write the line's values at its step."""
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float):
                group = name.split("_")[0] if name.startswith(("train_", "valid_")) else "training"
                label = name.removeprefix(f"{group}_")
                self._writer.add_scalar(f"{group}/{label}", value, row["step"])  # type: ignore[no-untyped-call]

    def on_end(self, end: End) -> None:
        """Close the event file."""
        self._writer.close()  # type: ignore[no-untyped-call]
