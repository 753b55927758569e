"""Old names of modules, kept for one version: importing one warns and gives the module under its new name.

To remove in 0.3, with the line in `lm/__init__.py` that installs it.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType

NEW_NAMES = {
    "lm.card": "lm.runs.card",
    "lm.checkpoint": "lm.runs.run_folder",
    "lm.corpora.reading": "lm.corpora.file_list",
    "lm.corpora.tables": "lm.corpora.table_files",
    "lm.corpora.tokens": "lm.corpora.prepared",
    "lm.evaluation.curves": "lm.runs.curves",
    "lm.evaluation.scores": "lm.evaluation.score_sums",
    "lm.generation.decoded": "lm.generation.decoder_model",
    "lm.generation.decoders": "lm.generation.open_decoder",
    "lm.generation.reading": "lm.generation.prefill",
    "lm.generation.scores": "lm.generation.token_scores",
    "lm.generation.states": "lm.generation.snapshots",
    "lm.generation.stops": "lm.generation.stop_strings",
    "lm.kernels.recurrent": "lm.kernels.recurrent_decoding",
    "lm.kernels.transformer": "lm.kernels.transformer_decoding",
    "lm.models.counts": "lm.models.kneser_ney",
    "lm.models.heads": "lm.models.output_head",
    "lm.models.parts": "lm.models.profiled_parts",
    "lm.models.tables": "lm.models.context_tables",
    "lm.run": "lm.runs.run",
    "lm.training.averaging": "lm.training.weight_average",
    "lm.training.benching": "lm.profiling.bench",
    "lm.training.choosing": "lm.jobs.autoconfig",
    "lm.training.defaults": "lm.profiling.machine_defaults",
    "lm.training.fitting": "lm.profiling.memory_estimate",
    "lm.training.jobs": "lm.jobs.train",
    "lm.training.looking": "lm.training.preview",
    "lm.training.memory": "lm.profiling.tensor_memory",
    "lm.training.phases": "lm.profiling.phases",
    "lm.training.profile_page": "lm.profiling.profile_html",
    "lm.training.profiling": "lm.profiling.profile",
    "lm.training.resuming": "lm.training.last_checkpoint",
    "lm.training.schedules": "lm.training.learning_rate",
    "lm.training.trials": "lm.profiling.trial",
    "lm.training.verifying": "lm.jobs.verify_resume",
    "lm.training.watching": "lm.jobs.follow",
    "lm.training.writing": "lm.training.async_writer",
}


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds a module under its old name."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        return importlib.util.spec_from_loader(fullname, self) if fullname in NEW_NAMES else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        new = NEW_NAMES[spec.name]
        warnings.warn(f"{spec.name} is now {new}; the old name goes in 0.3.", DeprecationWarning, stacklevel=2)
        module = ModuleType(spec.name)
        module.__dict__.update(vars(importlib.import_module(new)))
        return module

    def exec_module(self, module: ModuleType) -> None:
        """The module is loaded already, under its new name."""


def install() -> None:
    """Let old names be imported."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
