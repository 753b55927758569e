"""Step 2 of a training job: open the corpus, choose the options that nobody gave, and encode the text."""

from __future__ import annotations

import logging
import platform
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lm.config import CorpusConfig, RunConfig, Section, merge
from lm.corpora import Corpus, PreparedCorpus, load_prepared_or_prepare, open_corpus
from lm.corpora import prepare as encode
from lm.device import pick_device
from lm.errors import ConfigError, CorpusError
from lm.jobs.autoconfig import (
    Choice,
    Facts,
    Sections,
    Wishes,
    choose,
    on_gpu,
    read_facts,
    token_kind,
    with_length,
    with_measured_price,
)
from lm.jobs.distill import check_teacher
from lm.jobs.ensemble_config import as_ensemble, with_shared_minutes
from lm.jobs.resolve import ResolvedRequest, ResumeRequest, TrainRequest
from lm.jobs.speed import network_speed, reference_speed
from lm.machine import available_bytes
from lm.models.training_method import TrainingMethod, training_method
from lm.runs.run import Run, load
from lm.tokenizers.base import Tokenizer
from lm.training import distributed
from lm.training.distributed import ReadOnlyRunFolder, World
from lm.training.plan import DEFAULT_MINUTES, Plan, bptt_of, fit_to_text

log = logging.getLogger(__name__)

NETWORK_SECONDS, NETWORK_SHARE = 0.6, 0.01
"""Time to measure the network that the rule chooses, and the most as a share of the plan."""


@dataclass(frozen=True)
class ResumePoint:
    """Where a resumed run continues."""

    plan: Plan
    has_state: bool = True
    """False: the run was killed before anything was saved."""
    resets_patience: bool = False


@dataclass(frozen=True, kw_only=True)
class PreparedJob:
    """A job on its way through the steps: each step returns it with what the step decided."""

    config: RunConfig
    corpus: PreparedCorpus | None
    """None: the run is finished."""
    init: Run | None = None
    choice: Choice | None = None
    """How the options of the default model came about."""
    teacher: Run | None = None
    """The run of `training.distill`."""
    path: Path | None = None
    """The run folder; None: nothing is to be trained."""
    overwrite: bool = False
    memory_bytes: int | None = None
    """Tensors of each process at most, estimated; None: unknown."""
    resume: ResumePoint | None = None
    """None: a new run, or a finished one."""
    has_report: bool = True
    """False: a finished run that was killed before its report."""

    @property
    def method(self) -> TrainingMethod:
        """How the model is trained."""
        return training_method(self.config)

    @property
    def tokens(self) -> PreparedCorpus:
        """The corpus of a job that is not finished."""
        assert self.corpus is not None
        return self.corpus


def open_text(resolved: ResolvedRequest) -> Corpus:
    """The corpus of a request, opened, with a validation split.

    Raises:
        CorpusError: the text cannot be read, or has no validation split.
        ConfigError: options contradict a text that was tokenized before.
    """
    request = resolved.request
    corpus = request.corpus
    if not isinstance(corpus, Corpus):
        where = resolved.config.corpus.model_copy(update={"source": corpus})
        corpus = open_corpus(where, data_dir=request.data_dir, progress=request.progress)
    if corpus.tokens is not None and any(path.startswith("tokenizer.") for path in request.overrides):
        raise ConfigError(f"{corpus.source} was prepared with its tokenizer: leave tokenizer options out.")
    if "valid" not in corpus.splits:
        raise CorpusError(f"{corpus.source} has no validation split to find the best weights with: add one.")
    return corpus


def prepare_job(resolved: ResolvedRequest, corpus: Corpus | None = None) -> PreparedJob:
    """Final options and tokens of a request, in this process alone.

    Args:
        resolved: the request.
        corpus: its corpus, where it is open already.

    Raises:
        LMError: the text cannot be read or encoded, or the options do not suit it.
    """
    request = resolved.request
    text = corpus or open_text(resolved)
    encoded: dict[str, PreparedCorpus] = {}

    def encode_once(tokenizer: Tokenizer | Section) -> PreparedCorpus:
        key = tokenizer.model_dump_json() if isinstance(tokenizer, Section) else tokenizer.sha256
        if key not in encoded:
            encoded[key] = encode(text, tokenizer, progress=request.progress)
        return encoded[key]

    config, choice = resolved.config, None
    if resolved.over_default is not None:
        with distributed.single_process():
            facts, device = read_facts(text), pick_device(config.training.device)
            if device.type == "cuda":
                facts = on_gpu(facts, available_bytes(device))
            facts = with_length(facts, with_shared_minutes(config).training, lambda: reference_speed(config.training))
        wishes, teacher = resolved.wishes, resolved.teacher
        if text.splits["train"].conversations is not None:
            # Counts learn all tokens alike.
            wishes = replace(wishes, neural=True)
        if teacher is not None:
            wishes = replace(wishes, tokens=token_kind(teacher.config.tokenizer.type))
        choice = _choose_by_measurement(facts, wishes, resolved.over_default)
        if teacher is not None:
            # A student has its teacher's tokens.
            choice.sections["tokenizer"] = teacher.config.tokenizer.model_dump(mode="json")
        config = resolved.over_default(choice.sections)
    prepared = encode_once(request.init.tokenizer if request.init else config.tokenizer)
    sections: dict[str, Any] = {"corpus": config.corpus.model_copy(update={"source": text.source})}
    if text.tokens is not None:
        sections["tokenizer"] = Section(**prepared.tokenizer.options.model_dump(mode="json"))
    in_one_pass, training = training_method(config).in_one_pass, config.training
    has_length = training.max_steps is not None or training.epochs is not None or training.minutes is not None
    if not in_one_pass and not has_length:
        sections["training"] = training.model_copy(update={"minutes": DEFAULT_MINUTES})
    config = config.model_copy(update=sections)
    if not in_one_pass:
        config = _with_batches_that_fit(config, prepared)
    if config.training.ensemble is not None and not config.training.student:
        config = as_ensemble(config)
    if prepared.splits["train"].marks is not None:
        _check_conversations(config, prepared.source)
    if (teacher := resolved.teacher) is not None:
        check_teacher(teacher, prepared)
    return PreparedJob(config=config, corpus=prepared, init=request.init, teacher=teacher, choice=choice)


