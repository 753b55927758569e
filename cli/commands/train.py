"""lm train."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.chosen import chosen, first_options
from cli.options import ANY_OPTION, DEFAULT_RUNS, DataDir, Json, RunsDir, field, named, path_option
from cli.terminal import shown
from lm.config import CorpusConfig, RunConfig, TrainingConfig, parse_assignments, preset_names, validate
from lm.errors import ConfigError

if TYPE_CHECKING:
    from lm.corpora import Corpus
    from lm.runs.run import Run
    from lm.training.callbacks import End

POSITION = 1


def command(
    corpus: Annotated[
        str | None,
        typer.Argument(help=CorpusConfig.model_fields["source"].description, show_default=False),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(help=f"Where to start: {', '.join(preset_names())}; default: by the text.", show_default=False),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the run; default: after corpus and preset.", show_default=False)
    ] = None,
    minutes: Annotated[float | None, field(TrainingConfig, "minutes")] = None,
    max_steps: Annotated[int | None, field(TrainingConfig, "max_steps")] = None,
    epochs: Annotated[float | None, field(TrainingConfig, "epochs")] = None,
    stop_after: Annotated[
        int | None, typer.Option(min=1, help="Stop at this step of the plan; --resume goes on.", show_default=False)
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar=ANY_OPTION, help="Any option, e.g. model.hidden_size=768; repeatable."),
    ] = None,
    config: Annotated[Path | None, path_option(help="A TOML file of options, over the preset.")] = None,
    seed: Annotated[int | None, field(TrainingConfig, "seed")] = None,
    device: Annotated[str | None, field(TrainingConfig, "device")] = None,
    precision: Annotated[str | None, field(TrainingConfig, "precision")] = None,
    amp: Annotated[str | None, field(TrainingConfig, "amp")] = None,
    devices: Annotated[int | None, field(TrainingConfig, "devices")] = None,
    shard: Annotated[bool, field(TrainingConfig, "shard", "--shard")] = False,
    loss_scale: Annotated[str | None, field(TrainingConfig, "loss_scale")] = None,
    split_fractions: Annotated[str | None, field(CorpusConfig, "split_fractions")] = None,
    text_column: Annotated[str | None, field(CorpusConfig, "text_column")] = None,
    encoding: Annotated[str | None, field(CorpusConfig, "encoding")] = None,
    resume: Annotated[
        str | None, typer.Option(metavar="RUN", help="Go on with a run to the end of its plan.", show_default=False)
    ] = None,
    moved_to: Annotated[
        str | None,
        typer.Option(
            "--corpus",
            metavar="PATH",
            help="Where the text of the run of --resume lies now, if it has moved.",
            show_default=False,
        ),
    ] = None,
    init: Annotated[
        str | None,
        typer.Option(
            metavar="RUN", help="Start from a run's weights and tokenizer, on other text.", show_default=False
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a run of the same name.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Train nothing: say in seconds whether batch and model fit in memory.")
    ] = False,
    verify_resume: Annotated[
        bool,
        typer.Option(
            "--verify-resume",
            help="Train nothing: prove in a minute that a kill and a resume cost this training no bit on this machine.",
        ),
    ] = False,
    runs_dir: RunsDir = DEFAULT_RUNS,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Train a model on a text, and say how good it is.

    \b
    lm train input.txt
    lm train input.txt --preset gru-char --minutes 10 --set model.hidden_size=768
    lm train input.txt --devices 2
    lm train --resume RUN
    lm train input.txt --verify-resume
    """
    flags = {
        "training.minutes": minutes, "training.max_steps": max_steps, "training.epochs": epochs,
        "training.seed": seed, "training.device": device, "training.precision": precision, "training.amp": amp,
        "training.loss_scale": loss_scale, "training.devices": devices, "training.shard": shard or None,
    }  # fmt: skip
    if dry_run and verify_resume:
        raise ConfigError("--dry-run and --verify-resume are two different checks: give one of them.")
    overrides: dict[str, Any] = parse_assignments(set_ or [])
    overrides |= {path: value for path, value in flags.items() if value is not None}
    if resume is not None:
        unwanted = {
            "CORPUS": corpus, "--preset": preset, "--name": name, "--config": config, "--init": init,
            "--split-fractions": split_fractions, "--text-column": text_column, "--encoding": encoding,
            "--overwrite": overwrite, "--set": set_, "--minutes": minutes, "--epochs": epochs, "--seed": seed,
            "--precision": precision, "--amp": amp, "--loss-scale": loss_scale, "--verify-resume": verify_resume,
            "--dry-run": dry_run, "--shard": shard,
        }  # fmt: skip
        given = [flag for flag, value in unwanted.items() if value is not None and value is not False]
        if given:
            raise ConfigError(
                f"--resume {resume} goes on as the run was planned, so {', '.join(given)} cannot change it; "
                "--max-steps, --stop-after, --device, --devices and --corpus can. To train it differently, start from "
                "it with --init."
            )
        _resume(resume, runs_dir, max_steps, stop_after, device, devices, moved_to, data_dir, as_json)
        return
    if moved_to is not None:
        raise ConfigError(
            "--corpus says where the text of a run of --resume lies now. For a new run: lm train "
            + shlex.quote(moved_to)
        )
    if corpus is None:
        raise ConfigError(
            "Which text? Write: lm train FILE (or a folder, a named corpus, - for stdin; see lm train --help)."
        )
    where = {
        "source": corpus, "split_fractions": split_fractions, "text_column": text_column, "encoding": encoding
    }  # fmt: skip
    corpus_config = validate(
        CorpusConfig, {key: value for key, value in where.items() if value is not None}, where="corpus"
    )
    for key in ("split_fractions", "text_column", "encoding"):
        if where[key] is not None:
            overrides[f"corpus.{key}"] = getattr(corpus_config, key)
    if dry_run:
        _say_whether_it_fits(corpus_config, preset, config, overrides, init, runs_dir, data_dir, as_json)
        return
    if verify_resume:
        _verify(corpus_config, preset, config, overrides, init, runs_dir, data_dir, as_json)
        return
    _train(corpus_config, preset, config, overrides, name, init, stop_after, overwrite, runs_dir, data_dir, as_json)


