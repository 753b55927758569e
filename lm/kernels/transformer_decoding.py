"""The native decoding step of the Transformer with its key-value cache; equals `lm.models.transformer`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from lm.kernels.compiled import native
from lm.kernels.decoding import Arrays, DecodePrecision, Floats, as_floats, rounded_to_bf16
from lm.kernels.head_decoding import TABLES, HeadKernel, HeadParts, context_tables, tails, weights, with_tail_rows

REGISTERS = {"transformer": "TransformerKernel"}

_MATRICES = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
    "mlp.down_proj",
)  # fmt: skip
_NORMS = ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm")


class TransformerKernel(HeadKernel):
    """All blocks, the cache of each slot, and its window: when that is full, the older half is dropped."""

    precisions = ("fp32", "bf16", "int8", "int4")

    @classmethod
    def parts(cls, options: Mapping[str, Any], arrays: Arrays, precision: DecodePrecision) -> HeadParts:
        """See `Kernel.parts`."""
        return cls._parts(options, weights(arrays, precision))

    @classmethod
    def _parts(cls, options: Mapping[str, Any], arrays: Arrays) -> HeadParts:
        """`parts` of these arrays as they are."""
        embedding = arrays["embed_tokens.weight"]
        vocab_size, context = len(embedding), int(options["context_length"])
        heads, head_size = int(options["num_heads"]), _head_size(options)
        blocks = [
            (
                [arrays[f"layers.{layer}.{name}.weight"] for name in _MATRICES],
                # None without QK-norm.
                [arrays.get(f"layers.{layer}.{name}.weight") for name in _NORMS],
                np.concatenate([arrays[f"layers.{layer}.{name}.bias"] for name in _MATRICES[:3]])
                if options.get("qkv_bias")
                else None,
            )
            for layer in range(int(options["num_layers"]))
        ]
        # As `rotary_tables` in the torch model, in float32 throughout.
        exponents = np.arange(0, head_size, 2, dtype=np.float32) / np.float32(head_size)
        angles = np.arange(context, dtype=np.float32)[:, None] * np.float32(options["rope_theta"]) ** -exponents
        embedding, head = with_tail_rows(arrays, embedding, arrays.get("lm_head.weight", embedding))
        arguments = {
            "embedding": embedding,
            "head": head,
            "norm": arrays["norm.weight"],
            "blocks": blocks,
            "cosines": np.cos(angles),
            "sines": np.sin(angles),
            "heads": heads,
            "kv_heads": int(options["num_kv_heads"] or heads),
            "epsilon": float(options["norm_epsilon"]),
        }
        return HeadParts(
            "transformer",
            arguments | context_tables(options, arrays),
            vocab_size,
            context,
            **tails(options, arrays, vocab_size),
        )

    def _build(
        self, options: Mapping[str, Any], arrays: Arrays, precision: DecodePrecision, settings: dict[str, Any]
    ) -> Any:
        # Matrices stay in the format of their file: the compiled kernel converts and rounds them row by row.
        kept = {name: _as_stored(array) for name, array in arrays.items()}
        # Context tables are added, not multiplied: the compiled kernel takes them as they are.
        tables = {name: array for name, array in arrays.items() if name.startswith(TABLES)}
        kept |= weights(tables, "int8" if precision == "int4" else precision)
        parts = self._parts(options, kept)
        self.vocab_size, self.context_length = parts.vocab_size, parts.context_length
        self._head_size, self._layers = _head_size(options), int(options["num_layers"])
        self._in_slot = 2 if precision == "bf16" else 1
        return native().transformer(**parts.arguments, **settings)

    @classmethod
    def slot_bytes(cls, options: Mapping[str, Any]) -> int:
        """See `Kernel.slot_bytes`; of a text that fills the context, in bf16 half of it.

        Positions that are not used take no memory.
        """
        groups = int(options["num_kv_heads"] or options["num_heads"])
        return 8 * int(options["num_layers"]) * int(options["context_length"]) * groups * _head_size(options)

    def _value_rows(self, length: int) -> int:
        """The rows of slots that the values of so many positions take."""
        return -(-length // self._in_slot)

    def save(self, slot: int) -> tuple[dict[str, npt.NDArray[Any]], tuple[int, ...]]:
        """See `Kernel.save`: "keys.N" and "values.N" (L, G, D) of layer N, "lengths", and the "recent" tokens."""
        length = int(self._views["lengths"][slot])
        arrays: dict[str, npt.NDArray[Any]] = {"lengths": np.array(length)}
        if "recent" in self._views:
            arrays["recent"] = np.array(self._views["recent"][slot])
        keys, values = self._views["keys"][slot], self._views["values"][slot]
        for layer in range(self._layers):
            # (G, panels, D, 16) → (panels, 16, G, D): the keys of sixteen positions are interleaved.
            panels = _numbers(keys[layer, :, : -(-length // 16)]).transpose(1, 3, 0, 2)
            arrays[f"keys.{layer}"] = panels.reshape(-1, *panels.shape[2:])[:length].copy()
            found = _numbers(values[layer, :, : self._value_rows(length)])[:, :length, : self._head_size]
            arrays[f"values.{layer}"] = np.ascontiguousarray(found.transpose(1, 0, 2))
        return arrays, tuple(self._views["window"][slot, :length].tolist())

    def load(self, slot: int, arrays: Arrays, window: tuple[int, ...]) -> None:
        """See `Kernel.load`."""
        length = int(arrays["lengths"])
        keys, values = self._views["keys"][slot], self._views["values"][slot]
        for layer in range(self._layers):
            filled = np.zeros((-(-length // 16) * 16, *arrays[f"keys.{layer}"].shape[1:]), np.float32)
            filled[:length] = arrays[f"keys.{layer}"]
            panels = filled.reshape(-1, 16, *filled.shape[1:]).transpose(2, 0, 3, 1)
            keys[layer, :, : panels.shape[1]] = _slots(panels, keys.dtype)
            filled[:length] = arrays[f"values.{layer}"]
            rows = self._value_rows(length)
            used = filled.transpose(1, 0, 2)[:, : rows * self._in_slot]
            values[layer, :, :rows, : self._head_size] = _slots(used, values.dtype)
        if "recent" in self._views:
            self._views["recent"][slot] = arrays["recent"]
        self._views["window"][slot, :length] = window
        self._views["lengths"][slot] = length


def _head_size(options: Mapping[str, Any]) -> int:
    return int(options.get("head_size") or int(options["hidden_size"]) // int(options["num_heads"]))


def _numbers(slots: npt.NDArray[Any]) -> Floats:
    """A part of the cache (..., N, W) as numbers: slots that hold two bf16 are (..., 2 N, W)."""
    if slots.dtype == np.float32:
        return slots
    halves = np.ascontiguousarray(slots).view(np.uint16).reshape(*slots.shape, 2).swapaxes(-1, -2)
    floats = (halves.astype(np.uint32) << 16).view(np.float32)
    return floats.reshape(*slots.shape[:-2], 2 * slots.shape[-2], slots.shape[-1])


def _slots(numbers: Floats, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """The inverse of `_numbers`; rounds to bf16."""
    if dtype == np.float32:
        return numbers
    *others, rows, width = numbers.shape
    halves = (rounded_to_bf16(numbers).view(np.uint32) >> 16).astype(np.uint16)
    pairs = halves.reshape(*others, rows // 2, 2, width).swapaxes(-1, -2)
    return np.ascontiguousarray(pairs).view(np.int32)[..., 0]


def _as_stored(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """A contiguous array: a matrix in float16 stays one, all other arrays are float32."""
    return np.ascontiguousarray(array) if array.ndim == 2 and array.dtype == np.float16 else as_floats(array)
