"""Training jobs: from a corpus to a finished run, and from an interrupted run to its end.

    resolve ──► prepare ──► measure ──► train ──► report         (one module each; `PreparedJob` goes from step to step)

With several processes, the first one alone prepares and checks the memory. It sends the job without the tokens, which
each machine has in its cache. All processes measure the speed and train.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lm.config import RunConfig, TrainingConfig, runs_folder
from lm.corpora import Corpus, Progress
from lm.device import enough_memory
from lm.errors import ConfigError
from lm.interop.imported import find_or_import
from lm.jobs.autoconfig import Family, TokenKind
from lm.jobs.counting import train_by_counting
from lm.jobs.distill import make_teacher, teacher_name, teacher_record
from lm.jobs.ensemble import drop_teacher, train_members, train_teacher
from lm.jobs.ensemble_config import student_config
from lm.jobs.measure import fix_plan, measure_times, refuse_too_large, reserve_run
from lm.jobs.new_run import check_new_run, run_of_this_job
from lm.jobs.prepare import open_text, prepare_job
from lm.jobs.prepared_job import PreparedJob
from lm.jobs.report import report_run
from lm.jobs.resolve import ResolvedRequest, ResumeRequest, TrainRequest, init_config, resolve_new_run
from lm.jobs.resume import reopen
from lm.jobs.share import share_job
from lm.models.base import LanguageModel, build_model
from lm.models.lora import add_adapters
from lm.models.training_method import TrainingMethod, training_method
from lm.runs.adapters import read_whole_weights
from lm.runs.record import run_record
from lm.runs.run import Run
from lm.runs.run_folder import EVENTS, RunFolder
from lm.training import distributed
from lm.training.callbacks import Callback, End
from lm.training.distributed import World
from lm.training.film import Film
from lm.training.last_checkpoint import with_saved_format
from lm.training.plan import Plan
from lm.training.tensorboard import TensorBoard
from lm.training.trackers import check_tracker, tracked
from lm.training.trainer import Trainer

__all__ = ["check_new_run", "init_config", "resume", "train", "train_new_run"]


def train(
    corpus: str | Path | Corpus,
    config: RunConfig | None = None,
    *,
    minutes: float | None = None,
    epochs: float | None = None,
    max_steps: int | None = None,
    preset: str | None = None,
    family: Family | None = None,
    tokens: TokenKind | None = None,
    neural: bool = False,
    ensemble: int | None = None,
    distill: str | Run | None = None,
    overrides: Mapping[str, Any] | None = None,
    name: str | None = None,
    runs_dir: Path | str | None = None,
    init: Run | str | None = None,
    stop_after: int | None = None,
    overwrite: bool = False,
    callbacks: Sequence[Callback] = (),
    data_dir: Path | None = None,
    progress: Progress | None = None,
) -> Run:
    """Train a model on a corpus, as a new run.

    Args:
        corpus: what `CorpusConfig.source` may be, or an opened corpus.
        config: all options, from `lm.config.compose`; None: the default model, which suits the text,
            the length and the machine.
        minutes, epochs, max_steps: length of the plan; default: the config's, else 5 minutes. The one that ends first
            counts.
        preset: start from this preset instead of a config.
        family, tokens: of the default model; None: a GRU, and the tokens that suit the text.
        neural: a default model without counts.
        ensemble: train this many models with different seeds and average their probabilities.
        distill: the run, or its name as in `lm.load`, whose probabilities the model learns as well.
        overrides: other options over config or preset, "section.field" → value, as in `lm.config.compose`.
        name: of the run; None: made from corpus and model.
        runs_dir: folder of the runs; default: INKLING_RUNS, else checkpoints.
        init: start from the weights and tokenizer of this run, or of a model that `lm.import_model` takes; `config`
            then has its model options.
        stop_after: stop at this step of the plan; `resume` continues.
        overwrite: replace a run of that name.
        callbacks: receive the events of the training.
        data_dir: folder of named corpora.
        progress: called while the corpus is read.

    In a program that torchrun started in several processes, all of them call this. The arguments of the first process
    count; it alone reads the text, calls the callbacks and writes.

    Returns:
        The run with its best weights and their saved report on the validation split. An interrupted run (Ctrl-C) is
        saved without a report.

    Raises:
        LMError: an error the user can correct; nothing was overwritten.
    """
    runs_dir = runs_folder(runs_dir)
    teacher = teacher_name(distill, runs_dir) if isinstance(distill, Run) else distill
    given = {
        "minutes": minutes, "epochs": epochs, "max_steps": max_steps, "ensemble": ensemble, "distill": teacher
    }  # fmt: skip
    if isinstance(init, str):
        init = find_or_import(init, runs_dir=runs_dir, progress=progress)
    changes = {f"training.{field}": value for field, value in given.items() if value is not None}
    request = TrainRequest(
        corpus=corpus if isinstance(corpus, Corpus) else str(corpus), config=config, preset=preset,
        family=family, tokens=tokens, neural=neural, overrides={**changes, **(overrides or {})}, init=init,
        name=name, runs_dir=runs_dir, overwrite=overwrite, stop_after=stop_after,
        data_dir=data_dir, callbacks=callbacks, progress=progress,
    )  # fmt: skip
    return train_new_run(resolve_new_run(request))


def resume(
    run: str | None,
    *,
    runs_dir: Path | str | None = None,
    max_steps: int | None = None,
    stop_after: int | None = None,
    device: str | None = None,
    devices: int | None = None,
    corpus: Path | str | None = None,
    callbacks: Sequence[Callback] = (),
    data_dir: Path | None = None,
    progress: Progress | None = None,
) -> tuple[Run, bool]:
    """Train the rest of a run's plan.

    Args:
        run: as in `lm.load`.
        runs_dir: folder of the runs; default: INKLING_RUNS, else checkpoints.
        max_steps: a new length of the plan, longer than what is done.
        stop_after: stop at this step of the plan.
        device: another device than before.
        devices: another number of processes than before.
        corpus: the new path of the run's text, if it has moved; it must be the same text.
        callbacks: receive the events of the training.
        data_dir: folder of named corpora.
        progress: called if the corpus has to be read again.

    Returns:
        The run, and whether anything was left to do.

    Raises:
        LMError: the run or its corpus is not as recorded; nothing was changed.
    """
    changes = {"training.device": device, "training.devices": devices}
    request = ResumeRequest(
        run=run, runs_dir=runs_folder(runs_dir), max_steps=max_steps, stop_after=stop_after,
        changes={path: value for path, value in changes.items() if value is not None}, corpus=corpus,
        data_dir=data_dir, callbacks=callbacks, progress=progress,
    )  # fmt: skip
    with _joined(TrainingConfig(device=device)) as (world, locks):
        job = share_job(world, request, lambda: reopen(request, world, locks))
        return _train_job(world, job, request)


def counts_alone(config: RunConfig) -> bool:
    """Old name of `training_method(config).in_one_pass`. To remove in 0.3."""
    warnings.warn(
        "counts_alone is now lm.models.training_method.training_method(config).in_one_pass; the old name goes in 0.3.",
        DeprecationWarning,
        stacklevel=2,
    )
    return training_method(config).in_one_pass


def train_new_run(resolved: ResolvedRequest) -> Run:
    """Prepare, measure, train and report a resolved request. See `train`."""
    request, training = resolved.request, resolved.config.training
    check_tracker(training.log_to)
    with _joined(training) as (world, locks):
        if (training.devices or 1) > 1 and not distributed.started():
            raise ConfigError(
                f"training.devices={training.devices}: use torchrun --nproc-per-node N script.py to start a script in "
                "several processes, or lm train --devices N."
            )
        job = share_job(world, request, lambda: _begin(resolved, world, locks))
        return _train_job(world, job, request)[0]


@contextlib.contextmanager
def _joined(training: TrainingConfig) -> Iterator[tuple[World, contextlib.ExitStack]]:
    """The processes of the job, and what holds the run's lock until the end of the block."""
    with distributed.joined(training) as world, contextlib.ExitStack() as locks, enough_memory():
        yield world, locks


