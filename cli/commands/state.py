"""lm state."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli.options import (
    DEFAULT_RUNS,
    Device,
    Json,
    RunsDir,
    TextColumn,
    TextEncoding,
    Unknown,
    named,
    path_option,
    unknown_policy,
)
from lm.errors import CorpusError

POSITION = 15

Run = Annotated[str, typer.Argument(metavar="RUN", help="Name or path of a run, NAME@last or NAME@step-500.")]
Name = Annotated[str, typer.Argument(metavar="NAME", help="Name of the snapshot.")]

command = typer.Typer(
    help="Save, list and delete snapshots: the model's state after a text.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@command.command()
def save(
    run: Run,
    name: Name,
    text: Annotated[Path, path_option(metavar="FILE", help="Text to read; - is stdin.")],
    text_column: TextColumn = None,
    encoding: TextEncoding = None,
    unknown: Unknown = None,
    device: Device = None,
    runs_dir: RunsDir = DEFAULT_RUNS,
) -> None:
    """Read a text and save the state after it, for lm sample RUN --state NAME.

    \b
    lm state save RUN --text chapter.txt NAME
    """
    from cli.output import say
    from lm.corpora import open_text
    from lm.corpora.text import EMPTY
    from lm.runs.run import load

    policy = unknown_policy(unknown)
    loaded = load(run, runs_dir=runs_dir, device=device)
    loaded.snapshots.check(name)
    own = loaded.config.corpus
    try:
        opened = open_text(str(text), text_column=text_column or own.text_column, encoding=encoding or own.encoding)
        content = "".join(opened.chunks())
    except CorpusError as error:
        # An empty text is allowed.
        if error.kind != EMPTY:
            raise
        content = ""
    snapshot = loaded.read_text(content, unknown=policy)
    path = loaded.snapshots.save(name, snapshot, text=text.name)
    say(f"Wrote {path}: {snapshot.tokens:,} tokens, {path.stat().st_size:,} bytes.")
    say(f"Next: lm sample {named(run, runs_dir)} --state {name}")


@command.command("list")
def list_(run: Run, runs_dir: RunsDir = DEFAULT_RUNS, as_json: Json = False) -> None:
    """List the snapshots of a run: tokens, size, text."""
    from rich.filesize import decimal
    from rich.markup import escape
    from rich.table import Table

    from cli.output import console, print_json
    from lm.runs.run import load

    snapshots = load(run, runs_dir=runs_dir).snapshots
    rows = [{"name": name, **snapshots.facts(name)} for name in snapshots.names()]
    if as_json:
        shown = ("name", "tokens", "bytes", "text", "usable")
        print_json([{key: row.get(key) for key in shown} for row in rows])
        return
    if not rows:
        console(stderr=True).print(
            f"Run {run} has no snapshots yet: lm state save {named(run, runs_dir)} --text FILE NAME"
        )
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("snapshot", overflow="fold")
    for column in ("tokens", "size"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("text", overflow="fold")
    for row in rows:
        note = "" if row["usable"] else "  [red]of other weights[/red]"
        tokens = f"{row['tokens']:,}" if isinstance(row.get("tokens"), int) else "–"
        table.add_row(escape(row["name"]), tokens, decimal(row["bytes"]), escape(str(row.get("text") or "–")) + note)
    console().print(table)


@command.command()
def delete(run: Run, name: Name, runs_dir: RunsDir = DEFAULT_RUNS) -> None:
    """Delete a snapshot."""
    from lm.runs.run import load

    load(run, runs_dir=runs_dir).snapshots.delete(name)
