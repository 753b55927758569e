"""lm compare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli.options import DEFAULT_RUNS, DataDir, Json, RunsDir, choice, path_option
from lm.errors import ConfigError

POSITION = 4
"""After eval."""


def command(
    runs: Annotated[
        list[str],
        typer.Argument(metavar="RUN OTHER...", help="Names or paths of runs, NAME@last or NAME@step-500."),
    ],
    text: Annotated[
        str | None, typer.Option(metavar="FILE", help="Compare on this text; - is stdin.", show_default=False)
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(help="train, valid or test of the first run. Default: test if there is one, else valid."),
    ] = None,
    corpus: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="New path of the text of the runs, if it has moved.", show_default=False),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(help="Compare each with the best or the first. Default: first of two, best of more."),
    ] = None,
    html: Annotated[
        Path | None, path_option("--html", metavar="FILE", help="Write a page without external files.")
    ] = None,
    passages: Annotated[int, typer.Option(min=0, max=10, help="Passages of each side to print.")] = 3,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the bootstrap.")] = 0,
    resamples: Annotated[int, typer.Option(min=100, help="Resamples of the bootstrap.")] = 10_000,
    device: Annotated[str | None, typer.Option(help="Device: cpu, cuda, mps. Default: a GPU if there is one.")] = None,
    runs_dir: RunsDir = DEFAULT_RUNS,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Compare runs on one text: is B better than A, and where?

    Runs that differ by their seed alone are one candidate. Of conversations (JSONL with messages, or prompt and
    completion), the answers alone count.

    \b
    lm compare RUN OTHER
    lm compare RUN OTHER THIRD --text FILE --html compared.html
    """
    if split is not None and text is not None:
        raise ConfigError("--split and --text are two different texts: give only one.")
    if corpus is not None and text is not None:
        raise ConfigError("--corpus is the path of the runs' own text, --text is another text: give only one.")
    chosen = None if against is None else choice("--against", against, "best", "first")
    from lm.runs.run_folder import find_run

    for run in runs:
        # Before torch is loaded, which takes seconds.
        find_run(run, runs_dir)
    from cli.compare_tables import print_comparison
    from cli.output import console, print_json, reading, say, scoring
    from lm.comparison.compare import compare
    from lm.corpora import open_text
    from lm.files import check_place, write_file

    if html is not None:
        check_place(html)
    content = None if text is None else open_text(text)
    with reading() as watch, scoring(f"scoring {len(runs)} runs") as progress:
        found = compare(
            runs, text=content, split=split, name="stdin" if text == "-" else str(text), against=chosen,
            resamples=resamples, seed=seed, runs_dir=runs_dir, device=device, data_dir=data_dir, corpus=corpus,
            progress=progress, reading=watch,
        )  # fmt: skip
    if html is not None:
        from lm.comparison.comparison_html import page

        write_file(html, page(found).encode("utf-8", "replace"))
        say(f"Wrote {html}.")
    if as_json:
        print_json(found.model_dump(mode="json"))
    else:
        print_comparison(console(), found, passages=passages)
