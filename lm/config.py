"""All options, declared once: default, bounds, description.

A run's configuration has four sections. `corpus` and `training` are declared here. `tokenizer` and `model` are declared
in the file of the tokenizer or model that `type` names, and are checked when they are resolved. So reading a
configuration imports neither torch nor any model.

Precedence: defaults < preset < file (`--config`) < overrides (`--set section.field=value` and the flags).
"""

from __future__ import annotations

import codecs
import contextlib
import json
import os
import re
import tomllib
import warnings
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from lm.errors import ConfigError
from lm.registry import ALL, did_you_mean

M = TypeVar("M", bound=BaseModel)

DEFAULT_RUNS_DIR = Path("checkpoints")
"""Default folder of the runs."""
DEFAULT_ROW_LENGTH = 64
"""Tokens of a row in one step, without an option or a context length."""


def expanded(path: Path | str) -> Path:
    """A path with ~ replaced by the user's folder, which a shell does not do in --flag=~/x."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        # There is no such user: the folder has that name.
        return Path(path)


def runs_folder(given: Path | str | None = None) -> Path:
    """The folder of the runs: the given one, else INKLING_RUNS, else `DEFAULT_RUNS_DIR`."""
    return expanded(given if given is not None else os.environ.get("INKLING_RUNS") or DEFAULT_RUNS_DIR)


class Options(BaseModel):
    """Base of all option sections: frozen; unknown names are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


