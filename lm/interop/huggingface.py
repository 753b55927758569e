"""A run as a folder that Hugging Face transformers opens unchanged.

config.json and model.safetensors hold the model, tokenizer.json the tokenizer, README.md how to use them. Weights have
the names of transformers; the tokenizer is one of the library `tokenizers`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lm.errors import MissingExtraError
from lm.evaluation.perplexity import score
from lm.interop.exported import (
    MAX_DIFFERENCE,
    Exported,
    ExportPrecision,
    OpenedModel,
    Proof,
    front_matter,
    ids_there,
    new_folder,
    proof_text,
    sampling,
)
from lm.models.base import State
from lm.runs.run import Run
from lm.version import __version__

if TYPE_CHECKING:
    from torch import Tensor

TOKENIZER_CLASSES = {"Qwen2ForCausalLM": "PreTrainedTokenizerFast"}
"""What opens the tokenizer, if that is not AutoTokenizer: with this architecture, it makes the tokenizer of Qwen2."""
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


def export(run: Run, path: Path, precision: ExportPrecision = "fp32", *, data_dir: Path | None = None) -> Exported:
    """Write a run as a folder for transformers, open it there, and measure it.

    Args:
        run: of a model and a tokenizer that have counterparts.
        path: a new folder.
        precision: of the weights in the file.
        data_dir: folder of the named corpora, for the text of the proof.

    Raises:
        UnsupportedExportError: transformers has no such model; the message names what to train.
        MissingExtraError: transformers is not installed.
        RunError: there is something at `path`, or the losses of the two programs differ.
    """
    try:
        import transformers  # noqa: F401
    except ImportError:
        raise MissingExtraError("This needs transformers: pip install '.[export]' in a checkout of Inkling.") from None
    model, tokenizer = run.model.to_huggingface(), run.tokenizer.to_huggingface()
    start, notes = run.tokenizer.start_id, _notes(run)
    with new_folder(path) as folder:
        from safetensors.torch import save_file

        dtype = DTYPES[precision]
        save_file(
            {name: tensor.to("cpu", dtype).contiguous() for name, tensor in model.tensors.items()},
            folder / "model.safetensors",
            metadata={"format": "pt"},
        )
        ends = list(run.tokenizer.end_ids) or None
        tokens = {"bos_token_id": start, "eos_token_id": ends, "pad_token_id": None}
        write_json(
            folder / "config.json",
            {"architectures": [model.architecture], **model.config, **tokens, "dtype": str(dtype).split(".")[1]},
        )
        sampling: dict[str, Any] = {**_generation(run), "bos_token_id": start}
        if ends is not None:
            sampling["eos_token_id"] = ends
        write_json(folder / "generation_config.json", sampling)
        tokenizer.save(str(folder / "tokenizer.json"))
        write_json(
            folder / "tokenizer_config.json",
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "model_max_length": run.model.context_length,
                "clean_up_tokenization_spaces": False,
                **run.tokenizer.huggingface_config(),
            },
        )
        opener = TOKENIZER_CLASSES.get(model.architecture, "AutoTokenizer")
        (folder / "README.md").write_text(_card(run, notes, opener), "utf-8")
        proof = _measure(run, folder, opener, data_dir)
        proof.check(run, MAX_DIFFERENCE[precision])
        size = sum(file.stat().st_size for file in folder.iterdir())
    return proof.exported(path, "hf", precision, size, notes)


def _generation(run: Run) -> dict[str, Any]:
    """How the run is sampled by default, in the names of generation_config.json, which are those of our options."""
    own = sampling(run)
    # transformers refuses to sample at 0.
    how = {"do_sample": True, **own} if own["temperature"] else {"do_sample": False}
    return {**how, "max_new_tokens": 200}


class Opened(OpenedModel):
    """A model in transformers."""

    def __init__(self, model: Any, context_length: int | None) -> None:
        super().__init__(model.config.vocab_size, context_length)
        self.model = model

    def forward(self, ids: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """See `LanguageModel.forward`."""
        return self.model(ids, use_cache=False).logits, State({})


def _measure(run: Run, folder: Path, opener: str, data_dir: Path | None) -> Proof:
    """The losses there and here; `opener`: the class that opens the tokenizer."""
    import transformers
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    # No progress bar, and no warning that the text is longer than a window: `score` cuts it.
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    name, split = proof_text(run, data_dir)
    there = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    tokenizer = getattr(transformers, opener).from_pretrained(folder, local_files_only=True)
    label = f"transformers {transformers.__version__}"
    # With their own tokenizer: its ids are a part of the proof.
    encoded = tokenizer.encode(run.tokenizer.decode(split.ids[1:]), add_special_tokens=False)
    ids = ids_there(run, split, encoded, label)
    opened: Any = Opened(there, run.model.context_length)
    return Proof(label, name, split, score(opened, ids).loss, score(run.model, split.ids).loss)


def _notes(run: Run) -> tuple[str, ...]:
    """What the format does not hold."""
    notes = []
    unknown = run.tokenizer.options.unknown
    if unknown == "error" and run.tokenizer.unknown_id is not None:
        notes.append("Symbols outside the vocabulary become the unknown token there; here they are refused.")
    if unknown == "skip" and run.tokenizer.words is not None:
        notes.append("Words outside the vocabulary become the unknown token there; here they are left out.")
    notes.append(
        f"The first token of a text is predicted from token {run.tokenizer.start_id}: put it before the ids of a text."
    )
    return tuple(notes)


def write_json(path: Path, content: Any) -> None:
    """Write a file of transformers: JSON, indented."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _card(run: Run, notes: tuple[str, ...], opener: str) -> str:
    start = run.tokenizer.start_id
    return f"""{front_matter(run, "transformers")}

# {run.name}

Trained with Inkling {__version__}.

```python
import torch
from transformers import AutoModelForCausalLM, {opener}

tokenizer = {opener}.from_pretrained("PATH")
model = AutoModelForCausalLM.from_pretrained("PATH")
prompt = tokenizer.encode("The ", add_special_tokens=False)
ids = model.generate(torch.tensor([[{start}, *prompt]]), max_new_tokens=100)
print(tokenizer.decode(ids[0, 1:], skip_special_tokens=False))
```

Perplexity with lm-evaluation-harness: `--model hf --model_args pretrained=PATH,prefix_token_id={start}`.

{"".join(f"- {note}{chr(10)}" for note in notes)}
{run.card()}"""
