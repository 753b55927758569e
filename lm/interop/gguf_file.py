"""Reads a GGUF file: its metadata, and its tensors one at a time, dequantised.

The package `gguf` has the types and the dequantisation. Its own reader makes several arrays of numpy for each token of
a vocabulary: 4 s and 160 MB for 49,000 tokens, where this one takes 0.1 s.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import functools
import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lm.errors import ModelSourceError
from lm.files import BF16, LazyTensor
from lm.generation.options import source_sampling
from lm.interop.architectures import SUPPORTED, parameter_name_of_gguf

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Formats of `struct` by the number of a type of metadata."""
_STRING, _ARRAY = 8, 9
_VERSIONS = (2, 3)
_MAX_ITEMS = 1 << 24
"""Items of an array of metadata, tensors, and entries of metadata, at most: a larger number is damage."""
_STORED = {"F32": "F32", "F16": "F16", "BF16": BF16}
"""Types of tensors that are kept as they are; the others are dequantised to fp16."""
_CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}


@dataclass(frozen=True)
class _Entry:
    """A tensor of the file."""

    name: str
    shape: tuple[int, ...]
    """As numpy has it: the rows first."""
    kind: Any
    """`gguf.GGMLQuantizationType`."""
    begin: int
    end: int
    """Its bytes in the file."""


class GGUFFile:
    """A GGUF file, mapped into memory.

    Raises:
        ModelSourceError: it is no GGUF file, is cut short, or holds numbers of an unknown type.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:
            raise ModelSourceError(f"{path} is empty: copy or download it again.") from None
        except OSError as error:
            raise ModelSourceError(f"{path} cannot be read: {error.strerror or error}.") from None
        self._at = 0
        try:
            self.fields, self._entries = self._read()
        except (struct.error, ArithmeticError, ValueError, TypeError, MemoryError, LookupError, RecursionError):
            raise self._damaged() from None

    def _damaged(self) -> ModelSourceError:
        return ModelSourceError(f"{self.path} is cut short or damaged: copy or download it again.")

    # -- the header -------------------------------------------------------------------------------

    def _read(self) -> tuple[dict[str, Any], list[_Entry]]:
        if self._data[:4] != b"GGUF":
            raise ModelSourceError(f"{self.path} is no GGUF file: it does not begin with the letters GGUF.")
        self._at = 4
        version = self._scalar("I")
        if version not in _VERSIONS:
            big = "big-endian" if version & 0xFFFF == 0 else f"version {version}"
            raise ModelSourceError(f"{self.path} is GGUF {big}, and supported are little-endian versions 2 and 3.")
        num_tensors, num_fields = self._scalar("Q"), self._scalar("Q")
        if max(num_tensors, num_fields) > _MAX_ITEMS:
            raise self._damaged()
        fields = {}
        for _ in range(num_fields):
            name = self._string()
            fields[name] = self._value(self._scalar("I"))
        found = [self._tensor() for _ in range(num_tensors)]
        alignment = int(fields.get("general.alignment", 32))
        first = -(-self._at // alignment) * alignment
        return fields, [self._entry(first, *each) for each in found]

    def _scalar(self, form: str) -> Any:
        (value,) = struct.unpack_from("<" + form, self._data, self._at)
        self._at += struct.calcsize("<" + form)
        return value

    def _string(self) -> str:
        size = self._scalar("Q")
        if size > len(self._data) - self._at:
            raise self._damaged()
        text = self._data[self._at : self._at + size].decode("utf-8")
        self._at += size
        return text

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            inner, count = self._scalar("I"), self._scalar("Q")
            if count > min(_MAX_ITEMS, len(self._data) - self._at):
                raise self._damaged()
            if inner in _SCALARS:
                values = struct.unpack_from(f"<{count}{_SCALARS[inner]}", self._data, self._at)
                self._at += struct.calcsize(f"<{count}{_SCALARS[inner]}")
                return list(values)
            return [self._value(inner) for _ in range(count)]
        if kind not in _SCALARS:
            raise self._damaged()
        return self._scalar(_SCALARS[kind])

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape, number of the type, and place of a tensor."""
        name, dims = self._string(), self._scalar("I")
        if dims > 8:
            raise self._damaged()
        shape = tuple(self._scalar("Q") for _ in range(dims))
        return name, shape[::-1], self._scalar("I"), self._scalar("Q")

    def _entry(self, first: int, name: str, shape: tuple[int, ...], number: int, place: int) -> _Entry:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        try:
            kind = GGMLQuantizationType(number)
        except ValueError:
            raise ModelSourceError(
                f"{self.path}: tensor {name} has the unknown quantisation {number}: quantise the model as Q8_0 or "
                "Q4_K_M, or upgrade the package gguf."
            ) from None
        block, size = GGML_QUANT_SIZES[kind]
        count = math.prod(shape)
        begin = first + place
        end = begin + count // block * size
        # Blocks lie inside of rows.
        if not count or shape[-1] % block or end > len(self._data):
            raise self._damaged()
        return _Entry(name, shape, kind, begin, end)

    # -- as a model -------------------------------------------------------------------------------

    @property
    def architecture(self) -> str:
        """The class of transformers with the same architecture.

        Raises:
            ModelSourceError: it is not supported.
        """
        name = self.fields.get("general.architecture")
        if name not in _CLASSES:
            raise ModelSourceError(
                f"{self.path}: the architecture {name or 'of the file'} cannot be imported; supported are {SUPPORTED}."
            )
        return _CLASSES[name]

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """The configuration under the names of config.json, for `lm.interop.architectures`."""
        prefix = self.fields.get("general.architecture")

        def field(name: str) -> Any:
            return self.fields.get(f"{prefix}.{name}")

        def whole(name: str) -> int | None:
            value = field(name)
            if value is not None and not isinstance(value, int):
                raise ModelSourceError(f"{self.path} has no proper '{prefix}.{name}': copy or download it again.")
            return value

        hidden_size, num_heads = whole("embedding_length"), whole("attention.head_count")
        head_dim = whole("attention.key_length") or (hidden_size // num_heads if hidden_size and num_heads else None)
        rotated = whole("rope.dimension_count") or head_dim
        names = {each.name for each in self._entries}
        scaling = field("rope.scaling.type") or "none"
        if scaling == "none" and "rope_freqs.weight" in names:
            # The frequencies of Llama 3.1 and later.
            scaling = "llama3"
        return {
            "architectures": [self.architecture],
            "hidden_size": hidden_size,
            "num_hidden_layers": field("block_count"),
            "num_attention_heads": num_heads,
            "num_key_value_heads": field("attention.head_count_kv"),
            "head_dim": head_dim,
            "intermediate_size": field("feed_forward_length"),
            "rms_norm_eps": field("attention.layer_norm_rms_epsilon"),
            "rope_theta": field("rope.freq_base"),
            "rope_scaling": None if scaling == "none" else {"rope_type": scaling},
            "partial_rotary_factor": rotated / head_dim if rotated and head_dim else 1,
            "sliding_window": field("attention.sliding_window"),
            "use_sliding_window": True,
            "num_experts": field("expert_count"),
            "max_position_embeddings": field("context_length"),
            "tie_word_embeddings": "output.weight" not in names,
        }

    def tensors(self) -> dict[str, LazyTensor]:
        """The weights under the names of our Transformer.

        Raises:
            ModelSourceError: a tensor has a quantisation that the package gguf cannot undo.
        """
        return {parameter_name_of_gguf(each.name): self._lazy(each) for each in self._entries}

    def _lazy(self, entry: _Entry) -> LazyTensor:
        kind = entry.kind.name
        if kind not in _STORED and not _can_dequantize(entry.kind):
            raise ModelSourceError(
                f"{self.path}: tensor {entry.name} has the quantisation {kind}, which cannot be read: quantise the "
                "model as Q8_0 or Q4_K_M."
            )
        return LazyTensor(_STORED.get(kind, "F16"), entry.shape, functools.partial(self._values, entry))

    def _values(self, entry: _Entry) -> npt.NDArray[Any]:
        """The values of a tensor, of bf16 its bits."""
        from gguf import quants

        raw = np.frombuffer(self._data, np.uint8, entry.end - entry.begin, entry.begin)
        kind = entry.kind.name
        if kind in _STORED:
            stored = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}[kind]
            array: npt.NDArray[Any] = raw.view(stored).reshape(entry.shape)
        else:
            rows = raw.reshape(*entry.shape[:-1], -1)
            array = quants.dequantize(rows, entry.kind).astype(np.float16)
        if self.architecture == "LlamaForCausalLM" and entry.name.endswith(("attn_q.weight", "attn_k.weight")):
            heads = "num_attention_heads" if "attn_q" in entry.name else "num_key_value_heads"
            array = unpermuted(array, int(self.config[heads] or self.config["num_attention_heads"]))
        return array


