"""lm push."""

from __future__ import annotations

from typing import Annotated

import typer

from cli.options import DEFAULT_RUNS, DataDir, Json, RunsDir, choice

POSITION = 11.5


def command(
    run: Annotated[
        str,
        typer.Argument(metavar="RUN", help="Name or path of a run, NAME@last or NAME@step-500.", show_default=False),
    ],
    repository: Annotated[
        str,
        typer.Argument(metavar="hf:USER/NAME", help="Repository; it is made if there is none.", show_default=False),
    ],
    to: Annotated[
        str, typer.Option(metavar="FORMAT", help="Format: hf (transformers), gguf (llama.cpp) or onnx (ONNX Runtime).")
    ] = "hf",
    precision: Annotated[str | None, typer.Option(help="Weights in the file, as in lm export.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    runs_dir: RunsDir = DEFAULT_RUNS,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Upload a model to the Hugging Face Hub, as lm export writes it.

    The token is that of HF_TOKEN or of hf auth login.

    \b
    lm push RUN hf:USER/NAME
    lm push RUN hf:USER/NAME --to gguf --precision q8_0 --private
    """
    from cli.output import console, facts_table, print_json, print_sentence
    from lm.interop.push import FORMATS, push, repository_name
    from lm.runs.run import load

    chosen = choice("--to", to, *FORMATS)
    repository_name(repository)
    done = push(
        load(run, runs_dir=runs_dir, device="cpu"), repository, chosen, precision, private=private, data_dir=data_dir
    )
    if as_json:
        print_json(done.to_json())
        return
    from rich.filesize import decimal

    rows = [("uploaded", done.url, decimal(done.exported.size_bytes)), ("commit", done.commit, "")]
    console().print(facts_table(rows))
    for note in done.exported.notes:
        print_sentence(console(stderr=True), f"note: {note}", "yellow")
