"""Step 3 of a training job: check the memory, measure the speed, and fix the plan."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace

from lm.errors import ConfigError
from lm.evaluation.seen import tokens_to_score
from lm.jobs.ensemble_config import one_model
from lm.jobs.new_run import new_run_folder
from lm.jobs.prepared_job import PreparedJob
from lm.jobs.resolve import ResolvedRequest, TrainRequest
from lm.jobs.speed import Timings, measure_speed
from lm.models.base import LanguageModel
from lm.models.training_method import training_method
from lm.profiling.memory_estimate import refuse_large_model, refuse_what_cannot_fit
from lm.training import distributed
from lm.training.distillation import Teacher
from lm.training.distributed import World
from lm.training.plan import Plan, fixed_plan, timed_plan
from lm.training.trainer import Trainer

MEASURE_SECONDS, MEASURE_SHARE = 1.0, 0.02
"""Time to measure the speed before a plan by time, and the most as a share of the plan: the plan corrects it."""


def refuse_too_large(resolved: ResolvedRequest) -> None:
    """Refuse a model whose weights and optimizer alone are too large, before the text or a weight is read.

    Raises:
        DeviceError: the memory is not enough.
    """
    config, init = resolved.config, resolved.request.init
    if init is None or config.training.shard or not training_method(config).has_steps:
        # The vocabulary, and so the size, is known only after the text is read.
        return
    refuse_large_model(config, init.record["vocab_size"])


def reserve_run(job: PreparedJob, request: TrainRequest, world: World, locks: contextlib.ExitStack) -> PreparedJob:
    """The job with its run folder and its memory, in the first process alone; `locks` holds the run's lock.

    Raises:
        ConfigError: this number of processes cannot train the options.
        DeviceError: the memory is not enough.
        RunLockedError: another process trains a run of that name.
    """
    config, corpus = job.config, job.tokens
    if world.size > 1 and not job.method.has_steps:
        raise ConfigError(f"{config.model.type} models are trained in one process: leave --devices and torchrun out.")
    distributed.check(config, world.size)
    folder = new_run_folder(request.name, corpus.name, config, request.runs_dir)
    locks.enter_context(folder.lock())
    memory, config = None, one_model(config)
    if training_method(config).has_steps and not config.training.shard:
        with distributed.single_process():
            memory = refuse_what_cannot_fit(distributed.config_per_process(config, world.size), corpus)
    return replace(job, path=folder.path, overwrite=request.overwrite, memory_bytes=memory)


def measure_times(
    job: PreparedJob, make_model: Callable[[], LanguageModel], teacher: Teacher | None = None
) -> Timings | None:
    """Measured times for a plan by time, in all processes; None for a plan in steps or epochs."""
    minutes = job.config.training.minutes
    if minutes is None:
        return None
    seconds = min(MEASURE_SECONDS, minutes * 60 * MEASURE_SHARE)
    return measure_speed(job.config, job.tokens, seconds, make_model(), teacher)


def fix_plan(job: PreparedJob, trainer: Trainer, timings: Timings | None) -> Plan:
    """The plan of a new run."""
    valid = len(job.tokens.splits["valid"].ids) - 1
    sizes = trainer.config, trainer.steps_per_epoch
    if timings is None:
        plan = fixed_plan(*sizes, trainer.tokens_per_step, valid)
    else:
        plan = timed_plan(*sizes, timings.step_seconds, timings.token_seconds, valid)
        # The report of a fine-tuning scores the base as well.
        tokens = valid if job.init is None else 2 * valid + tokens_to_score(trainer.model, job.tokens)
        plan = replace(plan, report_seconds=round(tokens * timings.token_seconds, 1))
    return replace(plan, expected_bytes=job.memory_bytes)
