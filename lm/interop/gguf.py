"""A run as a folder for llama.cpp and Ollama.

model.gguf holds the model and the tokenizer, Modelfile is for `ollama create`, README.md says how to use them. The
tensors are those of transformers under other names; llama.cpp rotates other pairs of dimensions than Llama in
transformers, so the rows of queries and keys are in another order there.
"""

from __future__ import annotations

import ctypes
import functools
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from lm.errors import RunError, UnsupportedExportError
from lm.evaluation.perplexity import score
from lm.interop.exported import (
    Exported,
    ExportPrecision,
    OpenedModel,
    Proof,
    front_matter,
    new_folder,
    proof_text,
    sampling,
)
from lm.models.base import State
from lm.models.huggingface import HuggingFaceModel
from lm.runs.run import Run
from lm.tokenizers.base import REPLACEMENT
from lm.tokenizers.llama_cpp import SPACE, LlamaCppVocabulary
from lm.version import __version__

if TYPE_CHECKING:
    from torch import Tensor

ARCHITECTURES = "llama", "qwen2", "qwen3"
"""Those of transformers (`model_type`) that GGUF has under the same name."""
PERMUTED = "llama"
"""The architecture whose queries and keys have another order of rows."""
MAX_DIFFERENCE = {"fp32": 1e-3, "fp16": 1e-3, "q8_0": 0.02}
"""Nats per token between the two programs; more is an error."""
_UNKNOWN_RUN = re.compile(f"{REPLACEMENT}+")
MODEL, MODELFILE = "model.gguf", "Modelfile"


def export(run: Run, path: Path, precision: ExportPrecision = "fp32", *, data_dir: Path | None = None) -> Exported:
    """Write a run as a folder for llama.cpp, open it there, and measure it.

    Args:
        run: of a model and a tokenizer that have counterparts.
        path: a new folder.
        precision: of the matrices in the file; q8_0: 8 bits, and a scale for 32 weights of a row.
        data_dir: folder of the named corpora, for the text of the proof.

    Raises:
        UnsupportedExportError: llama.cpp has no such model or tokenizer; the message names what to train.
        RunError: there is something at `path`, or the losses of the two programs differ.
    """
    model, vocabulary = run.model.to_huggingface(), run.tokenizer.to_gguf()
    notes = list(vocabulary.notes)
    with new_folder(path) as folder:
        rounded_less = write(run, model, vocabulary, folder / MODEL, precision)
        if rounded_less:
            notes.append(f"{rounded_less} matrices whose rows are no multiples of 32 are fp16.")
        (folder / MODELFILE).write_text(_modelfile(run, vocabulary), "utf-8")
        proof, not_proved = _measure(run, vocabulary, folder / MODEL, data_dir)
        notes += not_proved
        proof.check(run, MAX_DIFFERENCE[precision])
        if precision == "q8_0" and proof.loss_there is not None:
            notes.append(f"q8_0 costs {proof.loss_there - proof.loss_here:+.4f} nats per token on this text.")
        (folder / "README.md").write_text(_card(run, notes), "utf-8")
        size = sum(file.stat().st_size for file in folder.iterdir())
    return proof.exported(path, "gguf", precision, size, notes)


# -- the file ---------------------------------------------------------------------------------------------


