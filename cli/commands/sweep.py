"""lm sweep."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.options import DEFAULT_RUNS, DataDir, Json, RunsDir, choice, runs_dir_flag
from cli.train_flags import TrainFlags, with_train_flags
from lm.config import CorpusConfig
from lm.errors import ConfigError

if TYPE_CHECKING:
    from lm.jobs.sweep import SweepResult
    from lm.jobs.sweep_record import SweepFolder

POSITION = 12
INTERRUPTED = 130
"""Exit code after Ctrl-C."""
MAX_DRAWN = 8
"""Configurations in the picture."""


@with_train_flags("devices", "shard", "ensemble", "student")
def command(
    corpus: Annotated[
        str | None,
        typer.Argument(help=CorpusConfig.model_fields["source"].description, show_default=False),
    ] = None,
    over: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUES",
            help="What varies: preset, family, tokens or SECTION.FIELD, with values such as 1e-3,3e-3; with --random "
            "also a range such as 1e-3..1e-2. Repeatable.",
            show_default=False,
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(help="Runs of each configuration: the seeds SEED, SEED + 1, …")] = 3,
    random: Annotated[
        int | None,
        typer.Option(metavar="N", help="Draw N configurations. Default: the grid of all values.", show_default=False),
    ] = None,
    jobs: Annotated[int, typer.Option(help="Runs at the same time; they share the CPU threads.")] = 1,
    name: Annotated[
        str | None, typer.Option(help="Name of the sweep. Default: made from the corpus.", show_default=False)
    ] = None,
    resume: Annotated[str | None, typer.Option(metavar="NAME", help="Continue this sweep.", show_default=False)] = None,
    retry: Annotated[bool, typer.Option("--retry", help="With --resume: train failed runs again.")] = False,
    bands: Annotated[
        str, typer.Option(help="Bands of the curves: min-max (lowest to highest) or std (± standard deviation).")
    ] = "min-max",
    runs_dir: RunsDir = DEFAULT_RUNS,
    data_dir: DataDir = None,
    as_json: Json = False,
    *,
    flags: TrainFlags,
) -> None:
    """Train all combinations of some options with several seeds, and choose the best.

    The same command continues a sweep that was interrupted.

    \b
    lm sweep input.txt --over preset=gru-char,lstm-char --minutes 2
    lm sweep input.txt --over training.learning_rate=1e-3..1e-2 --random 8
    lm sweep --resume NAME
    """
    choice("--bands", bands, "min-max", "std")
    from cli.output import print_json, say
    from lm.jobs.sweep import check_jobs, notes

    check_jobs(jobs)
    if resume is not None:
        others = {"CORPUS": corpus, "--over": over, "--random": random, "--name": name}
        unwanted = [*(flag for flag, value in others.items() if value is not None), *flags.used]
        folder = _resumed(resume, unwanted, runs_dir, retry=retry)
    elif retry:
        raise ConfigError("--retry is for --resume: the sweep whose failed runs are trained again.")
    elif corpus is None:
        raise ConfigError("Which text? Write: lm sweep FILE --over training.learning_rate=1e-3,3e-3")
    else:
        given: dict[str, Any] = {"seeds": seeds, "random": random, "name": name}
        folder = _new(corpus, over or [], flags, jobs, runs_dir=runs_dir, data_dir=data_dir, **given)
    _print_plan(folder)
    for note in notes(folder, jobs):
        say(f"note: {note}", dim=False)
    result = _run(folder, jobs, runs_dir)
    picture = _draw(result, bands)
    if as_json:
        print_json(result.to_json())
    else:
        from cli.output import console
        from cli.sweep_table import print_result

        print_result(console(), result, picture, runs_dir)
    if result.best is None:
        raise typer.Exit(1)


def _resumed(name: str, unwanted: list[str], runs_dir: Path, *, retry: bool) -> SweepFolder:
    """The folder of an interrupted sweep; `unwanted` are flags that cannot change it."""
    from lm.jobs.sweep import resume_sweep

    if unwanted:
        raise ConfigError(
            f"--resume {name} continues the sweep as planned, so {', '.join(unwanted)} cannot change it. For "
            "another sweep, leave --resume out."
        )
    return resume_sweep(name, runs_dir, retry=retry)


def _new(corpus: str, over: list[str], flags: TrainFlags, jobs: int, **options: Any) -> SweepFolder:
    """The folder of a new sweep, or of an interrupted one of the same plan; `options` are those of `SweepRequest`."""
    from cli.output import reading
    from lm.jobs.sweep import SweepRequest, prepare_sweep
    from lm.jobs.sweep_axes import parse_over

    with reading() as progress:
        request = SweepRequest(
            corpus=corpus, over=parse_over(over), preset=flags.preset, family=flags.family, tokens=flags.tokens,
            neural=flags.neural, file=flags.file, overrides=flags.overrides, progress=progress, **options,
        )  # fmt: skip
        return prepare_sweep(request, jobs=jobs)


def _run(folder: SweepFolder, jobs: int, runs_dir: Path) -> SweepResult:
    """Train all runs; Ctrl-C saves the sweep and ends the program."""
    from cli.output import say
    from cli.sweep_view import SweepView
    from lm.jobs.sweep import run_sweep

    try:
        with SweepView(folder.record, jobs) as view:
            return run_sweep(folder, jobs=jobs, on_update=view, on_score=view.on_score)
    except KeyboardInterrupt:
        there = f"{shlex.quote(folder.record.name)}{runs_dir_flag(runs_dir)}"
        say(f"Stopped, and saved. Continue with: lm sweep --resume {there}", dim=False)
        raise typer.Exit(INTERRUPTED) from None


def _print_plan(folder: SweepFolder) -> None:
    """How many runs there are, and how long they take."""
    from cli.output import say
    from cli.progress import duration

    record = folder.record
    ended = sum(run.status == "finished" for run in record.runs)
    configurations, seeds = len(record.configurations), len({run.seed for run in record.runs})
    counts = [
        f"{number:,} {name}" + "s" * (number != 1)
        for number, name in ((configurations, "configuration"), (seeds, "seed"), (len(record.runs), "run"))
    ]
    plan = f"{counts[0]} × {counts[1]}: {counts[2]}"
    minutes = {each.config.training.minutes for each in record.configurations}
    if None not in minutes and len(minutes) == 1:
        each = 60 * float(next(iter(minutes)) or 0)
        plan += f" of {duration(each)}"
    say(f"Sweep {record.name}: {plan}" + (f"; {ended} are finished." if ended else "."), dim=False)


def _draw(result: SweepResult, bands: str) -> Path | None:
    """Write the curves of the best configurations; None where there are none, or without matplotlib."""
    from cli.output import say
    from lm.errors import MissingExtraError, RunError
    from lm.jobs.sweep_choice import sweep_curves
    from lm.jobs.sweep_record import CURVES
    from lm.runs.curves import draw

    path = result.folder.path / CURVES
    # The best first, also in the legend.
    rank = {str(each.number): place for place, each in enumerate(result.configurations[:MAX_DRAWN])}
    by = "time" if any(each.config.training.minutes for each in result.folder.record.configurations) else "step"
    try:
        known = sweep_curves(result.folder, by=by, bands=bands)
        drawn = [curve for curve in known if curve.run.partition(":")[0] in rank]
        drawn.sort(key=lambda curve: rank[curve.run.partition(":")[0]])
        if not drawn:
            return None
        draw(drawn, path, metric="bits_per_byte", by=by)
    except (MissingExtraError, RunError, ConfigError) as error:
        say(f"note: No curves. {error}", dim=False)
        return None
    return path
