"""Adapter runs: their base, and the weights of both together.

    config.json of an adapter run
        base   run, checkpoint and path of the base, and the sha256 of its weights

The base is the one that RUN+ADAPTER names; else the run of the recorded name in the same folder, at the recorded path,
or among the shipped runs. Its weights must have the recorded hash. This module needs no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lm.config import TrainingConfig
from lm.errors import CorruptRunError, RunNotFoundError, VocabMismatchError
from lm.files import Arrays, read_facts
from lm.models.adapter_weights import merged
from lm.runs.run_folder import CONFIG, RunFolder, shipped_folder


def base_record(folder: RunFolder, checkpoint: str) -> dict[str, str]:
    """The entry "base" of the record of an adapter run.

    Args:
        folder: of the base.
        checkpoint: of the base.
    """
    return {
        "run": folder.name,
        "checkpoint": checkpoint,
        "path": str(folder.path.absolute()),
        "weights_sha256": weights_sha256(folder, checkpoint),
    }


def weights_sha256(folder: RunFolder, checkpoint: str) -> str:
    """The hash in the header of a run's weights file; "" if it cannot be read."""
    return str(read_facts(folder.weights_path(checkpoint)).get("sha256", ""))


def find_base(folder: RunFolder) -> tuple[RunFolder, str] | None:
    """The folder and the checkpoint of the base of an adapter run, checked; None: the run is not an adapter.

    Raises:
        RunNotFoundError: the base is missing.
        VocabMismatchError: the weights of the base are not those that the adapter was trained over.
    """
    recorded = folder.read_record().get("base")
    if recorded is None:
        return None
    other: RunFolder | None = None
    for base, checkpoint in _candidates(folder, recorded):
        if weights_sha256(base, checkpoint) == recorded["weights_sha256"]:
            return base, checkpoint
        other = other or base
    name = _named(recorded)
    if other is None:
        raise RunNotFoundError(
            f"Run {folder.path.name!r} is an adapter of the run {name!r}, which is neither in {folder.path.parent} nor "
            f"at {recorded['path']}: put it there, or name it: BASE+{folder.path.name}."
        )
    raise VocabMismatchError(
        f"Run {folder.path.name!r} is an adapter over other weights than those of {other.path}: they have another hash "
        f"than {name!r} had. Restore that run, or train the adapter again."
    )


def _candidates(folder: RunFolder, recorded: Mapping[str, str]) -> Iterator[tuple[RunFolder, str]]:
    """The places where the base may be, which have a run with such a checkpoint."""
    places = [folder.path.parent / recorded["run"], Path(recorded["path"]), shipped_folder() / recorded["run"]]
    named = [(RunFolder(path), recorded["checkpoint"]) for path in places]
    for base, checkpoint in named if folder.base is None else [folder.base]:
        try:
            if (base.path / CONFIG).is_file() and base.weights_path(checkpoint).is_file():
                yield base, checkpoint
        except RunNotFoundError:
            continue


def _named(recorded: Mapping[str, str]) -> str:
    """The base as RUN or RUN@CHECKPOINT."""
    checkpoint = recorded["checkpoint"]
    return recorded["run"] if checkpoint == "best" else f"{recorded['run']}@{checkpoint}"


def read_whole_weights(folder: RunFolder, checkpoint: str = "best") -> tuple[Arrays, dict[str, Any]]:
    """As `RunFolder.read_weights`; of an adapter run, the weights of its base with those of the adapter added.

    Raises:
        CorruptRunError, VocabMismatchError, RunNotFoundError: they cannot be used.
    """
    arrays, facts = folder.read_weights(checkpoint)
    base = find_base(folder)
    if base is None:
        return arrays, facts
    whole, _ = base[0].read_weights(base[1])
    training = TrainingConfig.model_validate(folder.read_record()["config"]["training"])
    try:
        return merged(whole, arrays, training.lora_scale), facts
    except ValueError as error:
        raise CorruptRunError(f"Run {folder.name!r}: {error}. Restore the files saved together.") from None
