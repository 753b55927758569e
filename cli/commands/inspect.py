"""lm inspect."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.options import (
    ANY_OPTION,
    DEFAULT_RUNS,
    DataDir,
    Json,
    RunName,
    RunsDir,
    TextColumn,
    TextEncoding,
    named,
    path_option,
    with_flags,
)
from lm.errors import ConfigError, CorpusError

if TYPE_CHECKING:
    from lm.corpora import TokenSplit
    from lm.runs.run import Run

POSITION = 16

GRADIENT_TOKENS = 20_000
NEURON_TOKENS = 10_000
ATTENTION_TOKENS = 10_000
WHY_TOKENS = 2_000
"""Tokens of the validation text that a view reads."""

command = typer.Typer(
    help="Look inside a model: gradients, attention, neurons, contributions, shapes.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


# -- what every view has ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class ViewFlags:
    """The flags that every view has."""

    text: str | None
    out: Path | None
    text_column: str | None
    encoding: str | None
    runs_dir: Path
    data_dir: Path | None
    as_json: bool

    def content(self, run: Run | None, tokens: int) -> tuple[str, str | TokenSplit]:
        """The name and the text that a view reads: of --text, else the first tokens of the run's validation text.

        Conversations are in tokens of the run.
        """
        from cli.output import reading
        from lm.corpora import open_text
        from lm.corpora.answers import part_of

        column, encoding = self.text_column, self.encoding
        for flag, value in (("--text-column", column), ("--encoding", encoding)):
            if value is not None and self.text is None:
                raise ConfigError(f"{flag} is for --text: leave it out for the run's own text.")
        if self.text is not None:
            if run is not None:
                column, encoding = column or run.config.corpus.text_column, encoding or run.config.corpus.encoding
            opened = open_text(self.text, text_column=column or "text", encoding=encoding)
            name = "stdin" if self.text == "-" else Path(self.text).name
            if run is not None and opened.conversations is not None:
                return name, run.encode(name, opened)
            return name, "".join(opened.chunks())
        assert run is not None, "without a run, a text is given"
        try:
            with reading() as progress:
                split = run.own_text(split="valid", data_dir=self.data_dir, progress=progress).splits["valid"]
        except CorpusError as error:
            other = "" if "--text FILE" in str(error) else " Or give another text: --text FILE"
            raise type(error)(f"{str(error).rstrip('.')}.{other}") from None
        name = f"the validation text ({run.record['corpus']['name']})"
        if split.marks is not None:
            return name, part_of(split, tokens)
        return name, run.tokenizer.decode(split.ids[1 : tokens + 1])

    def show(self, title: str, drawing: str, view: Any, print_tables: Callable[[], None]) -> None:
        """Write the view to --out with this module of `lm.inspection.drawing`, and print it."""
        from cli.output import print_json, say

        if self.out is not None:
            from lm.inspection.drawing.files import write_view

            module = importlib.import_module(f"lm.inspection.drawing.{drawing}")
            page = getattr(module, "page", None)
            write_view(self.out, title, lambda: module.figure(view), page and (lambda: page(view)))
            say(f"Wrote {self.out}.")
        if self.as_json:
            print_json(view.to_json())
        else:
            print_tables()


def with_view_flags(
    *, has_page: bool = False, reads_run_text: bool = True
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a view its flags, as `flags`; --out is checked before the view does anything.

    Args:
        has_page: whether the view has a page without a picture.
        reads_run_text: whether the view reads the run's validation text without --text.
    """
    text_help = (
        "Text to read; - is stdin. Default: the run's validation text."
        if reads_run_text
        else "Text that the preset's tokenizer learns from. Default: the built-in one."
    )
    hints: dict[str, tuple[Any, Any]] = {
        "text": (
            Annotated[str | None, typer.Option("--text", metavar="FILE", help=text_help, show_default=False)], None
        ),
        "out": (
            Annotated[
                Path | None,
                path_option(
                    "-o", "--out", metavar="FILE", help="Also write the view to this file: .png, .svg or .html."
                ),
            ],
            None,
        ),
        "text_column": (TextColumn, None),
        "encoding": (TextEncoding, None),
        "runs_dir": (RunsDir, DEFAULT_RUNS),
        "data_dir": (DataDir, None),
        "as_json": (Json, False),
    }  # fmt: skip
    if not reads_run_text:
        del hints["data_dir"]
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint)
        for name, (hint, default) in hints.items()
    ]

    def collect(values: dict[str, Any]) -> ViewFlags:
        flags = ViewFlags(**{"data_dir": None, **values})
        if flags.out is not None:
            from lm.inspection.drawing.files import check_output

            check_output(flags.out, has_page=has_page)
        return flags

    return with_flags(added, "flags", collect, last=True)


# -- gradients --------------------------------------------------------------------------------------------


