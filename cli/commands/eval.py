"""lm eval."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cli.options import (
    DEFAULT_RUNS,
    DataDir,
    Json,
    RunName,
    RunsDir,
    TextColumn,
    TextEncoding,
    choice,
    field,
    path_option,
)
from lm.errors import ConfigError, RunError
from lm.generation.options import SamplingOptions

POSITION = 3


def command(
    run: RunName = None,
    split: Annotated[
        str | None,
        typer.Option(help="train, valid or test. Default: test if there is one, else valid.", show_default=False),
    ] = None,
    text: Annotated[
        str | None, typer.Option(metavar="FILE", help="Score this text instead; - is stdin.", show_default=False)
    ] = None,
    text_column: TextColumn = None,
    encoding: TextEncoding = None,
    corpus: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="New path of the run's text, if it has moved.", show_default=False),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(
            min=1, help="Step of a Transformer's sliding window. Default: half its context.", show_default=False
        ),
    ] = None,
    copy: Annotated[
        bool,
        typer.Option("--copy", help="Also draw samples, and measure how much of them is copied."),
    ] = False,
    samples: Annotated[
        int | None, typer.Option(min=2, max=1024, help="Samples of --copy. Default: 20.", show_default=False)
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of each sample of --copy. Default: 300.", show_default=False)
    ] = None,
    temperature: Annotated[float | None, field(SamplingOptions, "temperature")] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Seed of the samples of --copy. Default: 1.", show_default=False)
    ] = None,
    device: Annotated[str | None, typer.Option(help="Device: cpu, cuda, mps. Default: a GPU if there is one.")] = None,
    precision: Annotated[
        str, typer.Option(help="fp32 (the reference), bf16, fp16, or weights as for decoding: int8, int4.")
    ] = "fp32",
    per_token: Annotated[
        Path | None,
        path_option("--per-token", metavar="FILE", help="Also write a row for each token: .parquet or .jsonl."),
    ] = None,
    calibration: Annotated[
        bool, typer.Option("--calibration", help="Also measure whether the model's probabilities are right.")
    ] = False,
    out: Annotated[
        Path | None,
        path_option("-o", "--out", metavar="FILE", help="Picture of --calibration: .png, .svg or .html."),
    ] = None,
    convention: Annotated[
        str, typer.Option(help="Also count as another program: inkling, lm-eval, kenlm or srilm.")
    ] = "inkling",
    adapt: Annotated[
        bool, typer.Option("--adapt", help="Also score while the model learns from the text (dynamic evaluation).")
    ] = False,
    cache: Annotated[
        bool, typer.Option("--cache", help="Also score with a cache of what this text said before.")
    ] = False,
    check: Annotated[
        str | None,
        typer.Option(
            metavar="SIGNATURE",
            help="Measure as this signature says, and say if the figure reproduces.",
            show_default=False,
        ),
    ] = None,
    runs_dir: RunsDir = DEFAULT_RUNS,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Measure how well a model predicts a text.

    Reports perplexity, bits per byte and more, each with its denominator.

    \b
    lm eval RUN
    lm eval RUN --text FILE --json
    lm eval RUN --calibration --out calibration.svg
    lm eval RUN --check SIGNATURE
    lm eval RUN --copy --samples 50 --temperature 0.8
    """
    measured_in = choice("--precision", precision, "fp32", "bf16", "fp16", "int8", "int4")
    if split is not None and text is not None:
        raise ConfigError("--split and --text are two different texts: give only one.")
    for flag, value in (("--text-column", text_column), ("--encoding", encoding)):
        if value is not None and text is None:
            raise ConfigError(f"{flag} is for --text: leave it out for the run's own text.")
    if corpus is not None and text is not None:
        raise ConfigError("--corpus is the path of the run's own text, --text is another text: give only one.")
    from cli.eval_extras import Extras

    given = {"samples": samples, "max_tokens": max_tokens, "temperature": temperature, "seed": seed}
    sampling: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if sampling and not copy:
        raise ConfigError(f"--{next(iter(sampling)).replace('_', '-')} is for the samples of --copy: give --copy too.")
    from cli.output import console, print_json, reading, scoring
    from cli.report import print_report
    from cli.signature_check import checked, settings_of
    from lm.corpora import open_text
    from lm.corpora.text import Text
    from lm.evaluation.signature import parse
    from lm.runs.run import load

    expected = None if check is None else parse(check)
    if expected is not None and expected.convention is not None and convention == "inkling":
        convention = expected.convention
    extras = Extras(per_token, calibration, out, convention, adapt, cache)
    extras.check(measured_in)
    loaded = load(run, runs_dir=runs_dir, device=device)
    extras.check_run(loaded)
    if copy:
        from cli.copies import check_training_text

        check_training_text(loaded, "--copy")
    if stride is not None and loaded.model.context_length is None:
        raise ConfigError(
            f"--stride {stride}: {loaded.config.model.type} models carry their state over the whole text, without a "
            "sliding window: leave --stride out."
        )
    if expected is not None:
        split, stride, measured_in = settings_of(
            expected, loaded, split=split, text=text, stride=stride, precision=measured_in
        )  # fmt: skip
        extras.check(measured_in)
    stride = extras.stride(stride, loaded)
    content: str | Text | None = None
    if text is not None:
        own = loaded.config.corpus
        opened = open_text(text, text_column=text_column or own.text_column, encoding=encoding or own.encoding)
        content = "".join(opened.chunks()) if opened.conversations is None else opened
        if isinstance(content, Text):
            extras.refuse_conversations(str(text))
    with (
        reading() as watch,
        extras.watching(loaded, stride=stride, corpus=corpus, data_dir=data_dir, reading=watch) as watchers,
        scoring(f"scoring {loaded.name}") as progress,
    ):
        report = loaded.evaluate(
            split, text=content, name="stdin" if text == "-" else str(text), stride=stride, precision=measured_in,
            progress=progress, reading=watch, data_dir=data_dir, corpus=corpus, watchers=watchers,
        )  # fmt: skip
    copies = None
    if copy:
        with reading() as watch:
            copies = loaded.copy_report(data_dir=data_dir, progress=watch, **sampling)
    more = extras.finish(loaded, report, stride=stride)
    facts = {**report.model_dump(mode="json"), **more}
    if copies is not None:
        facts["copies"] = copies.model_dump(mode="json")
    if not as_json:
        print_report(console(), report)
        extras.print(console())
        if copies is not None:
            from cli.copies import print_copies

            print_copies(console(), copies)
    if expected is not None:
        facts["check"] = checked(expected, extras.measured(report, expected), quiet=as_json)
    if as_json:
        print_json(facts)
    elif report.signature is not None:
        # The last lines, whole, so that they can be copied.
        for line in (extras.signature, report.signature):
            if line is not None:
                typer.echo(line)
    if expected is not None:
        raise typer.Exit(0 if facts["check"]["reproduces"] else 1)
    # The card has reference figures only.
    if not loaded.folder.shipped and text is None and stride is None and precision == "fp32":
        try:
            loaded.save_report(report)
        except RunError as error:
            # The run belongs to someone else, or the disk is full.
            typer.echo(f"note: The report was not saved with the run. {error}", err=True)
