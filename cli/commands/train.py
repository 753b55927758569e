"""lm train."""

from __future__ import annotations

import functools
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.options import DEFAULT_RUNS, DataDir, Json, RunsDir, named
from cli.processes import started_processes
from cli.terminal import shown
from cli.train_choices import print_choices
from cli.train_flags import TrainFlags, with_train_flags
from lm.config import CorpusConfig
from lm.errors import ConfigError

if TYPE_CHECKING:
    from lm.jobs.resolve import TrainRequest
    from lm.runs.run import Run
    from lm.training.callbacks import End

POSITION = 1
RESUME_FLAGS = "--max-steps", "--device", "--devices"
"""Flags that may change a run that is resumed."""


@with_train_flags()
def command(
    corpus: Annotated[
        str | None,
        typer.Argument(help=CorpusConfig.model_fields["source"].description, show_default=False),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(help="Name of the run. Default: made from corpus and preset.", show_default=False),
    ] = None,
    stop_after: Annotated[
        int | None,
        typer.Option(min=1, help="Stop at this step of the plan; --resume continues.", show_default=False),
    ] = None,
    resume: Annotated[
        str | None, typer.Option(metavar="RUN", help="Train the rest of this run's plan.", show_default=False)
    ] = None,
    moved_to: Annotated[
        str | None,
        typer.Option(
            "--corpus",
            metavar="PATH",
            help="With --resume: the new path of the run's text, if it has moved.",
            show_default=False,
        ),
    ] = None,
    init: Annotated[
        str | None,
        typer.Option(
            metavar="RUN",
            help="Start from the weights and tokenizer of this run, or of a model that lm import takes.",
            show_default=False,
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a run of the same name.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Estimate in seconds whether the training fits in memory; do not train.")
    ] = False,
    verify_resume: Annotated[
        bool,
        typer.Option(
            "--verify-resume",
            help="Check that an interrupted and resumed run gives bit-identical weights; do not train.",
        ),
    ] = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="Print how the options of the default model were chosen.")
    ] = False,
    runs_dir: RunsDir = DEFAULT_RUNS,
    data_dir: DataDir = None,
    as_json: Json = False,
    *,
    flags: TrainFlags,
) -> None:
    """Train a model on a text and report how good it is.

    \b
    lm train input.txt
    lm train input.txt --preset gru-char --minutes 10
    lm train input.txt --devices 2
    lm train --resume RUN
    lm train input.txt --verify-resume
    """
    if dry_run and verify_resume:
        raise ConfigError("--dry-run and --verify-resume are two different checks: give one of them.")
    if resume is not None:
        new_run = {
            "CORPUS": corpus, "--name": name, "--init": init, "--overwrite": overwrite or None,
            "--verify-resume": verify_resume or None, "--dry-run": dry_run or None,
        }  # fmt: skip
        _check_resume(resume, [flag for flag, value in new_run.items() if value is not None], flags)
        _resume(resume, flags, runs_dir, stop_after, moved_to, data_dir, as_json)
        return
    if moved_to is not None:
        raise ConfigError(
            f"--corpus is for --resume: the new path of the run's text. For a new run: lm train {shlex.quote(moved_to)}"
        )
    if corpus is None:
        raise ConfigError(
            "Which text? Write: lm train FILE (or a folder, a named corpus, - for stdin; see lm train --help)."
        )
    from cli.output import reading
    from cli.progress import TrainingView
    from lm.jobs.resolve import TrainRequest

    with reading() as progress:
        view = TrainingView(runs_dir, progress)
        request = TrainRequest(
            corpus=corpus, preset=flags.preset, family=flags.family, tokens=flags.tokens, neural=flags.neural,
            file=flags.file, overrides=flags.overrides, init=_initial_run(init, flags, runs_dir), name=name,
            runs_dir=runs_dir, overwrite=overwrite, stop_after=stop_after, data_dir=data_dir,
            callbacks=[view], progress=progress, on_prepared=functools.partial(print_choices, explain=explain),
        )  # fmt: skip
        if dry_run:
            _dry_run(request, as_json, explain=explain)
            return
        if verify_resume:
            _verify_resume(request, as_json)
            return
        run = _train(request)
    if run is not None:
        _leave_if_interrupted(view.end)
        _print_result(run, runs_dir, as_json)


def _check_resume(run: str, new_run: list[str], flags: TrainFlags) -> None:
    """Refuse flags that cannot change a run that is resumed: those in `new_run`, and most options."""
    unwanted = [*new_run, *(flag for flag in flags.used if flag not in RESUME_FLAGS)]
    if unwanted:
        raise ConfigError(
            f"--resume {run} continues the run as planned, so {', '.join(unwanted)} cannot change it. "
            "--max-steps, --stop-after, --device, --devices and --corpus can. To train it differently, start from "
            "it with --init."
        )


def _initial_run(init: str | None, flags: TrainFlags, runs_dir: Path) -> Run | None:
    """The run that --init names; a model from elsewhere is imported first."""
    from cli.output import say
    from lm.interop.imported import find_or_import, is_source

    if init is None:
        return None
    for flag in ("--preset", "--config"):
        if flag in flags.used:
            raise ConfigError(
                f"--init {init} keeps that run's model and training options: leave {flag} out, and change single "
                "options with --set."
            )
    run = find_or_import(init, runs_dir=runs_dir)
    if run.name != init and is_source(init):
        say(f"{init} is imported as run {run.name}.")
    return run


