"""lm plot."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.options import DEFAULT_RUNS, Json, RunsDir, path_option
from lm.errors import ConfigError

if TYPE_CHECKING:
    pass

POSITION = 14
DEFAULT_PICTURE = Path("curves.png")
LINES = 20
"""Height of a plot in the terminal, in lines."""


def command(
    runs: Annotated[list[str] | None, typer.Argument(metavar="[RUN]...", help="Runs. Default: the newest.")] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            help="loss, perplexity, bits_per_byte, accuracy, or any figure of metrics.jsonl. Default: loss; "
            "bits_per_byte for runs with different tokenizers, and with --sweep.",
            show_default=False,
        ),
    ] = None,
    by: Annotated[str, typer.Option(help="Horizontal axis: step, tokens or time.")] = "step",
    output: Annotated[
        Path | None,
        path_option("-o", "--output", help="Image file: .png, .svg or .pdf.  [default: curves.png]"),
    ] = None,
    terminal: Annotated[bool, typer.Option("--terminal", help="Draw in the terminal.")] = False,
    bands: Annotated[
        str | None,
        typer.Option(
            metavar="KIND",
            help="Draw runs that differ by their seed alone as their mean with a band: min-max (lowest to highest) or "
            "std (± standard deviation). Default: one curve for each run; with --sweep min-max.",
            show_default=False,
        ),
    ] = None,
    sweep: Annotated[
        str | None, typer.Option(metavar="NAME", help="Plot the finished runs of a sweep.", show_default=False)
    ] = None,
    runs_dir: RunsDir = DEFAULT_RUNS,
    as_json: Json = False,
) -> None:
    """Plot the training and validation curves of runs.

    \b
    lm plot RUN
    lm plot RUN OTHER --by time --metric bits_per_byte -o curves.svg
    lm plot RUN --terminal
    lm plot SEED1 SEED2 SEED3 --bands std
    """
    from dataclasses import asdict

    from cli.output import console, no_color, print_json, say
    from cli.plot_metric import chosen_metric
    from lm.comparison.seeds import seed_groups
    from lm.files import check_place
    from lm.runs.curves import curves, draw, sketch, with_bands
    from lm.runs.run import Run
    from lm.runs.run_folder import find_run

    if sweep is not None and runs:
        raise ConfigError("--sweep names the runs of a sweep: leave other runs out.")
    metric = chosen_metric(metric, runs, runs_dir) if sweep is None else metric or "bits_per_byte"
    if output is None and not (terminal or as_json):
        output = DEFAULT_PICTURE
    if output is not None:
        check_place(output)
    if sweep is not None:
        from lm.jobs.sweep_choice import sweep_curves
        from lm.jobs.sweep_record import open_sweep

        drawn = sweep_curves(open_sweep(sweep, runs_dir), metric, by, bands or "min-max")
    else:
        names: list[str | None] = [*dict.fromkeys(runs or [])] or [None]
        folders = [find_run(name, runs_dir)[0] for name in names]
        drawn = curves(folders, metric, by)
        if bands is not None:
            drawn = with_bands(drawn, seed_groups([Run(folder) for folder in folders]), bands)
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
