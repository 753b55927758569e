"""Neurons as an HTML page (the text, coloured by the values of a unit) or a picture (the scores of units)."""

from __future__ import annotations

import re
from html import escape
from typing import TYPE_CHECKING, Any

from lm.html_parts.page import whole_page
from lm.inspection.neurons import LEAST_AUC, LEAST_CORRELATION, RULE, Neurons, Ranking, UnitScore, UnitValues
from lm.version import __version__

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOW, MIDDLE, HIGH = (86, 180, 233), (250, 250, 248), (230, 159, 0)
"""Sky blue and orange of Okabe and Ito's palette, for colour-blind readers. Black text is readable on all of them."""
LEVELS = 10
"""Steps of colour on each side of the median."""
EXCERPT = 3_000
"""Tokens of the second half that a page shows of each unit that was not chosen."""
NAMED, OTHER = "#0072b2", "#9aa4ae"
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")

UNIT_STYLE = """
.unit { white-space: pre-wrap; overflow-wrap: anywhere; font: 14px/1.7 ui-monospace, monospace; color: #111;
  background: #fff; border: 1px solid var(--line); border-radius: 4px; padding: .8rem 1rem; }
.unit i { font-style: normal; color: #5d6670; }
.scale { display: inline-block; width: 12rem; height: .8rem; border-radius: 2px; margin: 0 .5rem;
  vertical-align: middle; border: 1px solid var(--line); }
td.named { font-weight: 600; }
"""


def color(level: float) -> tuple[int, int, int]:
    """Red, green and blue of a level: -1 is blue, 0 is almost white, 1 is orange."""
    end = HIGH if level > 0 else LOW
    red, green, blue = (
        round(middle + (other - middle) * min(1, abs(level))) for middle, other in zip(MIDDLE, end, strict=True)
    )
    return red, green, blue