def listed(value: Any) -> Any:
    """The value of a list option, "2,3" or 2, as a tuple; other values unchanged."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return (value,) if isinstance(value, int) else value


class Section(BaseModel):
    """Unchecked options of a model or tokenizer; `type` names the class that declares and checks them."""

    model_config = ConfigDict(frozen=True, extra="allow", protected_namespaces=())

    type: str = Field(description="Registered name of the model or tokenizer.")

    def resolve(self, kind: Literal["model", "tokenizer"]) -> Any:
        """The checked options, of the class's `Options` type.

        Raises:
            ConfigError: the type is unknown, or an option is unknown or out of bounds.
        """
        owner = ALL[kind].resolve(self.type)
        return validate(owner.Options, self.model_dump(), where=kind)


class CorpusConfig(Options):
    """Source and splits of the text."""

    source: str = Field(
        description="A file, a folder, a glob, - (stdin), a named corpus, hf:NAME[/CONFIG] for a hub data set, or a "
        "folder made by lm prepare."
    )
    text_column: str = Field("text", description="Text column of .jsonl, .csv, .parquet and hub data sets.")
    encoding: str | None = Field(
        None,
        description="Encoding of files without a byte-order mark, such as cp1252. Default: UTF-8.",
    )
    split_fractions: tuple[float, ...] | None = Field(
        None,
        description="Fractions train,valid or train,valid,test of a text without splits, cut by position. "
        "Default: 0.9,0.05,0.05, or the usual split of a named corpus.",
    )
    split_at: Literal["word", "character"] = Field(
        "word",
        description="Where a cut by position falls. word: at the start of the next word, if white space follows "
        "within 1,000 characters; character: exactly at the fraction.",
    )

    split_by: Literal["document", "line", "blank-line"] | None = Field(
        None,
        description="Split a text without splits by whole units instead of by position: documents (files, rows of a "
        "table), lines, or parts between blank lines. Equal units are always in the same split; which one depends on "
        "a hash of the unit.",
    )
    dedupe: bool = Field(
        False,
        description="Leave copies out of validation and test: each line of which at least half stands in the "
        "training text, in runs of 50 or more characters.",
    )

    @field_validator("encoding")
    @classmethod
    def _known_encoding(cls, value: str | None) -> str | None:
        if value is None:
            return None
        try:
            "".encode(value)  # also refuses codecs that are no text encodings, such as base64
            return codecs.lookup(value).name
        except (LookupError, ValueError):
            raise ValueError("unknown text encoding; use one such as cp1252 or utf-16") from None

    @field_validator("source")
    @classmethod
    def _is_utf8(cls, value: str) -> str:
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError("the name is not UTF-8, so no run can record it: rename the file") from None
        return value

    @field_validator("split_fractions", mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        return tuple(part.strip() for part in value.split(",")) if isinstance(value, str) else value

    @field_validator("split_fractions")
    @classmethod
    def _whole(cls, value: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if value is None:
            return None
        if len(value) not in (2, 3) or not all(0 < part < 1 for part in value) or abs(sum(value) - 1) > 1e-6:
            raise ValueError("give two or three positive numbers that add up to 1, such as 0.9,0.1")
        return value


class TrainingConfig(Options):
    """Training options."""

    model_config = ConfigDict(allow_inf_nan=False)

    # -- length ------------------------------------------------------------------------------------
    max_steps: int | None = Field(None, ge=1, description="Length of the plan in optimizer steps.")
    epochs: float | None = Field(None, gt=0, description="Length of the plan in epochs of the training split.")
    minutes: float | None = Field(
        None, gt=0, description="Length of the plan in minutes. The schedule follows the clock."
    )
    patience: int | None = Field(
        None, ge=1, description="Stop after this many validations in a row without a better loss."
    )

    # -- several models ---------------------------------------------------------------------------
    ensemble: int | None = Field(
        None,
        ge=2,
        le=64,
        description="Train this many models one after another, with the seeds seed, seed + 1, …, and average their "
        "probabilities: one run of model.type=ensemble. Minutes are shared by them; steps and epochs are of each.",
    )

    student: bool = Field(
        False,
        description="With ensemble: the models are the teacher of one more model, which becomes the run. It has half "
        "of the minutes.",
    )
    distill: str | None = Field(
        None,
        description="Run whose probabilities the model learns as well: its teacher, such as an ensemble. It must have "
        "the same tokenizer.",
    )
    distill_weight: float = Field(
        0.5, gt=0, le=1, description="Weight of the teacher's probabilities in the objective; the text has the rest."
    )

    # -- adapters ---------------------------------------------------------------------------------
    lora: int | None = Field(
        None,
        ge=1,
        description="Rank of LoRA adapters: train two thin matrices for each matrix of the blocks, and keep the "
        "weights of the run that training starts from. Needs --init.",
    )
    lora_alpha: float | None = Field(
        None, gt=0, description="The adapters' product is multiplied by lora_alpha / lora. Default: twice the rank."
    )
    lora_dropout: float = Field(
        0.0, ge=0, lt=1, description="Dropout probability of the inputs of adapters of linear layers."
    )
    lora_modules: tuple[str, ...] = Field(
        (), description="Names of the modules or matrices that get an adapter, such as q_proj,v_proj. Default: all."
    )

    # -- batches ----------------------------------------------------------------------------------
    batch_size: int = Field(64, ge=1, description="Rows in a batch, in all processes together.")
    bptt: int | None = Field(
        None,
        ge=1,
        description=f"Tokens of each row in one step. Default: the model's context length, else {DEFAULT_ROW_LENGTH}.",
    )
    batching: Literal["streams", "rotated", "random", "shuffled"] | None = Field(
        None,
        description="streams: contiguous text, with the state carried over if the model has no context limit; rotated: "
        "streams that begin elsewhere in each epoch; random: windows at random positions; shuffled: each window once "
        "an epoch. Default: streams for recurrent models, random for Transformers.",
    )
    gradient_accumulation: int = Field(
        1, ge=1, description="Batches whose gradients are averaged for one optimizer step."
    )

    # -- optimizer --------------------------------------------------------------------------------
    optimizer: Literal["adamw", "sgd", "muon"] = Field(
        "adamw", description="adamw, sgd, or muon (Muon for hidden matrices, AdamW for the rest)."
    )
    learning_rate: float = Field(3e-3, gt=0, description="Peak learning rate.")
    muon_learning_rate: float = Field(0.02, gt=0, description="Peak learning rate of the matrices of Muon.")
    table_learning_rate: float = Field(2.0, gt=0, description="Peak learning rate of context tables (Adagrad).")
    betas: tuple[float, float] = Field((0.9, 0.99), description="Decay rates of the two moments of Adam.")
    momentum: float = Field(0.9, ge=0, lt=1, description="Momentum of SGD and of Muon.")
    weight_decay: float = Field(
        0.01, ge=0, description="Decoupled weight decay of matrices, without embeddings, biases and gains; L2 for SGD."
    )
    grad_clip: float | None = Field(1.0, gt=0, description="Maximum gradient norm; none: no clipping.")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="Probability mass that is spread over all tokens.")

    # -- schedule ---------------------------------------------------------------------------------
    schedule: Literal["cosine", "linear", "constant", "step", "plateau"] = Field(
        "cosine",
        description="Learning rate over the plan: cosine or linear to the floor, constant, step (multiplied by "
        "decay_factor every decay_every steps), plateau (multiplied by decay_factor when validation stalls).",
    )
    warmup_steps: int = Field(100, ge=0, description="Steps of linear warm-up, at most a tenth of the plan.")
    learning_rate_floor: float = Field(
        0.02, ge=0, le=1, description="Final learning rate of cosine and linear, as a share of the peak."
    )
    decay_factor: float = Field(0.25, gt=0, lt=1, description="Factor of the step and plateau schedules.")
    decay_every: int = Field(1000, ge=1, description="Steps between decays of the step schedule.")
    decay_patience: int = Field(
        1, ge=1, description="Validations without a better loss before a decay of the plateau schedule."
    )

    average_share: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Validate and save an average of the weights over the last share of the steps; none: the weights "
        "of the last step.",
    )

    # -- precision and machine --------------------------------------------------------------------
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = Field(
        "auto",
        description="Number format of matrix products. auto: bf16 on a GPU that supports it, and on a CPU whose native "
        "kernels have it for this model; else fp32.",
    )
    amp: Literal["O0", "O1", "O2", "O3"] | None = Field(
        None,
        description="What uses the precision. O0: nothing, all is fp32 or tf32; O1: torch autocast over fp32 weights; "
        "O2: weights and products, with norms, softmax, loss and optimizer weights in fp32; O3: everything. Default: "
        "O1 for bf16 and fp16, else O0.",
    )
    fp32_modules: tuple[str, ...] = Field((), description="Names of modules that stay in fp32 at O1, O2 and O3.")
    loss_scale: Literal["auto", "dynamic"] | float | None = Field(
        "auto",
        description="Factor of the loss that keeps small gradients above zero: a number, dynamic (halved when a "
        "gradient overflows), or none. auto: dynamic for fp16, else none.",
    )
    loss_scale_init: float = Field(65_536.0, ge=1, description="First value of the dynamic loss scale.")
    loss_scale_growth: float = Field(2.0, gt=1, description="Factor of the dynamic loss scale when it grows.")
    loss_scale_backoff: float = Field(0.5, gt=0, lt=1, description="Factor of the dynamic loss scale at an overflow.")
    loss_scale_window: int = Field(2000, ge=1, description="Steps without an overflow before the loss scale grows.")
    device: str | None = Field(None, description="cpu, cuda, cuda:1 or mps. Default: a GPU if there is one.")
    devices: int | None = Field(
        None,
        ge=1,
        description="Processes on this machine that train together, each on its own GPU or with its share of the CPU "
        "threads. Default: one, or those that torchrun started.",
    )
    shard: bool = Field(
        False,
        description="Shard weights, gradients and moments over the processes (FSDP2), for models that are too large "
        "for one GPU.",
    )
    timeout_seconds: float = Field(
        600.0, gt=0, description="Longest wait of a process for the others in one step; then the job ends."
    )
    compile: Literal["auto", "on", "off"] = Field(
        "auto",
        description="Compile the training step: a Transformer with torch.compile, a recurrent model to CUDA graphs. "
        "auto: on a GPU, if the plan is long enough. Results differ by rounding.",
    )
    seed: int = Field(1, ge=0, le=2**63 - 1, description="Seed of weights, dropout and batch order.")
    on_nonfinite: Literal["stop", "skip"] = Field(
        "stop",
        description="If the loss or a gradient is not finite and no loss scale can correct it: stop with the last "
        "saved checkpoint, or skip the step.",
    )

    # -- validation and saving --------------------------------------------------------------------
    evaluate_every: int | None = Field(
        None, ge=1, description="Steps between validations. Default: ten over the plan, fewer if they are slow."
    )
    validation_tokens: int | None = Field(
        None, ge=1, description="Validate during training on this many tokens of the split. Default: all."
    )
    log_every: int = Field(10, ge=1, description="Steps between lines of metrics.jsonl.")
    sample_tokens: int | None = Field(
        80,
        ge=1,
        le=1000,
        description="Tokens of the sample at each validation, fewer of a large model; none: no sample.",
    )
    film: bool = Field(
        True, description="Keep short samples along the training for lm film; they take about 1 % of its time."
    )
    film_prompt: str | None = Field(None, description="Prompt of the film's samples. Default: the start of a text.")
    log_to: Literal["wandb", "mlflow", "trackio"] | None = Field(
        None, description="Also log the metrics to a tracker: wandb (Weights & Biases), mlflow or trackio."
    )
    log_activations: bool = Field(
        False, description="Also log the largest activation and its module; each line costs a forward pass."
    )
    checkpoint_every: int | None = Field(None, ge=1, description="Steps between the checkpoints under steps/.")
    checkpoint_epochs: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (), description="Keep a checkpoint at the end of these epochs."
    )
    keep_checkpoints: int | None = Field(
        None, ge=1, description="Number of checkpoints of checkpoint_every to keep, newest first. Default: all."
    )

    @field_validator("betas")
    @classmethod
    def _betas(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in value):
            raise ValueError("both must be between 0 and 1")
        return value

    @field_validator("precision", mode="before")
    @classmethod
    def _from_older_runs(cls, value: Any) -> Any:
        return "auto" if value is None else value

    @field_validator("amp")
    @classmethod
    def _level_and_format_agree(cls, value: str | None, info: ValidationInfo) -> str | None:
        precision = info.data.get("precision")
        if value == "O0" and precision in ("bf16", "fp16"):
            raise ValueError(
                f"everything in fp32 contradicts precision={precision}; use amp=O1, O2 or O3 with {precision}, or "
                "amp=O0 with precision=fp32"
            )
        if value in ("O1", "O2", "O3") and precision in ("fp32", "tf32"):
            raise ValueError(
                f"a lower precision contradicts precision={precision}; use amp={value} with precision=bf16 or fp16, or "
                f"amp=O0 with {precision}"
            )
        return value

    @property
    def lora_scale(self) -> float:
        """The factor of the product of an adapter's two matrices."""
        assert self.lora is not None
        return (2.0 * self.lora if self.lora_alpha is None else self.lora_alpha) / self.lora

    @field_validator("fp32_modules", "lora_modules", mode="before")
    @classmethod
    def _one_or_more(cls, value: Any) -> Any:
        return listed(value)

    @field_validator("loss_scale", mode="before")
    @classmethod
    def _scale(cls, value: Any) -> Any:
        if value is None or value in ("auto", "dynamic"):
            return value
        with contextlib.suppress(TypeError, ValueError):
            if not isinstance(value, bool) and 0 < float(value) < 2.0**64:
                return float(value)
        raise ValueError("use dynamic, none, or a number above 0 such as 1024")