@command.command()
@with_view_flags()
def gradients(
    flags: ViewFlags,
    runs: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RUN]...", help="Runs, NAME@last or NAME@step-500. Default: the newest run."),
    ] = None,
    presets: Annotated[
        list[str] | None,
        typer.Option(
            "--preset", metavar="PRESET", help="A preset, or a type such as rnn, with fresh weights; repeatable."
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar=ANY_OPTION, help="An option of the presets, e.g. model.type=rnn; repeatable."),
    ] = None,
    untrained: Annotated[
        bool, typer.Option("--untrained", help="Also each run with fresh weights, as before its training.")
    ] = False,
    steps: Annotated[
        int | None,
        typer.Option(
            min=1, help="Look back this many steps. Default: 64, or what the context allows.", show_default=False
        ),
    ] = None,
) -> None:
    """Measure how gradients fall with distance in time: vanishing gradients.

    The norm of dLoss_t/dh_(t-k) by k, singular values of the recurrent Jacobian, gates.

    \b
    lm inspect gradients RUN --untrained --out gradients.svg
    lm inspect gradients --preset rnn --preset gru --preset lstm
    lm inspect gradients --preset gru-char --set model.num_layers=2 --text FILE
    """
    if set_ and not presets:
        raise ConfigError("--set is for the models of --preset: a run has its own options.")
    if untrained and presets and not runs:
        raise ConfigError("--untrained is for runs: the models of --preset are untrained.")
    from cli import inspect_tables as tables
    from cli.output import console
    from lm.config import parse_assignments
    from lm.inspection.gradients import gradients as measure
    from lm.inspection.subject import fresh, subject
    from lm.inspection.subject import untrained as without_training
    from lm.runs.run import load

    names: list[str | None] = [*dict.fromkeys(runs or [])] or ([] if presets else [None])
    loaded = [load(name, runs_dir=flags.runs_dir) for name in names]
    content: str | TokenSplit | None = None
    if flags.text is not None or loaded:
        _, content = flags.content(loaded[0] if loaded else None, GRADIENT_TOKENS)
    if not isinstance(content, str | None) and (len(loaded) > 1 or presets):
        # Others have other tokens.
        content = loaded[0].tokenizer.decode(content.ids[1:])
    subjects = []
    for given, run in zip(names, loaded, strict=True):
        subjects += [without_training(run, content)] if untrained else []
        # As it was given, so that checkpoints of one run differ: RUN@step-500.
        subjects.append(subject(run, content)._replace(name=given or run.name))
    for preset in presets or []:
        assert isinstance(content, str | None)
        based_on, overrides = _preset(preset)
        made = fresh(based_on, content, overrides=overrides | parse_assignments(set_ or []))
        subjects.append(made._replace(name=", ".join([preset, *(set_ or []), "untrained"])))
    view = measure(subjects, steps=steps)
    flags.show("Gradients through time", "gradients", view, lambda: tables.print_gradients(console(), view))


def _preset(name: str) -> tuple[str, dict[str, Any]]:
    """A preset, and the options over it: for a type of model, those of its preset for characters."""
    from lm.config import preset_names
    from lm.registry import MODELS

    if name in preset_names() or name not in MODELS.names():
        return name, {}
    own = f"{name}-char"
    return (own, {}) if own in preset_names() else ("gru-char", {"model.type": name})


# -- attention --------------------------------------------------------------------------------------------


@command.command()
@with_view_flags()
def attention(
    flags: ViewFlags,
    run: RunName = None,
    layer: Annotated[int | None, typer.Option(help="Only this layer, counted from 0.", show_default=False)] = None,
    head: Annotated[int | None, typer.Option(help="Only this head, counted from 0.", show_default=False)] = None,
    span: Annotated[
        str | None,
        typer.Option(
            metavar="FIRST:END", help="Tokens of the maps, e.g. 0:40. Default: the first.", show_default=False
        ),
    ] = None,
) -> None:
    """Show where each head of a Transformer looks, and what scaling by sqrt(D) does.

    Entropy, mean distance and weight on the first token are means over the text.

    \b
    lm inspect attention RUN
    lm inspect attention RUN --text FILE --layer 2 --out attention.png
    lm inspect attention RUN --layer 2 --head 1 --span 100:140 --out head.svg
    """
    from cli import inspect_tables as tables
    from cli.output import console
    from lm.inspection.attention import attention as measure
    from lm.runs.run import load

    tokens = None if span is None else _span(span)
    loaded = load(run, runs_dir=flags.runs_dir)
    loaded.model.require_part("attention")
    name, content = flags.content(loaded, ATTENTION_TOKENS)
    view = measure(loaded, content, layer=layer, head=head, span=tokens, name=name)
    flags.show(f"Attention of {view.run}", "attention", view, lambda: tables.print_attention(console(), view))


