"""lm export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cli.options import DEFAULT_RUNS, DataDir, Json, RunName, RunsDir, choice, path_option

POSITION = 11
FORMATS = {"hf": "lm.interop.huggingface", "onnx": "lm.interop.onnx"}
"""Format → module whose `export` writes it."""
PRECISIONS = {"hf": ("fp32", "fp16"), "onnx": ("fp32", "fp16", "int8")}
"""Format → its precisions, the default first."""


def command(
    run: RunName = None,
    to: Annotated[str, typer.Option(metavar="FORMAT", help="Format: hf (transformers) or onnx (ONNX Runtime).")] = "hf",
    out: Annotated[Path | None, path_option("-o", "--out", help="What to write.  [default: RUN-FORMAT]")] = None,
    precision: Annotated[
        str | None, typer.Option(help="Weights in the file: fp32 (default), fp16, or int8 for onnx.")
    ] = None,
    runs_dir: RunsDir = DEFAULT_RUNS,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Write a model for another program, and prove it there.

    hf: a folder for Hugging Face transformers, of a Transformer without context tables.
    onnx: a folder for ONNX Runtime, of any model.

    \b
    lm export RUN --to hf --out folder
    lm export RUN --to onnx --out folder
    """
    import importlib

    from cli.output import console, facts_table, print_json
    from lm.runs.run import load

    chosen = choice("--to", to, *FORMATS)
    weights: Any = choice("--precision", precision or PRECISIONS[chosen][0], *PRECISIONS[chosen])
    loaded = load(run, runs_dir=runs_dir, device="cpu")
    path = out or Path(f"{loaded.name}-{chosen}")
    done = importlib.import_module(FORMATS[chosen]).export(loaded, path, weights, data_dir=data_dir)
    if as_json:
        print_json(done.to_json())
        return
    from rich.filesize import decimal

    rows = [
        ("written", done.path, decimal(done.size_bytes)),
        ("proved in", done.program, f"{done.tokens:,} tokens: {done.text}"),
        ("loss there", f"{done.loss_there:.6f}", "nats per token"),
        ("loss here", f"{done.loss_here:.6f}", ""),
    ]
    if done.bits_per_byte_there is not None and done.bits_per_byte_here is not None:
        rows += [
            ("there", f"{done.bits_per_byte_there:.6f}", "bits per byte"),
            ("here", f"{done.bits_per_byte_here:.6f}", ""),
        ]
    console().print(facts_table(rows))
    for note in done.notes:
        console(stderr=True).print(f"note: {note}", style="yellow", markup=False, soft_wrap=True)