def page(view: Neurons) -> str:
    """The whole HTML page, without external files."""
    levels = "".join(
        f".l{step + LEVELS} {{ background: rgb{color(step / LEVELS)}; }}\n" for step in range(-LEVELS, LEVELS + 1)
    )
    ramp = ", ".join(f"rgb{color(step / LEVELS)}" for step in range(-LEVELS, LEVELS + 1, LEVELS // 2))
    notes = "".join(f"<p>Note: {escape(note)}.</p>" for note in view.notes)
    texts = "".join(_unit(view, unit) for unit in view.shown)
    if not view.shown:
        texts = "<p>No unit is named. Choose one with --unit LAYER.UNIT to see its values.</p>"
    body = f"""<h1>What single units of {escape(view.run)} track</h1>
<p>{view.tokens:,} tokens of {escape(view.text)}; units of layers: {", ".join(map(str, view.layer_sizes))}.
Layers and units are counted from 0. Inkling {__version__}.</p>
<p>{escape(RULE)} The first {view.fitted:,} tokens set direction and border, the others give the scores.</p>{notes}
{_table(view)}
<p>Value of the unit after each token: low <span class="scale" style="background:linear-gradient(90deg, {ramp})"></span>
high. White is its median over the text. Point at a token to see the value.</p>
{texts}"""
    return whole_page(f"Neurons of {view.run}", body, UNIT_STYLE + levels)


def _table(view: Neurons) -> str:
    names = "Feature", "Share or mean", "Unit", "Score", "By chance", "Accuracy", "Rises or falls", "Named"
    rows = []
    for ranking in view.rankings:
        first = f"<td>{escape(ranking.feature)}: {escape(ranking.description)}</td><td>{share_text(ranking)}</td>"
        if ranking.skipped:
            rows.append(f'<tr>{first}<td class="text" colspan="6">not searched: {escape(ranking.skipped)}</td></tr>')
        for score in scores_of(view, ranking):
            rows.append(f"<tr>{first}{_cells(ranking, score)}</tr>")
            first = "<td></td><td></td>"
    head = "".join(f"<th>{name}</th>" for name in names)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _cells(ranking: Ranking, score: UnitScore) -> str:
    cells = (
        f"{score.layer}.{score.unit}", f"{measure_symbol(ranking)} {score.score:.3f}", f"{ranking.baseline:.3f}",
        "" if score.accuracy is None else f"{score.accuracy:.1%}", "rises" if score.direction > 0 else "falls",
        "yes" if score.named else "no",
    )  # fmt: skip
    kind = ' class="named"' if score.named else ""
    return "".join(f"<td{kind}>{cell}</td>" for cell in cells)


def _unit(view: Neurons, unit: UnitValues) -> str:
    begin = 0 if view.chosen else view.fitted
    end = view.tokens if view.chosen else min(view.tokens, begin + EXCERPT)
    steps = (unit.levels()[begin:end] * LEVELS).round().astype(int) + LEVELS
    spans = "".join(
        f'<span class="l{step}" title="{value:.3g}">{_shown(piece)}</span>'
        for piece, step, value in zip(
            view.pieces[begin:end], steps.tolist(), unit.values[begin:end].tolist(), strict=True
        )
        if piece
    )
    tracked = ", ".join(name for name, score in unit.scores.items() if score.named)
    what = f"tracks {escape(tracked)}" if tracked else "no strong evidence for a feature"
    part = "" if view.chosen else f"<p>Tokens {begin:,} to {end:,}, from the second half of the text.</p>"
    return f'<h2>Unit {unit.name}: {what}</h2>{part}<div class="unit">{spans}</div>'


def _shown(piece: str) -> str:
    return escape(_CONTROLS.sub("\N{MIDDLE DOT}", piece)).replace("\n", "<i>↵</i>\n")


# -- the scores, also for the command ---------------------------------------------------------------------


def scores_of(view: Neurons, ranking: Ranking) -> tuple[UnitScore, ...]:
    """The scores to list for a feature: of the chosen unit, else of the best units."""
    if not view.chosen:
        return ranking.units
    return tuple(unit.scores[ranking.feature] for unit in view.shown if ranking.feature in unit.scores)


def measure_symbol(ranking: Ranking) -> str:
    """AUC or r."""
    return "AUC" if ranking.measure == "AUC" else "r"


def share_text(ranking: Ranking) -> str:
    """The share of the tokens with the feature, or its mean."""
    return f"{ranking.share:.1%}" if ranking.measure == "AUC" else f"mean {ranking.share:.1f}"


# -- the picture ------------------------------------------------------------------------------------------


def figure(view: Neurons) -> Figure:
    """Bars of the scores, each with the score by chance; AUC and correlation in two plots."""
    from matplotlib.figure import Figure

    groups = [
        [(ranking, scores_of(view, ranking)) for ranking in view.rankings if ranking.measure == measure]
        for measure in ("AUC", "correlation")
    ]
    heights = [max(1, sum(len(scores) or 1 for _, scores in group)) + len(group) for group in groups]
    drawn = Figure(figsize=(9, 1.5 + 0.24 * sum(heights)), layout="constrained")
    what = f"unit {view.shown[0].name}" if view.chosen else "the best units"
    drawn.suptitle(f"{view.run}: features that {what} track{'s' if view.chosen else ''}", fontsize=12)
    axes = drawn.subplots(len(groups), 1, height_ratios=heights, squeeze=False)[:, 0]
    for panel, group in zip(axes, groups, strict=True):
        _bars(panel, group)
    return drawn


def _bars(axes: Any, group: list[tuple[Ranking, tuple[UnitScore, ...]]]) -> None:
    is_auc = group[0][0].measure == "AUC"
    chance, least = (0.5, LEAST_AUC) if is_auc else (0.0, LEAST_CORRELATION)
    ticks: list[tuple[float, str]] = []
    y = 0.0
    for ranking, scores in group:
        title = f"{ranking.feature} ({ranking.skipped or share_text(ranking)})"
        look = {"color": "#5d6670"} if ranking.skipped else {"fontweight": "bold"}
        axes.text(chance, y, f" {title}", va="center", fontsize=9, **look)
        top = y
        for score in scores:
            y += 1
            width = max(score.score - chance, 0)
            axes.barh(y, width, left=chance, height=0.75, color=NAMED if score.named else OTHER)
            axes.text(chance + width, y, f" {score.score:.2f}", va="center", fontsize=8)
            ticks.append((y, f"{score.layer}.{score.unit}"))
        if ranking.baseline is not None and scores:
            axes.plot([ranking.baseline] * 2, [top + 0.5, y + 0.5], color="#d55e00", linewidth=2)
        y += 1.3
    axes.axvline(least, color="#5d6670", linewidth=1, linestyle=":")
    axes.set_yticks([place for place, _ in ticks], [name for _, name in ticks], fontsize=8)
    axes.set(xlim=(chance, 1), ylim=(max(y, 1) - 0.5, -0.7), ylabel="layer.unit")
    axes.set_xlabel(
        f"{'AUC' if is_auc else 'correlation |r|'} on the second half of the text "
        "(blue: named; orange line: by chance; dotted: least to be named)",
        fontsize=9,
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
