"""Whole training jobs: from a corpus to a finished run, and from an interrupted run to its end."""

from __future__ import annotations

import datetime
import re
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lm.checkpoint import EVENTS, MODEL, RunFolder, find_run, list_runs
from lm.config import DEFAULT_RUNS_DIR, CorpusConfig, RunConfig, compose, merge
from lm.corpora import Corpus, PreparedCorpus, Progress, load_prepared, open_corpus, prepare
from lm.device import enough_memory, pick_device
from lm.errors import ConfigError, CorpusError, CorruptRunError, RunError, RunExistsError
from lm.generation.options import SamplingOptions
from lm.models.base import LanguageModel, build_model
from lm.registry import MODELS
from lm.run import Run, load
from lm.training.callbacks import Callback, End, Start
from lm.training.choosing import choose_config
from lm.training.expecting import expected_loss
from lm.training.fitting import refuse_what_cannot_fit
from lm.training.plan import DEFAULT_MINUTES, Plan, fixed_plan, timed_plan
from lm.training.precision import choose_format
from lm.training.tensorboard import TensorBoard
from lm.training.trainer import Trainer
from lm.version import __version__

ENDINGS = ("finished", "out_of_time", "no_progress")
"""Ways to stop that end a plan; the others are gone on from."""
CLOSING_SAMPLE = SamplingOptions(max_tokens=300)


