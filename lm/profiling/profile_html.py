"""A profile as one HTML page without external files: memory over time by purpose, and all layers."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from itertools import pairwise

from lm.html_parts.page import whole_page
from lm.profiling.phases import PHASES
from lm.profiling.profile import PhaseMemory, Profile
from lm.profiling.tensor_memory import KINDS, Kind
from lm.version import __version__

WIDTH, HEIGHT, LEFT, TOP, BELOW = 1100, 380, 78, 26, 42
"""Of the picture, and the margins for its labels."""
COLUMNS = 1000
"""Of the picture; each shows the peak of its time."""
MIN_WIDTH, MIN_LABEL_WIDTH = 1.5, 52
"""Of phases that get a band, and a name."""
COLORS: dict[Kind, str] = {
    # Okabe and Ito's palette, for colour-blind readers.
    "weights": "#0072b2",
    "optimizer": "#56b4e9",
    "gradients": "#d55e00",
    "kept": "#009e73",
    "other": "#e69f00",
}
SIZES = {"GB": 1e9, "MB": 1e6, "kB": 1e3}


def page(found: Profile) -> str:
    """The whole page."""
    head = (
        f"{found.model} of {found.parameters:,} parameters on {escape(found.corpus)}: {found.batch_size} rows of "
        f"{found.bptt} tokens a batch, {found.precision} on {escape(found.device_name)}"
    )
    body = f"""<h1>Memory and time of training</h1>
