"""lm report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli.options import DEFAULT_RUNS, DataDir, RunName, RunsDir, path_option
from lm.errors import ConfigError

POSITION = 10


def command(
    run: RunName = None,
    html: Annotated[
        Path | None, path_option("--html", metavar="FILE", help="The page's file.  [default: RUN-report.html]")
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(help="train, valid or test. Default: test if there is one, else valid.", show_default=False),
    ] = None,
    text: Annotated[
        str | None, typer.Option(metavar="FILE", help="Measure on this text instead; - is stdin.", show_default=False)
    ] = None,
    corpus: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="New path of the run's text, if it has moved.", show_default=False),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, max=20, help="Texts that the model writes.")] = 3,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first text.")] = 1,
    temperature: Annotated[float, typer.Option(min=0.0, help="Temperature of the texts.")] = 0.8,
    runs_dir: RunsDir = DEFAULT_RUNS,
    data_dir: DataDir = None,
) -> None:
    """Write a run's report as one HTML file to send to others.

    Figures with their meaning, learning curves, samples, the text coloured by surprise. It needs no network.

    \b
    lm report RUN
    lm report RUN --html report.html --seed 7
    lm report IMPORTED --text FILE
    """
    if split is not None and text is not None:
        raise ConfigError("--split and --text are two different texts: give only one.")
    if corpus is not None and text is not None:
        raise ConfigError("--corpus is the path of the run's own text, --text is another text: give only one.")
    from cli.output import say, scoring
    from lm.corpora import open_text
    from lm.files import check_place, write_file
    from lm.report_page.collect import collect
    from lm.report_page.page import page
    from lm.runs.run import load

    loaded = load(run, runs_dir=runs_dir)
    path = html or Path(f"{loaded.name}-report.html")
    check_place(path)
    content = None if text is None else open_text(text)
    with scoring(f"scoring {loaded.name}") as progress:
        report = collect(
            loaded,
            split,
            text=content,
            name="stdin" if text == "-" else str(text),
            samples=samples,
            seed=seed,
            temperature=temperature,
            progress=progress,
            data_dir=data_dir,
            corpus=corpus,
        )
    if report.missing_text is not None:
        say(f"note: The page has no map of the text. {report.missing_text}")
    write_file(path, page(report).encode("utf-8", "replace"))
    say(f"Wrote {path}.")
