"""The first steps of a resumed job: find the run, check it, and find where it continues."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

from lm.config import RunConfig, merge
from lm.corpora import PreparedCorpus
from lm.errors import ConfigError, CorruptRunError, RunError
from lm.jobs.distill import recorded_teacher
from lm.jobs.ensemble_config import check_ensemble, unwrapped
from lm.jobs.new_run import END_REASONS
from lm.jobs.prepared_job import PreparedJob, ResumePoint
from lm.jobs.resolve import ResumeRequest
from lm.models.training_method import training_method
from lm.runs.adapters import find_base
from lm.runs.run import Run, load
from lm.runs.run_folder import MEMBERS, MODEL, find_run
from lm.training import distributed
from lm.training.distributed import World
from lm.training.plan import Plan


def reopen(request: ResumeRequest, world: World, locks: contextlib.ExitStack) -> PreparedJob:
    """The job that trains the rest of a run's plan, in the first process alone; `locks` holds the run's lock.

    Raises:
        LMError: the run or its corpus is not as recorded, or the request does not suit it. Nothing was changed.
    """
    folder, checkpoint = find_run(request.run, request.runs_dir)
    if checkpoint not in ("best", "last"):
        raise ConfigError(
            f"--resume {request.run}: a run resumes from its last step. To start from {checkpoint}, use --init "
            f"{request.run}."
        )
    if folder.shipped:
        raise RunError(
            f"Run {folder.name!r} is shipped and read-only. To train from its weights, use --init {folder.name}."
        )
    locks.enter_context(folder.lock())
    run = Run(folder)
    if run.record.get("imported"):
        raise RunError(
            f"Run {folder.name!r} was imported, so it has no training to resume. To train from its weights: lm train "
            f"FILE --init {folder.argument}"
        )
    record, config, corpus = run.record, run.config, None
    if request.corpus is not None:
        corpus = run.own_text(request.corpus, data_dir=request.data_dir, progress=request.progress)
        config = config.model_copy(update={"corpus": config.corpus.model_copy(update={"source": corpus.source})})
        record = {**record, "config": config.model_dump(mode="json")}
        folder.write_record(record)
        run = Run(folder)
    method = training_method(config)
    if method.in_one_pass:
        if not (folder.path / MODEL).exists():
            raise CorruptRunError(f"Run {folder.name!r} was killed while it counted: train it again (--overwrite).")
        return PreparedJob(config=config, corpus=None, path=folder.path)
    folder.sweep()
    if method.of_members:
        return reopen_ensemble(run, config, corpus, request)
    has_checkpoint = bool(folder.has_last() or folder.read_metrics() or folder.kept_checkpoints())
    progress: Any = folder.read_state()["train_state"] if has_checkpoint else {"step": 0, "stop_reason": None}
    if config.training.student and not has_checkpoint:
        return reopen_before_teacher(run, config, corpus, request)
    try:
        plan, step, stopped = Plan.from_json(record["plan"]), int(progress["step"]), progress["stop_reason"]
    except (KeyError, TypeError, ValueError):
        raise CorruptRunError(f"{folder.path} has no readable plan or step: restore it from a copy.") from None
    resets_patience = False
    if request.max_steps is not None:
        if request.max_steps < max(step, 1):
            raise ConfigError(f"--max-steps {request.max_steps}: run {folder.name!r} is at step {step} already.")
        if request.max_steps > step or stopped not in END_REASONS:
            plan = _in_steps(plan, request.max_steps)
            resets_patience, stopped = stopped == "no_progress", None
    if stopped == "out_of_time" and not request.is_restart:
        plan, stopped = _in_steps(plan, plan.steps), None
    if (plan.seconds is None and step >= plan.steps) or stopped in END_REASONS:
        return PreparedJob(config=config, corpus=None, path=folder.path, has_report="valid" in run.reports())
    if request.stop_after is not None and request.stop_after <= step:
        if request.is_restart:
            return PreparedJob(config=config, corpus=None, path=folder.path)
        raise ConfigError(f"--stop-after {request.stop_after}: run {folder.name!r} is at step {step} already.")
    if request.changes:
        # The recorded model section stays as it is: the weights carry its hash.
        config = config.model_copy(update={"training": merge(config, request.changes).training})
    distributed.check(config, world.size)
    init = recorded_base(run) or (None if has_checkpoint else _recorded_init(run))
    return PreparedJob(
        config=config,
        corpus=corpus or run.own_text(data_dir=request.data_dir, progress=request.progress),
        init=init,
        teacher=recorded_teacher(run),
        path=folder.path,
        resume=ResumePoint(plan, has_checkpoint, resets_patience),
    )


def reopen_before_teacher(
    run: Run, config: RunConfig, corpus: PreparedCorpus | None, request: ResumeRequest
) -> PreparedJob:
    """The job of a run with `training.student` that has made no step: its teacher may be incomplete.

    Raises:
        LMError: see `reopen`.
    """
    for flag, value in (("--max-steps", request.max_steps), ("--stop-after", request.stop_after)):
        if value is not None:
            raise ConfigError(f"{flag} {value}: the teacher of {run.name!r} is not trained yet: leave {flag} out.")
    if request.changes:
        config = config.model_copy(update={"training": merge(config, request.changes).training})
    check_ensemble(unwrapped(config), None)
    return PreparedJob(
        config=config,
        corpus=corpus or run.own_text(data_dir=request.data_dir, progress=request.progress),
        init=_recorded_init(run),
        path=run.folder.path,
    )


def recorded_base(run: Run) -> Run | None:
    """The base of an adapter run, which every start needs; None: the run is not an adapter.

    Raises:
        RunError: it is missing, or has other weights.
    """
    base = find_base(run.folder)
    return None if base is None else Run(*base)


def _recorded_init(run: Run) -> Run | None:
    """The run whose weights this run starts from."""
    name = run.record.get("init")
    return load(name, runs_dir=run.folder.path.parent) if name else None


def reopen_ensemble(run: Run, config: RunConfig, corpus: PreparedCorpus | None, request: ResumeRequest) -> PreparedJob:
    """The job that trains the other members of an ensemble.

    Raises:
        LMError: see `reopen`.
    """
    folder, record = run.folder, run.record
    if request.max_steps is not None:
        raise ConfigError(
            f"--max-steps {request.max_steps}: {folder.name!r} is an ensemble, and its members keep their plan. Train "
            "a new one with a longer plan."
        )
    if (folder.path / MODEL).exists() and not (folder.path / MEMBERS).is_dir():
        return PreparedJob(config=config, corpus=None, path=folder.path, has_report="valid" in run.reports())
    if request.changes:
        config = config.model_copy(update={"training": merge(config, request.changes).training})
    check_ensemble(unwrapped(config), None)
    return PreparedJob(
        config=config,
        corpus=corpus or run.own_text(data_dir=request.data_dir, progress=request.progress),
        init=_recorded_init(run),
        path=folder.path,
        resume=ResumePoint(Plan.from_json(record["plan"])),
    )


def _in_steps(plan: Plan, steps: int) -> Plan:
    """The same plan with this number of steps, whatever time they take."""
    return replace(plan, steps=steps, seconds=None, validations=None, max_steps=None, segments=None)
