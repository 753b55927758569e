"""Flags that several commands share; what a configuration declares is described there and only named here."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BaseModel

from lm.config import DEFAULT_RUNS_DIR


def field(owner: type[BaseModel], name: str, *flags: str) -> Any:
    """A typer option that takes its help from a configuration field."""
    return typer.Option(*flags, help=owner.model_fields[name].description, show_default=False)


RunsDir = Annotated[Path, typer.Option("--runs-dir", envvar="INKLING_RUNS", help="Where the runs lie.")]
DataDir = Annotated[
    Path | None,
    typer.Option("--data-dir", help="Where named corpora lie; default: INKLING_DATA, else they are downloaded."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for a script instead of tables.")]
RunName = Annotated[
    str | None,
    typer.Argument(
        metavar="[RUN]",
        help="A run's name or path, NAME@last or NAME@step-500; default: the newest run.",
        show_default=False,
    ),
]
DEFAULT_RUNS = DEFAULT_RUNS_DIR


def among(runs_dir: Path) -> str:
    """What a printed command needs to find a run in `runs_dir`."""
    return "" if runs_dir == DEFAULT_RUNS else f" --runs-dir {shlex.quote(str(runs_dir))}"
