"""The teacher of a training job: the run that `training.distill` names, its checks, and its record."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lm.config import RunConfig
from lm.corpora import PreparedCorpus
from lm.errors import ConfigError, RunError, RunNotFoundError
from lm.files import read_facts
from lm.runs.run import Run, load
from lm.runs.run_folder import MEMBERS, TEACHER
from lm.training.distillation import Teacher

if TYPE_CHECKING:
    from lm.jobs.prepared_job import PreparedJob


def find_teacher(config: RunConfig, runs_dir: Path) -> Run | None:
    """The run of `training.distill`; None without that option.

    Raises:
        RunError: there is no such run, or it has no weights.
    """
    name = config.training.distill
    if name is None:
        return None
    teacher = load(name, runs_dir=runs_dir, device="cpu")
    if not teacher.folder.weights_path(teacher.checkpoint).exists():
        teacher.folder.read_weights(teacher.checkpoint)
    return teacher


def teacher_name(teacher: Run, runs_dir: Path | None) -> str:
    """The value of `training.distill` for a run: its name, or its path if it is not in the folder of the runs."""
    folder = teacher.folder.path.resolve()
    name = folder.name if runs_dir is not None and folder.parent == runs_dir.resolve() else str(folder)
    return name if teacher.checkpoint == "best" else f"{name}@{teacher.checkpoint}"


def check_teacher(teacher: Run, corpus: PreparedCorpus) -> None:
    """Refuse a teacher that divides the text into other tokens.

    Raises:
        ConfigError: the tokenizers differ.
    """
    if teacher.tokenizer.sha256 != corpus.tokenizer.sha256:
        own, other = corpus.tokenizer, teacher.tokenizer
        raise ConfigError(
            f"--distill {teacher.name}: it has another tokenizer ({other.type}, {other.vocab_size:,} tokens) than this "
            f"training ({own.type}, {own.vocab_size:,} tokens): train the teacher on the same text, with the same "
            "tokenizer options."
        )


def teacher_record(teacher: Run) -> dict[str, Any]:
    """The entry "teacher" of the record of a student."""
    kind = teacher.record.get("kind") or teacher.config.model.type
    is_own = teacher.folder.name == TEACHER
    return {
        "run": None if is_own else f"{teacher.name}@{teacher.checkpoint}", "kind": kind,
        "sha256": _weights_hash(teacher),
    }  # fmt: skip


def recorded_teacher(run: Run) -> Run | None:
    """The teacher of a run that is resumed; None if it has none.

    Raises:
        RunError: the teacher is missing, or has other weights than before.
    """
    name, recorded = run.config.training.distill, run.record.get("teacher")
    if run.config.training.student:
        name = str(run.folder.path / TEACHER)
        if not Path(name).is_dir():
            raise RunError(
                f"Run {run.name!r} learned from an ensemble that was removed when the run was complete, so it has no "
                f"longer plan: use it as a start with --init {run.folder.argument}."
            )
    if name is None or recorded is None:
        return None
    runs_dir = run.folder.path.parent
    if runs_dir.name == MEMBERS:
        # The run is a member of an ensemble.
        runs_dir = runs_dir.parent.parent
    try:
        teacher = load(name, runs_dir=runs_dir, device="cpu")
    except RunNotFoundError:
        raise RunError(
            f"Run {run.name!r} learns from the run {name}, which is missing: restore it, and resume again."
        ) from None
    if _weights_hash(teacher) != recorded["sha256"]:
        raise RunError(
            f"Run {run.name!r} learns from the run {name}, which has other weights now: restore those that the "
            "training began with, and resume again."
        )
    return teacher


def make_teacher(job: PreparedJob) -> Teacher | None:
    """The teacher of a job, ready to give soft targets.

    A teacher with counts that knows the text counts it again: its file has not what leaving out an occurrence needs.
    """
    if job.teacher is None:
        return None
    known = job.teacher.record["corpus"]["splits"].get("train", {}).get("sha256")
    knows_text = known == job.tokens.splits["train"].sha256
    model, ids = job.teacher.model, job.tokens.splits["train"].ids
    if knows_text and model.num_counts():
        model.fit(np.asarray(ids))
    return Teacher(model, job.config.training.distill_weight, knows_text=knows_text)


def _weights_hash(teacher: Run) -> str:
    return str(read_facts(teacher.folder.weights_path(teacher.checkpoint)).get("sha256"))
