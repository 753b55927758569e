"""A film as an animated GIF, drawn by matplotlib and written by Pillow, which comes with it."""

from __future__ import annotations

import io
import re
import textwrap
import warnings
from pathlib import Path

import numpy as np

from lm.errors import ConfigError, MissingExtraError
from lm.files import write_file
from lm.runs.film import frame_title, loss_curve, require_film
from lm.runs.run_folder import RunFolder

FRAME_MILLISECONDS, END_MILLISECONDS = 500, 3000
COLUMNS, LINES = 62, 11
"""Of the text."""
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def check_picture(path: Path) -> None:
    """Check that a GIF can be drawn.

    Raises:
        ConfigError: the suffix is another one.
        MissingExtraError: matplotlib is not installed.
    """
    if path.suffix.lower() != ".gif":
        raise ConfigError(f"{path}: the name of an animated picture ends with .gif.")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise MissingExtraError(
            "An animated picture needs matplotlib: pip install '.[plot]' in a checkout of Inkling. Or write a page "
            "with --html."
        ) from None


def write_film_gif(folder: RunFolder, path: Path) -> None:
    """Write the film of a run as an animated GIF: the text, and the loss with a moving dot.

    Raises:
        RunError: the run has no film, or the file cannot be written.
        ConfigError, MissingExtraError: see `check_picture`.
    """
    check_picture(path)
    frames, (name, points) = require_film(folder), loss_curve(folder)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    figure = Figure(figsize=(7.2, 5.4), dpi=100, layout=None)
    canvas = FigureCanvasAgg(figure)
    title = figure.text(0.06, 0.94, "", fontsize=11, color="#5d6670", parse_math=False)
    text = figure.text(0.06, 0.89, "", fontsize=12.5, va="top", linespacing=1.35, parse_math=False)
    dot = None
    if points:
        steps, losses = zip(*points, strict=True)
        axes = figure.add_axes((0.1, 0.1, 0.85, 0.25))
        axes.plot(steps, losses, color="#6366f1", linewidth=1.4)
        axes.set_xlabel("step", fontsize=9)
        axes.set_ylabel(name, fontsize=9)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        (dot,) = axes.plot([], [], "o", color="#f97316", markersize=8)
    images = []
    with warnings.catch_warnings():
        # A character that the font does not have is drawn as a box.
        warnings.simplefilter("ignore", UserWarning)
        for frame in frames:
            title.set_text(f"{folder.name} · {frame_title(frame, frames[-1])}")
            text.set_text("\n".join(_wrapped(frame.text)))
            if dot is not None:
                dot.set_data([frame.step], [np.interp(frame.step, steps, losses)])
            canvas.draw()
            images.append(Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB").quantize(64))
    content = io.BytesIO()
    durations = [FRAME_MILLISECONDS] * (len(images) - 1) + [END_MILLISECONDS]
    images[0].save(content, "GIF", save_all=True, append_images=images[1:], duration=durations, loop=0, disposal=2)
    write_file(path, content.getvalue())


def _wrapped(text: str) -> list[str]:
    """The lines of a text, folded, without those that have no room."""
    lines = [
        part
        for line in _CONTROLS.sub("\N{MIDDLE DOT}", text).split("\n")
        for part in textwrap.wrap(line.expandtabs(4), COLUMNS, drop_whitespace=False) or [""]
    ]
    return lines if len(lines) <= LINES else [*lines[: LINES - 1], "…"]
