"""lm demo."""

from __future__ import annotations

from typing import Annotated

import typer

from cli.commands.train import command as train
from cli.options import DEFAULT_RUNS, RunsDir

POSITION = 16


def command(
    minutes: Annotated[float, typer.Option(help="How long to train.")] = 1.0, runs_dir: RunsDir = DEFAULT_RUNS
) -> None:
    """Train, report and sample on the built-in corpus, within two minutes and without a download."""
    from lm.corpora.named import BUILTIN

    train(corpus=BUILTIN, minutes=minutes, runs_dir=runs_dir)
