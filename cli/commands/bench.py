"""lm bench."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from cli.options import DEFAULT_RUNS, DataDir, Json, RunsDir
from cli.train_flags import PROCESSES, TrainFlags, prepare_corpus_or_run, with_train_flags
from lm.errors import ConfigError, LMError

if TYPE_CHECKING:
    from lm.profiling.bench import Row

POSITION = 18


@with_train_flags(*PROCESSES)
def command(
    source: Annotated[
        str | None,
        typer.Argument(
            metavar="CORPUS|RUN", help="A text, as for lm train, or a run with its options.", show_default=False
        ),
    ] = None,
    runs_dir: RunsDir = DEFAULT_RUNS,
    data_dir: DataDir = None,
    as_json: Json = False,
    *,
    flags: TrainFlags,
) -> None:
    """Compare the training speed of all devices and precisions.

    Each setting trains the same few steps in its own process. Nothing is saved.

    \b
    lm bench input.txt --preset gru-char
    lm bench RUN --device cpu
    """
    from cli.output import console, print_json, reading, say
    from lm.device import pick_device
    from lm.profiling.bench import auto_format, run, settings
    from lm.profiling.trial import refuse_counting

    with reading() as progress:
        job = prepare_corpus_or_run(source, flags, runs_dir, data_dir, progress)
    config, corpus = job.config, job.tokens
    refuse_counting(config)
    pick_device(config.training.device)
    given = {path: value for path, value in flags.overrides.items() if path.startswith("training.")}
    auto = given.get("training.precision") == "auto" and given.pop("training.precision")
    chosen = [
        setting for setting in settings()
        if all(setting.overrides.get(path, value) == value for path, value in given.items())
        and not (auto and setting.format != auto_format(config, setting.device))
    ]  # fmt: skip
    if not chosen:
        raise ConfigError("No device and precision of this machine matches the flags: see lm devices.")
    say(
        f"{config.model.type} on {corpus.name}, batches of {config.training.batch_size} rows, {len(chosen)} settings",
        dim=False,
    )
    rows: list[Row] = []
    for row in run(config, corpus, chosen):
        rows.append(row)
        say(f"{_label(row)}: {row.problem or f'{row.tokens_per_second:,.0f} tokens/s'}")
    if as_json:
        print_json([row.to_json() for row in rows])
    else:
        _print(rows)
        for device in dict.fromkeys(row.setting.device for row in rows):
            console().print(f"--precision auto on {device}: {auto_format(config, device)}", style="dim")
    if all(row.problem for row in rows):
        raise LMError("No setting could be measured.")


def _device(row: Row) -> str:
    setting = row.setting
    return setting.device if setting.devices == 1 else f"{setting.devices} × {setting.device.partition(':')[0]}"


def _label(row: Row) -> str:
    setting = row.setting
    threads = f" {setting.threads} thread{'s' if setting.threads != 1 else ''}" if setting.threads else ""
    return f"{_device(row)}{threads} {setting.precision} {setting.level}"


def _print(rows: list[Row]) -> None:
    from rich.filesize import decimal

    from cli.output import console, wide_table
    from lm.profiling.bench import STEPS

    names = "threads", "precision", "tokens/s", "speed-up", "step", "memory", "loss"
    table = wide_table("device", *names, left=("precision",))
    for row in rows:
        setting, figures = row.setting, [""] * 5
        if row.tokens_per_second is not None and row.step_seconds is not None:
            figures = [
                f"{row.tokens_per_second:,.0f}",
                f"{row.speed_up:.2f}×" if row.speed_up else "",
                f"{row.step_seconds * 1e3:,.1f} ms",
                decimal(row.peak_bytes) if row.peak_bytes else "",
                f"{row.loss:.4f}" if row.loss is not None else "",
            ]
        table.add_row(_device(row), str(setting.threads or ""), f"{setting.precision} {setting.level}", *figures)
    screen = console()
    screen.print(table)
    for row in rows:
        note = row.problem or ("" if row.steps >= STEPS else f"{row.steps} steps, then the time was up")
        if note:
            screen.print(f"{_label(row)}: {note}", markup=False, soft_wrap=True)
    screen.print("memory: maximum of the whole process on a CPU, of tensors on a GPU", style="dim")
