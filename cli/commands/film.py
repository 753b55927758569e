"""lm film."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.options import DEFAULT_RUNS, Json, RunName, RunsDir, path_option
from lm.errors import ConfigError

if TYPE_CHECKING:
    from lm.runs.film import Frame

POSITION = 13.5
FRAME_SECONDS = 0.5
"""In a terminal."""


def command(
    run: RunName = None,
    html: Annotated[Path | None, path_option("--html", metavar="FILE", help="Write a page with a slider.")] = None,
    gif: Annotated[Path | None, path_option("--gif", metavar="FILE", help="Write an animated picture.")] = None,
    runs_dir: RunsDir = DEFAULT_RUNS,
    as_json: Json = False,
) -> None:
    """Show how a run learned to write: one prompt and seed along its training.

    \b
    lm film RUN
    lm film RUN --html film.html
    lm film RUN --gif film.gif
    """
    from dataclasses import asdict

    from cli.output import print_json, say
    from lm.files import check_place, write_file
    from lm.runs.film import require_film
    from lm.runs.run_folder import find_run

    if html is not None and gif is not None:
        raise ConfigError("--html and --gif: give one of them.")
    folder, _ = find_run(run, runs_dir)
    frames = require_film(folder)
    if html is not None:
        from lm.runs.film_page import film_page

        check_place(html)
        write_file(html, film_page(folder))
        say(f"Wrote {html}.")
    elif gif is not None:
        from lm.runs.film_picture import write_film_gif

        check_place(gif)
        write_film_gif(folder, gif)
        say(f"Wrote {gif}.")
    if as_json:
        print_json([asdict(frame) for frame in frames])
    elif html is None and gif is None:
        _play(frames)


def _play(frames: Sequence[Frame]) -> None:
    """Show the frames one after the other; in a pipe, one line each."""
    import time

    from rich.live import Live
    from rich.text import Text

    from cli.output import console
    from cli.terminal import visible
    from lm.runs.film import frame_title

    screen, last = console(), frames[-1]
    if not screen.is_terminal:
        for frame in frames:
            text = frame.text.replace("\r", "").replace("\n", "↵")
            typer.echo(f"{frame_title(frame, last)}: {text}")
        return
    with Live(console=screen, auto_refresh=False) as live:
        for frame in frames:
            live.update(
                Text.assemble((frame_title(frame, last), "bold"), "\n\n", visible(frame.text), "\n"), refresh=True
            )
            if frame is not last:
                time.sleep(FRAME_SECONDS)
