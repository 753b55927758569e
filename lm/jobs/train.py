"""Whole training jobs: from a corpus to a finished run, and from an interrupted run to its end."""

from __future__ import annotations

import contextlib
import logging
import platform
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lm.config import (
    CorpusConfig,
    RunConfig,
    Section,
    TrainingConfig,
    compose,
    merge,
    preset_names,
    read_preset,
    runs_folder,
)
from lm.corpora import Corpus, PreparedCorpus, Progress, load_prepared, open_corpus, prepare
from lm.device import enough_memory
from lm.errors import ConfigError, CorpusError, CorruptRunError, RunError
from lm.files import check_folder
from lm.generation.options import SamplingOptions
from lm.jobs.autoconfig import EVERY, choose_config, first_that_fits
from lm.models.base import build_model
from lm.profiling.memory_estimate import refuse_what_cannot_fit
from lm.registry import MODELS
from lm.runs.card import model_name
from lm.runs.record import run_record
from lm.runs.run import Run, load
from lm.runs.run_folder import CONFIG, EVENTS, MODEL, RunFolder, find_run, list_runs
from lm.tokenizers.base import Tokenizer
from lm.training import distributed
from lm.training.callbacks import Callback, End, Start
from lm.training.distributed import ReadOnlyRunFolder, World
from lm.training.plan import DEFAULT_MINUTES, Plan, bptt_of, fit_to_text, fixed_plan, timed_plan
from lm.training.precision import choose_format
from lm.training.tensorboard import TensorBoard
from lm.training.trainer import Trainer

log = logging.getLogger(__name__)

ENDINGS = ("finished", "out_of_time", "no_progress")
"""Ways to stop that end a job. A run out of time can be resumed all the same: its plan has steps left."""
CLOSING_SAMPLE = SamplingOptions(max_tokens=300)


def train(
    corpus: str | Path | Corpus,
    config: RunConfig | None = None,
    *,
    minutes: float | None = None,
    epochs: float | None = None,
    max_steps: int | None = None,
    preset: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    name: str | None = None,
    runs_dir: Path | str | None = None,
    init: Run | None = None,
    stop_after: int | None = None,
    overwrite: bool = False,
    callbacks: Sequence[Callback] = (),
    data_dir: Path | None = None,
    progress: Progress | None = None,
) -> Run:
    """Train a model on a corpus, as a new run.

    Args:
        corpus: what `CorpusConfig.source` may be, or an opened corpus.
        config: all options, from `lm.config.compose`; None takes the preset that suits the text and the length.
        minutes, epochs, max_steps: length of the plan; default: the config's, else 5 minutes. Of several, the one that
            ends first.
        preset: this one, instead of a config.
        overrides: other options over config or preset, "section.field" → value, as in `lm.config.compose`.
        name: of the run; None names it after corpus and model.
        runs_dir: where the run folder is made; default: INKLING_RUNS, else checkpoints.
        init: a run whose weights and tokenizer to start from; `config` then has its model options.
        stop_after: stop at this step of the plan; `resume` goes on.
        overwrite: replace a run of that name.
        callbacks: what watches.
        data_dir: where named corpora lie.
        progress: called while the corpus is read.

    In a program that torchrun started in several processes, all of them call this; the first one's arguments count,
    and it alone reads the text, watches and writes.

    Returns:
        The run with its best weights, their report on the validation split saved; one that was interrupted (Ctrl-C)
        is saved without a report.

    Raises:
        LMError: anything the caller can mend; nothing was overwritten.
    """
    length = {"minutes": minutes, "epochs": epochs, "max_steps": max_steps}
    changes = {f"training.{field}": value for field, value in length.items() if value is not None}
    changes |= overrides or {}
    source = corpus.source if isinstance(corpus, Corpus) else str(corpus)

    def make(preset: str) -> RunConfig:
        return compose(source, preset=preset, overrides=changes)

    if preset is not None and (config is not None or init is not None):
        raise ConfigError(f"preset={preset!r}: config or init has its preset already: leave preset out.")
    if config is not None:
        config = merge(config, changes) if changes else config
    elif init is not None:
        config = init_config(init, CorpusConfig(source=source), changes)
    elif preset is not None:
        config = make(preset)
    # What is wrong in the options is found before the text is read.
    known = config or first_that_fits(EVERY, make)
    training = known.training
    with distributed.joined(training) as world, contextlib.ExitStack() as held, enough_memory():
        if (training.devices or 1) > 1 and not distributed.started():
            raise ConfigError(
                f"training.devices={training.devices}: torchrun starts a script in several processes (torchrun "
                "--nproc-per-node N script.py), and lm train --devices N does on the command line."
            )

        def begin() -> _Job:
            place = runs_folder(runs_dir)
            return _begin(
                held, corpus, known.corpus, config or make, name, place, init, stop_after, overwrite, data_dir,
                progress, world,
            )  # fmt: skip

        job = world.broadcast_from_rank0(begin)
        if job.plan is not None or job.done:
            return _go_on(world, job, stop_after, callbacks, data_dir)[0]
        return _start(world, job, stop_after, callbacks, data_dir)


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
    """Go on with a run to the end of its plan.

    Args:
        run: as in `lm.load`.
        runs_dir: where the runs lie; default: INKLING_RUNS, else checkpoints.
        max_steps: a new length of the plan, longer than what is done.
        stop_after: stop at this step of the plan.
        device: another device than before.
        devices: another number of processes than before, as they were started.
        corpus: where the run's text lies now, if it has moved; it must be the same text.
        callbacks: what watches.
        data_dir: where named corpora lie.
        progress: called if the corpus has to be read again.

    Returns:
        The run, and whether there was anything left to do.

    Raises:
        LMError: the run or its corpus is not what it was; nothing was changed.
    """
    with (
        distributed.joined(TrainingConfig(device=device)) as world,
        contextlib.ExitStack() as held,
        enough_memory(),
    ):

        def begin() -> _Job:
            folder, state_name = find_run(run, runs_folder(runs_dir))
            if state_name not in ("best", "last"):
                raise ConfigError(
                    f"--resume {run}: a run goes on from its last step; start from {state_name} with --init {run}."
                )
            if folder.shipped:
                raise RunError(
                    f"Run {folder.name!r} is shipped and read-only: train on from it with --init {folder.name}."
                )
            changes = {"training.device": device, "training.devices": devices}
            changes = {path: value for path, value in changes.items() if value is not None}
            return _reopen(
                held, folder, max_steps, stop_after, changes, data_dir, progress, world,
                corpus=corpus,
            )  # fmt: skip

        return _go_on(world, world.broadcast_from_rank0(begin), stop_after, callbacks, data_dir)