def _begin(resolved: ResolvedRequest, world: World, locks: contextlib.ExitStack) -> PreparedJob:
    """The job of a new run, or of the run that this job created before a restart; in the first process alone."""
    request = resolved.request
    refuse_too_large(resolved)
    corpus = open_text(resolved)
    if distributed.job_name() is not None:
        own = run_of_this_job(request.name, corpus.source, request.runs_dir)
        if own is not None:
            again = ResumeRequest(
                run=str(own.path), stop_after=request.stop_after, data_dir=request.data_dir,
                progress=request.progress, is_restart=True,
            )  # fmt: skip
            return reopen(again, world, locks)
        check_new_run(request.name, request.runs_dir, overwrite=request.overwrite)
    job = prepare_job(resolved, corpus)
    if request.on_prepared is not None:
        request.on_prepared(resolved, job)
    return reserve_run(job, request, world, locks)


# -- the train step -------------------------------------------------------------------------------------


def _train_job(world: World, job: PreparedJob, request: TrainRequest | ResumeRequest) -> tuple[Run, bool]:
    """Train a job and report it, in all processes; whether anything was left to do."""
    assert job.path is not None
    folder = distributed.folder_of(world, job.path)
    with contextlib.ExitStack() as stack:
        tracker = None
        if world.is_rank0 and (job.corpus is not None or not job.has_report):
            tracker = stack.enter_context(tracked(job.config, folder.path, continues=not job.overwrite))
        if tracker is None:
            return _train_and_report(world, job, request, folder)
        run, was_left = _train_and_report(world, job, replace(request, callbacks=[tracker, *request.callbacks]), folder)
        if (report := run.reports().get("valid")) is not None:
            tracker.report(report)
        return run, was_left


