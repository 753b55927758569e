"""The architectures that can be imported, as options of our Transformer.

A configuration is that of transformers (config.json). The metadata of a GGUF file becomes the same fields first
(`lm.interop.gguf_file`), so that all checks are here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lm.errors import ModelSourceError

MODEL = "transformer"
"""The registered model that an imported run has."""
SUPPORTED = "LlamaForCausalLM, Qwen2ForCausalLM and Qwen3ForCausalLM, in GGUF llama, qwen2 and qwen3"


@dataclass(frozen=True)
class Architecture:
    """What a class of transformers has, where its config.json does not say it."""

    qk_norm: bool = False
    qkv_bias: bool = False
    head_dim: int | None = None
    """Default width of a head; None: hidden_size / num_attention_heads."""


ARCHITECTURES = {
    "LlamaForCausalLM": Architecture(),
    "Qwen2ForCausalLM": Architecture(qkv_bias=True),
    "Qwen3ForCausalLM": Architecture(qk_norm=True, head_dim=128),
}


_NUMBER = (int, float)
_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("head_dim", "num_key_value_heads", "max_position_embeddings", "vocab_size", "sliding_window",
                     "num_experts", "num_local_experts", "n_routed_experts"), (int,)),
    **dict.fromkeys(("rms_norm_eps", "rope_theta", "partial_rotary_factor"), _NUMBER),
    **dict.fromkeys(("tie_word_embeddings", "use_sliding_window", "attention_bias", "mlp_bias"), (bool,)),
    **dict.fromkeys(("rope_parameters", "rope_scaling", "quantization_config"), (Mapping,)),
    **dict.fromkeys(("hidden_act", "model_type", "rope_type", "type"), (str,)),
    "layer_types": (list,),
}  # fmt: skip
"""Types of the fields that may be left out."""


def architecture_of(config: Mapping[str, Any], where: str) -> str:
    """The class of transformers that a configuration names.

    Raises:
        ModelSourceError: it is not supported.
    """
    named = config.get("architectures")
    found = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else None
    if found not in ARCHITECTURES:
        name = found or config.get("model_type") or "no architecture"
        raise ModelSourceError(f"{where}: {name} cannot be imported; supported are {SUPPORTED}.")
    return str(found)


def model_options(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The options of our Transformer, without `context_length`, that computes the same.

    Args:
        config: as in config.json.
        where: the file, for errors.

    Raises:
        ModelSourceError: our Transformer does not have a part of it, or the file lacks a value.
    """
    name = architecture_of(config, where)
    architecture = ARCHITECTURES[name]
    for fields in (config, _rope(config)):
        _check_types(fields, where)
    _refuse_parts(config, name, where)
    hidden_size, num_heads = (_whole(config, field, where) for field in ("hidden_size", "num_attention_heads"))
    kv_heads, head_dim = config.get("num_key_value_heads"), config.get("head_dim") or architecture.head_dim
    return {
        "type": MODEL,
        "hidden_size": hidden_size,
        "num_layers": _whole(config, "num_hidden_layers", where),
        "num_heads": num_heads,
        "num_kv_heads": None if kv_heads in (None, num_heads) else _whole(config, "num_key_value_heads", where),
        "head_size": None if head_dim is None or head_dim * num_heads == hidden_size else head_dim,
        "mlp_size": _whole(config, "intermediate_size", where),
        "qk_norm": architecture.qk_norm,
        "qkv_bias": architecture.qkv_bias,
        "rope_theta": _rope(config).get("rope_theta") or config.get("rope_theta") or 10_000.0,
        "norm_epsilon": config.get("rms_norm_eps") or 1e-6,
        "tie_weights": bool(config.get("tie_word_embeddings", False)),
        "table_orders": [],
    }


def _check_types(fields: Mapping[str, Any], where: str) -> None:
    """Refuse a field of another type, and a number that is none.

    Raises:
        ModelSourceError: names the field.
    """
    for field, types in _TYPES.items():
        value = fields.get(field)
        if value is None:
            continue
        fits = isinstance(value, types) and (bool in types or not isinstance(value, bool))
        if not fits or (isinstance(value, float) and not math.isfinite(value)):
            raise ModelSourceError(f"{where} has no proper {field!r}, so the model cannot be built: restore the file.")


def _whole(config: Mapping[str, Any], field: str, where: str) -> int:
    value = config.get(field)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ModelSourceError(f"{where} has no proper {field!r}, so the model cannot be built: restore the file.")
    return value


def _rope(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The parameters of the rotary positions, before and since version 5 of transformers."""
    found = config.get("rope_parameters") or config.get("rope_scaling")
    return found if isinstance(found, Mapping) else {}


def _refuse_parts(config: Mapping[str, Any], name: str, where: str) -> None:
    """Refuse a model with a part that our Transformer does not have.

    Raises:
        ModelSourceError: names the part, and what is supported.
    """

    def refuse(part: str, instead: str) -> None:
        raise ModelSourceError(f"{where}: the model has {part}, which cannot be imported; supported is {instead}.")

    if config.get("auto_map"):
        refuse("code in its folder (auto_map)", "a model without code")
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unknown")
        refuse(f"quantised weights ({method})", "a folder in fp32, fp16 or bf16, or a GGUF file")
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        refuse(f"the activation {activation}", "silu")
    rope = _rope(config)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind != "default":
        refuse(f"rope scaling ({kind})", "a model without it")
    if float(rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1) != 1:
        refuse("rotary positions in a part of each head", "a model with them in whole heads")
    if config.get("rope_interleaved"):
        refuse("interleaved rotary positions (rope_interleaved)", "a model without them")
    # Llama has no windows; a Qwen has them if it says so.
    slides = config.get("use_sliding_window", name == "LlamaForCausalLM") and config.get("sliding_window")
    if slides or "sliding_attention" in (config.get("layer_types") or ()):
        refuse("a sliding window", "full attention")
    experts = config.get("num_experts") or config.get("num_local_experts") or config.get("n_routed_experts")
    if experts:
        refuse(f"{experts} experts (MoE)", "a dense model")
    if config.get("attention_bias") and name != "Qwen2ForCausalLM":
        refuse("biases in its attention (attention_bias)", "a model without them, or a Qwen2")
    if config.get("mlp_bias"):
        refuse("biases in its MLP (mlp_bias)", "a model without them")


def parameter_name(name: str) -> str:
    """The name of a tensor of transformers in our Transformer."""
    return name.removeprefix("model.")


def is_buffer(name: str) -> bool:
    """Whether a tensor of transformers is no weight: older files hold the frequencies of the rotary positions."""
    return name.endswith("rotary_emb.inv_freq")


_GGUF_NAMES = {
    "token_embd": "embed_tokens", "output_norm": "norm", "output": "lm_head", "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}  # fmt: skip
_GGUF_TENSOR = re.compile(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)")


def parameter_name_of_gguf(name: str) -> str:
    """The name of a tensor of GGUF in our Transformer; one that it does not have keeps its name."""
    match = _GGUF_TENSOR.fullmatch(name)
    if match is None or match[2] not in _GGUF_NAMES:
        return name
    layer = "" if match[1] is None else f"layers.{match[1]}."
    return f"{layer}{_GGUF_NAMES[match[2]]}.{match[3]}"