def _verify(
    where: CorpusConfig,
    preset: str | None,
    file: Path | None,
    overrides: dict[str, Any],
    init: str | None,
    runs_dir: Path,
    data_dir: Path | None,
    as_json: bool,
) -> None:
    """Exit code 1 where something differs."""
    from dataclasses import asdict

    from cli.output import console, print_json, reading
    from lm.jobs.verify_resume import verify_resume

    base = _base(init, preset, file, runs_dir)
    with reading() as progress:
        corpus, choice = chosen(where, preset, file, overrides, base, data_dir, progress)
        options = choice.config
        if (options.training.devices or 1) > 1:
            raise ConfigError("--verify-resume trains in one process: leave --devices out.")
        console(stderr=True).print("Training a few steps twice, once with a kill in the middle: a minute at most.")
        verdict = verify_resume(
            corpus, options, runs_dir=runs_dir, init=base, data_dir=data_dir, progress=progress
        )  # fmt: skip
    if as_json:
        print_json(asdict(verdict))
    else:
        console().print(verdict.sentence, markup=False, soft_wrap=True)
    if not verdict.same:
        raise typer.Exit(1)


def _say_whether_it_fits(
    where: CorpusConfig,
    preset: str | None,
    file: Path | None,
    overrides: dict[str, Any],
    init: str | None,
    runs_dir: Path,
    data_dir: Path | None,
    as_json: bool,
) -> None:
    from cli.fitting import show
    from cli.output import reading
    from lm.corpora import prepare
    from lm.profiling.memory_estimate import estimate
    from lm.training.distributed import own_part
    from lm.training.plan import fit_to_text

    base = _base(init, preset, file, runs_dir)
    with reading() as progress:
        corpus, choice = chosen(where, preset, file, overrides, base, data_dir, progress)
        options = choice.config
        prepared = prepare(corpus, base.tokenizer if base else options.tokenizer, progress=progress)
    options = fit_to_text(options, prepared.splits["train"].counts.tokens)
    # Each process has its own rows of the batch.
    show(estimate(own_part(options, options.training.devices or 1), prepared), as_json)


def _train(
    where: CorpusConfig,
    preset: str | None,
    file: Path | None,
    overrides: dict[str, Any],
    name: str | None,
    init: str | None,
    stop_after: int | None,
    overwrite: bool,
    runs_dir: Path,
    data_dir: Path | None,
    as_json: bool,
) -> None:
    from cli.output import reading
    from cli.training import TrainingView
    from lm.jobs.train import check_new_run, train
    from lm.training import distributed

    if not distributed.started():
        check_new_run(name, runs_dir, overwrite=overwrite)
    base = _base(init, preset, file, runs_dir)
    options = first_options(where, preset, file, overrides, base)
    known = options if preset is not None or base is not None else None
    if _run_in_processes(options.training.devices, options.training.device, known):
        return
    with distributed.joined(options.training) as world, reading() as progress:
        opened: str | Corpus = where.source
        if world.first:
            opened, options = _choose(where, options.training, preset, file, overrides, base, data_dir)
        view = TrainingView(runs_dir, progress)
        run = train(
            opened, options, name=name, runs_dir=runs_dir, init=base, stop_after=stop_after, overwrite=overwrite,
            callbacks=[view], data_dir=data_dir, progress=progress,
        )  # fmt: skip
    if world.first:
        _leave_if_interrupted(view.end)
        _closing(run, runs_dir, as_json)


