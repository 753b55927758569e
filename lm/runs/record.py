"""The record of a run: the content of its `config.json`."""

from __future__ import annotations

import datetime
from typing import Any

from lm.config import RunConfig
from lm.corpora import PreparedCorpus
from lm.models.base import LanguageModel
from lm.runs.adapters import base_record
from lm.runs.run import Run
from lm.version import __version__


def _base(config: RunConfig, model: LanguageModel, init: Run | None) -> dict[str, Any]:
    """The entries of an adapter run: its base, and the size of the model of both together; {} for other runs."""
    if config.training.lora is None or init is None:
        return {}
    adapters = sum(tensor.numel() for tensor in model.saved_tensors().values())
    whole = model.num_parameters() - adapters
    return {"base": base_record(init.folder, init.checkpoint), "parameters": whole, "adapter_parameters": adapters}


def run_record(config: RunConfig, corpus: PreparedCorpus, model: LanguageModel, init: Run | None) -> dict[str, Any]:
    """The record of a new run, without its plan; `init` is the run whose weights it starts from."""
    splits = {
        name: {"sha256": part.sha256, "tokens": part.counts.tokens, "characters": part.counts.characters}
        for name, part in corpus.splits.items()
    }
    return {
        "inkling": __version__,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "parameters": model.num_parameters(),
        "counts": model.num_counts(),
        "kind": model.kind,
        "init": f"{init.name}@{init.checkpoint}" if init else None,
        **_base(config, model, init),
        "corpus": {
            "name": corpus.name,
            "sha256": corpus.sha256,
            "key": corpus.key,
            "notes": [*corpus.notes, *model.notes],
            "newline": corpus.newline,
            "splits": splits,
        },
        "config": config.model_dump(mode="json"),
    }
