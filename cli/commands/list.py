"""lm list."""

from __future__ import annotations

from typing import Any

from cli.options import DEFAULT_RUNS, Json, RunsDir

POSITION = 7


def command(runs_dir: RunsDir = DEFAULT_RUNS, as_json: Json = False) -> None:
    """List the runs: model, corpus, step, bits per byte, size, date."""
    from rich.filesize import decimal
    from rich.markup import escape
    from rich.table import Table

    from cli.output import console, print_json
    from lm.card import figure, summary
    from lm.checkpoint import check_runs_dir, list_runs
    from lm.run import Run

    check_runs_dir(runs_dir)
    rows: list[dict[str, Any]] = [summary(Run(folder)) for folder in list_runs(runs_dir)]
    if as_json:
        print_json(rows)
        return
    if not rows:
        console(stderr=True).print(f"There is no run in {runs_dir} yet. Train one with: lm train FILE")
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("run", "model", "corpus"):
        # Folded rather than cut: a name is there to be copied.
        table.add_column(name, overflow="fold")
    for name in ("step", "bits/byte", "size", "date"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        if row["problem"]:
            continue
        score = figure(row["bits_per_byte"], ".4f") if row["bits_per_byte"] is not None else "–"
        step = f"{row['step']:,}" if row["step"] is not None else "–"
        table.add_row(
            escape(row["name"]), escape(row["model"]), escape(row["corpus"]), step, score, decimal(row["size_bytes"]),
            row["created"][:10] + (" shipped" if row["shipped"] else ""),
        )  # fmt: skip
    screen = console()
    screen.print(table)
    for row in rows:
        if row["problem"]:
            screen.print(f"{escape(row['name'])}  [red]{escape(row['problem'])}[/red]", soft_wrap=True)
    console(stderr=True).print("[dim]bits/byte: of the best weights on the validation split; lower is better[/dim]")
