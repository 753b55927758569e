"""Views of `lm inspect` in the terminal: tables of at most 80 columns, and what their figures mean."""

from __future__ import annotations

import math
import os
import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.cells import cell_len
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from cli.output import NARROW, facts_table, no_color, wide_table
from cli.terminal import visible

if TYPE_CHECKING:
    from rich.console import Console

    from lm.inspection.attention import Attention
    from lm.inspection.gradients import Gradients, ModelGradients
    from lm.inspection.neurons import Neurons, UnitValues
    from lm.inspection.shapes import Shapes, StageShapes
    from lm.inspection.why import Why

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

# -- gradients ----------------------------------------------------------------------------------------


def print_gradients(screen: Console, view: Gradients) -> None:
    """Norms by lag of each model, then factor, singular value, saturation and gates of each layer."""
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
    table = wide_table("", "part", "layer", "factor\na step", "singular\nvalue", "tanh\nsaturated", left=["part"])
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
                model.name, norms.part, str(layer), f"{norms.factor_per_step:.3f}",
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
        "Norm: of the gradient of the loss at one position with respect to the state k steps before (the part below), "
        "the median over positions. A norm that falls by the same factor at each step vanishes: the model cannot learn "
        "what needs a longer memory. Singular value: the largest of the Jacobian of a state by the state one step "
        "before, the median. Gates are 0 if closed and 1 if open: 5% of their values are below the first number, and "
        "5% above the second."
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


# -- attention ----------------------------------------------------------------------------------------


def print_attention(screen: Console, view: Attention) -> None:
    """Statistics of each head, with the scaling and without."""
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
        f"Distance: tokens from a query back to its keys; equal weights give {view.even_distance:.1f}. Entropy in "
        f"nats: 0 is one token, {view.even_entropy:.2f} equal weights. Gradient: norm of the softmax's Jacobian. The "
        f"last two columns are the same scores without the division by sqrt({view.head_size}): a saturated softmax "
        "passes no gradient.",
    )
    for note in view.notes:
        _print_paragraph(screen, f"Note: {note}.")


# -- why ----------------------------------------------------------------------------------------------


def print_why(screen: Console, view: Why) -> None:
    """Mean nats of sources, layers and parts of a mixture; then the first tokens one by one."""
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


# -- neurons ------------------------------------------------------------------------------------------


def print_neurons(screen: Console, view: Neurons) -> None:
    """The best units of each feature; of a chosen unit all scores, and the coloured text."""
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
    return BARS[min(int((level + 1) / 2 * len(BARS)), len(BARS) - 1)] * cell_len(part)


# -- shapes -------------------------------------------------------------------------------------------


def print_shapes(screen: Console, name: str, view: Shapes) -> None:
    """Letters, the tensors of each stage, and the totals."""
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


# -- shared -------------------------------------------------------------------------------------------


def _print_title(screen: Console, run: str, what: str, facts: str) -> None:
    screen.print(f"[bold]{escape(run)}[/bold]: {what}", soft_wrap=True)
    screen.print(f"{escape(facts)}\n", soft_wrap=True)


def _print_paragraph(screen: Console, sentences: str) -> None:
    screen.print()
    for line in textwrap.wrap(sentences, NARROW):
        screen.print(line, markup=False, style="dim")