class RunConfig(Options):
    """All options of a run, saved in `config.json`; they are enough to repeat the run."""

    corpus: CorpusConfig
    tokenizer: Section
    model: Section
    training: TrainingConfig = TrainingConfig()
    preset: str | None = Field(None, description="The preset below the options.")

    def resolved(self) -> RunConfig:
        """The same configuration with all options of tokenizer and model checked and filled in; imports torch."""
        sections = {
            kind: Section.model_validate(getattr(self, kind).resolve(kind).model_dump(mode="json"))
            for kind in ("tokenizer", "model")
        }
        return self.model_copy(update=sections)

    @property
    def row_length(self) -> int:
        """Tokens of a row in one training step; see `row_length`."""
        return row_length(self.training.bptt, self.model.model_dump().get("context_length"))


def row_length(bptt: int | None, context_length: int | None) -> int:
    """Tokens of a row in one training step.

    Args:
        bptt: the option of training; None: the context length.
        context_length: of the model; None: it has no limit, and the default is `DEFAULT_ROW_LENGTH`.
    """
    return bptt or context_length or DEFAULT_ROW_LENGTH


# -- presets --------------------------------------------------------------------------------------


def preset_names() -> tuple[str, ...]:
    """Names of the presets, sorted."""
    folder = resources.files("lm") / "presets"
    return tuple(sorted(file.name.removesuffix(".toml") for file in folder.iterdir() if file.name.endswith(".toml")))


