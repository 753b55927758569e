"""Step 2 of a training job: open the corpus, choose the options that nobody gave, and encode the text."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lm.config import RunConfig, Section, merge
from lm.corpora import Corpus, PreparedCorpus, open_corpus
from lm.corpora import prepare as encode
from lm.device import pick_device
from lm.errors import ConfigError, CorpusError
from lm.jobs.autoconfig import (
    Choice,
    Facts,
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
from lm.jobs.prepared_job import PreparedJob
from lm.jobs.resolve import ResolvedRequest, TrainRequest
from lm.jobs.speed import network_speed, reference_speed
from lm.machine import available_bytes
from lm.models.training_method import training_method
from lm.runs.run import Run
from lm.tokenizers.base import Tokenizer
from lm.training import distributed
from lm.training.plan import DEFAULT_MINUTES, fit_to_text

NETWORK_SECONDS, NETWORK_SHARE = 0.6, 0.01
"""Time to measure the network that the rule chooses, and the most as a share of the plan."""


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
        choice = _choose_by_measurement(facts, wishes, config)
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
        config = fit_to_text(config, prepared.splits["train"].counts.all_tokens)
    if config.training.ensemble is not None and not config.training.student:
        config = as_ensemble(config)
    if prepared.splits["train"].marks is not None:
        _check_conversations(config, prepared.source)
    if (teacher := resolved.teacher) is not None:
        check_teacher(teacher, prepared)
    return PreparedJob(config=config, corpus=prepared, init=request.init, teacher=teacher, choice=choice)


def _choose_by_measurement(facts: Facts, wishes: Wishes, config: RunConfig) -> Choice:
    """The options of the default model; for a plan by time, with the measured price of its network.

    It is the rule's own network. One with a caller's options may not fit, and the memory is checked later.
    """
    choice = choose(facts, wishes)
    if facts.seconds is None or not training_method(config).has_steps:
        return choice
    network = Section.model_validate(choice.sections["model"])
    seconds = min(NETWORK_SECONDS, NETWORK_SHARE * facts.seconds)
    with distributed.single_process():
        speed = network_speed(network, choice.vocabulary, config.training, choice.batch, seconds)
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