def init_config(run: Run, corpus: CorpusConfig, overrides: dict[str, Any]) -> RunConfig:
    """The configuration of a run that starts from another one: its model and tokenizer, and its way of training.

    Raises:
        ConfigError: an override would change what the weights were made for.
    """
    base = run.config.model_copy(update={"corpus": corpus})
    length = {f"training.{field}": None for field in ("max_steps", "epochs", "minutes", "evaluate_every")}
    config = merge(base, {**length, **overrides})
    if config.tokenizer != base.tokenizer:
        raise ConfigError(f"--init {run.name} keeps that run's tokenizer: leave tokenizer options out.")
    return config


# -- what the first process decides, and all do ---------------------------------------------------------


@dataclass(frozen=True)
class _Job:
    """What all processes of a job need to know; the first one decides it and tells the others."""

    path: Path
    """Of the run's folder."""
    config: RunConfig
    prepared: PreparedCorpusRef | None = None
    init: str | None = None
    """The run that a new one starts from, PATH@STATE."""
    overwrite: bool = False
    plan: Plan | None = None
    """Of a run that goes on; None for a new one, whose plan is still to be made."""
    begun: bool = True
    """False for a run that was ended before anything of it was saved."""
    patient: bool = False
    """Whether patience begins anew."""
    done: bool = False
    """Whether there is nothing left to train."""
    memory: int | None = None
    """Bytes of tensors that training is expected to take in each process."""
    reported: bool = True
    """False for one that was ended after the last step and before its report."""