def read_preset(name: str) -> dict[str, Any]:
    """The sections of a preset's file.

    Raises:
        ConfigError: no preset of that name.
    """
    if name not in preset_names():
        raise ConfigError(
            f"Unknown preset {name!r}.{did_you_mean(name, preset_names())} Presets: {', '.join(preset_names())}."
        )
    return tomllib.loads((resources.files("lm") / "presets" / f"{name}.toml").read_text("utf-8"))


def preset_summary(name: str) -> str:
    """The first comment line of a preset's file. To remove in 0.3."""
    warnings.warn("lm.config.preset_summary goes in 0.3: read the preset's file.", DeprecationWarning, stacklevel=2)
    read_preset(name)
    text = (resources.files("lm") / "presets" / f"{name}.toml").read_text("utf-8")
    return text.splitlines()[0].lstrip("# ").strip()


# -- composing a configuration ----------------------------------------------------------------------


def compose(
    source: str,
    *,
    preset: str | Mapping[str, Mapping[str, Any]],
    file: Path | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> RunConfig:
    """A checked configuration from preset, file and overrides, in that order of precedence.

    Args:
        source: the corpus, as `CorpusConfig.source`.
        preset: name of the lowest layer, or its sections.
        file: a TOML file with the same sections; "none" is None.
        overrides: "section.field" → value; text that is JSON ("3", "true", "[5,10]") is parsed, "none" is None.

    Raises:
        ConfigError: a name is unknown or a value is out of bounds; the error names it and a valid choice.
    """
    sections: dict[str, dict[str, Any]] = {
        "corpus": {"source": source}, "tokenizer": {}, "model": {}, "training": {}
    }  # fmt: skip
    layers = [read_preset(preset) if isinstance(preset, str) else preset, *given_sections(file, overrides)]
    for layer in layers:
        for name, fields in layer.items():
            if name not in sections:
                raise ConfigError(
                    f"Unknown section {name!r}.{did_you_mean(name, sections)} Known: {', '.join(sections)}."
                )
            if not isinstance(fields, dict):
                raise ConfigError(f"{name} is a section: write [{name}] and its fields below it.")
            sections[name] = {**_still_known(name, sections[name], fields), **fields}
    sections["corpus"]["source"] = source
    return validate(RunConfig, {**sections, "preset": preset if isinstance(preset, str) else None}).resolved()


def given_sections(file: Path | None, overrides: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """The options of a TOML file and of overrides, each by section.

    Raises:
        ConfigError: the file cannot be read.
    """
    layers = []
    if file is not None:
        try:
            layers.append(_with_none(tomllib.loads(file.read_text("utf-8"))))
        except OSError as error:
            raise ConfigError(f"--config {file}: {error.strerror}.") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"--config {file} is not TOML: {error}.") from None
    return [*layers, _nested(overrides or {})]


def _with_none(sections: dict[str, Any]) -> dict[str, Any]:
    """The sections of a TOML file with "none" as None, which TOML does not have."""
    return {
        name: {field: None if value == "none" else value for field, value in fields.items()}
        if isinstance(fields, dict)
        else fields
        for name, fields in sections.items()
    }


def _still_known(name: str, below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """The fields of the layers below that exist for the type that the layer above selects."""
    kind = above.get("type")
    if name not in ALL or "type" not in below or kind is None or kind == below["type"]:
        return below
    known = ALL[name].resolve(str(kind)).Options.model_fields
    return {field: value for field, value in below.items() if field in known}


def merge(config: RunConfig, overrides: Mapping[str, Any]) -> RunConfig:
    """A copy of `config` with checked overrides, as in `compose`."""
    sections = config.model_dump(mode="json")
    for name, fields in _nested(overrides).items():
        if not isinstance(sections.get(name), dict):
            raise ConfigError(f"Unknown section {name!r}. Known: corpus, tokenizer, model, training.")
        sections[name].update(fields)
    return validate(RunConfig, sections).resolved()


def parse_assignments(assignments: list[str]) -> dict[str, str]:
    """["model.dropout=0.1"] → {"model.dropout": "0.1"}.

    Raises:
        ConfigError: an entry is not SECTION.FIELD=VALUE.
    """
    pairs = {}
    for entry in assignments:
        match = re.fullmatch(r"\s*(\w+\.\w+)\s*=(.*)", entry, re.DOTALL)
        if match is None:
            raise ConfigError(f"--set {entry!r}: write SECTION.FIELD=VALUE, for example model.hidden_size=768.")
        pairs[match[1]] = match[2].strip()
    return pairs


def _nested(overrides: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    if "corpus.source" in overrides:
        raise ConfigError("corpus.source is not an option to set: give the text as CORPUS, as in lm train CORPUS.")
    nested: dict[str, dict[str, Any]] = {}
    for path, value in overrides.items():
        section, _, field = path.partition(".")
        nested.setdefault(section, {})[field] = parse_value(value) if isinstance(value, str) else value
    return nested


def parse_value(text: str) -> Any:
    """The value of an option written as text: JSON if it is JSON, none as None, else the text."""
    if text.lower() in ("none", "null"):
        return None
    try:
        return json.loads(text.lower() if text.lower() in ("true", "false") else text)
    except ValueError:
        return text


def validate(cls: type[M], data: Any, *, where: str = "") -> M:
    """`cls.model_validate` with errors in plain sentences.

    Raises:
        ConfigError: with one sentence for each invalid value.
    """
    try:
        return cls.model_validate(data)
    except ValidationError as error:
        sentences = []
        for finding in error.errors(include_url=False):
            place, value = finding["loc"], finding["input"]
            if finding["type"] == "missing" and isinstance(value, list | tuple):
                # A list that is too short: report the list, not the missing element.
                place = place[:-1]
            path = ".".join([*([where] if where else []), *(str(part) for part in place)])
            if finding["type"] == "extra_forbidden":
                known = _owner(cls, place).model_fields
                hint = did_you_mean(str(place[-1]), known)
                sentences.append(f"Unknown option {path}.{hint or ' Known: ' + ', '.join(known) + '.'}")
            else:
                # An error of a whole section names the values itself.
                shown = "" if isinstance(value, dict) else f" = {_as_typed(value)}"
                sentences.append(f"{path}{shown}: {wanted(finding, _example(cls, place))}.")
        raise ConfigError(" ".join(sentences)) from None


_WANTED = {
    "bool": "use true or false",
    "byte_size": "give a size such as 64MB or 2GB",
    "dict": 'give names with their values, such as {{"13": -100}}',
    "finite_number": "give a finite number",
    "float": "give a number",
    "greater_than": "give a number above {gt}",
    "greater_than_equal": "give a number of at least {ge}",
    "int": "give a whole number",
    "less_than": "give a number below {lt}",
    "less_than_equal": "give a number of at most {le}",
    "list": "give a list such as {example}",
    "literal_error": "use {expected}",
    "missing": "give a value such as {example}",
    "model": "give a section of options",
    "none_required": "use none",
    "path": "give a path",
    "string": "give a text",
    "too_long": "give {max_length} values at most, such as {example}",
    "too_short": "give {min_length} values at least, such as {example}",
    "tuple": "give a list such as {example}",
}
"""What to give, by the kind of pydantic error; for int_parsing, int_type and similar, by the first word."""


def wanted(finding: Any, example: str = "") -> str:
    """What to give instead of an invalid value, or the message of our own check.

    Args:
        finding: one of `ValidationError.errors()`.
        example: a valid value, for lists.
    """
    kind = finding["type"]
    if kind == "value_error":
        message = str(finding["msg"]).removeprefix("Value error, ")
        return f"{message[0].lower()}{message[1:]}"
    sentence = _WANTED.get(kind) or _WANTED.get(kind.partition("_")[0], "this value cannot be used")
    limits = {
        name: f"{value:.15g}" if isinstance(value, float) else value for name, value in finding.get("ctx", {}).items()
    }
    return sentence.format(example=example, **limits)


def _as_typed(value: Any) -> str:
    """A value as typed after --set."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return repr([*value] if isinstance(value, tuple) else value)


def _owner(cls: type[BaseModel], place: tuple[Any, ...]) -> type[BaseModel]:
    """The class of the section of an option."""
    for part in place[:-1]:
        annotation = cls.model_fields[str(part)].annotation
        assert isinstance(annotation, type) and issubclass(annotation, BaseModel)
        cls = annotation
    return cls


def _example(cls: type[BaseModel], place: tuple[Any, ...]) -> str:
    """A valid value of a list field as typed: its default, or an example."""
    for part in place:
        field = cls.model_fields.get(str(part))
        if field is None:
            break
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            cls = annotation
        elif isinstance(field.default, tuple) and field.default:
            return json.dumps(field.default, separators=(",", ":"))
        elif "tuple[" in str(annotation):
            return '["a","b"], or [] for none' if "str" in str(annotation) else "[2,3], or [] for none"
    return "one of those in docs/reference/options.md"
