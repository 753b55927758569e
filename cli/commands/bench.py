"""lm bench."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from cli.options import DEFAULT_RUNS, DataDir, Json, RunsDir
from cli.train_flags import PROCESSES, TrainFlags, prepare_corpus_or_run, with_train_flags
from lm.errors import ConfigError, LMError

if TYPE_CHECKING:
    from lm.profiling.bench import Row

POSITION = 13


@with_train_flags(*PROCESSES)
def command(
    source: Annotated[
        str | None,
        typer.Argument(
            metavar="CORPUS|RUN", help="A text, as for lm train, or a run, whose options it takes.", show_default=False
        ),
    ] = None,
    runs_dir: RunsDir = DEFAULT_RUNS,
    data_dir: DataDir = None,
    as_json: Json = False,
    *,
    flags: TrainFlags,
) -> None:
    """Train the same few steps on every device and precision here, and say what each gains; nothing is kept.

    \b
    lm bench input.txt --preset gru-char
    lm bench RUN --device cpu
    """
    from rich.markup import escape

    from cli.output import console, print_json, reading
    from lm.device import pick_device
    from lm.profiling.bench import run, settings
    from lm.profiling.trial import refuse_counting

    with reading() as progress:
        job = prepare_corpus_or_run(source, flags, runs_dir, data_dir, progress)
    config, corpus = job.config, job.tokens
    refuse_counting(config)
    pick_device(config.training.device)
    given = {path: value for path, value in flags.overrides.items() if path.startswith("training.")}
    chosen = [
        setting for setting in settings()
        if all(setting.overrides.get(path, value) == value for path, value in given.items())
    ]  # fmt: skip
    if not chosen:
        raise ConfigError("No device and precision here is what the flags ask for: see lm devices.")
    told = console(stderr=True)
    told.print(
        f"{config.model.type} on {escape(corpus.name)}, {config.training.batch_size} rows a batch: {len(chosen)} rows, "
        "each in a process of its own",
        soft_wrap=True,
    )
    rows: list[Row] = []
    for row in run(config, corpus, chosen):
        rows.append(row)
        speed = row.problem or f"{row.tokens_per_second:,.0f} tokens/s"
        told.print(f"{' '.join(_named(row))}: {speed}", style="dim", markup=False, soft_wrap=True)
    if as_json:
        print_json([row.to_json() for row in rows])
    else:
        _print(rows)
    if all(row.problem for row in rows):
        raise LMError("No row could be measured.")


def _named(row: Row) -> list[str]:
    setting = row.setting
    threads = f"{setting.threads} thread{'s' if setting.threads != 1 else ''}" if setting.threads else ""
    return [
        setting.device if setting.devices == 1 else f"{setting.devices} × {setting.device.partition(':')[0]}",
        threads, setting.precision, setting.level,
    ]  # fmt: skip


def _print(rows: list[Row]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.filesize import decimal
    from rich.table import Table

    from cli.output import console

    table = Table(box=SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for name in ("device", "threads", "precision", "level"):
        table.add_column(name)
    for name in ("tokens/s", "speed-up", "a step", "peak memory", "loss"):
        table.add_column(name, justify="right")
    table.add_column("", overflow="fold")
    for row in rows:
        figures = [""] * 5
        if row.tokens_per_second is not None and row.step_seconds is not None:
            figures = [
                f"{row.tokens_per_second:,.0f}",
                f"{row.speed_up:.2f}×" if row.speed_up else "",
                f"{row.step_seconds * 1e3:,.1f} ms",
                decimal(row.peak_bytes) if row.peak_bytes else "",
                f"{row.loss:.4f}" if row.loss is not None else "",
            ]
        note = row.problem or ("" if row.steps >= _steps() else f"{row.steps} steps, then time was up")
        table.add_row(*_named(row), *figures, note)
    screen = console()
    screen.print(table)
    screen.print("Peak memory is that of the whole process on a CPU, and of tensors on a GPU.", style="dim")


def _steps() -> int:
    from lm.profiling.bench import STEPS

    return STEPS
