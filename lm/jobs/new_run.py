"""The folder of a new run: its name, and the run that a restarted job continues."""

from __future__ import annotations

import re
from pathlib import Path

from lm.config import RunConfig, preset_names, read_preset
from lm.errors import ConfigError
from lm.files import check_folder
from lm.jobs.ensemble_config import unwrapped
from lm.runs.card import model_name
from lm.runs.run_folder import CONFIG, NAME, RunFolder, list_runs
from lm.training import distributed

END_REASONS = ("finished", "out_of_time", "no_progress")
"""Reasons to stop that end a job. An older run that is out of time can be resumed: its plan has steps left."""


def check_new_run(name: str | None, runs_dir: Path, *, overwrite: bool = False) -> None:
    """Check that a run of this name can be created; None: that the folder of the runs can be written to.

    Raises:
        ConfigError: the name is not valid.
        RunError: the name is taken, or the folder cannot be written to.
    """
    if name is None:
        check_folder(runs_dir)
        return
    if not NAME.fullmatch(name):
        raise ConfigError(
            f"--name {name!r}: a run's name is a folder's name of letters, digits and . _ + -. It starts with a "
            "letter or a digit."
        )
    RunFolder(runs_dir / name).check_new(overwrite=overwrite)


def new_run_folder(name: str | None, corpus: str, config: RunConfig, runs_dir: Path) -> RunFolder:
    """The folder of a new run.

    Args:
        name: of the run; None: the first free name made from corpus and model.
        corpus: name of the corpus.
        config: all options.
        runs_dir: folder of the runs.
    """
    if name is not None:
        return RunFolder(runs_dir / name)
    base = re.sub(r"[^\w.+]+", "-", f"{corpus}-{_model_label(config)}").lstrip("-.+")
    taken = {run.name for run in list_runs(runs_dir)}
    candidates = (base if number == 1 else f"{base}-{number}" for number in range(1, 1_000_000))
    return RunFolder(runs_dir / next(c for c in candidates if c not in taken and not (runs_dir / c).exists()))


def _model_label(config: RunConfig) -> str:
    """The name of the preset, or the type of the model where options changed that; and "ensemble" or "lora"."""
    if (member := unwrapped(config)) is not config:
        return f"{_model_label(member)}-ensemble"
    if config.training.lora is not None:
        without = config.training.model_copy(update={"lora": None})
        return f"{_model_label(config.model_copy(update={'training': without}))}-lora"
    if config.preset not in preset_names():
        return config.model.type
    sections = read_preset(str(config.preset))
    unchanged = all(sections[part]["type"] == getattr(config, part).type for part in ("model", "tokenizer"))
    return str(config.preset) if unchanged else model_name(config)


def run_of_this_job(name: str | None, source: str, runs_dir: Path) -> RunFolder | None:
    """The run that this job created before the launcher restarted it, after a failure or with other machines."""
    job = distributed.job_name()
    if job is None:
        return None
    for folder in [RunFolder(runs_dir / name)] if name is not None else list_runs(runs_dir):
        if not (folder.path / CONFIG).is_file():
            continue
        record = folder.read_record()
        if record.get("job") != job or record["config"]["corpus"]["source"] != source:
            continue
        # A first start under the name of a job that ended is a new job.
        ended = folder.has_last() and folder.read_state()["train_state"]["stop_reason"] in END_REASONS
        if distributed.restarted() or not ended:
            return folder
    return None
