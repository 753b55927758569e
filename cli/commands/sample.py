"""lm sample."""

from __future__ import annotations

import secrets
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from cli.options import DEFAULT_RUNS, Json, RunName, RunsDir, field
from lm.config import validate
from lm.errors import ConfigError
from lm.generation.options import SamplingOptions

if TYPE_CHECKING:
    from lm.tokenizers.base import UnknownPolicy

POSITION = 2


def command(
    run: RunName = None,
    source: Annotated[str | None, typer.Argument(metavar="[-]", help="- reads the prompt from stdin.")] = None,
    prompt: Annotated[str, typer.Option(help="Text to go on from.", show_default=False)] = "",
    temperature: Annotated[float | None, field(SamplingOptions, "temperature")] = None,
    top_k: Annotated[int | None, field(SamplingOptions, "top_k")] = None,
    top_p: Annotated[float | None, field(SamplingOptions, "top_p")] = None,
    max_tokens: Annotated[int | None, field(SamplingOptions, "max_tokens")] = None,
    stop: Annotated[list[str] | None, field(SamplingOptions, "stop")] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="The same seed and options give the same text; default: a new one, told on stderr."),
    ] = None,
    number: Annotated[int, typer.Option("-n", min=1, help="How many samples.")] = 1,
    unknown: Annotated[
        str | None,
        typer.Option(
            help="What symbols of the prompt that the model never saw become: replace, skip, byte or error.",
            show_default=False,
        ),
    ] = None,
    detokenize: Annotated[
        bool, typer.Option("--detokenize", help="Put the punctuation of word models back as a reader expects.")
    ] = False,
    allow_unknown: Annotated[bool, typer.Option("--allow-unknown", help="Let word models write <unk>.")] = False,
    echo: Annotated[bool, typer.Option(help="Print the prompt before its continuation.")] = True,
    out: Annotated[
        Path | None,
        typer.Option(help="Also write the samples, with options and seed, to this file.", show_default=False),
    ] = None,
    device: Annotated[str | None, typer.Option(help="Where to compute; default: a GPU when there is one.")] = None,
    runs_dir: RunsDir = DEFAULT_RUNS,
    as_json: Json = False,
) -> None:
    """Let a model write. The text goes to stdout, everything else to stderr.

    \b
    lm sample RUN --prompt "ROMEO:" --temperature 0.8 --top-k 40 --seed 7
    echo "O, for a" | lm sample RUN -
    """
    given = {
        "temperature": temperature, "top_k": top_k, "top_p": top_p, "max_tokens": max_tokens,
        "stop": tuple(stop) if stop else None, "allow_unknown": allow_unknown or None,
        "seed": secrets.randbelow(2**31) if seed is None else seed,
    }  # fmt: skip
    options = validate(
        SamplingOptions, {key: value for key, value in given.items() if value is not None}, where="sampling"
    )
    if unknown not in (None, "replace", "skip", "byte", "error"):
        raise ConfigError(f"--unknown {unknown!r}: use replace, skip, byte or error.")
    policy = cast("UnknownPolicy | None", unknown)
    if run == "-" and source is None:
        run, source = None, "-"
    if source is not None:
        if source != "-":
            raise ConfigError(
                f"{source!r} is one argument too many: give a prompt with --prompt, or - to read it from stdin."
            )
        # A shell's closing newline is not part of what was typed.
        prompt += sys.stdin.buffer.read().decode("utf-8", errors="replace").removesuffix("\n")

    from cli.output import no_color, print_json
    from lm.generation.generate import Outcome
    from lm.run import load

    loaded = load(run, runs_dir=runs_dir, device=device)
    if detokenize and not hasattr(loaded.tokenizer, "detokenize"):
        raise ConfigError(
            f"--detokenize is for word models; run {loaded.name!r} writes {loaded.tokenizer.type} tokens."
        )
    texts = []
    for index in range(number):
        outcome, begun, parts = Outcome(), time.perf_counter(), []
        pieces = loaded.stream(prompt, options, index=index, unknown=policy, outcome=outcome)
        live = not (as_json or detokenize)
        if live and index and number > 1:
            typer.echo("")
        if live and echo:
            typer.echo(prompt, nl=False)
        for piece in pieces:
            parts.append(piece)
            if live:
                typer.echo(piece, nl=False)
                sys.stdout.flush()
        text = "".join(parts)
        texts.append(text)
        seconds = time.perf_counter() - begun
        if as_json:
            print_json(
                {"prompt": prompt, "text": text, "index": index, "seed": options.seed, "tokens": outcome.tokens,
                 "finish_reason": outcome.finish_reason, "run": loaded.name, "state": loaded.state}
            )  # fmt: skip
        elif detokenize:
            typer.echo(loaded.tokenizer.detokenize((prompt if echo else "") + text))  # type: ignore[attr-defined]
        else:
            typer.echo("")
        which = f", sample {index + 1} of {number}" if number > 1 else ""
        said = (
            f"{loaded.name}@{loaded.state} · seed {options.seed}{which} · "
            f"{outcome.tokens:,} tokens, {outcome.tokens / max(seconds, 1e-9):,.0f} tokens/s"
        )
        typer.echo(said if no_color() else typer.style(said, dim=True), err=True)
    if out is not None:
        loaded.save_sample(prompt, texts, options, out, unknown=policy)
