"""Shapes as an HTML page (all tensors) or a picture (parameters, activations and FLOPs of each stage)."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from lm.html_parts.page import whole_page
from lm.inspection.shapes import Shapes, StageShapes, TensorShape
from lm.version import __version__

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOR = "#0072b2"
TEXT_COLUMNS = 5
"""Columns of the table of tensors that are aligned left: stage, tensor, kind, shape, sizes."""

SHAPES_STYLE = """
body { max-width: 1300px; } table { width: auto; } th.text { text-align: left; }
"""


def title(view: Shapes) -> str:
    """Of page and picture."""
    return f"Shapes of a model of type {view.type}: batch {view.batch}, length {view.length}"


def written(parts: Sequence[object]) -> str:
    """(3·H, E)"""
    return f"({', '.join(map(str, parts))}{',' if len(parts) == 1 else ''})"


def page(view: Shapes) -> str:
    """The whole HTML page, without external files."""
    letters = "".join(
        f'<tr><td>{escape(letter)}</td><td>{symbol.value:,}</td><td class="text">{escape(symbol.meaning)}</td></tr>'
        for letter, symbol in view.legend.items()
    )
    rows = "".join(_rows(stage) for stage in view.stages)
    totals = (
        ("parameters", f"{view.parameters:,}", f"{view.parameter_bytes:,} bytes"),
        ("activations of a step", "", f"{view.activation_bytes:,} bytes"),
        ("state after a step", "", f"{view.state_bytes:,} bytes"),
        ("FLOPs of forward", f"{view.forward_flops:,}", ""),
        ("FLOPs of backward", f"{view.backward_flops:,}", ""),
    )
    sums = "".join(f"<tr><td>{name}</td><td>{count}</td><td>{size}</td></tr>" for name, count, size in totals)
    names = "Stage", "Tensor", "Kind", "Shape", "Sizes", "Numbers", "Bytes", "FLOPs, forward"
    head = "".join(f"<th{_look(column)}>{name}</th>" for column, name in enumerate(names))
    body = f"""<h1>{escape(title(view))}</h1>
<p>FLOPs are of the matrix products. Inkling {__version__}.</p>
<h2>Letters</h2><div class="scroll"><table>{letters}</table></div>
<h2>Tensors</h2>
<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>
<h2>Totals</h2><div class="scroll"><table>{sums}</table></div>"""
    return whole_page(title(view), body, SHAPES_STYLE)


def _rows(stage: StageShapes) -> str:
    flops = f"{stage.forward_flops:,}" if stage.forward_flops else ""
    formula = f'<td class="text" colspan="6">{escape(stage.formula)}</td>'
    first = f"<tr><td>{escape(stage.name)}</td>{formula}<td>{flops}</td></tr>"
    kinds = (("parameter", stage.parameters), ("activation", stage.activations), ("state", stage.state))
    return first + "".join(_row(kind, tensor) for kind, tensors in kinds for tensor in tensors)


def _row(kind: str, tensor: TensorShape) -> str:
    shape = written(tensor.symbols), written(tensor.sizes)
    cells = "", tensor.name, kind, *shape, f"{tensor.count:,}", f"{tensor.bytes:,}", ""
    return f"<tr>{''.join(f'<td{_look(column)}>{escape(cell)}</td>' for column, cell in enumerate(cells))}</tr>"


def _look(column: int) -> str:
    return ' class="text"' if column < TEXT_COLUMNS else ""


def figure(view: Shapes) -> Figure:
    """Three bars a stage: bytes of parameters, bytes of activations, FLOPs of forward."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    names = [stage.name for stage in view.stages]
    measures = {
        "parameters (bytes)": [sum(tensor.bytes for tensor in stage.parameters) for stage in view.stages],
        "activations of a step (bytes)": [sum(tensor.bytes for tensor in stage.activations) for stage in view.stages],
        "FLOPs of forward": [stage.forward_flops for stage in view.stages],
    }
    drawn = Figure(figsize=(11, 1.6 + 0.32 * len(names)), layout="constrained")
    drawn.suptitle(title(view), fontsize=12)
    panels = drawn.subplots(1, len(measures), sharey=True, squeeze=False)[0]
    for axes, (name, values) in zip(panels, measures.items(), strict=True):
        axes.barh(range(len(names)), values, color=COLOR)
        axes.set_xlabel(name)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].invert_yaxis()
    return drawn
