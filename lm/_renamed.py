"""Old names, kept for one version: using one warns and gives what has the new name.

To remove in 0.3, with the line in `lm/__init__.py` that installs it and each `__getattr__` made by `old_names`.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import pkgutil
import sys
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

# Several new names: the old module was split, and a name that is in several of them is that of the last.
NEW_NAMES = {
    "lm.card": "lm.runs.card",
    "lm.checkpoint": "lm.runs.run_folder",
    "lm.corpora.reading": "lm.corpora.file_list",
    "lm.corpora.tables": "lm.corpora.table_files",
    "lm.corpora.tokens": "lm.corpora.prepared and lm.corpora.encode and lm.corpora.token_folder",
    "lm.evaluation.cache": "lm.evaluation.cache_model",
    "lm.evaluation.curves": "lm.runs.curves",
    "lm.evaluation.scores": "lm.evaluation.score_sums",
    "lm.generation.decoded": "lm.generation.decoder_model",
    "lm.generation.decoders": "lm.generation.open_decoder",
    "lm.generation.reading": "lm.generation.prefill",
    "lm.generation.scores": "lm.generation.token_scores",
    "lm.generation.states": "lm.generation.snapshots",
    "lm.generation.stops": "lm.generation.stop_strings",
    "lm.kernels.base": "lm.kernels.compiled and lm.kernels.decoding",
    "lm.kernels.recurrent": "lm.kernels.recurrent_decoding",
    "lm.kernels.training": "lm.kernels.dispatch and lm.kernels.autograd and lm.kernels.layers",
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

NEW_ATTRIBUTES = {
    "lm.card": {
        "card": "lm.runs.run.Run.card",
        "facts": "lm.runs.run.Run.facts",
        "summary": "lm.runs.run.Run.summary",
    },
    "lm.corpora.reading": {
        "Stored": "lm.corpora.file_list.InputFile",
        "say_left_out": "lm.corpora.file_list.warn_of_skipped",
        "stored": "lm.corpora.file_list.input_files",
        "usable": "lm.corpora.file_list.readable_files",
    },
    "lm.corpora.tokens": {"Met": "lm.corpora.encode.UnknownSymbolCounter"},
    "lm.device": {"kept_memory": "lm.torch_private.keep_freed_memory"},
    "lm.generation.decoded": {"Decoded": "lm.generation.decoder_model.DecoderModel"},
    "lm.generation.filters": {
        "draw": "lm.generation.distribution.draw",
        "greatest": "lm.generation.distribution.row_max",
        "log_softmax": "lm.generation.distribution.log_softmax",
        "revive": "lm.generation.filters.ensure_finite_row",
        "uniforms": "lm.generation.distribution.uniforms",
    },
    "lm.generation.reading": {"Reading": "lm.generation.prefill.PromptJob"},
    "lm.generation.sampler": {
        "Counts": "lm.generation.filters.Counts",
        "Place": "lm.generation.filters.SamplingContext",
    },
    "lm.generation.sequence": {"Sequence": "lm.generation.sequence.Sample"},
    "lm.generation.states": {
        "NamedState": "lm.generation.snapshots.NamedSnapshot",
        "States": "lm.generation.snapshots.Snapshots",
    },
    "lm.machine": {
        "INSTRUCTION_SETS": "lm.host.INSTRUCTION_SETS",
        "memory": "lm.host.memory",
        "peak_resident_bytes": "lm.host.peak_resident_bytes",
        "reset_peak_resident": "lm.host.reset_peak_resident",
        "usable_threads": "lm.host.usable_threads",
    },
    "lm.models.parts": {
        "part": "lm.models.profiled_parts.run_part",
        "watched_by": "lm.models.profiled_parts.observe_parts",
    },
    "lm.training.distributed": {
        "Reader": "lm.training.distributed.ReadOnlyRunFolder",
        "alone": "lm.training.distributed.single_process",
        "cores": "lm.host.usable_threads",
        "own_part": "lm.training.distributed.config_per_process",
    },
    "lm.training.looking": {"look": "lm.training.preview.preview_sample"},
    "lm.training.resuming": {"TrainState": "lm.training.last_checkpoint.TrainProgress"},
}
"""Names of modules, under the module's name of 0.1, with their new paths."""


def old_names(module: str) -> Callable[[str], Any]:
    """The `__getattr__` of a module: an old name warns and gives what has the new one."""

    def find(name: str) -> Any:
        new = NEW_ATTRIBUTES.get(module, {}).get(name)
        if new is None:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warnings.warn(f"{module}.{name} is now {new}; the old name goes in 0.3.", DeprecationWarning, stacklevel=2)
        return pkgutil.resolve_name(new)

    return find


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
        for part in new.split(" and "):
            module.__dict__.update(vars(importlib.import_module(part)))
        module.__dict__["__getattr__"] = old_names(spec.name)
        return module

    def exec_module(self, module: ModuleType) -> None:
        """The module is loaded already, under its new name."""


def install() -> None:
    """Let old names be imported."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
