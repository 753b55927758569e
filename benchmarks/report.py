"""RESULTS.md, from the newest record of each suite: the targets first, then each suite's tables and plots.

    python -m benchmarks.report

A record has its own tables, plots and claims (`benchmarks.suite`); here they are only set. Plots need matplotlib
(pip install '.[bench]'); without it the report names those that it could not draw.
"""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.machine import RESULTS
from benchmarks.suite import SUITES

REPORT = RESULTS.parent / "RESULTS.md"
HEAD = """# Results

Written by `python -m benchmarks.report` from the newest record of each suite under `results/`; how to run them, and
what each compares, is in [README.md](README.md). Compare only figures of one table: they were measured in turn, on one
machine, on the same data, with as many threads. A ratio under 1.3 shows nothing. Where a share of the matmul peak is
above 1, the peak was measured otherwise than `benchmarks/peak.py` measures it now.
"""

Json = Mapping[str, Any]


def newest(results: Path = RESULTS) -> dict[str, Json]:
    """Suite → its newest record, in the order of `SUITES`; a suite without a record is left out."""
    found: dict[str, Json] = {}
    for suite in SUITES:
        records = (json.loads(path.read_text("utf-8")) for path in sorted(results.glob("*.json")))
        mine = [record for record in records if record["benchmark"] == suite and "tables" in record]
        if mine:
            found[suite] = max(mine, key=lambda record: str(record["date"]))
    return found


def write(report: Path = REPORT, results: Path = RESULTS) -> Path:
    """Write the report and draw its plots next to the records."""
    records = newest(results)
    parts = [HEAD, "\n## Targets\n\n", targets(records)]
    for suite, record in records.items():
        parts += [f"\n## {suite}: {SUITES[suite]}\n\n", section(record)]
        parts += [plot(each, results, report.parent) for each in record["plots"]]
    if lacking := [suite for suite in SUITES if suite not in records]:
        parts.append(f"\nNo record yet of: {', '.join(lacking)}.\n")
    report.write_text("".join(parts), encoding="utf-8")
    return report


# -- parts -------------------------------------------------------------------------------------------


def targets(records: Mapping[str, Json]) -> str:
    """One table of all claims."""
    rows = [
        {
            "suite": suite, "target": claim["what"], "wanted": wanted(claim), "measured": measured(claim),
            "": verdict(claim), "remark": claim["why"],
        }
        for suite, record in records.items()
        for claim in record["claims"]
    ]  # fmt: skip
    return table(rows) if rows else "No record holds a target.\n"


def verdict(claim: Json) -> str:
    """met, missed, or not measured; a claim with an alternative is met where either holds."""
    both = [claim, {**claim, **claim["other"]}] if claim.get("other") else [claim]
    known = [each for each in both if each["value"] is not None]
    if any(holds(each) for each in known):
        return "met"
    return "**missed**" if known else "not measured"


def holds(claim: Json) -> bool:
    """Whether a measured value is within its bound; no rounding helps it there."""
    if claim["bound"] == "at least":
        return bool(claim["value"] >= claim["target"])
    return bool(claim["value"] <= claim["target"])


def wanted(claim: Json) -> str:
    """The target in words."""
    text = f"{claim['bound']} {number(claim['target'])} {claim['unit']}".strip()
    if other := claim.get("other"):
        text += f", or {number(other['target'])} {other['what']}"
    return text


def measured(claim: Json) -> str:
    """The value in words."""
    if claim["value"] is None:
        return "–"
    text = f"{number(claim['value'])} {claim['unit']}".strip()
    if other := claim.get("other"):
        text += f"; {number(other['value'])}"
    return text


def section(record: Json) -> str:
    """When, on what and with what, then the tables."""
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    machine = record["machine"]
    kind = "whole recipes" if record["options"].get("full") else "slices"
    lines = [
        f"{record['date'][:10]}, {kind}, {machine['cpu']}, {machine['cores']} cores, "
        f"{record['options'].get('threads', '–')} threads, commit {record['commit']}; {versions}.\n"
    ]
    lines += [f"\nNot here: {each}\n" for each in dict.fromkeys(record["missing"])]
    lines += [f"\n{each}\n" for each in record["notes"]]
    for each in record["tables"]:
        note = f" ({each['note']})" if each["note"] else ""
        lines.append(f"\n**{each['title']}**{note}\n\n{table(each['rows'])}")
    return "".join(lines)


def table(rows: Iterable[Json]) -> str:
    """Markdown, numbers to the right."""
    rows = list(rows)
    columns = list(rows[0])
    right = [any(isinstance(row[column], int | float) for row in rows) for column in columns]
    marks = ["---:" if each else "---" for each in right]
    lines = [columns, marks, *([number(row.get(column)) for column in columns] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def number(value: Any) -> str:
    """1234.5 → 1,234; 1.23456 → 1.235; 0.0123 → 0.0123; None → –."""
    if value is None:
        return "–"
    if not isinstance(value, int | float):
        return str(value).replace("|", "\\|")
    if isinstance(value, int) or value == int(value):
        return f"{int(value):,}"
    places = max(0, 3 - math.floor(math.log10(abs(value)))) if abs(value) < 1000 else 0
    return f"{value:,.{places}f}"


# -- plots -------------------------------------------------------------------------------------------


def plot(drawn: Json, results: Path, report: Path) -> str:
    """Draw it as results/NAME.svg, and the line of Markdown that shows it."""
    if not any(drawn["lines"].values()):
        return ""
    path = results / f"{drawn['name']}.svg"
    if importlib.util.find_spec("matplotlib") is None:
        return f"\n(No plot: pip install '.[bench]', then python -m benchmarks.report draws {path.name}.)\n"
    draw(drawn, path)
    return f"\n![{drawn['title']}]({path.relative_to(report).as_posix()})\n"


def draw(drawn: Json, path: Path) -> None:
    """The same file for the same record, byte for byte."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    with matplotlib.rc_context({"svg.hashsalt": "inkling", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(8.4, 4.0), layout="constrained")
        axes = figure.add_subplot()
        for name, points in drawn["lines"].items():
            if points:
                x, y = zip(*points, strict=True)
                axes.plot(x, y, marker="o", markersize=3, linewidth=1.4, label=name)
        if drawn["level"] is not None:
            name, level = drawn["level"]
            axes.axhline(level, linestyle="--", linewidth=1, color="0.4", label=f"{name}: {level:.3f}")
        axes.set(title=drawn["title"], xlabel=drawn["x"], ylabel=drawn["y"], xscale="log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.grid(linewidth=0.3, color="0.85")
        figure.legend(loc="outside right upper", fontsize=8, frameon=False)
        # White, since a dark page would swallow the letters.
        figure.savefig(path, metadata={"Date": None}, facecolor="white")


if __name__ == "__main__":
    print(write())