def _train(request: TrainRequest) -> Run | None:
    """The trained run; None in a process that does not print its result."""
    from lm.jobs.resolve import resolve_new_run
    from lm.jobs.train import train_new_run
    from lm.training import distributed

    resolved = resolve_new_run(request)
    training = resolved.config.training
    known = resolved.config if resolved.over_default is None else None
    if started_processes(training.devices, training.device, known):
        return None
    run = train_new_run(resolved)
    return run if distributed.rank() == 0 else None


def _dry_run(request: TrainRequest, as_json: bool, *, explain: bool) -> None:
    from cli.report_tables import print_memory_estimate
    from lm.jobs.ensemble_config import one_model
    from lm.jobs.prepare import prepare_job
    from lm.jobs.resolve import resolve
    from lm.profiling.memory_estimate import estimate
    from lm.training.distributed import config_per_process

    resolved = resolve(request)
    job = prepare_job(resolved)
    print_choices(resolved, job, explain=explain)
    # Members of an ensemble are trained one after another.
    config = one_model(job.config)
    # Each process trains its own rows of the batch.
    print_memory_estimate(estimate(config_per_process(config, config.training.devices or 1), job.tokens), as_json)


def _verify_resume(request: TrainRequest, as_json: bool) -> None:
    """Exit code 1 where a number differs."""
    from cli.output import console, print_json, print_sentence
    from lm.jobs.prepare import prepare_job
    from lm.jobs.resolve import resolve
    from lm.jobs.verify_resume import verify_resume

    resolved = resolve(request)
    if (resolved.config.training.devices or 1) > 1:
        raise ConfigError("--verify-resume trains in one process: leave --devices out.")
    job = prepare_job(resolved)
    console(stderr=True).print("Training a few steps twice, once with a kill in the middle: up to a minute.")
    verdict = verify_resume(job, request)
    if as_json:
        print_json(asdict(verdict))
    else:
        print_sentence(console(), verdict.sentence)
    if not verdict.same:
        raise typer.Exit(1)


def _resume(
    name: str,
    flags: TrainFlags,
    runs_dir: Path,
    stop_after: int | None,
    moved_to: str | None,
    data_dir: Path | None,
    as_json: bool,
) -> None:
    from cli.output import print_json, reading, say
    from cli.progress import TrainingView
    from lm.jobs.train import resume
    from lm.models.training_method import training_method
    from lm.runs.run import Run
    from lm.runs.run_folder import find_run
    from lm.training import distributed

    max_steps, device, devices = (
        flags.overrides.get(f"training.{field}") for field in ("max_steps", "device", "devices")
    )
    before = Run(find_run(name, runs_dir)[0]).config
    if started_processes(devices or before.training.devices, device or before.training.device, before):
        return
    with reading() as progress:
        view = TrainingView(runs_dir, progress)
        run, went_on = resume(
            name, runs_dir=runs_dir, max_steps=max_steps, stop_after=stop_after, device=device, devices=devices,
            corpus=moved_to, callbacks=[view], data_dir=data_dir, progress=progress,
        )  # fmt: skip
    if distributed.rank() > 0:
        return
    _leave_if_interrupted(view.end)
    if went_on:
        _print_result(run, runs_dir, as_json)
        return
    has_steps = training_method(run.config).has_steps
    longer = f" A longer plan: lm train --resume {named(run.name, runs_dir)} --max-steps N" if has_steps else ""
    say(f"{run.name} is finished already.{longer}", dim=False)
    if as_json:
        print_json(_result(run))


def _leave_if_interrupted(end: End | None) -> None:
    """Exit as a program that a signal ended, so that a shell does not run what follows &&."""
    if end is not None and end.signal is not None:
        raise typer.Exit(128 + end.signal)


def _result(run: Run) -> dict[str, Any]:
    return {"run": run.name, "path": str(run.folder.path), "report": run.reports().get("valid")}


def _print_result(run: Run, runs_dir: Path, as_json: bool) -> None:
    """The report, a sample, and the commands to type next."""
    from cli.output import console, print_json, print_sentence
    from cli.report_tables import print_report, ways_to_beat_floor
    from lm.evaluation.report import Report

    if as_json:
        print_json(_result(run))
        return
    if (found := run.reports().get("valid")) is None:
        # An ensemble that was stopped before its last member.
        return
    report = Report.model_validate(found)
    screen = console()
    print_report(screen, report)
    samples = sorted((run.folder.path / "samples").glob("*.txt"), key=lambda path: path.stat().st_mtime)
    if samples:
        text = samples[-1].read_text("utf-8").partition("# sample 1 of 1\n")[2].strip("\n")
        screen.print(" sample ".center(50, "─"))
        # Not by rich, which drops some control characters.
        typer.echo(shown(text, sys.stdout), color=True)
        screen.print("─" * 50)
    if report.misses_floor:
        screen.print("To beat the floor:")
        for way in ways_to_beat_floor(run):
            print_sentence(screen, f"- {way}")
    there = named(run.name, runs_dir)
    test = " --split test" if "test" in run.record["corpus"]["splits"] else ""
    screen.print(f'Next: lm sample {there} --prompt "…"', markup=False, soft_wrap=True)
    screen.print(f"or:   lm eval {there}{test}", markup=False, soft_wrap=True)
