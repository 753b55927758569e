"""lm inspect."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.options import (
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

if TYPE_CHECKING:
    from rich.console import Console

    from lm.inspection.neurons import Neurons, UnitValues
    from lm.runs.run import Run

POSITION = 13

OUTPUT_HELP = "Also write the view to this file: .png, .svg or .html."
TEXT_HELP = "Text to read; - is stdin. Default: the run's validation text."
Output = Annotated[Path | None, path_option("-o", "--out", metavar="FILE", help=OUTPUT_HELP)]
TextFile = Annotated[str | None, typer.Option("--text", metavar="FILE", help=TEXT_HELP, show_default=False)]

NEURON_TOKENS = 10_000
"""Tokens of the validation text that the search reads."""
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
    from lm.inspection.drawing import neurons as drawing
    from lm.inspection.neurons import neurons as search
    from lm.runs.run import load

    loaded = load(run, runs_dir=runs_dir)
    loaded.model.require_part("hidden")
    name, content = _content(loaded, text, text_column, encoding, data_dir, NEURON_TOKENS)
    view = search(loaded, content, unit=unit, name=name)
    if out is not None:
        write_view(out, f"Neurons of {view.run}", lambda: drawing.figure(view), lambda: drawing.page(view))
        say(f"Wrote {out}.")
    if as_json:
        print_json(view.to_json())
        return
    _print_neurons(console(), view)
    if not view.chosen and view.shown:
        say(f"Next: lm inspect neurons {named(view.run, runs_dir)} --unit {view.shown[0].name}")


def _print_neurons(screen: Console, view: Neurons) -> None:
    from rich.markup import escape

    from cli.output import wide_table
    from lm.inspection.drawing.neurons import measure_symbol, scores_of, share_text
    from lm.inspection.neurons import LEAST_AUC, LEAST_CORRELATION, PERCENTILE, SHIFTS

    what = f"What unit {view.shown[0].name} tracks" if view.chosen else "What single units track"
    screen.print(f"[bold]{escape(view.run)}[/bold]: {what} in {view.tokens:,} tokens of {escape(view.text)}\n")
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


# -- shared -----------------------------------------------------------------------------------------------


def _content(
    run: Run, file: str | None, column: str | None, encoding: str | None, data_dir: Path | None, tokens: int
) -> tuple[str, str]:
    """The name and the text that a view reads: of --text, else the first tokens of the validation text."""
    from cli.output import reading
    from lm.corpora import open_text
    from lm.errors import ConfigError

    for flag, value in (("--text-column", column), ("--encoding", encoding)):
        if value is not None and file is None:
            raise ConfigError(f"{flag} is for --text: leave it out for the run's own text.")
    if file is not None:
        own = run.config.corpus
        opened = open_text(file, text_column=column or own.text_column, encoding=encoding or own.encoding)
        return ("stdin" if file == "-" else Path(file).name), "".join(opened.chunks())
    with reading() as progress:
        split = run.own_text(split="valid", data_dir=data_dir, progress=progress).splits["valid"]
    return f"the validation text ({run.record['corpus']['name']})", run.tokenizer.decode(split.ids[1 : tokens + 1])


def _print_paragraph(screen: Console, sentences: str) -> None:
    import textwrap

    from cli.output import NARROW

    screen.print()
    for line in textwrap.wrap(sentences, NARROW):
        screen.print(line, markup=False, style="dim")
