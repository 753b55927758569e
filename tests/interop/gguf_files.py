"""Writes GGUF files for tests: of a model of transformers, and of another GGUF file in another format."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lm.interop.gguf_file import GGUFFile

NAMES = {
    "embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip


def gguf_name(name: str) -> str:
    """The name in GGUF of a tensor of transformers."""
    name = name.removeprefix("model.")
    layer = ""
    if name.startswith("layers."):
        _, number, name = name.split(".", 2)
        layer = f"blk.{number}."
    stem, _, end = name.rpartition(".")
    return f"{layer}{NAMES[stem]}.{end}"


def permuted(rows: npt.NDArray[Any], heads: int) -> npt.NDArray[Any]:
    """The rows of queries or keys as llama.cpp's conversion of Llama orders them."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def write_gguf(path: Path, kind: str, fields: Mapping[str, Any], tensors: Mapping[str, Any], quantisation: str) -> None:
    """Write a file.

    Args:
        path: the file.
        kind: llama, qwen2 or qwen3.
        fields: metadata; integers become uint32, numbers float32.
        tensors: values in fp32, by their names in GGUF; vectors stay fp32.
        quantisation: of the matrices, such as F32, Q8_0 or Q4_0.
    """
    import gguf

    writer = gguf.GGUFWriter(path, kind)
    for key, value in fields.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_string(key, value)
    chosen = gguf.GGMLQuantizationType[quantisation]
    for name, array in tensors.items():
        array = np.asarray(array, np.float32)
        stored = gguf.GGMLQuantizationType.F32 if array.ndim == 1 else chosen
        writer.add_tensor(name, gguf.quants.quantize(array, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def rewritten(source: Path, target: Path, quantisation: str) -> None:
    """Write the model of a GGUF file in another format."""
    import gguf

    opened = gguf.GGUFReader(source)
    tensors = {each.name: gguf.quants.dequantize(each.data, each.tensor_type) for each in opened.tensors}
    fields = {key: value for key, value in GGUFFile(source).fields.items() if key != "general.architecture"}
    write_gguf(target, str(GGUFFile(source).fields["general.architecture"]), fields, tensors, quantisation)
