"""lm inspect."""

from __future__ import annotations

import os
import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence
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
    from rich.console import Console

    from lm.inspection.attention import Attention
    from lm.inspection.gradients import Gradients, ModelGradients
    from lm.inspection.neurons import Neurons, UnitValues
    from lm.inspection.shapes import Shapes, StageShapes
    from lm.inspection.why import Why
    from lm.runs.run import Run

POSITION = 13

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
SHAPE_WIDTHS = 1, 33, 12, 17, 9
"""Columns of the table of tensors: kind, name, symbols, sizes, bytes."""
LAGS = 8
"""Lags that the terminal lists."""
LISTED_TOKENS = 20
"""Tokens that the terminal lists."""
LISTED_UNITS = 3
"""Units of a feature that the terminal lists."""
COLORED_TOKENS = 1_000
"""Tokens that the terminal colours."""
LINE = 78
"""Columns of the coloured text."""
BARS = "▁▂▃▄▅▆▇█"
"""Values from low to high, where there is no colour."""

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
        _print_gradients(console(), view)


def _preset(name: str) -> tuple[str, dict[str, Any]]:
    """A preset, and the options over it: for a type of model, those of its preset for characters."""
    from lm.config import preset_names
    from lm.registry import MODELS

    if name in preset_names() or name not in MODELS.names():
        return name, {}
    own = f"{name}-char"
    return (own, {}) if own in preset_names() else ("gru-char", {"model.type": name})


def _print_gradients(screen: Console, view: Gradients) -> None:
    import numpy as np

    from cli.output import wide_table
    from lm.inspection.gradients import QUANTILES

    screen.print(f"[bold]Gradients through time[/bold] over {_texts_of(view.models)}\n", soft_wrap=True)
    lags = [0, *(2**power for power in range(view.steps.bit_length()) if 2**power < view.steps), view.steps]
    if len(lags) > LAGS:
        lags = [0, *lags[-LAGS + 1 :]]
    table = wide_table("norm, k steps back", *(f"k={lag}" for lag in lags))
    for model in view.models:
        table.add_row(model.name, *(_short(model.main.median[lag]) for lag in lags))
    screen.print(table)
    screen.print()
    table = wide_table("", "layer", "factor\na step", "singular\nvalue", "tanh\nsaturated")
    alone = False
    for model in view.models:
        singular = {jacobian.layer: float(np.median(jacobian.largest[:, 0])) for jacobian in model.jacobians}
        saturated = {part.layer: part.share for part in model.saturated}
        for norms in model.norms:
            if norms.part != model.main.part:
                continue
            layer = norms.layer
            alone = alone or not norms.median[1:].any()
            table.add_row(
                model.name, str(layer), f"{norms.factor_per_step:.3f}",
                f"{singular[layer]:.2f}" if layer in singular else "",
                f"{saturated[layer]:.1%}" if layer in saturated else "",
            )  # fmt: skip
    screen.print(table)
    if any(model.gates for model in view.models):
        screen.print()
        low, *_, high = (f"{quantile:.0%}" for quantile in QUANTILES)
        table = wide_table("open gates", "layer", "gate", "mean", low, high, left=["gate"])
        for model in view.models:
            for gate in model.gates:
                ends = (f"{gate.quantiles[end]:.2f}" for end in (0, -1))
                table.add_row(model.name, str(gate.layer), gate.gate, f"{gate.mean:.2f}", *ends)
        screen.print(table)
    _print_paragraph(
        screen,
        "Norm: of the gradient of the loss at one position with respect to the hidden state k steps before, the median "
        "over positions. A norm that falls by the same factor at each step vanishes: the model cannot learn what needs "
        "a longer memory. Singular value: the largest of the Jacobian of a state by the state one step before, the "
        "median. Gates are 0 if closed and 1 if open: 5% of their values are below the first number, and 5% above the "
        "second."
        + (" A factor of 0: the outputs of this layer change only the loss of their own position." if alone else ""),
    )


def _texts_of(models: Sequence[ModelGradients]) -> str:
    """What the models read: "20,000 tokens, 256 positions" if it is the same for all."""
    facts = dict.fromkeys(f"{model.tokens:,} tokens, {model.positions:,} positions" for model in models)
    return "; ".join(facts)


def _short(number: float) -> str:
    """3e-4, or 0."""
    mantissa, _, exponent = f"{number:.0e}".partition("e")
    return f"{mantissa}e{int(exponent)}" if number else "0"


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
        _print_attention(console(), view)