@dataclass(frozen=True)
class PreparedCorpusRef:
    """Which prepared corpus it is; its tokens lie in each machine's cache."""

    key: str
    sha256: str
    tokenizer_sha256: str
    name: str
    source: str
    notes: tuple[str, ...]

    @classmethod
    def of(cls, corpus: PreparedCorpus) -> PreparedCorpusRef:
        """Of a corpus that is here."""
        return cls(corpus.key, corpus.sha256, corpus.tokenizer.sha256, corpus.name, corpus.source, corpus.notes)

    def load(self, tokenizer: Tokenizer | Section, config: CorpusConfig, data_dir: Path | None) -> PreparedCorpus:
        """The same corpus from this machine's cache; made here where it is not in it.

        Raises:
            CorpusError: this machine has another text.
        """
        found = load_prepared(self.key)
        if found is None or found.tokenizer.sha256 != self.tokenizer_sha256:
            found = prepare(open_corpus(config, data_dir=data_dir), tokenizer)
        if (found.sha256, found.tokenizer.sha256) != (self.sha256, self.tokenizer_sha256):
            raise CorpusError(
                f"{self.source} on {platform.node()} is not the text that the first process has: give all machines the "
                "same file, or let them share INKLING_CACHE."
            )
        return replace(found, name=self.name, source=self.source, notes=self.notes)


def _begin(
    held: contextlib.ExitStack,
    corpus: str | Path | Corpus,
    where: CorpusConfig,
    config: RunConfig | Callable[[str], RunConfig],
    name: str | None,
    runs_dir: Path,
    init: Run | None,
    stop_after: int | None,
    overwrite: bool,
    data_dir: Path | None,
    progress: Progress | None,
    world: World,
) -> _Job:
    """Everything up to the first step that is for one process alone; the run's lock stays in `held`.

    Args:
        where: how the text is read, where `corpus` is not opened yet.
        config: all options, or what makes them over the preset that is to be chosen.
    """
    if isinstance(config, RunConfig):
        distributed.check(config, world.size)
    if distributed.job_name() is None:
        # A job that is started again finds its own run in that place.
        check_new_run(name, runs_dir, overwrite=overwrite)
    if not isinstance(corpus, Corpus):
        where = where.model_copy(update={"source": str(corpus)})
        corpus = open_corpus(where, data_dir=data_dir, progress=progress)
    own = _of_this_job(name, corpus.source, runs_dir)
    if own is not None:
        return _reopen(held, own, None, stop_after, {}, data_dir, progress, world, again=True)
    if not isinstance(config, RunConfig):
        with distributed.alone():
            config = choose_config(corpus, config, progress=progress).config
        distributed.check(config, world.size)
    config = config.model_copy(update={"corpus": config.corpus.model_copy(update={"source": corpus.source})})
    choose_format(config.training, world.place(config.training.device))
    if stop_after is not None and stop_after < 1:
        raise ConfigError(f"--stop-after {stop_after}: give a step of the plan, 1 or later.")
    if world.size > 1 and counts_alone(config):
        raise ConfigError(
            f"{config.model.type} models are trained by counting, in one process: leave --devices and torchrun out."
        )
    folder = _new_folder(name, corpus, config, runs_dir, overwrite)
    if "valid" not in corpus.splits:
        raise CorpusError(f"{corpus.source} has no validation split, so nothing could tell the best weights: add one.")
    prepared = prepare(corpus, init.tokenizer if init else config.tokenizer, progress=progress)
    if corpus.tokens is not None:
        # Prepared in shards: with the tokenizer that made them.
        config = config.model_copy(update={"tokenizer": Section(**prepared.tokenizer.options.model_dump(mode="json"))})
    if not counts_alone(config):
        config = _fitted(config, prepared)
    held.enter_context(folder.lock())
    memory = None
    # Of what counts as well, the counts would be made twice.
    if MODELS.resolve(config.model.type).trained_by == "gradient" and not config.training.shard:
        with distributed.alone():
            memory = refuse_what_cannot_fit(distributed.own_part(config, world.size), prepared)
    return _Job(
        folder.path,
        config,
        PreparedCorpusRef.of(prepared),
        init=f"{init.folder.path}@{init.state}" if init else None,
        overwrite=overwrite,
        memory=memory,
    )


def _fitted(config: RunConfig, corpus: PreparedCorpus) -> RunConfig:
    """The options with batches that fit the text; a notice says what was changed."""
    tokens = corpus.splits["train"].counts.tokens
    fitted = fit_to_text(config, tokens)
    if fitted is not config:
        log.warning(
            "The training text has %s tokens: a batch has %d rows of %d tokens instead of %d rows of %d.",
            f"{tokens:,}",
            fitted.training.batch_size,
            bptt_of(fitted),
            config.training.batch_size,
            bptt_of(config),
        )
    return fitted


