"""The learning film of a run: what its weights wrote at moments of the training, with one prompt and one seed.

`lm.training.film` writes the frames; `lm.runs.film_page` and `lm.runs.film_picture` show them. No torch is needed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lm.errors import RunError
from lm.runs.run_folder import RunFolder


@dataclass(frozen=True)
class Frame:
    """What the weights after a step wrote."""

    step: int
    seconds: float
    """Training time."""
    progress: float
    """Share of the plan, 0 to 1."""
    valid_loss: float | None
    """Of the last validation before it, nats per token; None: there was none."""
    text: str
    """Prompt and sample."""


def read_film(folder: RunFolder) -> list[Frame]:
    """The frames of a run, by rising step; empty if it has no film."""
    frames: dict[int, Frame] = {}
    for row in folder.read_film():
        if isinstance(row.get("text"), str):
            frames[row["step"]] = Frame(
                row["step"], _number(row, "seconds") or 0.0, _number(row, "progress") or 0.0,
                _number(row, "valid_loss"), row["text"],
            )  # fmt: skip
    return [frames[step] for step in sorted(frames)]


def require_film(folder: RunFolder) -> list[Frame]:
    """The frames of a run that has a film.

    Raises:
        RunError: it has none.
    """
    frames = read_film(folder)
    if not frames:
        if folder.read_record().get("imported"):
            raise RunError(f"Run {folder.name!r} has no film: it was imported, so there was no training to film.")
        raise RunError(
            f"Run {folder.name!r} has no film. A training keeps one if it takes about 20 seconds or more and "
            "training.film is true; counting alone has no steps to show."
        )
    return frames


def loss_curve(folder: RunFolder) -> tuple[str, list[tuple[int, float]]]:
    """The name and the points (step, nats per token) of the curve that goes with a film.

    Training loss has more points; validation loss is used if there is no other.
    """
    rows = folder.read_metrics()
    for field, name in (("train_loss", "training loss"), ("valid_loss", "validation loss")):
        values = [(row["step"], _number(row, field)) for row in rows]
        points = [(step, value) for step, value in values if value is not None]
        if points:
            return name, points
    return "training loss", []


def frame_title(frame: Frame, last: Frame) -> str:
    """The step of a frame, and the loss."""
    loss = "" if frame.valid_loss is None else f" · validation loss {frame.valid_loss:.3f}"
    return f"step {frame.step:,} of {last.step:,}{loss}"


def _number(row: Mapping[str, Any], field: str) -> float | None:
    value = row.get(field)
    return value if isinstance(value, int | float) and math.isfinite(value) else None