def _span(span: str) -> tuple[int, int]:
    first, colon, end = span.partition(":")
    if not (colon and first.isdecimal() and end.isdecimal()):
        raise ConfigError(f"--span {span!r}: give FIRST:END, counted from 0, such as 0:40.")
    return int(first), int(end)


def _print_attention(screen: Console, view: Attention) -> None:

    from cli.output import wide_table

    tokens = f"{view.tokens:,} tokens of {view.text}, read {view.window:,} at a time"
    _print_title(screen, view.run, "where its heads look", tokens)
    names = "head", "distance", "first\ntoken", "entropy", "gradient", "entropy,\nunscaled", "gradient,\nunscaled"
    table = wide_table("layer", *names)
    for row in view.heads:
        table.add_row(
            str(row.layer), str(row.head), f"{row.distance:.1f}", f"{row.first:.1%}", f"{row.entropy:.2f}",
            f"{row.gradient:.3f}", f"{row.unscaled_entropy:.2f}", f"{row.unscaled_gradient:.3f}",
        )  # fmt: skip
    screen.print(table)
    _print_paragraph(
        screen,
        f"Distance: tokens that a head looks back; looking at all equally gives {view.even_distance:.1f}. Entropy in "
        f"nats: 0 is one token, {view.even_entropy:.2f} all equally. Gradient: norm of the softmax's Jacobian. The "
        f"last two columns are the same scores without the division by sqrt({view.head_size}): a saturated softmax "
        "passes no gradient.",
    )
    for note in view.notes:
        _print_paragraph(screen, f"Note: {note}.")


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
        _print_why(console(), view)


def _print_why(screen: Console, view: Why) -> None:
    import math

    from rich.markup import escape

    from cli.output import wide_table

    count = len(view.pieces)
    facts = f"{count:,} tokens of {view.text}, loss {view.loss:.4f} nats per token"
    _print_title(screen, view.run, "where its predictions come from", facts)
    table = wide_table("source", "nats per token")
    table.add_row("no source: log(1/V)", f"{view.baseline.mean():+.3f}")
    for source, mean in view.totals.items():
        table.add_row(escape(source), f"{mean:+.3f}")
    table.add_row("sum: log-probability", f"{-view.loss:+.3f}", style="bold")
    screen.print(table)
    if view.layers.shape[1]:
        screen.print()
        table = wide_table("layer", "log-probability", "gain")
        for layer, (log, gain) in enumerate(
            zip(view.layers.mean(axis=0).tolist(), view.layer_gains.mean(axis=0).tolist(), strict=True)
        ):
            table.add_row(str(layer), f"{log:+.3f}", f"{gain:+.3f}")
        screen.print(table)
    if view.parts:
        screen.print()
        table = wide_table("part of the mixture", "weight", "share")
        for part, weight, share in zip(view.parts, view.weights.mean(axis=0), view.shares.mean(axis=0), strict=True):
            table.add_row(escape(part), f"{weight:.1%}", f"{share:.1%}")
        screen.print(table)
    screen.print()
    table = wide_table("token", "probability", "log", "most from", left=["most from"])
    for number in range(min(count, LISTED_TOKENS)):
        log = float(view.log_probabilities[number])
        terms = sorted(zip(view.sources, view.terms[number].tolist(), strict=True), key=lambda term: -abs(term[1]))
        most = "  ".join(f"{source} {nats:+.2f}" for source, nats in terms[:3])
        table.add_row(escape(view.pieces[number]), f"{math.exp(log):.2%}", f"{log:.2f}", escape(most))
    screen.print(table)
    if count > LISTED_TOKENS:
        screen.print(f"[dim]… of {count:,} tokens; all: --json or --out FILE.html[/dim]")
    _print_paragraph(
        screen,
        "A positive number made the token more likely. The sources and log(1/V), which every token has, add up exactly "
        "to its log-probability.",
    )
    for note in view.notes:
        _print_paragraph(screen, f"Note: {note}.")


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
    _print_neurons(console(), view)
    if not view.chosen and view.shown:
        say(f"Next: lm inspect neurons {named(view.run, runs_dir)} --unit {view.shown[0].name}")


