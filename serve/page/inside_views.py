"""Views into a model, as HTML for the tab Inside: `lm.inspection` computes them, and this module draws them.

    computed = compute(run, "attention", text)      # slow: in a thread
    computed.choices                                # of the picker: (label, value)
    attention_html(computed.view, "0.1")

A view that the model does not have, or that needs a longer text, raises ViewError with one sentence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from lm.corpora.answers import part_of
from lm.corpora.named import BUILTIN
from lm.errors import LMError
from lm.html_parts import escape
from lm.html_parts.line_chart import COLOURS
from lm.html_parts.token_marks import Mark, marks_html, percent, scale_html
from lm.runs.training_text import cached_text
from serve.page.line_chart import ChartLine, chart
from serve.page.messages import without_commands

if TYPE_CHECKING:
    from lm.corpora import TokenSplit
    from lm.inspection.attention import Attention
    from lm.inspection.gradients import Gradients
    from lm.inspection.neurons import Neurons, UnitValues
    from lm.inspection.why import Why
    from lm.runs.run import Run

ViewName = Literal["gradients", "attention", "neurons", "why"]
VIEWS: tuple[ViewName, ...] = get_args(ViewName)


class _Needs(NamedTuple):
    part: str
    """Of `LanguageModel.inspectable`."""
    tokens: int
    """Most tokens of the text that are read."""
    missing: str
    """After the name of a model without the part."""


NEEDS: dict[ViewName, _Needs] = {
    "gradients": _Needs("hidden", 2_000, "has no hidden states, so there are no gradients through time"),
    "attention": _Needs("attention", 1_000, "has no attention"),
    "neurons": _Needs("hidden", 5_000, "has no hidden units"),
    "why": _Needs("terms", 400, "does not say where its predictions come from"),
}
LONGEST_TOKEN = 16
"""Mean characters of a token that the limit on a text allows."""
STEPS, POSITIONS = 48, 64
"""Of the gradients: the largest lag, and the positions in the text."""
SHOWN_TOKENS = 1_200
"""Tokens of a text that is coloured by a unit."""
LEAST_GAIN = 0.1
"""Nats: a token to which no source added at least this has no colour."""
STRENGTHS = 0.25, 0.7
"""Weakest and strongest colour of a source."""
SAMPLE_TOKENS = 1_200
"""Of a text that the model writes for its own inspection."""


class ViewError(Exception):
    """A view cannot be shown; the message is a sentence for the visitor."""


@dataclass(frozen=True)
class Computed:
    """A computed view."""

    name: ViewName
    run: str
    text: str
    """What was read: a sentence's part, such as "your text"."""
    view: Any
    choices: list[tuple[str, str]]
    """(label, value) of the picker: heads or units."""


# -- the text ------------------------------------------------------------------------------------------