def _train_and_report(
    world: World, job: PreparedJob, request: TrainRequest | ResumeRequest, folder: RunFolder
) -> tuple[Run, bool]:
    if job.corpus is not None:
        return _TRAIN[job.method](job, folder, request), True
    run = Run(folder)
    if not job.has_report and world.is_rank0:
        run.own_text(data_dir=request.data_dir)
        run = report_run(folder, str(world.pick_device(job.config.training.device)), request.callbacks)
        drop_teacher(folder)
    world.barrier()
    return run, not job.has_report


def _train_in_steps(job: PreparedJob, folder: RunFolder, request: TrainRequest | ResumeRequest) -> Run:
    """Train one model, after the teacher of `training.student`, and report it."""
    world = distributed.current()
    if job.config.training.student and job.resume is None:
        taught = train_teacher(job, folder, request, _train_steps)
        if taught is None:
            return Run(folder)
        job = taught
    recorded = request.plan if isinstance(request, TrainRequest) else None
    callbacks = [TensorBoard(folder.path / EVENTS), *request.callbacks]
    end = _train_steps(job, folder, callbacks, request.stop_after, recorded)
    device = str(world.pick_device(job.config.training.device))
    run = Run(folder, device=device)
    # An interrupted run is saved, and `lm eval` can measure it later.
    if world.is_rank0 and end.reason != "interrupted":
        run = report_run(folder, device, request.callbacks, base=job.init)
        drop_teacher(folder)
    world.barrier()
    return run


def _train_each_member(job: PreparedJob, folder: RunFolder, request: TrainRequest | ResumeRequest) -> Run:
    """Train an ensemble."""
    return train_members(job, folder, request, _train_steps)


_TRAIN: dict[TrainingMethod, Callable[[PreparedJob, RunFolder, TrainRequest | ResumeRequest], Run]] = {
    TrainingMethod.GRADIENT: _train_in_steps,
    TrainingMethod.BOTH: _train_in_steps,
    TrainingMethod.COUNTING: train_by_counting,
    TrainingMethod.MEMBERS: _train_each_member,
}
"""Each trains a new or a resumed job and reports it."""