def _print_neurons(screen: Console, view: Neurons) -> None:

    from cli.output import wide_table
    from lm.inspection.drawing.neurons import measure_symbol, scores_of, share_text
    from lm.inspection.neurons import LEAST_AUC, LEAST_CORRELATION, PERCENTILE, SHIFTS

    what = f"what unit {view.shown[0].name} tracks" if view.chosen else "what single units track"
    _print_title(screen, view.run, what, f"{view.tokens:,} tokens of {view.text}")
    table = wide_table("feature", "share", "unit", "score", "chance", "accuracy", "sign", "", left=["sign", ""])
    for ranking in view.rankings:
        first = ranking.feature, share_text(ranking)
        for score in scores_of(view, ranking)[:LISTED_UNITS]:
            table.add_row(
                *first, f"{score.layer}.{score.unit}", f"{measure_symbol(ranking)} {score.score:.2f}",
                f"{ranking.baseline:.2f}", "" if score.accuracy is None else f"{score.accuracy:.0%}",
                "+" if score.direction > 0 else "−", "named" if score.named else "",
                style="bold" if score.named else None,
            )  # fmt: skip
            first = "", ""
    screen.print(table)
    for ranking in view.rankings:
        if ranking.skipped:
            screen.print(f"{ranking.feature}: not searched, {ranking.skipped}", style="dim")
    _print_paragraph(
        screen,
        f"Score: how well the unit alone tells the feature on the second half of the text (AUC: 0.5 is chance; r: 0). "
        f"Chance: the {PERCENTILE:.0f}th percentile of the best unit's score over {SHIFTS} circular shifts of the "
        f"feature. A unit is named if its score is above chance, and AUC is at least {LEAST_AUC} or r at least "
        f"{LEAST_CORRELATION}. Sign: + rises with the feature, − falls. "
        "Features overlap: names begin lines.",
    )
    for note in view.notes:
        _print_paragraph(screen, f"Note: {note}.")
    if view.chosen:
        print_colored(screen, view, view.shown[0])


def print_colored(screen: Console, view: Neurons, unit: UnitValues) -> None:
    """The text coloured by the unit's values; without colour, a line of bars under each line."""
    from rich.text import Text

    from cli.output import no_color
    from lm.inspection.drawing.neurons import color

    def style(level: float) -> str:
        red, green, blue = color(level)
        return f"black on rgb({red},{green},{blue})"

    colored = screen.is_terminal and not no_color()
    key = Text("\nlow ")
    steps = [index / 4 - 1 for index in range(9)]
    key.append_text(Text.assemble(*((" ", style(step)) for step in steps)) if colored else Text(BARS))
    key.append(" high; the middle is the median")
    screen.print(key)
    screen.print()
    levels = unit.levels()[:COLORED_TOKENS].tolist()
    for line in _lines(view.pieces[:COLORED_TOKENS], levels):
        if colored:
            screen.print(Text.assemble(*((part, style(level)) for part, level in line)), no_wrap=True, soft_wrap=True)
        else:
            screen.print(Text("".join(part for part, _ in line)), soft_wrap=True)
            screen.print(Text("".join(_bar(part, level) for part, level in line)), soft_wrap=True)
    if view.tokens > COLORED_TOKENS:
        screen.print(f"\n[dim]… of {view.tokens:,} tokens; all: --out FILE.html[/dim]")


def _lines(pieces: Sequence[str], levels: Sequence[float]) -> Iterator[list[tuple[str, float]]]:
    """Lines of at most `LINE` columns, as parts of one level; a newline is shown as ↵."""
    from rich.cells import cell_len

    from cli.terminal import visible

    line: list[tuple[str, float]] = []
    width = 0
    for piece, level in zip(pieces, levels, strict=True):
        for character in piece:
            part = "↵" if character == "\n" else visible(character.replace("\t", " "))
            if width + cell_len(part) > LINE:
                yield line
                line, width = [], 0
            line.append((part, level))
            width += cell_len(part)
            if character == "\n":
                yield line
                line, width = [], 0
    if line:
        yield line


def _bar(part: str, level: float) -> str:
    from rich.cells import cell_len

    return BARS[min(int((level + 1) / 2 * len(BARS)), len(BARS) - 1)] * cell_len(part)


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
        _print_shapes(console(), name, view)


