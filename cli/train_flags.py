"""The flags that choose training options: those of `lm train`, shared by `lm profile` and `lm bench`."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.options import ANY_OPTION, parameter, path_option, runs_dir_flag, with_flags
from lm.config import CorpusConfig, TrainingConfig, parse_assignments, preset_names
from lm.errors import ConfigError, RunNotFoundError

if TYPE_CHECKING:
    from lm.corpora import Progress
    from lm.jobs.prepared_job import PreparedJob

TRAINING_FLAGS = (
    "minutes", "max_steps", "epochs", "ensemble", "student", "distill", "lora", "seed", "device", "precision", "amp",
    "loss_scale", "devices", "shard", "compile", "log_to",
)  # fmt: skip
"""Fields of `TrainingConfig` that have a flag; the others are set with --set."""
CORPUS_FLAGS = "split_fractions", "split_by", "dedupe", "text_column", "encoding"
"""Fields of `CorpusConfig` that have a flag."""
SECTIONS = ("training", TrainingConfig, TRAINING_FLAGS), ("corpus", CorpusConfig, CORPUS_FLAGS)
PROCESSES = "devices", "shard", "ensemble", "student", "distill", "lora", "compile", "log_to"
"""Flags for training alone: profiles and benchmarks measure one process and one model, uncompiled, and log nothing."""

_PRESET = Annotated[
    str | None,
    typer.Option(
        help=f"Start from these options: {', '.join(preset_names())}. Default: by text, time and machine.",
        show_default=False,
    ),
]
_FAMILY = Annotated[
    str | None, typer.Option(help="Family of the default model: gru, lstm or transformer.", show_default=False)
]
_TOKENS = Annotated[
    str | None, typer.Option(help="Tokens of the default model: char, word or subword.", show_default=False)
]
_NEURAL = Annotated[bool, typer.Option("--neural", help="A default model without n-gram counts: the network alone.")]
_SET = Annotated[
    list[str] | None,
    typer.Option("--set", metavar=ANY_OPTION, help="Any option, e.g. model.hidden_size=768; repeatable."),
]
_CONFIG = Annotated[Path | None, path_option("--config", help="A TOML file of options, over the preset.")]


@dataclass(frozen=True)
class TrainFlags:
    """The flags that choose options, as they were given."""

    preset: str | None
    family: Any
    tokens: Any
    neural: bool
    file: Path | None
    overrides: dict[str, Any]
    """"section.field" → value, from --set and from the flags of fields."""
    used: tuple[str, ...]
    """The flags that were given, such as --seed."""


def with_train_flags(*leave_out: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the flags that choose options; it gets them as `flags`."""
    fields = {
        name: (section, owner.model_fields[name])
        for section, owner, names in SECTIONS
        for name in names
        if name not in leave_out
    }
    own = {
        "preset": _PRESET, "family": _FAMILY, "tokens": _TOKENS, "neural": _NEURAL, "set_": _SET, "config": _CONFIG
    }  # fmt: skip
    added = [
        inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=False if hint is _NEURAL else None, annotation=hint
        )
        for name, hint in own.items()
    ]
    for name, (_, declared) in fields.items():
        option = typer.Option(_flag(name), help=declared.description, show_default=False)
        added.append(parameter(name, declared, option, repeatable=False))

    def collect(values: dict[str, Any]) -> TrainFlags:
        used = {name: value for name, value in values.items() if value is not None and value is not False}
        overrides: dict[str, Any] = parse_assignments(used.get("set_") or [])
        for name, (section, _) in fields.items():
            if name in used:
                # A text option stays a text, also if it looks like a number.
                overrides[f"{section}.{name}"] = json.dumps(used[name]) if section == "corpus" else used[name]
        default_model = used.get("family"), used.get("tokens"), "neural" in used
        return TrainFlags(
            used.get("preset"), *default_model, used.get("config"), overrides, tuple(map(_flag, used))
        )  # fmt: skip

    return with_flags(added, "flags", collect)


def _flag(name: str) -> str:
    return "--" + name.rstrip("_").replace("_", "-")


def prepare_corpus_or_run(
    source: str | None, flags: TrainFlags, runs_dir: Path, data_dir: Path | None, progress: Progress
) -> PreparedJob:
    """Options and tokens of what CORPUS|RUN names: a run with its own options and text, else a text.

    Raises:
        ConfigError: nothing is named, or a flag contradicts the run.
    """
    from lm.jobs.prepare import prepare_job, prepare_run
    from lm.jobs.resolve import TrainRequest, resolve
    from lm.runs.run import load
    from lm.runs.run_folder import find_run

    if source is None:
        raise ConfigError("Which text, or which run? Write: lm profile FILE (or a named corpus, or a run's name).")
    request = TrainRequest(
        corpus=source, preset=flags.preset, family=flags.family, tokens=flags.tokens, neural=flags.neural,
        file=flags.file, overrides=flags.overrides, data_dir=data_dir, progress=progress,
    )  # fmt: skip
    if source == "-" or Path(source).is_file():
        return prepare_job(resolve(request))
    try:
        find_run(source, runs_dir)
    except RunNotFoundError:
        return prepare_job(resolve(request))
    for flag in ("--preset", "--config"):
        if flag in flags.used:
            raise ConfigError(
                f"Run {source} has its own options{runs_dir_flag(runs_dir)}: leave {flag} out, and change single "
                "options with --set."
            )
    return prepare_run(load(source, runs_dir=runs_dir), request)