def _of_this_job(name: str | None, source: str, runs_dir: Path) -> RunFolder | None:
    """The run that this job began before it was started again: after a failure, with other machines, or requeued."""
    job = distributed.job_name()
    if job is None:
        return None
    for folder in [RunFolder(runs_dir / name)] if name is not None else list_runs(runs_dir):
        if not (folder.path / CONFIG).is_file():
            continue
        record = folder.read_record()
        if record.get("job") != job or record["config"]["corpus"]["source"] != source:
            continue
        # A job that is not started again but bears the same name as one that ended well is a new one.
        ended = folder.has_last() and folder.read_state()["train_state"]["stop_reason"] in ENDINGS
        if distributed.restarted() or not ended:
            return folder
    return None


def _start(
    world: World, job: _Job, stop_after: int | None, callbacks: Sequence[Callback], data_dir: Path | None
) -> Run:
    """Train a new run."""
    config, told = job.config, job.prepared
    assert told is not None
    init = None if job.init is None else load(job.init)
    tokenizer = init.tokenizer if init else config.tokenizer
    prepared = world.local_rank0_first(lambda: told.load(tokenizer, config.corpus, data_dir))
    folder = distributed.folder_of(world, job.path)
    if counts_alone(config):
        return _fit_by_counting(folder, config, prepared, init, job.overwrite, callbacks)
    make = _factory(folder, config, prepared, init)
    config, plan = _fix_plan(config, make)
    trainer = make()
    plan = replace(plan, expected_bytes=job.memory)
    record = {**run_record(config, prepared, trainer.model, init), "plan": plan.to_json()}
    if (name := distributed.job_name()) is not None:
        record["job"] = name
    folder.create(record, prepared.tokenizer, overwrite=job.overwrite)
    return _run(trainer, plan, stop_after, callbacks)


def _reopen(
    held: contextlib.ExitStack,
    folder: RunFolder,
    max_steps: int | None,
    stop_after: int | None,
    changes: dict[str, Any],
    data_dir: Path | None,
    progress: Progress | None,
    world: World,
    *,
    corpus: Path | str | None = None,
    again: bool = False,
) -> _Job:
    """What is left of a run, found and checked by one process alone; the run's lock stays in `held`.

    Args:
        corpus: where its text lies now, if not where it did; recorded once it is known to be the same text.
        again: the launcher started the job again, as it stood: what it asked for may be reached already.
    """
    held.enter_context(folder.lock())
    current = Run(folder)
    record, config = current.record, current.config
    prepared = None
    if corpus is not None:
        prepared = current.own_text(corpus, data_dir=data_dir, progress=progress)
        config = config.model_copy(update={"corpus": config.corpus.model_copy(update={"source": prepared.source})})
        record = {**record, "config": config.model_dump(mode="json")}
        folder.write_record(record)
        current = Run(folder)
    if counts_alone(config):
        if not (folder.path / MODEL).exists():
            raise CorruptRunError(f"Run {folder.name!r} was killed while it counted: train it again (--overwrite).")
        return _Job(folder.path, config, done=True)
    folder.sweep()
    begun = bool(folder.has_last() or folder.read_metrics() or folder.kept_checkpoints())
    # A kill may come before the first save, when nothing is trained yet: then it begins at its first step.
    state: Any = folder.read_state()["train_state"] if begun else {"step": 0, "stop_reason": None}
    try:
        plan, done = Plan.from_json(record["plan"]), int(state["step"])
        stopped = state["stop_reason"]
    except (KeyError, TypeError, ValueError):
        raise CorruptRunError(f"{folder.path} has no plan or step that can be read: restore it from a copy.") from None
    patient = False
    if max_steps is not None:
        if max_steps < max(done, 1):
            raise ConfigError(f"--max-steps {max_steps}: run {folder.name!r} is at step {done} already.")
        if max_steps > done or stopped not in ENDINGS:
            plan = replace(plan, steps=max_steps, seconds=None)
            patient, stopped = stopped == "no_progress", None
    if stopped == "out_of_time" and not again:
        # The steps of the plan are there to be finished; its time is spent.
        plan, stopped = replace(plan, seconds=None), None
    if done >= plan.steps or stopped in ENDINGS:
        return _Job(folder.path, config, done=True, reported="valid" in current.reports())
    if stop_after is not None and stop_after <= done:
        if again:
            return _Job(folder.path, config, done=True)
        raise ConfigError(f"--stop-after {stop_after}: run {folder.name!r} is at step {done} already.")
    if changes:
        # The other sections as they were recorded: the weights carry the hash of the model's.
        config = config.model_copy(update={"training": merge(config, changes).training})
    distributed.check(config, world.size)
    init = load(record["init"], runs_dir=folder.path.parent) if record.get("init") and not begun else None
    return _Job(
        folder.path,
        config,
        PreparedCorpusRef.of(current.own_text(data_dir=data_dir, progress=progress) if prepared is None else prepared),
        init=f"{init.folder.path}@{init.state}" if init else None,
        plan=plan,
        begun=begun,
        patient=patient,
    )


