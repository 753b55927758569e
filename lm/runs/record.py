"""The record of a run: the content of its `config.json`."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from typing import Any

from lm.config import RunConfig
from lm.corpora import PreparedCorpus
from lm.models.base import LanguageModel
from lm.runs.adapters import base_record
from lm.runs.run import Run
from lm.version import __version__

NO_CORPUS: dict[str, Any] = {"name": "imported", "sha256": "", "key": "", "notes": [], "newline": "\n", "splits": {}}
"""The entry "corpus" of an imported run: its training text is unknown."""


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
        **_made(model),
        "init": f"{init.name}@{init.checkpoint}" if init else None,
        **_base(config, model, init),
        **({"sampling": init.record["sampling"]} if init and init.record.get("sampling") else {}),
        "corpus": {
            "name": corpus.name,
            "sha256": corpus.sha256,
            "key": corpus.key,
            "notes": [*corpus.notes, *model.notes],
            "newline": corpus.newline,
            "splits": splits,
            # As in `lm.corpora.answers`: the model has learned answers alone.
            **({} if corpus.splits["train"].marks is None else {"conversations": True}),
        },
        "config": config.model_dump(mode="json"),
    }


def imported_record(
    config: RunConfig, model: LanguageModel, imported: Mapping[str, Any], sampling: Mapping[str, Any]
) -> dict[str, Any]:
    """The record of an imported run.

    Args:
        config: all options; the corpus has no source.
        model: without weights.
        imported: where it is from: source, format, architecture, sha256, files, license, positions.
        sampling: options that its source gives.
    """
    return {
        **_made(model),
        "imported": dict(imported),
        **({"sampling": dict(sampling)} if sampling else {}),
        "corpus": NO_CORPUS,
        "config": config.model_dump(mode="json"),
    }


def _made(model: LanguageModel) -> dict[str, Any]:
    """When and with what the run is made, and the size of its model."""
    return {
        "inkling": __version__,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "parameters": model.num_parameters(),
        "counts": model.num_counts(),
        "kind": model.kind,
    }