def _span(span: str) -> tuple[int, int]:
    first, colon, end = span.partition(":")
    if not (colon and first.isdecimal() and end.isdecimal()):
        raise ConfigError(f"--span {span!r}: give FIRST:END, counted from 0, such as 0:40.")
    return int(first), int(end)


# -- why --------------------------------------------------------------------------------------------------


@command.command()
@with_view_flags(has_page=True)
def why(
    flags: ViewFlags,
    run: RunName = None,
) -> None:
    """Divide the log-probability of each token among tables, counts, network and layers.

    \b
    lm inspect why RUN --text FILE
    lm inspect why RUN --out why.html
    """
    from cli import inspect_tables as tables
    from cli.output import console
    from lm.inspection.why import why as measure
    from lm.runs.run import load

    loaded = load(run, runs_dir=flags.runs_dir)
    loaded.model.require_part("terms")
    name, content = flags.content(loaded, WHY_TOKENS)
    view = measure(loaded, content, name=name)
    flags.show(f"Why {view.run} predicts", "why", view, lambda: tables.print_why(console(), view))


# -- neurons ----------------------------------------------------------------------------------------------


@command.command()
@with_view_flags(has_page=True)
def neurons(
    flags: ViewFlags,
    run: RunName = None,
    unit: Annotated[
        str | None,
        typer.Option(
            metavar="LAYER.UNIT", help="Color the text by this unit, counted from 0: 0.17.", show_default=False
        ),
    ] = None,
) -> None:
    """Find the units that track the line, quotes, brackets, words, case, names.

    Direction and border are fitted on the first half of the text, and scored on the second.

    \b
    lm inspect neurons RUN
    lm inspect neurons RUN --text FILE --unit 0.17
    lm inspect neurons RUN --unit 0.17 --out unit.html
    """
    from cli import inspect_tables as tables
    from cli.output import console, say
    from lm.inspection.neurons import neurons as search
    from lm.runs.run import load

    loaded = load(run, runs_dir=flags.runs_dir)
    loaded.model.require_part("hidden")
    name, content = flags.content(loaded, NEURON_TOKENS)
    view = search(loaded, content, unit=unit, name=name)
    flags.show(f"Neurons of {view.run}", "neurons", view, lambda: tables.print_neurons(console(), view))
    if not flags.as_json and not view.chosen and view.shown:
        say(f"Next: lm inspect neurons {named(view.run, flags.runs_dir)} --unit {view.shown[0].name}")


# -- shapes -----------------------------------------------------------------------------------------------


@command.command()
@with_view_flags(has_page=True, reads_run_text=False)
def shapes(
    flags: ViewFlags,
    run: RunName = None,
    preset: Annotated[
        str | None,
        typer.Option("--preset", metavar="PRESET", help="A preset, or a type such as rnn, instead of a run."),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar=ANY_OPTION, help="An option of the preset; repeatable."),
    ] = None,
    batch: Annotated[
        int | None, typer.Option(help="B: rows of a batch. Default: those of training.", show_default=False)
    ] = None,
    length: Annotated[
        int | None, typer.Option(help="T: tokens of a row. Default: those of training.", show_default=False)
    ] = None,
) -> None:
    """List every tensor: shape in symbols and numbers, parameters, FLOPs, bytes.

    \b
    lm inspect shapes RUN
    lm inspect shapes RUN --batch 1 --length 10
    lm inspect shapes --preset transformer-char --set model.num_layers=2
    """
    if preset is not None and run is not None:
        raise ConfigError("Give a run or --preset, not both.")
    for flag, value in (("--set", set_), ("--text", flags.text)):
        if value and preset is None:
            raise ConfigError(f"{flag} is for the model of --preset: a run has its own options and tokenizer.")
    from cli import inspect_tables as tables
    from cli.output import console
    from lm.config import row_length
    from lm.inspection.shapes import shapes as measure
    from lm.runs.run import load

    if preset is None:
        loaded = load(run, runs_dir=flags.runs_dir)
        name, model, training = loaded.name, loaded.model, loaded.config.training
    else:
        from lm.config import compose, parse_assignments
        from lm.corpora.named import BUILTIN
        from lm.inspection.subject import fresh

        based_on, overrides = _preset(preset)
        overrides |= parse_assignments(set_ or [])
        content = None if flags.text is None else flags.content(None, 0)[1]
        assert isinstance(content, str | None), "conversations are in tokens of a run"
        name, model = ", ".join([preset, *(set_ or [])]), fresh(based_on, content, overrides=overrides).model
        training = compose(BUILTIN, preset=based_on, overrides=overrides).training
    longest = model.context_length
    trained = row_length(training.bptt, longest)
    view = measure(
        model,
        batch=training.batch_size if batch is None else batch,
        length=min(trained, longest or trained) if length is None else length,
    )
    flags.show(f"Shapes of {name}", "shapes", view, lambda: tables.print_shapes(console(), name, view))
