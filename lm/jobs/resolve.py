"""Step 1 of a training job: the options that a caller gives become one configuration, before the text is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from lm.config import DEFAULT_RUNS_DIR, CorpusConfig, RunConfig, TrainingConfig, compose, given_sections, merge
from lm.corpora import Corpus, Progress
from lm.device import pick_device
from lm.errors import ConfigError
from lm.jobs.adapters import check_adapters
from lm.jobs.autoconfig import Family, Sections, TokenKind, Wishes, composed, token_kind
from lm.jobs.distill import find_teacher
from lm.jobs.ensemble_config import check_ensemble, unwrapped
from lm.jobs.new_run import check_new_run
from lm.registry import TOKENIZERS
from lm.runs.run import Run
from lm.training import distributed
from lm.training.callbacks import Callback
from lm.training.plan import Plan
from lm.training.precision import choose_format

if TYPE_CHECKING:
    from lm.jobs.prepared_job import PreparedJob


ADAPTER_LEARNING_RATE = 5e-4
"""Least default of adapters, which start at zero: the rate for all weights of a large model is too low for them."""


@dataclass(frozen=True, kw_only=True)
class TrainRequest:
    """What a caller asks of a new training run."""

    corpus: str | Corpus
    """A source as in `CorpusConfig.source`, or an opened corpus."""
    config: RunConfig | None = None
    """All options; None: `preset`, `file` and `overrides` give them."""
    preset: str | None = None
    """None: the default model, which suits the text, the plan and the machine."""
    family: Family | None = None
    """Of the default model; None: GRU."""
    tokens: TokenKind | None = None
    """Of the default model; None: by the text."""
    neural: bool = False
    """A default model without counts."""
    file: Path | None = None
    """A TOML file of options over the preset."""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """"section.field" → value, over all of these."""
    init: Run | None = None
    """The run whose weights and tokenizer the new run starts from."""
    name: str | None = None
    """Name of the run; None: made from corpus and model."""
    runs_dir: Path = DEFAULT_RUNS_DIR
    overwrite: bool = False
    stop_after: int | None = None
    """Stop at this step of the plan."""
    plan: Plan | None = None
    """A recorded plan to repeat; None: that of the options."""
    data_dir: Path | None = None
    callbacks: Sequence[Callback] = ()
    progress: Progress | None = None
    on_prepared: Callable[[ResolvedRequest, PreparedJob], None] | None = None
    """Called in the first process when options and tokens are known."""

    @property
    def source(self) -> str:
        """The corpus as `CorpusConfig.source`."""
        return self.corpus.source if isinstance(self.corpus, Corpus) else self.corpus


@dataclass(frozen=True, kw_only=True)
class ResumeRequest:
    """What a caller asks of an interrupted run. See `lm.resume` for the fields."""

    run: str | None
    runs_dir: Path = DEFAULT_RUNS_DIR
    max_steps: int | None = None
    stop_after: int | None = None
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Training options that a resumed run may change, as overrides."""
    corpus: Path | str | None = None
    data_dir: Path | None = None
    callbacks: Sequence[Callback] = ()
    progress: Progress | None = None
    is_restart: bool = False
    """Whether the launcher restarted the job: what it requested may be done already."""


@dataclass(frozen=True)
class ResolvedRequest:
    """A request with a checked configuration."""

    request: TrainRequest
    config: RunConfig
    """All options; for the default model, those of a nominal text."""
    over_default: Callable[[Sections], RunConfig] | None = None
    """The configuration over the sections of the default model; None: `config` is final."""
    wishes: Wishes = Wishes()
    """For the default model."""
    teacher: Run | None = None
    """The run of `training.distill`."""


