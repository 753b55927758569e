"""The value that goes through the steps of a training job."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lm.config import RunConfig
from lm.corpora import PreparedCorpus
from lm.jobs.autoconfig import Choice
from lm.models.training_method import TrainingMethod, training_method
from lm.runs.run import Run
from lm.training.plan import Plan


@dataclass(frozen=True)
class ResumePoint:
    """Where a resumed run continues."""

    plan: Plan
    has_checkpoint: bool = True
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