def text_of(run: Run, name: ViewName, given: str) -> tuple[str, str | TokenSplit]:
    """The name and the text that a view reads: the start of `given`, of the validation text, or of a sample.

    Conversations are tokens: the turns as the model learned them, with the special tokens of its chat template.

    Only a text on this machine is read: a visitor cannot make the server load anything from another host.
    """
    limit = NEEDS[name].tokens
    if given:
        ids = run.tokenizer.encode(given[: limit * LONGEST_TOKEN], unknown="replace")
        if len(ids) <= limit and len(given) <= limit * LONGEST_TOKEN:
            return "your text", given
        cut = max(1, min(len(given), limit * LONGEST_TOKEN) * limit // max(limit, len(ids)))
        return f"the first {cut:,} characters of your text", given[:cut]
    try:
        source = run.config.corpus.source
        prepared = cached_text(run.record["corpus"], run.tokenizer)
        if prepared is None and (source == BUILTIN or Path(source).is_file()):
            prepared = run.own_text(split="valid")
        if prepared is not None and prepared.splits["valid"].marks is not None:
            return "its validation conversations", part_of(prepared.splits["valid"], limit)
        if prepared is not None:
            ids = prepared.splits["valid"].ids[1 : limit + 1]
            return "its validation text", run.tokenizer.decode(ids)
    except (LMError, KeyError):
        pass
    return "a text that it wrote", run.sample(max_tokens=min(limit, SAMPLE_TOKENS), seed=1)


# -- computing -----------------------------------------------------------------------------------------


def compute(run: Run, name: ViewName, given: str, unit: str | None = None) -> Computed:
    """Compute a view of a run; slow.

    Args:
        run: its model is loaded.
        name: of the view.
        given: the visitor's text; empty: another one.
        unit: LAYER.UNIT, for neurons.

    Raises:
        ViewError: the model has no such view, or the text does not fit it.
    """
    try:
        if NEEDS[name].part not in run.model.inspectable():
            raise ViewError(f"{run.name} {NEEDS[name].missing}.")
        where, text = text_of(run, name, given)
        view, choices = _COMPUTE[name](run, text, unit)
    except LMError as error:
        raise ViewError(without_commands(str(error))) from None
    return Computed(name, run.name, where, view, choices)


def _gradients(run: Run, text: str | TokenSplit, unit: str | None) -> tuple[Gradients, list[tuple[str, str]]]:
    from lm.inspection.gradients import gradients
    from lm.inspection.subject import subject

    seen = subject(run, text)
    context = run.model.context_length
    steps = max(1, min(STEPS, len(seen.ids) - 2, STEPS if context is None else context - 1))
    return gradients([seen], steps=steps, positions=POSITIONS), []


def _attention(run: Run, text: str | TokenSplit, unit: str | None) -> tuple[Attention, list[tuple[str, str]]]:
    from lm.inspection.attention import attention

    view = attention(run, text)
    return view, [
        (f"layer {head.layer}, head {head.head}: {head.distance:.1f} tokens back", f"{head.layer}.{head.head}")
        for head in view.heads
    ]


def _neurons(run: Run, text: str | TokenSplit, unit: str | None) -> tuple[Neurons, list[tuple[str, str]]]:
    from lm.inspection.neurons import neurons

    view = neurons(run, text, unit=unit)
    return view, [(f"{each.name}: {_tracked(each)}", each.name) for each in view.shown]


def _why(run: Run, text: str | TokenSplit, unit: str | None) -> tuple[Why, list[tuple[str, str]]]:
    from lm.inspection.why import why

    return why(run, text), []


_COMPUTE: dict[ViewName, Callable[[Run, str | TokenSplit, str | None], tuple[Any, list[tuple[str, str]]]]] = {
    "gradients": _gradients, "attention": _attention, "neurons": _neurons, "why": _why,
}  # fmt: skip


# -- gradients -----------------------------------------------------------------------------------------


def gradients_chart(view: Gradients) -> dict[str, Any] | None:
    """The norm of the gradient by lag, one line a layer: the value of a `LineChart`."""
    lines: list[ChartLine] = []
    for norms in view.models[0].norms:
        medians = norms.median.tolist()
        lags = [lag for lag, norm in enumerate(medians) if norm > 0]
        name = "embeddings" if norms.part == "inputs" else f"{norms.part}, layer {norms.layer}"
        if len(lags) > 1:
            heights = [math.log10(medians[lag]) for lag in lags]
            lines.append(ChartLine(name, lags, heights, COLOURS[len(lines) % len(COLOURS)]))
    return chart(lines, x_title="tokens back", y_title="log10 of the gradient's norm (median)", file="gradients")


def gates_html(view: Gradients) -> str:
    """How open the gates are; "" if there are none."""
    gates = "".join(
        f"<tr><th scope='row'>layer {gate.layer}, {escape(gate.gate)}</th><td>{gate.mean:.2f}</td></tr>"
        for gate in view.models[0].gates
    )
    table = (
        "<h3>Gates, from 0 (closed) to 1 (open)</h3><div class='scroll'><table><thead><tr><th scope='col'>gate</th>"
        f"<th scope='col'>mean</th></tr></thead><tbody>{gates}</tbody></table></div>"
    )
    return table if gates else ""


def gradients_sentence(view: Gradients) -> str:
    """How fast the gradient falls."""
    main = view.models[0].main
    return (
        f"How much an earlier state changes the loss now. From one token to the one before it, the gradient changes by "
        f"a factor of {main.factor_per_step:.2f} on average ({main.part}, layer {main.layer}): below 1, it vanishes "
        "with distance."
    )


# -- attention -----------------------------------------------------------------------------------------


def attention_html(view: Attention, choice: str) -> str:
    """The map of one head as SVG: each row is a token that looks, each column a token that is looked at."""
    index = next((number for number, head in enumerate(view.heads) if f"{head.layer}.{head.head}" == choice), 0)
    head = view.heads[index]
    row, column = divmod(index, view.maps.shape[1])
    weights = view.maps[row, column]
    size, edge = len(weights), 20
    names = [escape(piece.replace("▁", "␣")[:7]) for piece in view.pieces]
    left = 4 + 8 * max(len(piece.replace("▁", "␣")[:7]) for piece in view.pieces)
    cells, labels = [], []
    for query in range(size):
        middle = edge * query + edge / 2
        labels.append(f'<text x="{left - 4}" y="{left + middle + 4:.0f}" text-anchor="end">{names[query]}</text>')
        labels.append(
            f'<text transform="translate({left + middle + 4:.0f} {left - 4}) rotate(-90)">{names[query]}</text>'
        )
        for key in range(query + 1):
            weight = float(weights[query, key])
            cells.append(
                f'<rect x="{left + edge * key}" y="{left + edge * query}" width="{edge - 1}" height="{edge - 1}"'
                f' style="--weight:{math.sqrt(max(weight, 0)):.2f}"><title>{names[query]} looks at {names[key]}: '
                f"{percent(weight)}</title></rect>"
            )
    whole = left + edge * size
    about = f"Attention of layer {head.layer}, head {head.head}"
    return (
        f'<div class="map"><svg viewBox="0 0 {whole} {whole}" style="max-width:{whole}px" role="img"'
        f' aria-label="{about}">{"".join(labels)}{"".join(cells)}</svg></div>'
        f"<p class='hint'>{about}: the weights have an entropy of {head.entropy:.2f} nats (equal weights: "
        f"{view.even_entropy:.2f}); {head.first:.0%} is on the first token.</p>"
    )


# -- neurons -------------------------------------------------------------------------------------------


def _tracked(unit: UnitValues) -> str:
    named = [
        f"{feature} ({'AUC' if score.accuracy is not None else 'r'} {score.score:.2f})"
        for feature, score in unit.scores.items()
        if score.named
    ]
    return ", ".join(named) or "no strong evidence for a feature"


def unit_of(view: Neurons, choice: str | None) -> UnitValues | None:
    """The unit of a choice, or the first one; None if the view has none."""
    return next((unit for unit in view.shown if unit.name == choice), view.shown[0] if view.shown else None)


def unit_marks(view: Neurons, unit: UnitValues) -> str:
    """The text, coloured by the values of a unit: orange above its median, blue below."""
    begin = min(view.fitted, max(0, view.tokens - SHOWN_TOKENS))
    part = slice(begin, begin + SHOWN_TOKENS)
    levels, values = unit.levels()[part].tolist(), unit.values[part].tolist()
    return marks_html(
        Mark(piece, 0.75 * abs(level), f"unit {unit.name}: {value:.3g}", "surprise" if level > 0 else "less")
        for piece, level, value in zip(view.pieces[part], levels, values, strict=True)
        if piece
    )


def units_html(view: Neurons) -> str:
    """The best unit of each feature."""
    rows = []
    for ranking in view.rankings:
        name = f"<th scope='row'>{escape(ranking.feature)}<small>{escape(ranking.description)}</small></th>"
        if not ranking.units:
            rows.append(f"<tr>{name}<td colspan='3'>not searched: {escape(ranking.skipped or '')}</td></tr>")
            continue
        best = ranking.units[0]
        rows.append(
            f"<tr>{name}<td>{best.layer}.{best.unit}</td><td>{best.score:.2f}"
            f"<small>by chance {ranking.baseline:.2f}</small></td><td>{'yes' if best.named else 'no'}</td></tr>"
        )
    heads = "".join(f"<th scope='col'>{head}</th>" for head in ("feature", "best unit", "score", "strong evidence"))
    sizes = ", ".join(map(str, view.layer_sizes))
    return (
        f"<div class='scroll'><table><thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
        f"<p class='hint'>Units of each layer: {sizes}. A unit is LAYER.UNIT, counted from 0. The score is the AUC of "
        "a feature that is there or not, and the correlation of one that is a number.</p>"
    )


def unit_scale() -> str:
    """Legend of `unit_marks`."""
    return scale_html("low", "high", "both")


# -- why -----------------------------------------------------------------------------------------------


class _Columns(NamedTuple):
    """What a text is coloured by: the sources, or the layers of a model with one source."""

    names: Sequence[str]
    terms: npt.NDArray[np.float64]
    """(N, names) nats."""
    colors: Sequence[str]

    @classmethod
    def of(cls, view: Why) -> _Columns:
        from lm.inspection.drawing.why import colors_of

        layers = [f"layer {number}" for number in range(view.layers.shape[1])]
        if len(view.sources) == 1 and len(layers) > 1:
            return cls(layers, view.layer_gains, colors_of(layers))
        return cls(view.sources, view.terms, colors_of(view.sources))


def why_legend(view: Why) -> str:
    """The sources with their colours and mean terms."""
    columns = _Columns.of(view)
    entries = "".join(
        f"<li><i style='background:{color}'></i>{escape(source)} <b>{mean:+.2f}</b></li>"
        for source, color, mean in zip(columns.names, columns.colors, columns.terms.mean(axis=0).tolist(), strict=True)
    )
    return f"<ul class='sources'>{entries}</ul>"


def why_marks(view: Why) -> str:
    """The text: each token has the colour of the source that added most to its log-probability."""
    columns = _Columns.of(view)
    best = columns.terms.argmax(axis=1)
    gains = columns.terms[np.arange(len(best)), best]
    shares = np.clip(gains / np.maximum(-view.baseline, 1e-9), 0, 1)
    low, high = STRENGTHS
    parts = []
    for index, (piece, source, gain, share) in enumerate(
        zip(view.pieces, best.tolist(), gains.tolist(), shares.tolist(), strict=True)
    ):
        color = columns.colors[source] if gain >= LEAST_GAIN else "transparent"
        mark = marks_html(
            [Mark(_text(piece), low + (high - low) * share, _first_line(view, columns, index), "")], first=index
        )
        parts.append(mark.replace('style="', f'style="--tone:{color};', 1))
    return "".join(parts)


def terms_html(view: Why, index: int) -> str:
    """What each source added for one token."""
    if not 0 <= index < len(view.pieces):
        return ""
    columns = _Columns.of(view)
    terms = columns.terms[index].tolist()
    scale = max(map(abs, terms)) or 1.0
    rows = "".join(
        f"<tr><th scope='row'>{escape(source)}</th><td>{term:+.2f}</td><td class='lane'>"
        f"<i style='width:{100 * abs(term) / scale:.1f}%;background:{color}'></i></td></tr>"
        for source, color, term in zip(columns.names, columns.colors, terms, strict=True)
    )
    before = escape("".join(map(_text, view.pieces[max(0, index - 16) : index])).replace("\n", "↵"))
    token = escape(_text(view.pieces[index]).replace("\n", "↵").replace(" ", "␣"))
    return (
        f"<h3>{before}<mark>{token}</mark></h3><p class='hint'>{escape(_first_line(view, columns, index))}. The "
        f"uniform distribution gives {view.baseline[index]:.2f} nats; to it come, in nats:</p>"
        f"<div class='scroll'><table class='terms'><tbody>{rows}</tbody></table></div>"
    )


def _first_line(view: Why, columns: _Columns, index: int) -> str:
    nats = float(view.log_probabilities[index])
    most = columns.names[int(columns.terms[index].argmax())]
    return f"Probability {percent(math.exp(nats))} ({-nats:.2f} nats), mostly from {most}"


def _text(piece: str) -> str:
    return "\n" if piece == "\\n" else piece.replace("▁", " ")


def why_sentence(view: Why) -> str:
    """The loss and what it is the sum of."""
    columns = _Columns.of(view)
    means = zip(columns.names, columns.terms.mean(axis=0).tolist(), strict=True)
    best = sorted(means, key=lambda item: -item[1])[:2]
    most = " and ".join(f"{name} ({gain:+.2f} nats)" for name, gain in best)
    kind = "source" if columns.names is view.sources else "layer"
    return (
        f"Loss {view.loss:.2f} nats per token. Most of what the model knows comes from {most}. A token has the colour "
        f"of the {kind} that added most."
    )