<p>{head}. Runs on: {escape(found.runs_on)}. Inkling {__version__}.</p>
<h2>Memory of tensors over time</h2>
{_legend()}
{_picture(found)}
<p>Two steps, some batches of validation and a save, each in its own scale of time. Tracking every tensor takes time:
read sizes here, and durations below. Native kernels keep their buffers for the next step.</p>
{_memory(found)}
<h2>Time</h2>
{_facts(found)}
<h2>Layers</h2>
<p>Each row is the layer's own work, without inner layers. Kept: made here, and still held when backward begins.</p>
{_layers(found)}"""
    return whole_page(f"Profile: {found.model} on {found.corpus}", body)


def _legend() -> str:
    entries = (f'<span><i style="background:{COLORS[kind]}"></i>{escape(name)}</span>' for kind, name in KINDS.items())
    return f'<div class="legend">{"".join(entries)}</div>'


# -- the picture ------------------------------------------------------------------------------------------

Stretch = tuple[str, float, float, list[PhaseMemory]]
"""A step, the validation or the save: name, begin, end, phases."""
SHARES = {"first step": 3, "a step": 3, "validation": 3, "saving": 1}
"""Of the width: steps are short, but matter most."""


class _Axes:
    """Moments and sizes as positions in the picture; each stretch has its own scale of time."""

    def __init__(self, stretches: Sequence[Stretch], most: int) -> None:
        self.stretches = stretches
        whole, left = sum(SHARES[name] for name, *_ in stretches), float(LEFT)
        self._spans = []
        for name, begin, end, _ in stretches:
            width = (WIDTH - LEFT) * SHARES[name] / whole
            self._spans.append((begin, end, left, width))
            left += width
        # Lines at 1, 2, 5, 10, … bytes.
        power = 10.0 ** math.floor(math.log10(max(most / 4, 1)))
        self.tick = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= most / 4)
        self.top = self.tick * -(-most // self.tick)

    def x(self, moment: float) -> float:
        begin, end, left, width = next((span for span in self._spans if moment <= span[1]), self._spans[-1])
        return left + width * min(1.0, max(0.0, (moment - begin) / (end - begin)))

    def y(self, size: float) -> float:
        return TOP + HEIGHT * (1 - size / self.top)


def _stretches(phases: Sequence[PhaseMemory]) -> list[Stretch]:
    found: list[Stretch] = []
    for phase in phases:
        if phase.name not in PHASES:
            name = "validation" if phase.name == "evaluation" else phase.name
            found.append((name, phase.begin, phase.end, [phase]))
        elif phase.name == "data" and (not found or found[-1][3][-1].name == "optimizer"):
            found.append(("a step" if found else "first step", phase.begin, phase.end, [phase]))
        else:
            name, begin, _, others = found[-1]
            found[-1] = name, begin, phase.end, [*others, phase]
    return found


def _picture(found: Profile) -> str:
    axes = _Axes(_stretches(found.followed), max(sum(held.values()) for _, held in found.timeline))
    borders = [LEFT + (WIDTH - LEFT) * column / COLUMNS for column in range(COLUMNS + 1)]
    columns = _columns(found.timeline, axes, borders)

    def edge(sizes: Sequence[int]) -> list[str]:
        pairs = zip(pairwise(borders), sizes, strict=True)
        return [f"{x:.1f},{axes.y(size):.1f}" for sides, size in pairs for x in sides]

    parts = [
        f'<svg viewBox="0 0 {WIDTH} {TOP + HEIGHT + BELOW}" role="img" aria-label="Memory of tensors over time, '
        'stacked by purpose">',
        *_bands(axes),
    ]
    below = [0] * COLUMNS
    for kind, name in KINDS.items():
        above = [size + held[kind] for size, held in zip(below, columns, strict=True)]
        points = " ".join(edge(above) + edge(below)[::-1])
        parts.append(f'<polygon points="{points}" fill="{COLORS[kind]}"><title>{escape(name)}</title></polygon>')
        below = above
    return "".join([*parts, "</svg>"])


def _columns(
    timeline: Sequence[tuple[float, dict[Kind, int]]], axes: _Axes, borders: Sequence[float]
) -> list[dict[Kind, int]]:
    """The bytes of each kind at the peak of each column."""
    positions = [axes.x(moment) for moment, _ in timeline]
    sums = [sum(held.values()) for _, held in timeline]
    columns = []
    for left, right in pairwise(borders):
        first = max(0, bisect_right(positions, left) - 1)
        last = max(first + 1, bisect_left(positions, right))
        columns.append(timeline[max(range(first, last), key=sums.__getitem__)][1])
    return columns


def _bands(axes: _Axes) -> Iterator[str]:
    """Behind the curves: phases in two alternating shades, with their names, and lines of equal size."""
    number = 0
    for name, begin, end, phases in axes.stretches:
        left, right = axes.x(begin), axes.x(end)
        yield f'<text x="{(left + right) / 2:.1f}" y="{TOP - 10}" text-anchor="middle">{name}</text>'
        for phase in phases:
            start, width = axes.x(phase.begin), axes.x(phase.end) - axes.x(phase.begin)
            if width < MIN_WIDTH:
                continue
            number += 1
            yield (
                f'<rect x="{start:.1f}" y="{TOP}" width="{width:.1f}" height="{HEIGHT}" '
                f'fill="var(--band)" opacity="{number % 2}"><title>{phase.name}</title></rect>'
            )
            if width > MIN_LABEL_WIDTH and len(phases) > 1:
                middle, base = start + width / 2, TOP + HEIGHT + 18
                yield f'<text x="{middle:.1f}" y="{base}" text-anchor="middle">{phase.name}</text>'
        yield f'<line x1="{right:.1f}" x2="{right:.1f}" y1="{TOP}" y2="{TOP + HEIGHT}" stroke="var(--soft)"/>'
    for count in range(int(axes.top / axes.tick) + 1):
        y = axes.y(count * axes.tick)
        yield f'<line x1="{LEFT}" x2="{WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="var(--line)"/>'
        yield f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{_size(count * axes.tick)}</text>'


# -- tables -----------------------------------------------------------------------------------------------


def _memory(found: Profile) -> str:
    process = "Resident" if found.device == "cpu" else "Reserved"
    rows = [
        [phase.name, *map(_size, (phase.held_bytes, phase.peak_bytes, phase.process_bytes, phase.process_peak_bytes))]
        for phase in found.memory
    ]
    held = " ".join(_size(size) for size in found.evaluation.held_bytes)
    note = f"<p>Held after each of {len(found.evaluation.held_bytes)} batches of validation: {held}.</p>"
    return _table(["Phase", "Tensors after", "Peak", f"{process} after", "Peak"], rows) + note


def _facts(found: Profile) -> str:
    speed, sums, logging = found.speed, found.arithmetic, found.logging
    whole = sum(speed.phase_seconds.values())
    phases = ", ".join(f"{name} {spent / whole:.0%}" for name, spent in speed.phase_seconds.items())
    peaks = ", ".join(f"{name} {peak / 1e9:,.1f}" for name, peak in sums.peak_flops_per_second.items())
    shares = ", ".join(f"every {every}: {share:.2%}" for every, share in logging.share_of_time.items())
    facts = {
        "Speed": f"{speed.tokens_per_second:,.0f} tokens/s",
        "A step": f"{_milliseconds(speed.step_seconds)} (median of {speed.steps}; {phases})",
        "Data": f"{_milliseconds(speed.data_seconds)} to make a step's batches and move them to the device",
        "Arithmetic": f"{sums.flops_per_step / 1e9:,.2f} GFLOP a step, {sums.flops_per_second / 1e9:,.1f} GFLOP/s",
        "Share of peak": f"{sums.share_of_peak:.1%} of matrix products as measured here, in GFLOP/s: {peaks} "
        f"({sums.peak_threads} threads)",
        "A line of metrics": f"{_milliseconds(logging.line_seconds)}; share by training.log_every: {shares}",
    }
    return f"<dl>{''.join(f'<dt>{escape(name)}</dt><dd>{escape(fact)}</dd>' for name, fact in facts.items())}</dl>"


def _layers(found: Profile) -> str:
    whole = sum(layer.seconds for layer in found.layers)
    rows = []
    for layer in found.layers:
        shares = {"": layer.forward_seconds / whole, " back": layer.backward_seconds / whole}
        bars = "".join(f'<span class="bar{k}" style="width:{share * 120:.1f}px"></span>' for k, share in shares.items())
        rows.append(
            [
                escape(layer.name), "×".join(map(str, layer.shape or ())),
                f"{layer.parameters:,}" if layer.parameters else "", _size(layer.kept_bytes),
                _milliseconds(layer.forward_seconds), _milliseconds(layer.backward_seconds),
                f"{layer.seconds / whole:.1%}", f'<td class="text">{bars}</td>',
                layer.runs_on if layer.parameters or layer.runs_on == "native" else "",
            ]
        )  # fmt: skip
    total = [
        "total", "", f"{found.parameters:,}", _size(sum(layer.kept_bytes for layer in found.layers)),
        _milliseconds(sum(layer.forward_seconds for layer in found.layers)),
        _milliseconds(sum(layer.backward_seconds for layer in found.layers)), "100.0%", "", "",
    ]  # fmt: skip
    names = ["Layer", "Output", "Parameters", "Kept", "Forward", "Backward", "Share", "", "Runs on"]
    return _table(names, rows, total)


def _table(names: Sequence[str], rows: Iterable[Sequence[str]], last: Sequence[str] = ()) -> str:
    def cells(row: Sequence[str]) -> str:
        return "".join(cell if cell.startswith("<td") else f"<td>{cell}</td>" for cell in row)

    head = "".join(f"<th>{name}</th>" for name in names)
    body = "".join(f"<tr>{cells(row)}</tr>" for row in rows)
    foot = f"<tfoot><tr>{cells(last)}</tr></tfoot>" if last else ""
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody>{foot}</table></div>'


def _size(size: float | None) -> str:
    if size is None:
        return ""
    unit = next((unit for unit in SIZES if size >= SIZES[unit]), None)
    return f"{size:.0f} B" if unit is None else f"{size / SIZES[unit]:,.1f} {unit}"


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:,.2f} ms"