def _go_on(
    world: World, job: _Job, stop_after: int | None, callbacks: Sequence[Callback], data_dir: Path | None
) -> tuple[Run, bool]:
    """Train what is left of a run; whether there was anything."""
    folder = distributed.folder_of(world, job.path)
    run = Run(folder)
    if job.done:
        if not job.reported and world.first:
            run.own_text(data_dir=data_dir)
            run = _close(folder, str(world.place(job.config.training.device)), callbacks)
        world.wait()
        return run, not job.reported
    if isinstance(folder, ReadOnlyRunFolder):
        folder.await_record()
    told, plan = job.prepared, job.plan
    assert told is not None and plan is not None
    prepared = world.local_rank0_first(lambda: told.load(run.tokenizer, job.config.corpus, data_dir))
    init = None if job.init is None else load(job.init)
    trainer = _factory(folder, job.config, prepared, init, resumes=job.begun)()
    if job.begun:
        trainer.load()
    changed = {"plan": plan.to_json(), "config": job.config.model_dump(mode="json")}
    if changed != {key: run.record[key] for key in changed}:
        folder.write_record({**run.record, **changed})
    if job.patient:
        # Whoever asks for more steps wants as much patience again.
        trainer.state.stalls = trainer.state.harmful = 0
    return _run(trainer, plan, stop_after, callbacks), True


# -- the parts ------------------------------------------------------------------------------------------


def check_new_run(name: str | None, runs_dir: Path, *, overwrite: bool = False) -> None:
    """See that a run of this name can be made, before its text is read; None: one that is named after its text.

    Raises:
        ConfigError: it is no name for a run.
        RunError: it is taken, or the folder cannot be written to.
    """
    if name is None:
        check_folder(runs_dir)
        return
    if not re.fullmatch(r"\w[\w.+-]*", name):
        raise ConfigError(
            f"--name {name!r}: a run's name is a folder's name of letters, digits and . _ + -, and begins with a "
            "letter or digit."
        )
    RunFolder(runs_dir / name).check_new(overwrite=overwrite)


def _new_folder(name: str | None, corpus: Corpus, config: RunConfig, runs_dir: Path, overwrite: bool) -> RunFolder:
    if name is not None:
        check_new_run(name, runs_dir, overwrite=overwrite)
        return RunFolder(runs_dir / name)
    base = re.sub(r"[^\w.+]+", "-", f"{corpus.name}-{_called(config)}").lstrip("-.+")
    taken = {run.name for run in list_runs(runs_dir)}
    candidates = (base if number == 1 else f"{base}-{number}" for number in range(1, 1_000_000))
    return RunFolder(runs_dir / next(c for c in candidates if c not in taken and not (runs_dir / c).exists()))


def _called(config: RunConfig) -> str:
    """The preset, or what the model is where options made something else of it."""
    if config.preset not in preset_names():
        return config.model.type
    sections = read_preset(str(config.preset))
    kept = all(sections[part]["type"] == getattr(config, part).type for part in ("model", "tokenizer"))
    return str(config.preset) if kept else model_name(config)


def _factory(
    folder: RunFolder, config: RunConfig, corpus: PreparedCorpus, init: Run | None, *, resumes: bool = False
) -> Any:
    """A function that makes an equal trainer each time it is called.

    A model that counts as well counts the training text once, whatever `init` had counted; one that resumes is to be
    given the counts that it was saved with.
    """
    fitted: dict[str, Any] = {}

    notes: tuple[str, ...] = ()

    def make() -> Trainer:
        nonlocal notes
        model = build_model(config.model, corpus.tokenizer.vocab_size, seed=config.training.seed)
        if fitted:
            model.load_arrays(fitted)
            model.notes = notes
            return Trainer(folder, config.training, model, corpus)
        if init is not None:
            arrays, _ = init.folder.read_weights(init.state)
            try:
                model.load_arrays(arrays)
            except ValueError as error:
                raise ConfigError(
                    f"--init {init.name}: {error}; leave options that change the model's shape out."
                ) from None
        if model.trained_by == "both" and not resumes:
            model.fit(np.asarray(corpus.splits["train"].ids))
            fitted.update(model.arrays())
            notes = model.notes
        return Trainer(folder, config.training, model, corpus)

    return make


