"""lm profile."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.options import DEFAULT_RUNS, DataDir, Json, RunsDir, path_option
from cli.train_flags import PROCESSES, TrainFlags, prepare_corpus_or_run, with_train_flags

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from lm.profiling.profile import Layer, Profile

POSITION = 17


@with_train_flags(*PROCESSES)
def command(
    source: Annotated[
        str | None,
        typer.Argument(
            metavar="CORPUS|RUN", help="A text, as for lm train, or a run with its options.", show_default=False
        ),
    ] = None,
    html: Annotated[
        Path | None,
        path_option(metavar="FILE", help="Also write an HTML page with memory over time and all layers."),
    ] = None,
    runs_dir: RunsDir = DEFAULT_RUNS,
    data_dir: DataDir = None,
    as_json: Json = False,
    *,
    flags: TrainFlags,
) -> None:
    """Measure the memory and the time of each training step.

    Takes a few seconds. Nothing is saved.

    \b
    lm profile input.txt --preset gru-char --set model.hidden_size=768
    lm profile RUN --html profile.html
    """
    from lm.files import check_place, write_file

    if html is not None:
        check_place(html)
    from cli.output import console, print_json, reading, say
    from lm.profiling.profile import profile_training

    with reading() as progress:
        job = prepare_corpus_or_run(source, flags, runs_dir, data_dir, progress)
    config, corpus = job.config, job.tokens
    found = profile_training(config, corpus)
    if html is not None:
        from lm.profiling.profile_html import page

        write_file(html, page(found))
        say(f"Wrote {html}.")
    if as_json:
        print_json(found.to_json())
    else:
        _print(console(), found)


def _print(screen: Console, found: Profile) -> None:
    from rich.markup import escape

    from cli.output import facts_table

    threads = f"{found.device}, {found.threads} of {found.arithmetic.peak_threads} threads"
    device = threads if found.device == "cpu" else found.device
    screen.print(
        f"[bold]{found.model}[/bold] with {found.parameters:,} parameters on {escape(found.corpus)}: "
        f"batches of {found.batch_size} × {found.bptt} tokens",
        soft_wrap=True,
    )
    screen.print(f"{found.precision} on {escape(found.device_name)} ({device})", soft_wrap=True)
    screen.print(f"runs on: {found.runs_on}\n", soft_wrap=True)
    for table in (_layer_table(found), _memory_table(found), facts_table(_memory_facts(found))):
        screen.print(table)
        screen.print()
    screen.print(facts_table(_time_facts(found)))


def _layer_table(found: Profile) -> Table:
    from cli.output import wide_table

    names = "output", "parameters", "saved", "forward\nms", "backward\nms", "share", "runs\non"
    table = wide_table("layers", *names, left=names[-1:])
    table.padding = (0, 1, 0, 0)
    whole = sum(layer.forward_seconds + layer.backward_seconds for layer in found.layers)
    for name, times, layers in _alike(found.layers):
        forward, backward = (
            sum(getattr(layer, f"{way}_seconds") for layer in layers) for way in ("forward", "backward")
        )
        table.add_row(
            name + (f" ×{times}" if times > 1 else ""),
            "×".join(map(str, layers[0].shape)) if layers[0].shape else "",
            f"{sum(layer.parameters for layer in layers):,}" if layers[0].parameters else "",
            _size(sum(layer.kept_bytes for layer in layers)),
            f"{forward * 1e3:,.2f}",
            f"{backward * 1e3:,.2f}",
            f"{(forward + backward) / whole:.1%}",
            layers[0].runs_on if layers[0].parameters or layers[0].runs_on == "native" else "",
        )
    table.add_row(
        "total", "", f"{found.parameters:,}", _size(sum(layer.kept_bytes for layer in found.layers)),
        f"{sum(layer.forward_seconds for layer in found.layers) * 1e3:,.2f}",
        f"{sum(layer.backward_seconds for layer in found.layers) * 1e3:,.2f}", "100.0%", "",
    )  # fmt: skip
    return table


def _alike(layers: Iterable[Layer]) -> list[tuple[str, int, list[Layer]]]:
    """Layers that differ only in their number, as one row: layers.0–3.mlp, four times."""
    groups: dict[Any, list[Layer]] = {}
    for layer in layers:
        pattern = re.sub(r"\d+", "*", layer.name)
        groups.setdefault((pattern, layer.shape, layer.parameters, layer.runs_on), []).append(layer)
    return [(_span(group[0].name, group[-1].name), len(group), group) for group in groups.values()]


def _span(first: str, last: str) -> str:
    pairs = zip(first.split("."), last.split("."), strict=True)
    return ".".join(one if one == other else f"{one}–{other}" for one, other in pairs)


def _memory_table(found: Profile) -> Table:
    from cli.output import wide_table

    process = "resident" if found.device == "cpu" else "reserved"
    table = wide_table("memory", "tensors after", "tensors max", f"{process} after", f"{process} max")
    for phase in found.memory:
        table.add_row(
            phase.name, _size(phase.held_bytes), _size(phase.peak_bytes),
            _size(phase.process_bytes), _size(phase.process_peak_bytes),
        )  # fmt: skip
    return table


def _memory_facts(found: Profile) -> list[tuple[str, str, str]]:
    from lm.profiling.tensor_memory import KINDS

    evaluation = found.evaluation
    flat = "flat" if evaluation.growth_bytes == 0 else f"{evaluation.growth_bytes:+,} bytes"
    after = " ".join(_size(held) for held in evaluation.held_bytes)
    return [
        ("maximum of a step", _size(sum(found.peak_kinds.values())), f"of tensors, in the phase {found.peak_phase}:"),
        *(("", _size(found.peak_kinds[kind]), name) for kind, name in KINDS.items()),
        ("validation", flat, f"after each of {len(evaluation.held_bytes)} batches: {after}"),
    ]


def _time_facts(found: Profile) -> list[tuple[str, str, str]]:
    speed, sums, logging = found.speed, found.arithmetic, found.logging
    shares = ", ".join(
        f"{name} {spent / sum(speed.phase_seconds.values()):.0%}" for name, spent in speed.phase_seconds.items()
    )
    peaks = ", ".join(f"{name} {_flops(peak)}" for name, peak in sums.peak_flops_per_second.items())
    counted = f", counted on {sums.counted_rows} rows" if sums.counted_rows < found.batch_size else ""
    costs = ", ".join(f"every {every}: {share:.2%}" for every, share in logging.share_of_time.items())
    return [
        ("speed", f"{speed.tokens_per_second:,.0f}", "tokens/s"),
        ("  one step", _milliseconds(speed.step_seconds),
         f"median of {speed.steps} ({_milliseconds(speed.least_seconds)} to {_milliseconds(speed.most_seconds)})"),
        ("  phases", "", shares),
        ("  data", _milliseconds(speed.data_seconds),
         f"to load a batch: {speed.data_seconds / speed.step_seconds:.2%} of the step"),
        ("arithmetic", _flops(sums.flops_per_second),
         f"{sums.flops_per_step / 1e9:,.2f} GFLOP a step, {sums.flops_per_token / 1e6:,.2f} MFLOP a token{counted}"),
        ("  share of peak", f"{sums.share_of_peak:.1%}",
         f"of matrix products measured on {sums.peak_threads} threads: {peaks}"),
        ("logging a line", _milliseconds(logging.line_seconds), f"share of time by training.log_every: {costs}"),
    ]  # fmt: skip


def _size(size: int | None) -> str:
    from rich.filesize import decimal

    return "" if size is None else decimal(size)


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:,.2f} ms"


def _flops(rate: float) -> str:
    return f"{rate / 1e9:,.1f} GFLOP/s" if rate < 1e12 else f"{rate / 1e12:,.2f} TFLOP/s"
