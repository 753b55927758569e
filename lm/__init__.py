"""Inkling: train a small language model on your own text, measure it, and sample from it.

    import lm

    run = lm.train("input.txt", minutes=10)            # chooses a preset; writes to checkpoints/
    run = lm.load("input-gru-char")                    # or lm.load() for the newest
    print(run.sample("ROMEO:", temperature=0.8, seed=7))
    print(run.samples("ROMEO:", n=3))
    print(run.evaluate("valid").bits_per_byte)
    print(run.score("To be, or not to be"))            # nats of each token
    print(lm.inspect.shapes(run.model))                # and attention, gradients, neurons, why
    print(lm.compare(["shakespeare-gru", run]).verdict)

Names are imported at first use, so that `import lm` is fast and does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lm import _renamed, torch_private
from lm.version import __version__

torch_private.set_environment()

_renamed.install()

if TYPE_CHECKING:
    from lm import inspection as inspect
    from lm.comparison.compare import compare
    from lm.comparison.result import Comparison
    from lm.config import CorpusConfig, RunConfig, Section, TrainingConfig, compose, preset_names
    from lm.errors import LMError
    from lm.evaluation.report import Report
    from lm.generation.options import SamplingOptions
    from lm.interop.imported import import_model
    from lm.jobs.sweep import sweep
    from lm.jobs.train import resume, train
    from lm.runs.run import Run, load
    from lm.training.callbacks import Callback

_HOMES = {
    "Callback": "lm.training.callbacks",
    "Comparison": "lm.comparison.result",
    "CorpusConfig": "lm.config",
    "LMError": "lm.errors",
    "Report": "lm.evaluation.report",
    "Run": "lm.runs.run",
    "RunConfig": "lm.config",
    "SamplingOptions": "lm.generation.options",
    "Section": "lm.config",
    "TrainingConfig": "lm.config",
    "compare": "lm.comparison.compare",
    "compose": "lm.config",
    "import_model": "lm.interop.imported",
    "load": "lm.runs.run",
    "preset_names": "lm.config",
    "resume": "lm.jobs.train",
    "sweep": "lm.jobs.sweep",
    "train": "lm.jobs.train",
}
_ROOMS = {"inspect": "lm.inspection"}

__all__ = [
    "Callback",
    "Comparison",
    "CorpusConfig",
    "LMError",
    "Report",
    "Run",
    "RunConfig",
    "SamplingOptions",
    "Section",
    "TrainingConfig",
    "__version__",
    "compare",
    "compose",
    "import_model",
    "inspect",
    "load",
    "preset_names",
    "resume",
    "sweep",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(_ROOMS[name])
    if name not in _HOMES:
        raise AttributeError(f"module 'lm' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