def _choose_by_measurement(facts: Facts, wishes: Wishes, over: Callable[[Sections], RunConfig]) -> Choice:
    """The options of the default model; for a plan by time, with the measured price of its network."""
    choice = choose(facts, wishes)
    if facts.seconds is None:
        return choice
    config = over(choice.sections)
    if not training_method(config).has_steps:
        return choice
    batch = config.training.batch_size, bptt_of(config)
    seconds = min(NETWORK_SECONDS, NETWORK_SHARE * facts.seconds)
    with distributed.single_process():
        speed = network_speed(config.model, choice.vocabulary, config.training, batch, seconds)
    return choose(with_measured_price(choice, speed), wishes)


def _check_conversations(config: RunConfig, source: str) -> None:
    """Refuse what learns all tokens of a text alike.

    Raises:
        ConfigError: the model counts, or options ask for several models.
    """
    method = training_method(config)
    refused = "a model that counts" if method.counts else None
    refused = refused or ("an ensemble" if method.of_members or config.training.student else None)
    refused = refused or ("distillation" if config.training.distill else None)
    if refused is not None:
        raise ConfigError(
            f"{source} holds conversations, of which only the answers are learned, and {refused} learns all tokens of "
            "a text: train one network, such as --preset gru-char or --init RUN of a network."
        )


def prepare_run(run: Run, request: TrainRequest) -> PreparedJob:
    """Options and tokens of an existing run, with the overrides of a request.

    Raises:
        ConfigError: an override changes the text or the tokenizer.
    """
    config = merge(run.config, request.overrides)
    if config.tokenizer != run.config.tokenizer or config.corpus != run.config.corpus:
        raise ConfigError(
            f"Run {request.source} keeps its text and its tokenizer. To use another text, give it in place of the run."
        )
    if run.record.get("imported"):
        raise ConfigError(
            f"Run {run.name!r} was imported, so it has no training to measure: give a text in its place, or a run that "
            f"was trained from it with: lm train FILE --init {run.folder.argument}"
        )
    tokens = run.own_text(data_dir=request.data_dir, progress=request.progress)
    return PreparedJob(config=config, corpus=tokens)


def _with_batches_that_fit(config: RunConfig, corpus: PreparedCorpus) -> RunConfig:
    """The options with batches that fit the text; a notice reports a change."""
    tokens = corpus.splits["train"].counts.all_tokens
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


# -- the same job in several processes ------------------------------------------------------------------


@dataclass(frozen=True)
class PreparedCorpusRef:
    """Names a prepared corpus; its tokens are in the cache of each machine."""

    key: str
    sha256: str
    tokenizer_sha256: str
    name: str
    source: str
    notes: tuple[str, ...]

    @classmethod
    def of(cls, corpus: PreparedCorpus) -> PreparedCorpusRef:
        """The reference to a corpus."""
        return cls(corpus.key, corpus.sha256, corpus.tokenizer.sha256, corpus.name, corpus.source, corpus.notes)

    def load(self, tokenizer: Tokenizer | Section, config: CorpusConfig, data_dir: Path | None) -> PreparedCorpus:
        """The corpus from this machine's cache, or encoded here.

        Raises:
            CorpusError: this machine has another text.
        """
        found = load_prepared_or_prepare(
            [self.key], self.tokenizer_sha256, corpus=config, tokenizer=tokenizer, data_dir=data_dir
        )
        assert found is not None
        if (found.sha256, found.tokenizer.sha256) != (self.sha256, self.tokenizer_sha256):
            raise CorpusError(
                f"{self.source} on {platform.node()} is not the text that the first process has. Give all machines the "
                "same file, or let them share INKLING_CACHE."
            )
        return replace(found, name=self.name, source=self.source, notes=self.notes)


def share_job(world: World, request: TrainRequest | ResumeRequest, make: Callable[[], PreparedJob]) -> PreparedJob:
    """The job that `make` returns in the first process, in all processes. Its tokens are not sent.

    Raises:
        LMError: `make` raised it in the first process, or this machine has another text.
    """
    own: list[PreparedJob] = []

    def decide() -> tuple[PreparedJob, PreparedCorpusRef | None, list[str | None]]:
        own.append(job := make())
        ref = None if job.corpus is None else PreparedCorpusRef.of(job.corpus)
        runs = [f"{run.folder.path}@{run.checkpoint}" if run else None for run in (job.init, job.teacher)]
        return replace(job, corpus=None, init=None, teacher=None), ref, runs

    job, ref, names = world.broadcast_from_rank0(decide)
    if ref is None:
        return job
    init, teacher = (own[0].init, own[0].teacher) if own else (load(name) if name else None for name in names)

    def tokens() -> PreparedCorpus:
        if own:
            return own[0].tokens
        assert job.path is not None
        if job.resume is not None:
            folder = ReadOnlyRunFolder(job.path)
            folder.await_record()
            return ref.load(folder.read_tokenizer(), job.config.corpus, request.data_dir)
        return ref.load(init.tokenizer if init else job.config.tokenizer, job.config.corpus, request.data_dir)

    return replace(job, corpus=world.local_rank0_first(tokens), init=init, teacher=teacher)