def write(
    run: Run, model: HuggingFaceModel, vocabulary: LlamaCppVocabulary, path: Path, precision: ExportPrecision = "fp32"
) -> int:
    """Write the GGUF file; the number of matrices that q8_0 does not fit, which are fp16.

    Raises:
        UnsupportedExportError: llama.cpp has no such model.
    """
    import gguf

    config: Any = model.config
    name = config["model_type"]
    if name not in ARCHITECTURES:
        raise UnsupportedExportError(f"The export to GGUF holds {', '.join(ARCHITECTURES)} models, not {name}.")
    kind = gguf.GGMLQuantizationType
    type_, file_type = {
        "fp32": (kind.F32, gguf.LlamaFileType.ALL_F32),
        "fp16": (kind.F16, gguf.LlamaFileType.MOSTLY_F16),
        "q8_0": (kind.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
    }[precision]
    writer = gguf.GGUFWriter(path, name)
    writer.add_name(run.name)
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    for add in (writer.add_key_length, writer.add_value_length, writer.add_rope_dimension_count):
        add(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    add_vocabulary(writer, vocabulary, run.tokenizer.start_id)
    add_sampling(writer, run.sampling_defaults())
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[name.upper()], config["num_hidden_layers"])
    rounded_less = 0
    for theirs, tensor in model.tensors.items():
        array = tensor.to("cpu", torch.float32).numpy()
        if name == PERMUTED and (found := re.search(r"\.([qk])_proj\.", theirs)):
            array = permuted(array, config[{"q": "num_attention_heads", "k": "num_key_value_heads"}[found[1]]])
        own = type_ if array.ndim > 1 else kind.F32
        if own == kind.Q8_0 and array.shape[-1] % gguf.GGML_QUANT_SIZES[own][0]:
            own, rounded_less = kind.F16, rounded_less + 1
        called = names.get_name(theirs, try_suffixes=(".weight", ".bias"))
        assert called is not None, theirs
        writer.add_tensor(called, gguf.quantize(np.ascontiguousarray(array), own), raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return rounded_less


def permuted(array: npt.NDArray[np.float32], heads: int) -> npt.NDArray[np.float32]:
    """Rows (heads · D, …) of queries or keys in the order of llama.cpp.

    llama.cpp rotates the dimensions 2i and 2i + 1 of a head together, and transformers i and i + D/2.
    """
    halves = array.reshape(heads, 2, -1, *array.shape[1:])
    return halves.swapaxes(1, 2).reshape(array.shape)


def add_vocabulary(writer: Any, vocabulary: LlamaCppVocabulary, start_id: int) -> None:
    """Write a tokenizer into the metadata of a `gguf.GGUFWriter`."""
    writer.add_tokenizer_model(vocabulary.model)
    if vocabulary.split is not None:
        writer.add_tokenizer_pre(vocabulary.split)
    writer.add_token_list(list(vocabulary.tokens))
    writer.add_token_types(list(vocabulary.types))
    if vocabulary.scores is not None:
        writer.add_token_scores(list(vocabulary.scores))
    if vocabulary.merges is not None:
        writer.add_token_merges(list(vocabulary.merges))
    writer.add_bos_token_id(start_id)
    writer.add_eos_token_id(vocabulary.end_id)
    if vocabulary.unknown_id is not None:
        writer.add_unk_token_id(vocabulary.unknown_id)
        # By default llama.cpp takes token 0.
        writer.add_pad_token_id(vocabulary.unknown_id)
    writer.add_add_bos_token(vocabulary.adds_start)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(vocabulary.adds_space)
    writer.add_remove_extra_whitespaces(False)
    if vocabulary.chat_template is not None:
        writer.add_chat_template(vocabulary.chat_template)


def add_sampling(writer: Any, options: Mapping[str, Any]) -> None:
    """Write sampling options into the metadata of a `gguf.GGUFWriter`; `sampling_of` reads them."""
    adders = {
        "temperature": writer.add_sampling_temp,
        "top_k": writer.add_sampling_top_k,
        "top_p": writer.add_sampling_top_p,
        "min_p": writer.add_sampling_min_p,
        "repetition_penalty": writer.add_sampling_penalty_repeat,
    }
    for name, value in options.items():
        # There is no field for typical_p.
        if name in adders:
            adders[name](value)


# -- the proof --------------------------------------------------------------------------------------------


class Opened(OpenedModel):
    """A GGUF file in llama.cpp.

    Args:
        path: of the file.
        length: most tokens of a window.
        context_length: of the model.
    """

    def __init__(self, path: Path, length: int, context_length: int | None) -> None:
        import llama_cpp

        _silence()
        # In fp32, without the rounding of its cache.
        cache = dict.fromkeys(("type_k", "type_v"), llama_cpp.GGML_TYPE_F32)
        llama = llama_cpp.Llama(
            str(path), n_ctx=length, n_batch=length, n_ubatch=length, n_gpu_layers=0, logits_all=True, verbose=False,
            **cache,
        )  # fmt: skip
        super().__init__(llama.n_vocab(), context_length)
        self.llama = llama

    def forward(self, ids: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Logits (B, T, V) of windows (B, T)."""
        rows = []
        for row in ids.tolist():
            self.llama.reset()
            self.llama.eval(row)
            rows.append(self.llama.scores[: len(row)].copy())
        return torch.from_numpy(np.stack(rows)), State({})

    def ids(self, text: str) -> list[int]:
        """The tokens of a text; the start token first, if llama.cpp adds it."""
        found: list[int] = self.llama.tokenize(text.encode("utf-8"), add_bos=True, special=False)
        return found


def _readable(text: str) -> str:
    """The text without what the notes of vocabularies name."""
    return _UNKNOWN_RUN.sub(REPLACEMENT, text.replace(SPACE, " "))


@functools.cache
def _silence() -> Any:
    """Without llama.cpp's notes, such as that its window is padded; the result must not be freed."""
    import llama_cpp

    callback = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
    return callback


def _measure(run: Run, vocabulary: LlamaCppVocabulary, path: Path, data_dir: Path | None) -> tuple[Proof, list[str]]:
    """The losses there and here, and what was not proved."""
    name, split = proof_text(run, data_dir, readable=str if vocabulary.model == "gpt2" else _readable)
    loss_here = score(run.model, split.ids).loss
    try:
        import llama_cpp
    except ImportError:
        note = "The file was not proved: llama-cpp-python is not installed (pip install llama-cpp-python)."
        return Proof("none", name, split, None, loss_here), [note]
    context = run.model.context_length
    opened: Any = Opened(path, min(context or sys.maxsize, len(split.ids)), context)
    program = f"llama-cpp-python {llama_cpp.__version__}"
    # With their own tokenizer: its ids are a part of the proof.
    ids = np.array(opened.ids(run.tokenizer.decode(split.ids[1:])))
    if not vocabulary.adds_start:
        ids = np.concatenate([split.ids[:1], ids])
    if not np.array_equal(ids, split.ids):
        raise RunError(
            f"The export does not read a text as run {run.name!r} does: {len(ids):,} tokens in {program}, "
            f"{len(split.ids):,} here. It was not kept: report this."
        )
    return Proof(program, name, split, score(opened, ids).loss, loss_here), []


# -- the other files --------------------------------------------------------------------------------------


def _modelfile(run: Run, vocabulary: LlamaCppVocabulary) -> str:
    """For `ollama create`: without a chat template in the file, the prompt is continued as it stands."""
    template = "" if vocabulary.chat_template is not None else 'TEMPLATE "{{ .Prompt }}"\n'
    return f"""FROM ./{MODEL}
{template}PARAMETER num_ctx {run.model.context_length}
PARAMETER num_predict 200
{"".join(f"PARAMETER {name} {value}{chr(10)}" for name, value in _sampling(run).items())}"""


def _sampling(run: Run) -> dict[str, Any]:
    """As `sampling`, in the names of Ollama, which are those of llama-cpp-python."""
    return {"repeat_penalty" if name == "repetition_penalty" else name: value for name, value in sampling(run).items()}


def _card(run: Run, notes: list[str]) -> str:
    options = ", ".join(f"{name}={value}" for name, value in _sampling(run).items())
    return f"""{front_matter(run, "gguf")}

# {run.name}

Trained with Inkling {__version__}.

```python
from llama_cpp import Llama

model = Llama("{MODEL}", n_ctx={run.model.context_length})
print(model.create_completion("The ", max_tokens=100, {options})["choices"][0]["text"])
```

With Ollama: `ollama create NAME -f {MODELFILE}`, then `ollama run NAME "The "`.

{"".join(f"- {note}{chr(10)}" for note in notes)}
{run.card()}"""
