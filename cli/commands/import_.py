"""lm import."""

from __future__ import annotations

from typing import Annotated

import typer

from cli.options import DEFAULT_RUNS, Json, RunsDir, named

POSITION = 11.5


def command(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A folder of Hugging Face transformers, hf:OWNER/NAME[@REVISION], or a .gguf file.",
            show_default=False,
        ),
    ],
    name: Annotated[str | None, typer.Option(help="Name of the run. Default: that of the source.")] = None,
    context: Annotated[
        int | None,
        typer.Option(metavar="N", help="Positions that the run uses. Default: those of the model, at most 2,048."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a run of the same name.")] = False,
    runs_dir: RunsDir = DEFAULT_RUNS,
    as_json: Json = False,
) -> None:
    """Import a model from elsewhere as a run: Llama, Qwen2 or Qwen3, with its tokenizer.

    Nothing in the source is run, and no pickle is opened.

    \b
    lm import model.gguf
    lm import hf:HuggingFaceTB/SmolLM2-135M-Instruct --context 4096
    lm import folder --name base
    """
    from rich.filesize import decimal

    from cli.output import console, facts_table, print_json, reading, say
    from lm.interop.imported import import_model
    from lm.runs.card import numbers

    with reading() as progress:
        run = import_model(
            source, name=name, context=context, overwrite=overwrite, runs_dir=runs_dir, progress=progress
        )
    facts = run.facts()
    used = run.config.model.model_dump()["context_length"]
    if as_json:
        kept = ("name", "path", "model", "parameters", "tokenizer", "vocab_size", "size_bytes", "imported")
        print_json({**{key: facts[key] for key in kept}, "context_length": used})
        return
    imported = facts["imported"]
    unused = f", of which {count:,} fill up the vocabulary" if (count := imported["unused_tokens"]) else ""
    rows = [
        ("run", run.name, facts["path"]),
        ("source", imported["format"], imported["architecture"]),
        ("model", facts["model"], f"{numbers(facts)}, {decimal(facts['size_bytes'])} in {imported['weights']}"),
        ("tokenizer", facts["tokenizer"], f"{facts['vocab_size']:,} tokens{unused}"),
        ("context", f"{used:,}", f"of the {imported['positions']:,} positions that the model knows"),
        ("licence", imported["license"] or "–", "" if imported["license"] else "not named by the source"),
    ]
    console().print(facts_table(rows))
    if used < imported["positions"]:
        say(f"For a longer context: --context {imported['positions']} (time and memory grow with it).")
    there = named(run.name, runs_dir)
    screen = console(stderr=True)
    chat = " or: lm chat " + there if run.tokenizer.chat_template is not None else ""
    screen.print(f'Next: lm sample {there} --prompt "…"{chat}', markup=False, soft_wrap=True)
    screen.print(f"or:   lm eval {there} --text FILE", markup=False, soft_wrap=True)