def _train_steps(
    job: PreparedJob,
    folder: RunFolder,
    callbacks: Sequence[Callback],
    stop_after: int | None,
    recorded: Plan | None = None,
) -> End:
    """Train a new or a resumed run to the end of its plan, or to step `stop_after`, without a report.

    Args:
        job: the job.
        folder: of the run.
        callbacks: receive the events, in the first process.
        stop_after: a step of the plan.
        recorded: the plan of another run, which a new run follows; None: make a plan.
    """
    trainer, plan = _new_trainer(job, folder, recorded) if job.resume is None else _resumed_trainer(job, folder)
    trainer.callbacks = []
    if distributed.current().is_rank0:
        trainer.callbacks += callbacks
        training = job.config.training
        if training.film:
            trainer.callbacks.append(
                Film(folder, trainer.step, job.tokens.tokenizer, prompt=training.film_prompt or "")
            )
    return trainer.train(plan, stop_after=stop_after)


def _new_trainer(job: PreparedJob, folder: RunFolder, recorded: Plan | None) -> tuple[Trainer, Plan]:
    """The trainer of a new run at step 0, and its plan: `recorded` or a new one; the run folder is created."""
    config = job.config
    job = replace(job, config=student_config(config))
    make_model, teacher = _model_factory(job), make_teacher(job)
    timings = None if recorded is not None else measure_times(job, make_model, teacher)
    if teacher is not None:
        teacher.state = None
    trainer = Trainer(folder, job.config.training, make_model(), job.tokens, teacher=teacher)
    plan = recorded or fix_plan(job, trainer, timings)
    record = {
        **run_record(config, job.tokens, trainer.model, job.init), "plan": plan.to_json(),
        "precision": str(trainer.step.mixed.format),
    }  # fmt: skip
    if job.teacher is not None:
        record["teacher"] = teacher_record(job.teacher)
    if (name := distributed.job_name()) is not None:
        record["job"] = name
    if config.training.student:
        # The folder was made before the teacher was trained in it.
        folder.write_record({**folder.read_record(), **record})
    else:
        folder.create(record, job.tokens.tokenizer, overwrite=job.overwrite)
    return trainer, plan


def _resumed_trainer(job: PreparedJob, folder: RunFolder) -> tuple[Trainer, Plan]:
    """The trainer of a run at its saved step, and its plan; changes of options are recorded."""
    assert job.resume is not None
    plan = job.resume.plan
    training = job.config.training
    if job.resume.has_checkpoint:
        training = with_saved_format(training, folder)
    trainer = Trainer(folder, training, _model_factory(job)(), job.tokens, teacher=make_teacher(job))
    if job.resume.has_checkpoint:
        trainer.load()
    record = folder.read_record()
    changed = {
        "plan": plan.to_json(), "config": job.config.model_dump(mode="json"),
        "precision": str(trainer.step.mixed.format),
    }  # fmt: skip
    if changed != {key: record.get(key) for key in changed}:
        folder.write_record({**record, **changed})
    if job.resume.resets_patience:
        trainer.reset_patience()
    return trainer, plan


def _model_factory(job: PreparedJob) -> Callable[[], LanguageModel]:
    """A function that makes an equal model at each call: with fresh weights, or with those of the initial run.

    With `training.lora` these are frozen, and the model has fresh adapters.

    A model that counts as well counts the training text once, also when the job continues from a checkpoint: that has
    only what evaluation needs of the counts.
    """
    fitted: Any = None

    def make() -> LanguageModel:
        nonlocal fitted
        model = build_model(job.config.model, job.tokens.tokenizer.vocab_size, seed=job.config.training.seed)
        if job.init is not None:
            # Not `Run.arrays`, which stay in memory.
            arrays, _ = read_whole_weights(job.init.folder, job.init.checkpoint)
            try:
                model.load_arrays(arrays)
            except ValueError as error:
                raise ConfigError(
                    f"--init {job.init.name}: {error}; leave options that change the model's shape out."
                ) from None
        if fitted is None:
            model.fit(np.asarray(job.tokens.splits["train"].ids))
            fitted = model.fitted()
        else:
            model.use_fitted(fitted)
        return add_adapters(model, job.config.training)

    return make
