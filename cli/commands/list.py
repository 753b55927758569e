"""lm list."""

from __future__ import annotations

import math
from typing import Annotated, Any

import typer

from cli.options import DEFAULT_RUNS, Json, RunsDir
from lm.errors import ConfigError

POSITION = 7


def command(
    sort: Annotated[str, typer.Option(help="date (the newest first) or bits (the best first).")] = "date",
    runs_dir: RunsDir = DEFAULT_RUNS,
    as_json: Json = False,
) -> None:
    """List the runs: model, corpus, step, bits per byte, size, date."""
    if sort not in ("date", "bits"):
        raise ConfigError(f"--sort {sort!r}: use date or bits.")
    from rich.filesize import decimal
    from rich.markup import escape
    from rich.table import Table

    from cli.output import console, print_json
    from lm.runs.card import figure
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
        console(stderr=True).print(f"There is no run in {runs_dir} yet. Train one with: lm train FILE")
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("run", "model", "corpus"):
        # Folded rather than cut: a name is there to be copied.
        table.add_column(name, overflow="fold")
    # What the tokens do not say has a cost: where there is one, the customary figure stands next to the whole one.
    both = any(row.get("token_bits_per_byte") != row.get("bits_per_byte") for row in rows)
    for name in ("step", "bits/byte", *(["tokens alone"] if both else []), "size", "date"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        if row["problem"]:
            continue
        step = f"{row['step']:,}" if row["step"] is not None else "–"
        scores = [figure(row["bits_per_byte"], ".4f")]
        if both:
            scores.append(figure(row["token_bits_per_byte"], ".4f"))
        table.add_row(
            escape(row["name"]), escape(row["model_name"]), escape(row["corpus"]), step, *scores,
            decimal(row["size_bytes"]), row["created"][:10] + (" shipped" if row["shipped"] else ""),
        )  # fmt: skip
    screen = console()
    screen.print(table)
    for row in rows:
        if row["problem"]:
            screen.print(f"{escape(row['name'])}  [red]{escape(row['problem'])}[/red]", soft_wrap=True)
    hints = ["bits/byte: of the best weights on the validation split; lower is better"]
    if both:
        hints.append(
            "unknown words and dropped white space are charged for their spelling "
            "(docs/reference/evaluation.md); tokens alone: "
            "without it, not comparable across tokenizers"
        )
    unknown = [row for row in rows if row.get("bits_per_byte") is None and row.get("token_bits_per_byte") is not None]
    if unknown:
        hints.append(f"–: not known; measure again, or read why: lm eval {unknown[0]['name']} --split valid")
    for hint in hints:
        console(stderr=True).print(f"[dim]{escape(hint)}[/dim]", soft_wrap=True)


def _bits(row: dict[str, Any]) -> float:
    bits = row.get("bits_per_byte")
    return math.inf if bits is None else float(bits)