@functools.cache
def _can_dequantize(kind: Any) -> bool:
    """Whether the package gguf can, found out with a block of zeros."""
    from gguf import GGML_QUANT_SIZES, quants

    try:
        quants.dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def unpermuted(rows: npt.NDArray[Any], heads: int) -> npt.NDArray[Any]:
    """Rows of queries or keys (H · D, E) in the order of transformers.

    llama.cpp rotates the pairs (0, 1), (2, 3), …, of a head, transformers the pairs (i, i + D/2). Files of the
    architecture llama have the rows of each head in the order of llama.cpp.
    """
    width = len(rows) // heads
    return rows.reshape(heads, width // 2, 2, -1).swapaxes(1, 2).reshape(rows.shape)


def license_of(fields: Mapping[str, Any]) -> str | None:
    """The licence that the file names."""
    found = fields.get("general.license") or fields.get("general.license.name")
    return str(found) if found else None


def sampling_of(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The sampling options that the file gives."""
    names = {
        "temperature": "temp", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p",
        "repetition_penalty": "penalty_repeat",
    }  # fmt: skip
    found = {name: fields.get(f"general.sampling.{there}") for name, there in names.items()}
    # Numbers are stored in 32 bits.
    rounded = {name: float(f"{value:.6g}") if isinstance(value, float) else value for name, value in found.items()}
    return source_sampling(rounded)