def _choose(
    where: CorpusConfig,
    length: TrainingConfig,
    preset: str | None,
    file: Path | None,
    overrides: dict[str, Any],
    base: Run | None,
    data_dir: Path | None,
) -> tuple[Corpus, RunConfig]:
    """The text and the options for it; says what was not said and therefore chosen."""
    from cli.output import console, reading
    from lm.jobs.train import counts_alone

    with reading() as progress:
        opened, choice = chosen(where, preset, file, overrides, base, data_dir, progress)
    told, options = console(stderr=True), choice.config
    if opened.notes:
        told.print(f"Text: {'; '.join(opened.notes)}.", markup=False, soft_wrap=True)
    if length.max_steps is None and length.epochs is None and length.minutes is None and not counts_alone(options):
        told.print("No length was given: training for 5 minutes (--minutes, --epochs or --max-steps change it).")
    if base is None and preset is None:
        tokens = "" if choice.tokens is None else f", which comes to about {choice.tokens:,} tokens on this machine"
        told.print(f"No preset was given: {options.preset} suits this text and length{tokens}.")
    if options.training.epochs != length.epochs:
        told.print(
            f"So short a text is known by heart after {options.training.epochs:g} readings: "
            "training ends there, if the time does not end before (--epochs changes it)."
        )
    return opened, options


def _run_in_processes(devices: int | None, device: str | None, options: RunConfig | None) -> bool:
    """Start this very command in several processes, where that is wanted and nobody has yet; whether it was.

    Options that are known already are looked at first.
    """
    from lm.training import distributed

    if devices is None or devices == 1 or distributed.started():
        return False
    distributed.check_devices(devices, device)
    if options is not None:
        distributed.check(options, devices)
    if code := distributed.launch(devices, [sys.executable, "-m", "cli.main", *sys.argv[1:]]):
        raise typer.Exit(code)
    return True


def _base(init: str | None, preset: str | None, file: Path | None, runs_dir: Path) -> Run | None:
    """The run that --init names."""
    from lm.runs.run import load

    if init is None:
        return None
    for flag, value in (("--preset", preset), ("--config", file)):
        if value is not None:
            raise ConfigError(
                f"--init {init} keeps that run's model and training options: leave {flag} out, change with --set."
            )
    return load(init, runs_dir=runs_dir)


def _resume(
    name: str,
    runs_dir: Path,
    max_steps: int | None,
    stop_after: int | None,
    device: str | None,
    devices: int | None,
    moved_to: str | None,
    data_dir: Path | None,
    as_json: bool,
) -> None:
    from cli.output import console, print_json, reading
    from cli.training import TrainingView
    from lm.jobs.train import counts_alone, resume
    from lm.runs.run import Run
    from lm.runs.run_folder import find_run
    from lm.training import distributed

    before = Run(find_run(name, runs_dir)[0]).config
    if _run_in_processes(devices or before.training.devices, device or before.training.device, before):
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
        _closing(run, runs_dir, as_json)
        return
    longer = f" A longer plan: lm train --resume {named(run.name, runs_dir)} --max-steps N"
    console(stderr=True).print(
        f"{run.name} is finished already.{'' if counts_alone(run.config) else longer}",
        markup=False,
        soft_wrap=True,
    )
    if as_json:
        print_json(_result(run))


def _leave_if_interrupted(end: End | None) -> None:
    """The exit code that a shell gives to a program ended by a signal: what follows with && must not run."""
    if end is not None and end.signal is not None:
        raise typer.Exit(128 + end.signal)


def _result(run: Run) -> dict[str, Any]:
    return {"run": run.name, "path": str(run.folder.path), "report": run.reports().get("valid")}


def _closing(run: Run, runs_dir: Path, as_json: bool) -> None:
    """The best score, a sample, and what to type next."""
    from cli.output import console, print_json
    from cli.report import print_report, ways_to_beat_floor
    from lm.evaluation.report import Report

    if as_json:
        print_json(_result(run))
        return
    report = Report.model_validate(run.reports()["valid"])
    screen = console()
    print_report(screen, report)
    samples = sorted((run.folder.path / "samples").glob("*.txt"), key=lambda path: path.stat().st_mtime)
    if samples:
        text = samples[-1].read_text("utf-8").partition("# sample 1 of 1\n")[2].strip("\n")
        screen.print(" a sample ".center(50, "─"))
        # Not by rich, which leaves some control characters out.
        typer.echo(shown(text, sys.stdout), color=True)
        screen.print("─" * 50)
    if report.misses_floor:
        screen.print(f"To beat the floor: {ways_to_beat_floor(run)}.", markup=False, soft_wrap=True)
    there = named(run.name, runs_dir)
    test = " --split test" if "test" in run.record["corpus"]["splits"] else ""
    screen.print(
        f'Next: lm sample {there} --prompt "…"    or: lm eval {there}{test}',
        markup=False,
        soft_wrap=True,
    )
