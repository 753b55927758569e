"""lm inspect."""

from __future__ import annotations

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
)
from lm.errors import ConfigError, CorpusError

if TYPE_CHECKING:
    from lm.runs.run import Run

POSITION = 16

OUTPUT_HELP = "Also write the view to this file: .png, .svg or .html."
TEXT_HELP = "Text to read; - is stdin. Default: the run's validation text."
Output = Annotated[Path | None, path_option("-o", "--out", metavar="FILE", help=OUTPUT_HELP)]
TextFile = Annotated[str | None, typer.Option("--text", metavar="FILE", help=TEXT_HELP, show_default=False)]

GRADIENT_TOKENS = 20_000
NEURON_TOKENS = 10_000
ATTENTION_TOKENS = 10_000
WHY_TOKENS = 2_000
"""Tokens of the validation text that a view reads."""
DEFAULT_LENGTH = 64
"""Of a row, for a model without training steps."""

command = typer.Typer(
    help="Look inside a model: gradients, attention, neurons, contributions, shapes.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


# -- gradients --------------------------------------------------------------------------------------------


@command.command()
def gradients(
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
    text: TextFile = None,
    steps: Annotated[int, typer.Option(min=1, help="Look back this many steps.")] = 64,
    out: Output = None,
    text_column: TextColumn = None,
    encoding: TextEncoding = None,
    runs_dir: RunsDir = DEFAULT_RUNS,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Measure how gradients fall with distance in time: vanishing gradients.

    The norm of dLoss_t/dh_(t-k) by k, singular values of the recurrent Jacobian, gates.

    \b
    lm inspect gradients RUN --untrained --out gradients.svg
    lm inspect gradients --preset rnn --preset gru --preset lstm
    lm inspect gradients --preset gru-char --set model.num_layers=2 --text FILE
    """
    from lm.inspection.drawing.files import check_output, write_view

    if out is not None:
        check_output(out)
    if set_ and not presets:
        raise ConfigError("--set is for the models of --preset: a run has its own options.")
    if untrained and presets and not runs:
        raise ConfigError("--untrained is for runs: the models of --preset are untrained.")
    from cli import inspect_tables as tables
    from cli.output import console, print_json, say
    from lm.config import parse_assignments
    from lm.inspection.gradients import gradients as measure
    from lm.inspection.subject import fresh, subject
    from lm.inspection.subject import untrained as without_training
    from lm.runs.run import load

    names: list[str | None] = [*dict.fromkeys(runs or [])] or ([] if presets else [None])
    loaded = [load(name, runs_dir=runs_dir) for name in names]
    content = None
    if text is not None or loaded:
        _, content = _content(loaded[0] if loaded else None, text, text_column, encoding, data_dir, GRADIENT_TOKENS)
    subjects = []
    for given, run in zip(names, loaded, strict=True):
        subjects += [without_training(run, content)] if untrained else []
        # As it was given, so that checkpoints of one run differ: RUN@step-500.
        subjects.append(subject(run, content)._replace(name=given or run.name))
    for preset in presets or []:
        based_on, overrides = _preset(preset)
        made = fresh(based_on, content, overrides=overrides | parse_assignments(set_ or []))
        subjects.append(made._replace(name=", ".join([preset, *(set_ or []), "untrained"])))
    view = measure(subjects, steps=steps)
    if out is not None:
        from lm.inspection.drawing import gradients as drawing

        write_view(out, "Gradients through time", lambda: drawing.figure(view))
        say(f"Wrote {out}.")
    if as_json:
        print_json(view.to_json())
    else:
        tables.print_gradients(console(), view)


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
def attention(
    run: RunName = None,
    text: TextFile = None,
    layer: Annotated[int | None, typer.Option(help="Only this layer, counted from 0.", show_default=False)] = None,
    head: Annotated[int | None, typer.Option(help="Only this head, counted from 0.", show_default=False)] = None,
    span: Annotated[
        str | None,
        typer.Option(
            metavar="FIRST:END", help="Tokens of the maps, e.g. 0:40. Default: the first.", show_default=False
        ),
    ] = None,
    out: Output = None,
    text_column: TextColumn = None,
    encoding: TextEncoding = None,
    runs_dir: RunsDir = DEFAULT_RUNS,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Show where each head of a Transformer looks, and what scaling by sqrt(D) does.

    Entropy, mean distance and weight on the first token are means over the text.

    \b
    lm inspect attention RUN
    lm inspect attention RUN --text FILE --layer 2 --out attention.png
    lm inspect attention RUN --layer 2 --head 1 --span 100:140 --out head.svg
    """
    from lm.inspection.drawing.files import check_output, write_view

    if out is not None:
        check_output(out)
    from cli import inspect_tables as tables
    from cli.output import console, print_json, say
    from lm.inspection.attention import attention as measure
    from lm.runs.run import load

    tokens = None if span is None else _span(span)
    loaded = load(run, runs_dir=runs_dir)
    loaded.model.require_part("attention")
    name, content = _content(loaded, text, text_column, encoding, data_dir, ATTENTION_TOKENS)
    view = measure(loaded, content, layer=layer, head=head, span=tokens, name=name)
    if out is not None:
        from lm.inspection.drawing import attention as drawing

        write_view(out, f"Attention of {view.run}", lambda: drawing.figure(view))
        say(f"Wrote {out}.")
    if as_json:
        print_json(view.to_json())
    else:
        tables.print_attention(console(), view)


def _span(span: str) -> tuple[int, int]:
    first, colon, end = span.partition(":")
    if not (colon and first.isdecimal() and end.isdecimal()):
        raise ConfigError(f"--span {span!r}: give FIRST:END, counted from 0, such as 0:40.")
    return int(first), int(end)


# -- why --------------------------------------------------------------------------------------------------


@command.command()
def why(
    run: RunName = None,
    text: TextFile = None,
    out: Output = None,
    text_column: TextColumn = None,
    encoding: TextEncoding = None,
    runs_dir: RunsDir = DEFAULT_RUNS,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Divide the log-probability of each token among tables, counts, network and layers.

    \b
    lm inspect why RUN --text FILE
    lm inspect why RUN --out why.html
    """
    from lm.inspection.drawing.files import check_output, write_view

    if out is not None:
        check_output(out, has_page=True)
    from cli import inspect_tables as tables
    from cli.output import console, print_json, say
    from lm.inspection.why import why as measure
    from lm.runs.run import load

    loaded = load(run, runs_dir=runs_dir)
    loaded.model.require_part("terms")
    name, content = _content(loaded, text, text_column, encoding, data_dir, WHY_TOKENS)
    view = measure(loaded, content, name=name)
    if out is not None:
        from lm.inspection.drawing import why as drawing

        write_view(out, f"Why {view.run} predicts", lambda: drawing.figure(view), lambda: drawing.page(view))
        say(f"Wrote {out}.")
    if as_json:
        print_json(view.to_json())
    else:
        tables.print_why(console(), view)


# -- neurons ----------------------------------------------------------------------------------------------


@command.command()
def neurons(
    run: RunName = None,
    text: TextFile = None,
    unit: Annotated[
        str | None,
        typer.Option(
            metavar="LAYER.UNIT", help="Color the text by this unit, counted from 0: 0.17.", show_default=False
        ),
    ] = None,
    out: Output = None,
    text_column: TextColumn = None,
    encoding: TextEncoding = None,
    runs_dir: RunsDir = DEFAULT_RUNS,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Find the units that track the line, quotes, brackets, words, case, names.

    Direction and border are fitted on the first half of the text, and scored on the second.

    \b
    lm inspect neurons RUN
    lm inspect neurons RUN --text FILE --unit 0.17
    lm inspect neurons RUN --unit 0.17 --out unit.html
    """
    from lm.inspection.drawing.files import check_output, write_view

    if out is not None:
        check_output(out, has_page=True)
    from cli import inspect_tables as tables
    from cli.output import console, print_json, say
    from lm.inspection.neurons import neurons as search
    from lm.runs.run import load

    loaded = load(run, runs_dir=runs_dir)
    loaded.model.require_part("hidden")
    name, content = _content(loaded, text, text_column, encoding, data_dir, NEURON_TOKENS)
    view = search(loaded, content, unit=unit, name=name)
    if out is not None:
        from lm.inspection.drawing import neurons as drawing

        write_view(out, f"Neurons of {view.run}", lambda: drawing.figure(view), lambda: drawing.page(view))
        say(f"Wrote {out}.")
    if as_json:
        print_json(view.to_json())
        return
    tables.print_neurons(console(), view)
    if not view.chosen and view.shown:
        say(f"Next: lm inspect neurons {named(view.run, runs_dir)} --unit {view.shown[0].name}")


# -- shapes -----------------------------------------------------------------------------------------------


@command.command()
def shapes(
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
    text: Annotated[
        str | None,
        typer.Option(
            "--text",
            metavar="FILE",
            help="Text that the preset's tokenizer learns from. Default: the built-in one.",
            show_default=False,
        ),
    ] = None,
    out: Output = None,
    text_column: TextColumn = None,
    encoding: TextEncoding = None,
    runs_dir: RunsDir = DEFAULT_RUNS,
    as_json: Json = False,
) -> None:
    """List every tensor: shape in symbols and numbers, parameters, FLOPs, bytes.

    \b
    lm inspect shapes RUN
    lm inspect shapes RUN --batch 1 --length 10
    lm inspect shapes --preset transformer-char --set model.num_layers=2
    """
    from lm.inspection.drawing.files import check_output, write_view

    if out is not None:
        check_output(out, has_page=True)
    if preset is not None and run is not None:
        raise ConfigError("Give a run or --preset, not both.")
    for flag, value in (("--set", set_), ("--text", text)):
        if value and preset is None:
            raise ConfigError(f"{flag} is for the model of --preset: a run has its own options and tokenizer.")
    from cli import inspect_tables as tables
    from cli.output import console, print_json, say
    from lm.inspection.shapes import shapes as measure
    from lm.runs.run import load

    if preset is None:
        loaded = load(run, runs_dir=runs_dir)
        name, model, training = loaded.name, loaded.model, loaded.config.training
    else:
        from lm.config import compose, parse_assignments
        from lm.corpora.named import BUILTIN
        from lm.inspection.subject import fresh

        based_on, overrides = _preset(preset)
        overrides |= parse_assignments(set_ or [])
        content = None if text is None else _content(None, text, text_column, encoding, None, 0)[1]
        name, model = ", ".join([preset, *(set_ or [])]), fresh(based_on, content, overrides=overrides).model
        training = compose(BUILTIN, preset=based_on, overrides=overrides).training
    longest = model.context_length
    trained = training.bptt or longest or DEFAULT_LENGTH
    view = measure(
        model,
        batch=training.batch_size if batch is None else batch,
        length=min(trained, longest or trained) if length is None else length,
    )
    if out is not None:
        from lm.inspection.drawing import shapes as drawing

        write_view(out, f"Shapes of {name}", lambda: drawing.figure(view), lambda: drawing.page(view))
        say(f"Wrote {out}.")
    if as_json:
        print_json(view.to_json())
    else:
        tables.print_shapes(console(), name, view)


# -- shared -----------------------------------------------------------------------------------------------


def _content(
    run: Run | None, file: str | None, column: str | None, encoding: str | None, data_dir: Path | None, tokens: int
) -> tuple[str, str]:
    """The name and the text that a view reads: of --text, else the first tokens of the validation text."""
    from cli.output import reading
    from lm.corpora import open_text

    for flag, value in (("--text-column", column), ("--encoding", encoding)):
        if value is not None and file is None:
            raise ConfigError(f"{flag} is for --text: leave it out for the run's own text.")
    if file is not None:
        if run is not None:
            column, encoding = column or run.config.corpus.text_column, encoding or run.config.corpus.encoding
        opened = open_text(file, text_column=column or "text", encoding=encoding)
        return ("stdin" if file == "-" else Path(file).name), "".join(opened.chunks())
    assert run is not None, "without a run, a text is given"
    try:
        with reading() as progress:
            split = run.own_text(split="valid", data_dir=data_dir, progress=progress).splits["valid"]
    except CorpusError as error:
        raise type(error)(f"{str(error).rstrip('.')}. Or give another text: --text FILE") from None
    return f"the validation text ({run.record['corpus']['name']})", run.tokenizer.decode(split.ids[1 : tokens + 1])
