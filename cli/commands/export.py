"""lm export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli.options import DEFAULT_RUNS, DataDir, Json, RunName, RunsDir, choice, path_option

POSITION = 11


def command(
    run: RunName = None,
    to: Annotated[
        str,
        typer.Option(
            metavar="FORMAT",
            help="Format: hf (transformers), peft (an adapter alone), gguf (llama.cpp), onnx (ONNX Runtime) or "
            "html (a page).",
        ),
    ] = "hf",
    out: Annotated[
        Path | None, path_option("-o", "--out", help="New file or folder.  [default: RUN-FORMAT, RUN.html]")
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            help="Weights in the file. hf, gguf and onnx: fp32 (default) or fp16; gguf: q8_0; onnx and html: int8."
        ),
    ] = None,
    runs_dir: RunsDir = DEFAULT_RUNS,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Write a model for another program, and prove it there.

    hf: a folder for Hugging Face transformers, of a Transformer without context tables.
    peft: a folder for peft, of an adapter (lm train --lora) without its base.
    gguf: a folder for llama.cpp and Ollama, of such a Transformer over bytes, characters or subwords.
    onnx: a folder for ONNX Runtime, of any model.
    html: one page that generates text in a browser, without a network.

    RUN+ADAPTER exports both together, except with peft.

    \b
    lm export RUN --to hf --out folder
    lm export RUN+ADAPTER --to peft
    lm export RUN --to gguf --precision q8_0
    lm export RUN --to onnx --out folder
    lm export RUN --to html --out page.html
    """
    from cli.output import console, facts_table, print_json, print_sentence
    from lm.interop.formats import FORMATS, export
    from lm.runs.run import load

    chosen = choice("--to", to, *FORMATS)
    if precision is not None:
        choice("--precision", precision, *FORMATS[chosen].precisions)
    loaded = load(run, runs_dir=runs_dir, device="cpu")
    path = out or Path(FORMATS[chosen].name_for(loaded.name, chosen))
    done = export(loaded, path, chosen, precision, data_dir=data_dir)
    if as_json:
        print_json(done.to_json())
        return
    from rich.filesize import decimal

    rows = [
        ("written", done.path, decimal(done.size_bytes)),
        ("proved in", done.program, f"{done.tokens:,} tokens: {done.text}"),
        ("loss there", "not measured" if done.loss_there is None else f"{done.loss_there:.6f}", "nats per token"),
        ("loss here", f"{done.loss_here:.6f}", ""),
    ]
    if done.bits_per_byte_there is not None and done.bits_per_byte_here is not None:
        rows += [
            ("there", f"{done.bits_per_byte_there:.6f}", "bits per byte"),
            ("here", f"{done.bits_per_byte_here:.6f}", ""),
        ]
    console().print(facts_table(rows))
    for note in done.notes:
        print_sentence(console(stderr=True), f"note: {note}", "yellow")