def _print_shapes(screen: Console, name: str, view: Shapes) -> None:
    from rich.filesize import decimal

    from cli.output import facts_table

    _print_title(screen, name, "shapes of a training step", f"batch {view.batch}, length {view.length}")
    screen.print(facts_table([(letter, f"{each.value:,}", each.meaning) for letter, each in view.legend.items()]))
    for stages in _alike(view.stages):
        _print_stages(screen, stages)
    screen.print()
    rows = view.batch * view.length
    totals = [
        ("parameters", f"{view.parameters:,}", decimal(view.parameter_bytes)),
        ("activations", "", decimal(view.activation_bytes)),
        ("state", "", decimal(view.state_bytes)),
        ("forward", _flops(view.forward_flops), f"{_flops(view.forward_flops // rows)} a token"),
        ("backward", _flops(view.backward_flops), ""),
    ]
    screen.print(facts_table(totals))
    _print_paragraph(
        screen,
        "P: parameters, A: activations, S: state that the next chunk gets. FLOPs are those of the matrix products; a "
        "multiplication and an addition are two. Activations are those of the formulas: lm profile measures what a "
        "step keeps.",
    )


def _print_stages(screen: Console, stages: Sequence[StageShapes]) -> None:
    """The tensors of stages that are alike."""
    from rich.filesize import decimal
    from rich.table import Table
    from rich.text import Text

    from lm.inspection.drawing.shapes import written

    stage = stages[0]
    rows = []
    for kind, members in (("P", "parameters"), ("A", "activations"), ("S", "state")):
        for number, tensor in enumerate(getattr(stage, members)):
            name = _span_of([getattr(each, members)[number].name for each in stages])
            rows.append((kind, name, written(tensor.symbols), written(tensor.sizes), decimal(tensor.bytes)))
    # The module's name is left out where it is too long.
    names = [name for kind, name, *_ in rows if kind == "P"]
    prefix = ""
    if any(len(name) > SHAPE_WIDTHS[1] for name in names):
        prefix = os.path.commonprefix(names).rpartition(".")[0]
        prefix += "." if prefix else ""
    table = Table.grid(padding=(0, 2, 0, 0))
    for width, justify in zip(SHAPE_WIDTHS, ("left", "left", "left", "left", "right"), strict=True):
        table.add_column(width=width, overflow="fold", justify=justify)  # type: ignore[arg-type]
    for kind, name, *others in rows:
        table.add_row(kind, *map(Text, (name.removeprefix(prefix) if kind == "P" else name, *others)))
    count = sum(tensor.count for tensor in stage.parameters)
    facts = [f"{count:,} parameters"] if count else []
    facts += [f"{_flops(stage.forward_flops)} forward"] if stage.forward_flops else []
    facts += [f"{len(stages)} times"] if len(stages) > 1 else []
    facts += [f"parameters: {prefix}…"] if prefix else []
    screen.print()
    screen.print(Text.assemble((_span_of([each.name for each in stages]), "bold"), f"   {stage.formula}"))
    screen.print(table)
    if facts:
        screen.print(Text("   " + ", ".join(facts), style="dim"))


def _alike(stages: Iterable[StageShapes]) -> list[list[StageShapes]]:
    """Stages that differ only in their number, as one."""
    groups: dict[Any, list[StageShapes]] = {}
    for stage in stages:
        tensors = (*stage.parameters, *stage.activations, *stage.state)
        sizes = tuple((re.sub(r"\d+", "*", each.name), each.sizes) for each in tensors)
        groups.setdefault((re.sub(r"\d+", "*", stage.name), stage.formula, sizes), []).append(stage)
    return list(groups.values())


def _span_of(names: Sequence[str]) -> str:
    """layers.0–3.mlp for layers.0.mlp to layers.3.mlp."""
    first, last = (re.split(r"(\d+)", name) for name in (names[0], names[-1]))
    return "".join(one if one == other else f"{one}–{other}" for one, other in zip(first, last, strict=True))


def _flops(count: int) -> str:
    """1.61 GFLOP."""
    for power, unit in ((12, "TFLOP"), (9, "GFLOP"), (6, "MFLOP"), (3, "kFLOP")):
        if count >= 10**power:
            return f"{count / 10**power:,.2f} {unit}"
    return f"{count} FLOP"


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
        raise type(error)(f"{error} Or give another text: --text FILE") from None
    return f"the validation text ({run.record['corpus']['name']})", run.tokenizer.decode(split.ids[1 : tokens + 1])


def _print_title(screen: Console, run: str, what: str, facts: str) -> None:
    from rich.markup import escape

    screen.print(f"[bold]{escape(run)}[/bold]: {what}", soft_wrap=True)
    screen.print(f"{escape(facts)}\n", soft_wrap=True)


def _print_paragraph(screen: Console, sentences: str) -> None:
    from cli.output import NARROW

    screen.print()
    for line in textwrap.wrap(sentences, NARROW):
        screen.print(line, markup=False, style="dim")
