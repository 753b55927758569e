"""lm plot."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli.options import DEFAULT_RUNS, Json, RunsDir, path_option

POSITION = 11
DEFAULT_PICTURE = Path("curves.png")
LINES = 20
"""Height of a plot in the terminal, in lines."""


def command(
    runs: Annotated[list[str] | None, typer.Argument(metavar="[RUN]...", help="Runs. Default: the newest.")] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            help="loss, perplexity, bits_per_byte, accuracy, or any figure of metrics.jsonl. Default: loss; "
            "bits_per_byte for runs with different tokenizers.",
            show_default=False,
        ),
    ] = None,
    by: Annotated[str, typer.Option(help="Horizontal axis: step, tokens or time.")] = "step",
    output: Annotated[
        Path | None,
        path_option("-o", "--output", help="Image file: .png, .svg or .pdf.  [default: curves.png]"),
    ] = None,
    terminal: Annotated[bool, typer.Option("--terminal", help="Draw in the terminal.")] = False,
    runs_dir: RunsDir = DEFAULT_RUNS,
    as_json: Json = False,
) -> None:
    """Plot the training and validation curves of runs.

    \b
    lm plot RUN
    lm plot RUN OTHER --by time --metric bits_per_byte -o curves.svg
    lm plot RUN --terminal
    """
    from dataclasses import asdict

    from cli.plot_metric import chosen_metric

    metric = chosen_metric(metric, runs, runs_dir)
    from cli.output import console, no_color, print_json, say
    from lm.files import check_place
    from lm.runs.curves import curves, draw, sketch
    from lm.runs.run_folder import find_run

    names: list[str | None] = [*dict.fromkeys(runs or [])] or [None]
    folders = [find_run(name, runs_dir)[0] for name in names]
    if output is None and not (terminal or as_json):
        output = DEFAULT_PICTURE
    if output is not None:
        check_place(output)
    drawn = curves(folders, metric, by)
    if output is not None:
        draw(drawn, output, metric=metric, by=by)
        say(f"Wrote {output}.")
    if terminal:
        screen = console()
        color = screen.is_terminal and not no_color()
        for line in sketch(drawn, metric=metric, by=by, width=min(screen.width, 120), height=LINES, color=color):
            typer.echo(line)
    if as_json:
        print_json([asdict(curve) for curve in drawn])