def train(
    corpus: str | Path | Corpus,
    config: RunConfig | None = None,
    *,
    name: str | None = None,
    runs_dir: Path | str = DEFAULT_RUNS_DIR,
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
        config: all options, from `lm.config.compose`; None takes the preset that suits the text.
        name: of the run; None names it after corpus and model.
        runs_dir: where the run folder is made.
        init: a run whose weights and tokenizer to start from; `config` then has its model options.
        stop_after: stop at this step of the plan; `resume` goes on.
        overwrite: replace a run of that name.
        callbacks: what watches.
        data_dir: where named corpora lie.
        progress: called while the corpus is read.

    Returns:
        The run with its best weights, their report on the validation split saved; one that was interrupted (Ctrl-C)
        is saved without a report.

    Raises:
        LMError: anything the caller can mend; nothing was overwritten.
    """
    if init is not None and config is None:
        source = corpus.source if isinstance(corpus, Corpus) else str(corpus)
        config = init_config(init, CorpusConfig(source=source), {})
    if not isinstance(corpus, Corpus):
        where = (
            CorpusConfig(source=str(corpus))
            if config is None
            else config.corpus.model_copy(update={"source": str(corpus)})
        )
        corpus = open_corpus(where, data_dir=data_dir, progress=progress)
    if config is None:
        source = corpus.source
        config = choose_config(corpus, lambda preset: compose(source, preset=preset), progress=progress).config
    config = config.model_copy(update={"corpus": config.corpus.model_copy(update={"source": corpus.source})})
    choose_format(config.training, pick_device(config.training.device))
    if stop_after is not None and stop_after < 1:
        raise ConfigError(f"--stop-after {stop_after}: give a step of the plan, 1 or later.")
    folder = _new_folder(name, corpus, config, Path(runs_dir), overwrite)
    if "valid" not in corpus.splits:
        raise CorpusError(f"{corpus.source} has no validation split, so nothing could tell the best weights: add one.")
    prepared = prepare(corpus, init.tokenizer if init else config.tokenizer, progress=progress)
    with folder.lock(), enough_memory():
        if counts_alone(config):
            return _fit_by_counting(folder, config, prepared, init, overwrite, callbacks)
        refuse_what_cannot_fit(config, prepared)
        make = _factory(folder, config, prepared, init)
        config, plan = _fix_plan(config, make)
        trainer = make()
        if init is None:
            plan = _with_expectation(plan, config, prepared, trainer)
        record = run_record(config, prepared, trainer.model, init)
        folder.create({**record, "plan": plan.to_json()}, prepared.tokenizer, overwrite=overwrite)
        return _run(trainer, plan, stop_after, callbacks)


def resume(
    run: str | None,
    *,
    runs_dir: Path | str = DEFAULT_RUNS_DIR,
    max_steps: int | None = None,
    stop_after: int | None = None,
    device: str | None = None,
    callbacks: Sequence[Callback] = (),
    data_dir: Path | None = None,
    progress: Progress | None = None,
) -> tuple[Run, bool]:
    """Go on with a run to the end of its plan.

    Args:
        run: as in `lm.load`.
        runs_dir: where the runs lie.
        max_steps: a new length of the plan, longer than what is done.
        stop_after: stop at this step of the plan.
        device: another device than before.
        callbacks: what watches.
        data_dir: where named corpora lie.
        progress: called if the corpus has to be read again.

    Returns:
        The run, and whether there was anything left to do.

    Raises:
        LMError: the run or its corpus is not what it was; nothing was changed.
    """
    patient = False
    folder, state_name = find_run(run, Path(runs_dir))
    if state_name not in ("best", "last"):
        raise ConfigError(
            f"--resume {run}: a run goes on from its last step; start from {state_name} with --init {run}."
        )
    if folder.shipped:
        raise RunError(f"Run {folder.name!r} is shipped and read-only: train on from it with --init {folder.name}.")
    with folder.lock(), enough_memory():
        current = Run(folder)
        record, config = current.record, current.config
        if counts_alone(config):
            if not (folder.path / MODEL).exists():
                raise CorruptRunError(f"Run {folder.name!r} was killed while it counted: train it again (--overwrite).")
            return current, False
        folder.sweep()
        begun = folder.has_last() or folder.read_metrics() or folder.kept_states()
        # A kill may come before the first save, when nothing is trained yet: then it begins at its first step.
        state: Any = folder.read_state()["train_state"] if begun else {"step": 0, "stop_reason": None}
        try:
            plan, done = Plan.from_json(record["plan"]), int(state["step"])
            stopped = state["stop_reason"]
        except (KeyError, TypeError, ValueError):
            raise CorruptRunError(
                f"{folder.path} has no plan or step that can be read: restore it from a copy."
            ) from None
        if max_steps is not None:
            if max_steps < max(done, 1):
                raise ConfigError(f"--max-steps {max_steps}: run {folder.name!r} is at step {done} already.")
            if max_steps > done or stopped not in ENDINGS:
                plan = replace(plan, steps=max_steps, seconds=None, expected_least=None, expected_most=None)
                patient, stopped = stopped == "no_progress", None
        if done >= plan.steps or stopped in ENDINGS:
            if current.reports().get("valid"):
                return current, False
            # Killed after the last step and before the report.
            prepared = same_corpus(current, data_dir, progress)
            return _close(folder, prepared, str(pick_device(config.training.device))), True
        if stop_after is not None and stop_after <= done:
            raise ConfigError(f"--stop-after {stop_after}: run {folder.name!r} is at step {done} already.")
        prepared = same_corpus(current, data_dir, progress)
        if device is not None:
            config = merge(config, {"training.device": device})
        init = load(record["init"], runs_dir=runs_dir) if record.get("init") and not begun else None
        trainer = _factory(folder, config, prepared, init, resumes=bool(begun))()
        if begun:
            trainer.load()
        if plan.to_json() != record["plan"] or device is not None:
            folder.write_record({**record, "plan": plan.to_json(), "config": config.model_dump(mode="json")})
        if patient:
            # Whoever asks for more steps wants as much patience again.
            trainer.state.stalls = 0
        return _run(trainer, plan, stop_after, callbacks), True


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


# -- the parts ------------------------------------------------------------------------------------------


def _new_folder(name: str | None, corpus: Corpus, config: RunConfig, runs_dir: Path, overwrite: bool) -> RunFolder:
    if name is not None:
        if not re.fullmatch(r"\w[\w.+-]*", name):
            raise ConfigError(
                f"--name {name!r}: a run's name is a folder's name of letters, digits and . _ + -, and begins with a "
                "letter or digit."
            )
        if RunFolder(runs_dir / name).taken and not overwrite:
            raise RunExistsError(
                f"{runs_dir / name} exists already: choose another --name, say --overwrite to replace that run, or go "
                f"on with it: lm train --resume {name}"
            )
        return RunFolder(runs_dir / name)
    base = re.sub(r"[^\w.+]+", "-", f"{corpus.name}-{config.preset or config.model.type}").lstrip("-.+")
    taken = {run.name for run in list_runs(runs_dir)}
    candidates = (base if number == 1 else f"{base}-{number}" for number in range(1, 1_000_000))
    return RunFolder(runs_dir / next(c for c in candidates if c not in taken and not (runs_dir / c).exists()))


def _factory(
    folder: RunFolder, config: RunConfig, corpus: PreparedCorpus, init: Run | None, *, resumes: bool = False
) -> Any:
    """A function that makes an equal trainer each time it is called.

    A model that counts as well counts the training text once, whatever `init` had counted; one that resumes is to be
    given the counts that it was saved with.
    """
    fitted: dict[str, Any] = {}

    def make() -> Trainer:
        model = build_model(config.model, corpus.tokenizer.vocab_size, seed=config.training.seed)
        if fitted:
            model.load_arrays(fitted)
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
        return Trainer(folder, config.training, model, corpus)

    return make


def _fix_plan(config: RunConfig, make: Any) -> tuple[RunConfig, Plan]:
    training = config.training
    if training.max_steps is None and training.epochs is None and training.minutes is None:
        training = training.model_copy(update={"minutes": DEFAULT_MINUTES})
        config = config.model_copy(update={"training": training})
    trial: Trainer = make()
    if training.minutes is None:
        return config, fixed_plan(training, trial.steps_per_epoch)
    step_seconds, token_seconds = trial.measure(min(4.0, training.minutes * 60 * 0.05))
    valid = len(trial.corpus.splits["valid"].ids) - 1
    return config, timed_plan(training, trial.steps_per_epoch, step_seconds, token_seconds, valid)


def _with_expectation(plan: Plan, config: RunConfig, corpus: PreparedCorpus, trainer: Trainer) -> Plan:
    expected = expected_loss(config, corpus, plan, plan.steps * trainer.tokens_per_step)
    return plan if expected is None else replace(plan, expected_least=expected[0], expected_most=expected[1])


def run_record(config: RunConfig, corpus: PreparedCorpus, model: LanguageModel, init: Run | None) -> dict[str, Any]:
    """What a new run's `config.json` holds, without its plan."""
    splits = {
        name: {"sha256": part.sha256, "tokens": part.counts.tokens, "characters": part.counts.characters}
        for name, part in corpus.splits.items()
    }
    return {
        "inkling": __version__,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "parameters": model.num_parameters(),
        "counts": model.num_counts(),
        "kind": model.kind,
        "init": f"{init.name}@{init.state}" if init else None,
        "corpus": {
            "name": corpus.name,
            "sha256": corpus.sha256,
            "key": corpus.key,
            "notes": list(corpus.notes),
            "splits": splits,
        },
        "config": config.model_dump(mode="json"),
    }


def _run(trainer: Trainer, plan: Plan, stop_after: int | None, callbacks: Sequence[Callback]) -> Run:
    trainer.callbacks = [TensorBoard(trainer.folder.path / EVENTS), *callbacks]
    end = trainer.train(plan, stop_after=stop_after)
    if end.reason == "interrupted":
        # Whoever interrupts is in a hurry: all is saved, and `lm eval` can measure it.
        return Run(trainer.folder, device=str(trainer.device))
    return _close(trainer.folder, trainer.corpus, str(trainer.device))


def _close(folder: RunFolder, corpus: PreparedCorpus, device: str) -> Run:
    """Measure the best weights exactly, and leave report, card and a sample."""
    run = Run(folder, device=device)
    run.save_report(run.evaluate("valid"))
    run.save_sample("", [run.sample(**CLOSING_SAMPLE.model_dump())], CLOSING_SAMPLE)
    return run


def same_corpus(run: Run, data_dir: Path | None, progress: Progress | None) -> PreparedCorpus:
    """The run's own text, from the cache or read again, checked by its hash."""
    prepared = load_prepared(run.record["corpus"]["key"])
    if prepared is None or prepared.tokenizer.sha256 != run.tokenizer.sha256:
        corpus = open_corpus(run.config.corpus, data_dir=data_dir, progress=progress)
        prepared = prepare(corpus, run.tokenizer, progress=progress)
    if prepared.sha256 != run.record["corpus"]["sha256"]:
        raise CorpusError(
            f"{run.config.corpus.source} is not the text that run {run.name!r} was trained on: give that text back, or "
            f"train on the new one with --init {run.name}."
        )
    return prepared


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
        {**run_record(config, corpus, model, None), "plan": Plan(1, 1).to_json()}, corpus.tokenizer, overwrite=overwrite
    )
    tokens = corpus.splits["train"].counts.tokens
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
        run = _close(folder, corpus, "cpu")
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