def _fix_plan(config: RunConfig, make: Any) -> tuple[RunConfig, Plan]:
    training = config.training
    if training.max_steps is None and training.epochs is None and training.minutes is None:
        training = training.model_copy(update={"minutes": DEFAULT_MINUTES})
        config = config.model_copy(update={"training": training})
    trial: Trainer = make()
    valid = len(trial.corpus.splits["valid"].ids) - 1
    if training.minutes is None:
        return config, fixed_plan(training, trial.steps_per_epoch, trial.tokens_per_step, valid)
    step_seconds, token_seconds = trial.measure(min(4.0, training.minutes * 60 * 0.05))
    return config, timed_plan(training, trial.steps_per_epoch, step_seconds, token_seconds, valid)


def _run(trainer: Trainer, plan: Plan, stop_after: int | None, callbacks: Sequence[Callback]) -> Run:
    world, device = trainer.world, str(trainer.device)
    trainer.callbacks = [TensorBoard(trainer.folder.path / EVENTS), *callbacks] if world.first else []
    end = trainer.train(plan, stop_after=stop_after)
    run = Run(trainer.folder, device=device)
    # Whoever interrupts is in a hurry: all is saved, and `lm eval` can measure it.
    if world.first and end.reason != "interrupted":
        run = _close(trainer.folder, device, callbacks)
    world.wait()
    return run


def _close(folder: RunFolder, device: str, callbacks: Sequence[Callback]) -> Run:
    """Measure the best weights exactly, and leave report, card and a sample."""

    def progress(done: int, total: int) -> None:
        for callback in callbacks:
            callback.on_report(done, total)

    run = Run(folder, device=device)
    run.save_report(run.evaluate("valid", progress=progress))
    run.save_sample("", [run.sample(**CLOSING_SAMPLE.model_dump())], CLOSING_SAMPLE)
    return run


def counts_alone(config: RunConfig) -> bool:
    """Whether the model is trained by counting alone: in one go, without steps."""
    return MODELS.resolve(config.model.type).trained_by == "counting"


def _fit_by_counting(
    folder: RunFolder,
    config: RunConfig,
    corpus: PreparedCorpus,
    init: Run | None,
    overwrite: bool,
    callbacks: Sequence[Callback],
) -> Run:
    if init is not None:
        raise ConfigError(
            f"--init {init.name}: {config.model.type} models are trained by counting and start from nothing."
        )
    begun = time.perf_counter()
    model = build_model(config.model, corpus.tokenizer.vocab_size, seed=config.training.seed)
    model.fit(np.asarray(corpus.splits["train"].ids))
    seconds = time.perf_counter() - begun
    folder.create(
        {**run_record(config, corpus, model, None), "plan": Plan(1, 1).to_json()},
        corpus.tokenizer,
        overwrite=overwrite,
    )
    tokens = model.counted_tokens
    start = Start(
        run=folder.name,
        model=config.model.type,
        parameters=model.num_parameters(),
        counts=model.num_counts(),
        corpus=corpus.name,
        step=0,
        plan_steps=1,
        tokens_per_step=tokens,
        steps_per_epoch=1,
        device="cpu",
        precision="fp32",
    )
    try:
        for callback in callbacks:
            callback.on_start(start)
        folder.write_best(model.arrays(), step=1, valid_loss=None)
        run = _close(folder, "cpu", callbacks)
        loss = run.reports()["valid"]["loss"]
        row = {
            "step": 1,
            "epoch": 1.0,
            "train_loss": None,
            "valid_loss": loss,
            "best_step": 1,
            "tokens_per_second": tokens / max(seconds, 1e-9),
            "seconds": round(seconds, 3),
        }
        folder.append_metrics(row)
        for callback in callbacks:
            callback.on_log(row)
            callback.on_end(End("finished", 1, 1, seconds, loss, 1))
    finally:
        for callback in callbacks:
            callback.close()
    return run
