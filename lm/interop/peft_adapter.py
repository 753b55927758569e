"""The adapter of a run alone, as a folder for peft, which opens it over the base in transformers.

adapter_config.json, adapter_model.safetensors, README.md
"""

from __future__ import annotations

import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from lm.errors import MissingExtraError, UnsupportedExportError
from lm.evaluation.perplexity import score
from lm.interop.exported import (
    MAX_DIFFERENCE,
    Exported,
    ExportPrecision,
    Proof,
    front_matter,
    new_folder,
    proof_text,
)
from lm.interop.hub import PREFIX as HUB
from lm.interop.huggingface import Opened, write_json
from lm.models.adapter_weights import DOWN, adapted_matrix, is_adapter
from lm.models.huggingface import HuggingFaceModel
from lm.runs.adapters import find_base
from lm.runs.run import Run
from lm.version import __version__

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def export(run: Run, path: Path, precision: ExportPrecision = "fp32", *, data_dir: Path | None = None) -> Exported:
    """Write the adapter of a run as a folder for peft, open it there over the base, and measure both.

    Args:
        run: an adapter, over a Transformer that transformers has.
        path: a new folder.
        precision: fp32.
        data_dir: folder of the named corpora, for the text of the proof.

    Raises:
        UnsupportedExportError: the run is no adapter, or transformers has no such model.
        MissingExtraError: peft is not installed.
        RunError: there is something at `path`, or the losses of the two programs differ.
    """
    base = find_base(run.folder)
    if base is None:
        raise UnsupportedExportError(
            f"Run {run.name!r} is no adapter, so there is nothing for peft: export it with --to hf."
        )
    try:
        import peft
    except ImportError:
        raise MissingExtraError("This needs peft: pip install '.[export]' in a checkout of Inkling.") from None
    whole = Run(*base, device="cpu")
    model, training = whole.model.to_huggingface(), run.config.training
    arrays, _ = run.folder.read_weights(run.checkpoint)
    tensors = {_their_name(name): torch.from_numpy(array.copy()) for name, array in arrays.items() if is_adapter(name)}
    imported = str((whole.record.get("imported") or {}).get("source", ""))
    named = imported.removeprefix(HUB) if imported.startswith(HUB) else whole.name
    source, _, revision = named.partition("@")
    notes = (
        f"The base is run {whole.name!r}: give peft the model {source}{f' of revision {revision}' if revision else ''}."
        if source != whole.name
        else f"The base is run {whole.name!r}: give peft the folder of lm export {whole.name} --to hf.",
    )
    with new_folder(path) as folder:
        from safetensors.torch import save_file

        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        write_json(
            folder / CONFIG,
            {
                "peft_type": "LORA",
                "task_type": "CAUSAL_LM",
                "base_model_name_or_path": source,
                "revision": revision or None,
                "r": training.lora,
                "lora_alpha": training.lora_scale * (training.lora or 1),
                "lora_dropout": training.lora_dropout,
                "target_modules": _targets({name.rpartition(".lora_")[0] for name in tensors}, model),
                "bias": "none",
                "fan_in_fan_out": False,
                "inference_mode": True,
            },
        )
        (folder / "README.md").write_text(_card(run, source, revision, notes), "utf-8")
        name, split = proof_text(run, data_dir)
        with warnings.catch_warnings():
            # peft uses names that transformers will remove.
            warnings.simplefilter("ignore", FutureWarning)
            opened: Any = Opened(peft.PeftModel.from_pretrained(_base_there(model), folder), run.model.context_length)
        losses = score(opened, split.ids).loss, score(run.model, split.ids).loss
        proof = Proof(f"peft {peft.__version__}", name, split, *losses)
        proof.check(run, MAX_DIFFERENCE[precision])
        size = sum(file.stat().st_size for file in folder.iterdir())
    return proof.exported(path, "peft", precision, size, notes)


def _their_name(name: str) -> str:
    """The name in peft of a tensor of an adapter."""
    part = "lora_A" if name.endswith(f".{DOWN}") else "lora_B"
    return f"base_model.model.model.{adapted_matrix(name).removesuffix('.weight')}.{part}.weight"


def _targets(adapted: Collection[str], model: HuggingFaceModel) -> list[str]:
    """The modules with an adapter: by their last names, if all modules of these names have one."""
    modules = {name.removeprefix("base_model.model.") for name in adapted}
    last = {name.rpartition(".")[2] for name in modules}
    everywhere = {
        module for name in model.tensors if (module := name.removesuffix(".weight")).rpartition(".")[2] in last
    }
    return sorted(last if everywhere == modules else modules)


def _base_there(model: HuggingFaceModel) -> Any:
    """The base in transformers."""
    import transformers

    config = transformers.AutoConfig.for_model(**model.config)
    there = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    there.load_state_dict({name: tensor.float() for name, tensor in model.tensors.items()}, strict=False)
    there.tie_weights()
    return there.eval()


def _card(run: Run, source: str, revision: str, notes: tuple[str, ...]) -> str:
    base = f'"{source}", revision="{revision}"' if revision else f'"{source}"'
    return f"""{front_matter(run, "peft", base_model=source)}

# {run.name}

Trained with Inkling {__version__}.

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base}), "PATH")
```

{"".join(f"- {note}{chr(10)}" for note in notes)}
{run.card()}"""
