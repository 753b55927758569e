"""What a command is to train or to measure: the corpus, and the options over a preset, as `lm train` takes them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from typer.models import OptionInfo

from cli.options import among
from lm.config import CorpusConfig, RunConfig, TrainingConfig, compose, merge, parse_assignments, validate
from lm.errors import ConfigError, RunNotFoundError

if TYPE_CHECKING:
    from lm.corpora import Corpus, PreparedCorpus, Progress
    from lm.jobs.autoconfig import Choice
    from lm.runs.run import Run

PROCESSES = "devices", "shard"
"""Flags of `lm train` that only training has: what is measured runs in one process."""
SECTIONS = {TrainingConfig: "training", CorpusConfig: "corpus"}


@dataclass(frozen=True)
class Asked:
    """The flags that choose options, as they were given."""

    preset: str | None
    file: Path | None
    overrides: dict[str, Any]


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command all flags of `lm train` that choose options; it gets them as `asked`."""
    from cli.commands import train

    hints = get_type_hints(train.command, include_extras=True)
    flags = [
        each.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY)
        for name, each in inspect.signature(train.command).parameters.items()
        if name in ("preset", "set_", "config") or (_declared(hints[name]) and name not in PROCESSES)
    ]

    @functools.wraps(command)
    def with_flags(**given: Any) -> None:
        used = {flag.name: given.pop(flag.name) for flag in flags}
        overrides: dict[str, Any] = parse_assignments(used.pop("set_") or [])
        preset, file = used.pop("preset"), used.pop("config")
        for name, value in used.items():
            owner, option = _declared(hints[name])
            if value is not None and value is not False:
                overrides[f"{SECTIONS[owner]}.{option}"] = value
        command(**given, asked=Asked(preset, file, overrides))

    own_hints = get_type_hints(command, include_extras=True)
    own = [
        each.replace(annotation=own_hints[name], kind=inspect.Parameter.KEYWORD_ONLY)
        for name, each in inspect.signature(command).parameters.items()
        if name != "asked"
    ]
    own[1:1] = flags
    with_flags.__signature__ = inspect.Signature(own)  # type: ignore[attr-defined]
    with_flags.__annotations__ = {each.name: each.annotation for each in own}
    return with_flags


def _declared(hint: Any) -> Any:
    """The class and the name of the field that a flag was declared as; None for a flag of another kind."""
    options = (part for part in getattr(hint, "__metadata__", ()) if isinstance(part, OptionInfo))
    return next((declared for option in options if (declared := getattr(option, "declared", None))), None)


def chosen(
    where: CorpusConfig,
    preset: str | None,
    file: Path | None,
    overrides: dict[str, Any],
    base: Run | None,
    data_dir: Path | None,
    progress: Progress,
) -> tuple[Corpus, Choice]:
    """The text, and the options for it."""
    from lm.corpora import open_corpus
    from lm.device import pick_device
    from lm.jobs import autoconfig
    from lm.training.precision import choose_format

    # What can be wrong in the options is found before the text is read.
    options = first_options(where, preset, file, overrides, base)
    choose_format(options.training, pick_device(options.training.device))
    opened = open_corpus(options.corpus, data_dir=data_dir, progress=progress)
    if opened.tokens is not None and any(path.startswith("tokenizer.") for path in overrides):
        raise ConfigError(f"{where.source} was prepared with its tokenizer: leave tokenizer options out.")
    if base is not None or preset is not None:
        return opened, autoconfig.Choice(options)
    return opened, autoconfig.choose_config(
        opened, lambda preset: compose(where.source, preset=preset, file=file, overrides=overrides), progress=progress
    )


def first_options(
    where: CorpusConfig, preset: str | None, file: Path | None, overrides: dict[str, Any], base: Run | None
) -> RunConfig:
    """The options as far as they are known without the text: over the preset, or the first one that takes them."""
    from lm.jobs.autoconfig import EVERY, first_that_fits
    from lm.jobs.train import init_config

    if base is not None:
        return init_config(base, where, overrides)
    return first_that_fits(
        [preset] if preset else EVERY,
        lambda preset: compose(where.source, preset=preset, file=file, overrides=overrides),
    )


def corpus_config(source: str, overrides: dict[str, Any]) -> CorpusConfig:
    """The corpus that is asked for; what the text itself says of it goes over to `overrides` as it is meant."""
    given = {path.partition(".")[2]: value for path, value in overrides.items() if path.startswith("corpus.")}
    return validate(CorpusConfig, {"source": source, **given}, where="corpus")


def prepared(
    source: str | None, asked: Asked, runs_dir: Path, data_dir: Path | None, progress: Progress
) -> tuple[RunConfig, PreparedCorpus]:
    """Options and tokens of what CORPUS|RUN names: a run with its own options and text, else a text.

    Raises:
        ConfigError: nothing was named, or flags contradict what the run is.
    """
    from lm.corpora import prepare
    from lm.runs.run import load
    from lm.training.plan import fit_to_text

    if source is None:
        raise ConfigError("Which text, or which run? Write: lm profile FILE (or a named corpus, or a run's name).")
    run = None if source == "-" or Path(source).is_file() else _run(source, runs_dir)
    if run is None:
        where = corpus_config(source, asked.overrides)
        opened, choice = chosen(where, asked.preset, asked.file, asked.overrides, None, data_dir, progress)
        tokens = prepare(opened, choice.config.tokenizer, progress=progress)
        return fit_to_text(choice.config, tokens.splits["train"].counts.tokens), tokens
    for flag, value in (("--preset", asked.preset), ("--config", asked.file)):
        if value is not None:
            raise ConfigError(f"Run {source} has its options{among(runs_dir)}: leave {flag} out, change with --set.")
    loaded = load(run, runs_dir=runs_dir)
    config = merge(loaded.config, asked.overrides)
    if config.tokenizer != loaded.config.tokenizer or config.corpus != loaded.config.corpus:
        raise ConfigError(f"Run {source} has its text and its tokenizer: give another text in the run's place.")
    return config, loaded.own_text(data_dir=data_dir, progress=progress)


def _run(source: str, runs_dir: Path) -> str | None:
    from lm.runs.run_folder import find_run

    try:
        find_run(source, runs_dir)
    except RunNotFoundError:
        return None
    return source
