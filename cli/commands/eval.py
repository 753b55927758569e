"""lm eval."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

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

if TYPE_CHECKING:
    from cli.eval_extras import Extras
    from lm.corpora.text import Text
    from lm.evaluation.copying import CopyReport
    from lm.evaluation.report import Report
    from lm.evaluation.signature import Signature
    from lm.runs.run import Run

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
    source = _Source(split, text, text_column, encoding, corpus, data_dir)
    source.check()
    sampling = _sampling(copy, samples=samples, max_tokens=max_tokens, temperature=temperature, seed=seed)
    from cli.eval_extras import Extras
    from cli.output import print_json
    from cli.signature_check import checked
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
    how = _settle(loaded, source, stride, measured_in, expected, extras)
    report = _score(loaded, source, how, extras)
    copies = _copies(loaded, sampling, data_dir)
    facts = {**report.model_dump(mode="json"), **extras.finish(loaded, report, stride=how.stride)}
    if copies is not None:
        facts["copies"] = copies.model_dump(mode="json")
    if not as_json:
        _print_tables(report, extras, copies)
    if expected is not None:
        facts["check"] = checked(expected, extras.measured(report, expected), quiet=as_json)
    if as_json:
        print_json(facts)
    else:
        _print_signatures(report, extras)
    if expected is not None:
        raise typer.Exit(0 if facts["check"]["reproduces"] else 1)
    # The card has reference figures only.
    if text is None and how.stride is None and precision == "fp32":
        _save(loaded, report)


@dataclass(frozen=True)
class _Source:
    """Which text is scored, as the flags say."""

    split: str | None
    text: str | None
    text_column: str | None
    encoding: str | None
    corpus: str | None
    data_dir: Path | None

    def check(self) -> None:
        """Raise ConfigError if the flags contradict each other."""
        if self.split is not None and self.text is not None:
            raise ConfigError("--split and --text are two different texts: give only one.")
        for flag, value in (("--text-column", self.text_column), ("--encoding", self.encoding)):
            if value is not None and self.text is None:
                raise ConfigError(f"{flag} is for --text: leave it out for the run's own text.")
        if self.corpus is not None and self.text is not None:
            raise ConfigError("--corpus is the path of the run's own text, --text is another text: give only one.")

    def read(self, run: Run, extras: Extras) -> str | Text | None:
        """The text of --text, one of conversations with its roles; None for the run's own text."""
        from lm.corpora import open_text

        if self.text is None:
            return None
        own = run.config.corpus
        opened = open_text(
            self.text, text_column=self.text_column or own.text_column, encoding=self.encoding or own.encoding
        )
        if opened.conversations is None:
            return "".join(opened.chunks())
        extras.refuse_conversations(self.text)
        return opened


class _How(NamedTuple):
    """How the text is scored."""

    split: str | None
    stride: int | None
    precision: Any


def _sampling(copy: bool, **given: Any) -> dict[str, Any] | None:
    """The options of the samples of --copy; None without it."""
    sampling = {name: value for name, value in given.items() if value is not None}
    if sampling and not copy:
        raise ConfigError(f"--{next(iter(sampling)).replace('_', '-')} is for the samples of --copy: give --copy too.")
    return sampling if copy else None


def _settle(
    run: Run, source: _Source, stride: int | None, precision: Any, expected: Signature | None, extras: Extras
) -> _How:
    """Split, stride and precision: of the flags, then of an expected signature, then of a convention."""
    from cli.signature_check import settings_of

    if stride is not None and run.model.context_length is None:
        raise ConfigError(
            f"--stride {stride}: {run.config.model.type} models carry their state over the whole text, without a "
            "sliding window: leave --stride out."
        )
    how = _How(source.split, stride, precision)
    if expected is not None:
        how = _How(
            *settings_of(expected, run, split=source.split, text=source.text, stride=stride, precision=precision)
        )
        extras.check(how.precision)
    return how._replace(stride=extras.stride(how.stride, run))


def _score(run: Run, source: _Source, how: _How, extras: Extras) -> Report:
    """Score the text once, for the report and for what `extras` needs of it."""
    from cli.output import reading, scoring

    content, corpus, data_dir = source.read(run, extras), source.corpus, source.data_dir
    with (
        reading() as watch,
        extras.watching(run, stride=how.stride, corpus=corpus, data_dir=data_dir, reading=watch) as watchers,
        scoring(f"scoring {run.name}") as progress,
    ):
        return run.evaluate(
            how.split, text=content, name="stdin" if source.text == "-" else str(source.text), stride=how.stride,
            precision=how.precision, progress=progress, reading=watch, data_dir=data_dir, corpus=corpus,
            watchers=watchers,
        )  # fmt: skip


def _copies(run: Run, sampling: dict[str, Any] | None, data_dir: Path | None) -> CopyReport | None:
    """How much samples copy from the training text; None without --copy."""
    from cli.output import reading

    if sampling is None:
        return None
    with reading() as watch:
        return run.copy_report(data_dir=data_dir, progress=watch, **sampling)


def _print_tables(report: Report, extras: Extras, copies: CopyReport | None) -> None:
    from cli.output import console
    from cli.report_tables import print_report

    print_report(console(), report)
    extras.print(console())
    if copies is not None:
        from cli.copies import print_copies

        print_copies(console(), copies)


def _print_signatures(report: Report, extras: Extras) -> None:
    """Print the signatures, whole, so that they can be copied."""
    if report.signature is None:
        return
    for line in (extras.signature, report.signature):
        if line is not None:
            typer.echo(line)


def _save(run: Run, report: Report) -> None:
    """Save the report with the run, if that is possible."""
    if run.folder.shipped:
        return
    try:
        run.save_report(report)
    except RunError as error:
        # The run belongs to someone else, or the disk is full.
        typer.echo(f"note: The report was not saved with the run. {error}", err=True)