def resolve(request: TrainRequest) -> ResolvedRequest:
    """Check all options of a request. The text is not read.

    Raises:
        ConfigError: an option is unknown, out of bounds or contradicts another.
        DeviceError: the device does not exist.
    """

    def over(preset: str | Sections) -> RunConfig:
        return compose(request.source, preset=preset, file=request.file, overrides=request.overrides)

    wishes = _wishes(request)
    if request.stop_after is not None and request.stop_after < 1:
        raise ConfigError(f"--stop-after {request.stop_after}: give a step of the plan, 1 or later.")
    if request.preset is not None and (request.config is not None or request.init is not None):
        raise ConfigError(f"preset={request.preset!r}: config or init already has a preset: leave preset out.")
    if request.config is not None:
        config = merge(request.config, request.overrides) if request.overrides else request.config
        resolved = ResolvedRequest(request, config)
    elif request.init is not None:
        where = CorpusConfig(source=request.source)
        resolved = ResolvedRequest(request, init_config(request.init, where, dict(request.overrides)))
    elif request.preset is not None:
        resolved = ResolvedRequest(request, over(request.preset))
    else:
        resolved = ResolvedRequest(request, composed(over, wishes), over, wishes)
    config = unwrapped(resolved.config)
    check_ensemble(config, request.init)
    check_adapters(config, request.init)
    if config.training.student and request.stop_after is not None:
        raise ConfigError("--stop-after stops the training of one model or ensemble: leave --student out.")
    resolved = replace(resolved, config=config, teacher=find_teacher(config, request.runs_dir))
    training = resolved.config.training
    choose_format(training, pick_device(training.device))
    return resolved


def _wishes(request: TrainRequest) -> Wishes:
    """What the request says about the default model, by flags and by the types among its options.

    Raises:
        ConfigError: flags for the default model, and another model that is given.
    """
    flags = {"--family": request.family, "--tokens": request.tokens, "--neural": request.neural}
    used = [flag for flag, value in flags.items() if value]
    if request.preset is not None or request.config is not None or request.init is not None:
        if not used:
            return Wishes()
        other = f"--preset {request.preset}" if request.preset else "--init" if request.init else "config"
        raise ConfigError(f"{used[0]} is for the default model, and {other} gives another one: leave one of them out.")
    given: dict[str, dict[str, Any]] = {"model": {}, "tokenizer": {}}
    for layer in given_sections(request.file, request.overrides):
        for name in given:
            given[name] |= layer[name] if isinstance(layer.get(name), dict) else {}
    model, tokenizer = given["model"].get("type"), given["tokenizer"].get("type")
    cell = given["model"].get("cell", "gru") if model == "hybrid" else model
    family = request.family or (cell if cell in get_args(Family) else None)
    tokens = request.tokens or (_kind_with(given["tokenizer"]) if tokenizer is None else token_kind(tokenizer))
    return Wishes(family, tokens, request.neural or model in ("rnn", "gru", "lstm"))


def _kind_with(options: dict[str, Any]) -> TokenKind | None:
    """The first kind of tokens whose tokenizer has all of these options; None if there are no options, or no kind."""
    kinds: tuple[TokenKind, ...] = get_args(TokenKind) if options else ()
    return next(
        (kind for kind in kinds if options.keys() <= TOKENIZERS.resolve(kind).Options.model_fields.keys()), None
    )


def resolve_new_run(request: TrainRequest) -> ResolvedRequest:
    """Check all options of a request, and that its run can be created.

    Raises:
        LMError: see `resolve` and `check_new_run`.
    """
    # A restarted job finds its own run under that name.
    if distributed.job_name() is None:
        check_new_run(request.name, request.runs_dir, overwrite=request.overwrite)
    return resolve(request)


def init_config(run: Run, corpus: CorpusConfig, overrides: dict[str, Any]) -> RunConfig:
    """The configuration of a run that starts from another run: its model, tokenizer and training options.

    Raises:
        ConfigError: an override changes the tokenizer.
    """
    base = run.config.model_copy(update={"corpus": corpus})
    own: dict[str, Any] = dict.fromkeys(("max_steps", "epochs", "minutes", "evaluate_every", "ensemble", "distill"))
    own["student"] = False
    # An adapter's own options are not those of a model that starts from it.
    if overrides.get("training.lora") is not None:
        own["learning_rate"] = max(base.training.learning_rate, ADAPTER_LEARNING_RATE)
    own |= {name: field.default for name, field in TrainingConfig.model_fields.items() if name.startswith("lora")}
    config = merge(base, {**{f"training.{field}": value for field, value in own.items()}, **overrides})
    if config.tokenizer != base.tokenizer:
        raise ConfigError(f"--init {run.name} keeps that run's tokenizer: leave tokenizer options out.")
    return config
