"""lm demo."""

from __future__ import annotations

from typing import Annotated

import typer

from cli.commands.train import command as train
from cli.options import DEFAULT_RUNS, RunsDir

POSITION = 21


def command(
    minutes: Annotated[float, typer.Option(help="Training time.")] = 1.0, runs_dir: RunsDir = DEFAULT_RUNS
) -> None:
    """Train, report and sample on the built-in corpus, in two minutes."""
    from lm.corpora.named import BUILTIN

    train(corpus=BUILTIN, minutes=minutes, runs_dir=runs_dir)
