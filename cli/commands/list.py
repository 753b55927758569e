"""lm list."""

from __future__ import annotations

import math
from typing import Annotated, Any

import typer

from cli.options import DEFAULT_RUNS, Json, RunsDir, choice

POSITION = 8


def command(
    sort: Annotated[str, typer.Option(help="date (newest first) or bits (best first).")] = "date",
    runs_dir: RunsDir = DEFAULT_RUNS,
    as_json: Json = False,
) -> None:
    """List the runs: model, corpus, step, bits per byte, size, date."""
    choice("--sort", sort, "date", "bits")
    from cli.output import console, print_json
    from lm.runs.run import Run
    from lm.runs.run_folder import check_runs_dir, list_runs

    check_runs_dir(runs_dir)
    rows: list[dict[str, Any]] = [Run(folder).summary() for folder in list_runs(runs_dir)]
    if sort == "bits":
        rows.sort(key=_bits)
    if as_json:
        print_json(rows)
        return
    if not rows:
        console(stderr=True).print(f"There is no run in {runs_dir} yet. Train one: lm train FILE")
        return
    # Where the spelling of unknown words costs bits, show the figure without it too.
    both = any(row.get("token_bits_per_byte") != row.get("bits_per_byte") for row in rows)
    _print_table(rows, both=both)
    _print_hints(rows, both=both, by_bits=sort == "bits")


def _print_table(rows: list[dict[str, Any]], *, both: bool) -> None:
    """Print a row for each run, then the runs that have a problem; `both` adds the column of the tokens alone."""
    from rich.filesize import decimal
    from rich.markup import escape
    from rich.table import Table

    from cli.output import console
    from lm.runs.card import figure

    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("run", "model", "corpus"):
        # Folded, not cut: names are copied.
        table.add_column(name, overflow="fold")
    for name in ("step", "bits/byte", *(["tokens alone"] if both else []), "size", "date"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        if row["problem"]:
            continue
        step = f"{row['step']:,}" if row["step"] is not None else "–"
        scores = [figure(row["bits_per_byte"], ".4f")]
        if both:
            scores.append(figure(row["token_bits_per_byte"], ".4f"))
        model = row["model_name"] if row["base"] is None else f"adapter of {row['base']}"
        table.add_row(
            escape(row["name"]), escape(model), escape(row["corpus"]), step, *scores,
            decimal(row["size_bytes"]), "shipped" if row["shipped"] else row["created"][:10],
        )  # fmt: skip
    screen = console()
    screen.print(table)
    for row in rows:
        if row["problem"]:
            screen.print(f"{escape(row['name'])}  [red]{escape(row['problem'])}[/red]", soft_wrap=True)


def _print_hints(rows: list[dict[str, Any]], *, both: bool, by_bits: bool) -> None:
    """Print on stderr what the figures mean, and how to compare or measure again."""
    from rich.markup import escape

    from cli.output import console

    hints = ["bits/byte: best weights, validation split; lower is better"]
    if both:
        hints += [
            "bits/byte includes the spelling of unknown words and white space;",
            "tokens alone: without it, not comparable across tokenizers (docs/reference/evaluation.md)",
        ]
    texts = {row.get("text_sha256") for row in rows if row.get("bits_per_byte") is not None}
    if by_bits and len(texts) > 1:
        hints += [
            "the runs have different validation texts, so their figures do not rank them;",
            "to compare on one text: lm compare RUN OTHER --text FILE",
        ]
    unknown = [row for row in rows if row.get("bits_per_byte") is None and row.get("token_bits_per_byte") is not None]
    if unknown:
        hints.append(f"–: unknown; measure again: lm eval {unknown[0]['name']} --split valid")
    for hint in hints:
        console(stderr=True).print(f"[dim]{escape(hint)}[/dim]", soft_wrap=True)


def _bits(row: dict[str, Any]) -> float:
    bits = row.get("bits_per_byte")
    return math.inf if bits is None else float(bits)
