"""Tiny models of transformers with a tiny tokenizer, as folders and as GGUF files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from tests.interop.gguf_files import gguf_name, permuted, write_gguf
from tests.tokenizers.tiny_pretrained import CONFIG, byte_level

SIZES: dict[str, Any] = {
    "vocab_size": 328, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
"""The vocabulary is 21 tokens larger than that of the tokenizer, as in published models."""
EXTRAS: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True, "rope_theta": 100_000.0},
    "qwen2": {"tie_word_embeddings": False},
    "qwen3": {"tie_word_embeddings": False, "head_dim": 24},
}


def make_model(kind: str) -> Any:
    """A model with random weights of a size that tells tokens apart."""
    import transformers

    config = transformers.AutoConfig.for_model(kind, **{**SIZES, **EXTRAS[kind]})
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Norms and biases too, so that none can be left out unnoticed.
            spread = torch.randn_like(parameter) * 0.2
            parameter.copy_(1 + spread if "norm" in name else spread)
    return model


def save_folder(model: Any, path: Path, **options: Any) -> Path:
    """The model and its tokenizer as a folder."""
    model.save_pretrained(path, **options)
    (path / "tokenizer.json").write_text(byte_level(), "utf-8")
    (path / "tokenizer_config.json").write_text(json.dumps(CONFIG), "utf-8")
    generation = {"do_sample": True, "temperature": 0.6, "top_p": None, "eos_token_id": [2, 0]}
    (path / "generation_config.json").write_text(json.dumps(generation), "utf-8")
    (path / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\n# A model\n", "utf-8")
    return path


def gguf_parts(model: Any) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Architecture, metadata and tensors of the model's GGUF file."""
    config, kind = model.config, model.config.model_type
    tensors = {
        gguf_name(name): tensor.float().numpy()
        for name, tensor in model.state_dict().items()
        if not (name == "lm_head.weight" and config.tie_word_embeddings)
    }
    if kind == "llama":
        for name in [*tensors]:
            if name.endswith(("attn_q.weight", "attn_k.weight")):
                heads = config.num_attention_heads if "attn_q" in name else config.num_key_value_heads
                tensors[name] = permuted(tensors[name], heads)
    library = json.loads(byte_level())
    names = {number: name for name, number in library["model"]["vocab"].items()}
    names |= {token["id"]: token["content"] for token in library["added_tokens"]}
    size = max(names) + 1
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in library["model"]["merges"]]
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    fields = {
        f"{kind}.context_length": config.max_position_embeddings, f"{kind}.embedding_length": config.hidden_size,
        f"{kind}.block_count": config.num_hidden_layers, f"{kind}.feed_forward_length": config.intermediate_size,
        f"{kind}.attention.head_count": config.num_attention_heads,
        f"{kind}.attention.head_count_kv": config.num_key_value_heads,
        f"{kind}.attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        f"{kind}.attention.key_length": head_dim, f"{kind}.attention.value_length": head_dim,
        f"{kind}.rope.freq_base": float(config.rope_parameters["rope_theta"]),
        f"{kind}.rope.dimension_count": head_dim, "general.license": "mit",
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": [names[number] for number in range(size)], "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.token_type": [3 if number < 3 else 1 for number in range(size)],
        "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": CONFIG["chat_template"],
    }  # fmt: skip
    return kind, fields, tensors


def save_gguf(model: Any, path: Path, quantisation: str = "F32", **changed: Any) -> Path:
    """The model and its tokenizer as a GGUF file; `changed` replaces fields, with __ for a dot."""
    kind, fields, tensors = gguf_parts(model)
    fields |= {name.replace("__", "."): value for name, value in changed.items()}
    write_gguf(path, kind, {key: value for key, value in fields.items() if value is not None}, tensors, quantisation)
    return path
