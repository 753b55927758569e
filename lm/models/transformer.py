"""A decoder-only Transformer with the architecture and parameter names of Llama, Qwen2 and Qwen3.

    ids ─► embedding ─► num_layers × (RMSNorm ─► attention ─► + ; RMSNorm ─► SwiGLU ─► +) ─► RMSNorm ─► logits

Rotary positions, causal attention by torch's `scaled_dot_product_attention`; optional: grouped queries, QK-norm, biases
of queries, keys and values. Parameter names are those of Hugging Face transformers. The state is the key-value cache.

Shapes: B batch, T new positions, L cached positions, H query heads, G key-value heads, D head size, E hidden size.

Sources: Vaswani et al. 2017; Touvron et al. 2023 (Llama); Su et al. 2021 (rotary positions); Zhang and Sennrich 2019
(RMSNorm); Shazeer 2020 (SwiGLU); Ainslie et al. 2023 (grouped queries); Dehghani et al. 2023 (QK-norm).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from lm.errors import UnsupportedExportError
from lm.kernels import autograd, layers
from lm.kernels.dispatch import usable
from lm.models.attention_maps import attend
from lm.models.base import AttentionMaps, Inspection, LanguageModel, State, TrainingLoss
from lm.models.context_tables import ContextTables, TableOptions
from lm.models.huggingface import HuggingFaceModel
from lm.models.layout import Shape, Stage, Symbol
from lm.models.output_head import HeadOptions, OutputHead, make_tails, output_stage, tail_positions
from lm.models.target_scores import TargetScores
from lm.torch_private import has_hooks

REGISTERS = {"transformer": "Transformer"}

Cache = tuple[Tensor, Tensor]
"""Keys and values (B, L, G, D) of one layer."""


class Room(NamedTuple):
    """Buffers of keys and values (B, P, G, D) of one layer, and the rows (B, 1) and positions (B, T) of new ones."""

    keys: Tensor
    values: Tensor
    rows: Tensor
    positions: Tensor


class TransformerOptions(HeadOptions, TableOptions):
    """Options of the Transformer."""

    type: Literal["transformer"] = Field("transformer", description="Registered name of the model.")
    context_length: int = Field(128, ge=2, description="Number of tokens that a prediction depends on.")
    hidden_size: int = Field(128, ge=2, description="Width of embeddings and residual stream (E).")
    num_layers: int = Field(4, ge=1, description="Number of blocks.")
    num_heads: int = Field(4, ge=1, description="Query heads; hidden_size must be an even multiple of it.")
    num_kv_heads: int | None = Field(
        None, ge=1, description="Key-value heads, each shared by num_heads / num_kv_heads queries; default: num_heads."
    )
    head_size: int | None = Field(None, ge=2, description="Width of a head, even; default: hidden_size / num_heads.")
    mlp_size: int | None = Field(
        None, ge=1, description="Inner width of SwiGLU; default: 8/3 of hidden_size, up to a multiple of 64."
    )
    qk_norm: bool = Field(True, description="RMSNorm on queries and keys (Qwen3) instead of none (Llama).")
    qkv_bias: bool = Field(False, description="Biases of queries, keys and values (Qwen2).")
    rope_theta: float = Field(10_000.0, gt=0, description="Base of the rotary wavelengths.")
    norm_epsilon: float = Field(1e-6, gt=0, description="Added to the mean square in RMSNorm.")
    dropout: float = Field(
        0.0, ge=0, lt=1, description="Dropout probability of embeddings, attention weights and both branches."
    )

    @property
    def bf16_on_cpu(self) -> bool:
        """See `ModelOptions.bf16_on_cpu`."""
        return True

    @property
    def inner_size(self) -> int:
        """`mlp_size`, or its default."""
        return self.mlp_size or -(-self.hidden_size * 8 // 3 // 64) * 64

    @property
    def head_width(self) -> int:
        """`head_size`, or its default."""
        return self.head_size or self.hidden_size // self.num_heads

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        if self.head_size is not None and self.head_size % 2:
            raise ValueError(f"head_size {self.head_size} must be even")
        if self.head_size is None and self.hidden_size % (2 * self.num_heads):
            raise ValueError(f"hidden_size {self.hidden_size} must be an even multiple of num_heads {self.num_heads}")
        if self.num_heads % (self.num_kv_heads or 1):
            raise ValueError(f"num_heads {self.num_heads} must be a multiple of num_kv_heads {self.num_kv_heads}")
        return self


class HiddenLinear(layers.Linear):
    """A linear layer of a block."""

    optimizer_kind = "muon"
    adapts = ("weight",)


class Attention(nn.Module):
    """Causal attention with rotary positions over the cache and the new positions."""

    def __init__(self, options: TransformerOptions) -> None:
        super().__init__()
        size = options.hidden_size
        self.head_size = options.head_width
        kv_heads = options.num_kv_heads or options.num_heads
        bias = options.qkv_bias
        self.grouped = kv_heads != options.num_heads
        self.dropout = options.dropout
        self.q_proj = HiddenLinear(size, options.num_heads * self.head_size, bias=bias)
        self.k_proj = HiddenLinear(size, kv_heads * self.head_size, bias=bias)
        self.v_proj = HiddenLinear(size, kv_heads * self.head_size, bias=bias)
        self.o_proj = HiddenLinear(options.num_heads * self.head_size, size, bias=False)
        epsilon = options.norm_epsilon
        self.q_norm = layers.RMSNorm(self.head_size, eps=epsilon) if options.qk_norm else None
        self.k_norm = layers.RMSNorm(self.head_size, eps=epsilon) if options.qk_norm else None

    def forward(
        self,
        hidden: Tensor,
        rotation: tuple[Tensor, Tensor],
        cache: Cache | Room | None,
        mask: Tensor | None,
        causal: bool,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """(B, T, E) → (B, T, E), and keys and values (B, L + T, G, D) of the new cache."""
        query, key, value = self._heads(hidden, rotation, cache)
        dropout = self.dropout if self.training else 0.0
        if causal and cache is None and usable("attention", query):
            return self.o_proj(autograd.attend(query, key, value, dropout).flatten(2)), (key, value)
        mixed = F.scaled_dot_product_attention(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=causal,
            enable_gqa=self.grouped,
        )
        return self.o_proj(mixed.transpose(1, 2).flatten(2)), (key, value)

    def inspect(
        self,
        hidden: Tensor,
        rotation: tuple[Tensor, Tensor],
        cache: Cache | Room | None,
        mask: Tensor | None,
    ) -> tuple[AttentionMaps, tuple[Tensor, Tensor]]:
        """`forward` in plain torch, with the scores and weights of each head."""
        query, key, value = self._heads(hidden, rotation, cache)
        dropout = self.dropout if self.training else 0.0
        scores, weights, mixed = attend(query, key, value, mask, dropout=dropout)
        return AttentionMaps(scores, weights, self.o_proj(mixed.flatten(2)), self.head_size), (key, value)

    def _heads(
        self, hidden: Tensor, rotation: tuple[Tensor, Tensor], cache: Cache | Room | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, T, H, D), and keys and values (B, L + T, G, D) of the cache and the new positions.

        With a `Room` the new ones are written into its buffers (B, P, G, D), which are returned.
        """
        batch, time, _ = hidden.shape
        projected = autograd.linears(hidden, (self.q_proj, self.k_proj, self.v_proj))
        query, key, value = (heads.view(batch, time, -1, self.head_size) for heads in projected)
        query, key = self._rotated(query, self.q_norm, rotation), self._rotated(key, self.k_norm, rotation)
        if isinstance(cache, Room):
            places = cache.rows, cache.positions
            return query, cache.keys.index_put_(places, key), cache.values.index_put_(places, value)
        if cache is not None:
            key, value = torch.cat([cache[0], key], dim=1), torch.cat([cache[1], value], dim=1)
        return query, key, value

    def _rotated(self, heads: Tensor, norm: nn.RMSNorm | None, rotation: tuple[Tensor, Tensor]) -> Tensor:
        """Queries or keys (B, T, H, D) after QK-norm and rotation."""
        if usable("norm", heads):
            weight, epsilon = (None, 0.0) if norm is None else (norm.weight, norm.eps or 0.0)
            return autograd.rms_norm_rope(heads, weight, epsilon, rotation)
        # Autocast does not cast the inputs of norms, and torch's fused norm needs the dtype of its weight.
        return rotate(heads if norm is None else norm(heads.to(norm.weight.dtype)), *rotation).to(heads.dtype)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) · up(x)) at each position."""

    def __init__(self, options: TransformerOptions) -> None:
        super().__init__()
        size = options.hidden_size
        inner = options.inner_size
        self.gate_proj = HiddenLinear(size, inner, bias=False)
        self.up_proj = HiddenLinear(size, inner, bias=False)
        self.down_proj = HiddenLinear(inner, size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, T, E) → (B, T, E)."""
        mixed: Tensor = self.down_proj(autograd.swiglu(*autograd.linears(hidden, (self.gate_proj, self.up_proj))))
        return mixed


class Block(nn.Module):
    """Attention, then SwiGLU, each after a norm and added to the residual stream."""

    def __init__(self, options: TransformerOptions) -> None:
        super().__init__()
        self.input_layernorm = layers.RMSNorm(options.hidden_size, eps=options.norm_epsilon)
        self.self_attn = Attention(options)
        self.post_attention_layernorm = layers.RMSNorm(options.hidden_size, eps=options.norm_epsilon)
        self.mlp = SwiGLU(options)
        self.dropout = layers.Dropout(options.dropout)
        self._parts = [part for part in self.modules() if part is not self]

    def forward(
        self,
        hidden: Tensor,
        rotation: tuple[Tensor, Tensor],
        cache: Cache | Room | None,
        mask: Tensor | None,
        causal: bool,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """(B, T, E) → (B, T, E), and the new cache."""
        # Hooks and adapters of the parts need calls of the modules, and the native block has no biases.
        native = causal and cache is None and self.self_attn.q_proj.bias is None and usable("block", hidden)
        if native and not any(has_hooks(part) or layers.is_adapted(part) for part in self._parts):
            hidden, key, value = self._run_native(hidden, rotation)
            return hidden, (key, value)
        mixed, after = self.self_attn(self.input_layernorm(hidden), rotation, cache, mask, causal)
        hidden = hidden + self.dropout(mixed)
        return hidden + self.dropout(self.mlp(self.post_attention_layernorm(hidden))), after

    def inspect(
        self,
        hidden: Tensor,
        rotation: tuple[Tensor, Tensor],
        cache: Cache | Room | None,
        mask: Tensor | None,
    ) -> tuple[Tensor, AttentionMaps, tuple[Tensor, Tensor]]:
        """`forward` in plain torch, with the maps of the attention."""
        maps, after = self.self_attn.inspect(self.input_layernorm(hidden), rotation, cache, mask)
        hidden = hidden + self.dropout(maps.outputs)
        return hidden + self.dropout(self.mlp(self.post_attention_layernorm(hidden))), maps, after

    def _run_native(self, hidden: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """The whole block in one native call."""
        attention, mlp, norm = self.self_attn, self.mlp, self.input_layernorm
        assert norm.eps is not None
        weights = (
            norm.weight, attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight,
            None if attention.q_norm is None else attention.q_norm.weight,
            None if attention.k_norm is None else attention.k_norm.weight,
            attention.o_proj.weight, self.post_attention_layernorm.weight,
            mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight,
        )  # fmt: skip
        return autograd.transformer_block(
            hidden,
            weights,
            rotation,
            heads=len(attention.q_proj.weight) // attention.head_size,
            kv_heads=len(attention.k_proj.weight) // attention.head_size,
            epsilon=norm.eps,
            dropout=self.dropout.p if self.training else 0.0,
        )


class Transformer(LanguageModel):
    """A Transformer with the parts of Llama; with QK-norm those of Qwen3, with biases those of Qwen2."""

    Options = TransformerOptions
    batching = "random"
    equal_blocks = "num_layers", "layers"

    options: TransformerOptions

    def __init__(self, options: TransformerOptions, vocab_size: int) -> None:
        super().__init__(options, vocab_size)
        self.embed_tokens = layers.Embedding(vocab_size, options.hidden_size)
        self.dropout = layers.Dropout(options.dropout)
        self.layers = nn.ModuleList(Block(options) for _ in range(options.num_layers))
        self.norm = layers.RMSNorm(options.hidden_size, eps=options.norm_epsilon)
        self.lm_head = None if options.tie_weights else layers.Linear(options.hidden_size, vocab_size, bias=False)
        self.tails = make_tails(options, vocab_size, options.hidden_size)
        self._initialise()
        self.tables = ContextTables(options, vocab_size)
        self.host_context = self.tables.num_earlier if self.tables.orders or self.tails is not None else None

    def _initialise(self) -> None:
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                # The residual stream is a sum of 2 × num_layers branches, which share the variance.
                branch = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * self.options.num_layers) ** 0.5 if branch else 0.02)
            elif name.endswith(".bias"):
                nn.init.zeros_(parameter)

    @property
    def context_length(self) -> int:
        """See `LanguageModel.context_length`; longer inputs work, but training had no such distances."""
        return self.options.context_length

    def forward(self, ids: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """See `LanguageModel.forward`."""
        hidden, added, after = self._hidden(ids, state)
        return self._head().logits(hidden, added), after

    def training_loss(
        self,
        ids: Tensor,
        targets: Tensor,
        state: State | None = None,
        *,
        label_smoothing: float = 0.0,
        soft_targets: Tensor | None = None,
        host_inputs: Mapping[str, Tensor] | None = None,
        learned: Tensor | None = None,
    ) -> TrainingLoss:
        """See `LanguageModel.training_loss`."""
        hidden, added, after = self._hidden(ids, state, host_inputs)
        return self._head().loss(
            hidden,
            targets,
            after,
            added=added,
            label_smoothing=label_smoothing,
            dtype=self.loss_dtype,
            soft_targets=soft_targets,
            host_inputs=host_inputs,
            learned=learned,
        )

    def target_scores(self, ids: Tensor, targets: Tensor, state: State | None = None) -> tuple[TargetScores, State]:
        """See `LanguageModel.target_scores`."""
        hidden, added, after = self._hidden(ids, state)
        return self._head().target_scores(hidden, targets, added), after

    @property
    def logits_per_target(self) -> int:
        """See `LanguageModel.logits_per_target`."""
        return self._head().logits_per_target(has_added=bool(self.tables.orders))

    def host_inputs(
        self, ids: npt.NDArray[np.int64], targets: npt.NDArray[np.int64], earlier: npt.NDArray[np.int64] | None = None
    ) -> dict[str, Tensor]:
        """See `LanguageModel.host_inputs`: rows of the context tables, positions of the tails."""
        return {**self.tables.host_inputs(ids, earlier), **tail_positions(targets, self.tails, self.vocab_size)}

    def _head(self) -> OutputHead:
        matrix = self.embed_tokens if self.lm_head is None else self.lm_head
        return OutputHead(matrix.weight, tails=self.tails)

    def _hidden(
        self, ids: Tensor, state: State | None, host_inputs: Mapping[str, Tensor] | None = None
    ) -> tuple[Tensor, Tensor | None, State]:
        """The last norm's outputs (B, T, E), the logits of context tables, and the state."""
        before, rotation, mask = self._positions(ids, state)
        hidden = self.dropout(self.embed_tokens(ids))
        caches = []
        for layer, cache in zip(self.layers, self._caches(state, ids.shape[1]), strict=True):
            hidden, cache = layer(hidden, rotation, cache, mask, state is None)
            caches.append(cache)
        added, after = self.tables(ids, state, make_state(before + ids.shape[1], caches, state), host_inputs)
        return self.norm(hidden), added, after

    def _positions(self, ids: Tensor, state: State | None) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor | None]:
        """The tokens before `ids` (B,), the rotary tables and the mask; None: causal, or every key."""
        batch, time = ids.shape
        rope = self.options.head_width, self.options.rope_theta
        if state is None:
            before = torch.zeros(batch, dtype=torch.int64, device=ids.device)
            if torch.compiler.is_compiling():
                return before, rotary_tables(torch.arange(time, device=ids.device)[None], *rope), None
            # The native kernels read a table for each row; torch broadcasts one.
            rows = batch if ids.is_cpu else 1
            return before, first_rotary_tables(rows, time, *rope, ids.device), None
        before = state.tensors["lengths"]
        positions = before[:, None] + torch.arange(time, device=ids.device)
        return before, rotary_tables(positions, *rope), cache_mask(state, time)

    def _caches(self, state: State | None, time: int) -> list[Cache | Room | None]:
        """Keys and values of each layer, and where those of `time` new positions go."""
        if state is None:
            return [None] * len(self.layers)
        pairs = [
            (state.tensors[f"keys.{index}"], state.tensors[f"values.{index}"]) for index in range(len(self.layers))
        ]
        if not state.reserved:
            return [*pairs]
        lengths = state.tensors["lengths"]
        rows = torch.arange(len(lengths), device=lengths.device)[:, None]
        positions = lengths[:, None] + torch.arange(time, device=lengths.device)
        return [Room(keys, values, rows, positions) for keys, values in pairs]

    def to_huggingface(self) -> HuggingFaceModel:
        """See `LanguageModel.to_huggingface`: Qwen3 with QK-norm, Qwen2 with biases, else Llama."""
        if any(name.startswith("tables.") for name, _ in self.named_parameters()):
            raise UnsupportedExportError(
                "This Transformer has context tables, which neither transformers nor llama.cpp has. Train one without "
                "them: --preset transformer-char-plain, or --set model.table_orders=[]."
            )
        if self.tails is not None:
            raise UnsupportedExportError(
                "This Transformer has an adaptive softmax, which neither transformers nor llama.cpp has. Train one "
                "without it: --preset transformer-word-plain, or --set model.adaptive_cutoffs=[]."
            )
        options = self.options
        if options.qk_norm and options.qkv_bias:
            raise UnsupportedExportError(
                "This Transformer has QK-norm and biases, which no class of transformers has together. Train one "
                "without biases: --set model.qkv_bias=false."
            )
        kind = "Qwen3" if options.qk_norm else "Qwen2" if options.qkv_bias else "Llama"
        config = {
            "model_type": kind.lower(),
            "vocab_size": self.vocab_size,
            "hidden_size": options.hidden_size,
            "intermediate_size": options.inner_size,
            "num_hidden_layers": options.num_layers,
            "num_attention_heads": options.num_heads,
            "num_key_value_heads": options.num_kv_heads or options.num_heads,
            "head_dim": options.head_width,
            "hidden_act": "silu",
            # Of Llama and Qwen3; Qwen2 always has the biases.
            "attention_bias": options.qkv_bias,
            "max_position_embeddings": options.context_length,
            "rms_norm_eps": options.norm_epsilon,
            # Before and since version 5 of transformers.
            "rope_theta": options.rope_theta,
            "rope_parameters": {"rope_type": "default", "rope_theta": options.rope_theta},
            "tie_word_embeddings": self.lm_head is None,
        }
        tensors = {
            name if name.startswith("lm_head.") else f"model.{name}": tensor.detach()
            for name, tensor in self.named_parameters()
        }
        return HuggingFaceModel(f"{kind}ForCausalLM", config, tensors)

    def symbols(self) -> dict[str, Symbol]:
        """See `LanguageModel.symbols`."""
        options = self.options
        found = {
            "V": Symbol(self.vocab_size, "tokens of the vocabulary"),
            "E": Symbol(options.hidden_size, "width of the residual stream"),
            "H": Symbol(options.num_heads, "query heads"),
            "G": Symbol(options.num_kv_heads or options.num_heads, "key-value heads"),
            "D": Symbol(options.head_width, "width of a head"),
            "M": Symbol(options.inner_size, "inner width of SwiGLU"),
        }
        if self.tails is not None:
            found["K"] = Symbol(len(self.tails.cutoffs), "tails of the adaptive softmax")
        return found | self.tables.symbols()

    def layout(self) -> tuple[Stage, ...]:
        """See `LanguageModel.layout`; attention has all T · T scores, of which the causal mask uses half."""
        stream = "B", "T", "E"
        stages = [Stage("embedding", "x = row of the token", {"embed_tokens.weight": ("V", "E")}, {"x": stream})]
        for layer in range(self.options.num_layers):
            stages += self._block_stages(layer)
        stages.append(Stage("norm", "x / rms(x) · w", {"norm.weight": ("E",)}, {"normed": stream}))
        stages += self.tables.stages("tables.")
        own: dict[str, Shape] = {} if self.lm_head is None else {"lm_head.weight": ("V", "E")}
        shares = "embed_tokens.weight" if self.lm_head is None else None
        return (*stages, output_stage(own, "E", self.tails, shares=shares))

    def _block_stages(self, layer: int) -> tuple[Stage, Stage]:
        """Attention and SwiGLU of one block."""
        prefix, stream = f"layers.{layer}.", ("B", "T", "E")
        attention: dict[str, Shape] = {
            "input_layernorm.weight": ("E",),
            "self_attn.q_proj.weight": ("H·D", "E"),
            "self_attn.k_proj.weight": ("G·D", "E"),
            "self_attn.v_proj.weight": ("G·D", "E"),
            "self_attn.o_proj.weight": ("E", "H·D"),
        }
        if self.options.qkv_bias:
            widths = {"q": "H·D", "k": "G·D", "v": "G·D"}
            attention |= {f"self_attn.{part}_proj.bias": (width,) for part, width in widths.items()}
        if self.options.qk_norm:
            attention |= {"self_attn.q_norm.weight": ("D",), "self_attn.k_norm.weight": ("D",)}
        mlp: dict[str, Shape] = {
            "post_attention_layernorm.weight": ("E",),
            "mlp.gate_proj.weight": ("M", "E"),
            "mlp.up_proj.weight": ("M", "E"),
            "mlp.down_proj.weight": ("E", "M"),
        }
        keys = ("B", "T", "G", "D")
        heads: dict[str, Shape] = {"Q": ("B", "T", "H", "D"), "K": keys, "V": keys}
        scores: dict[str, Shape] = {"scores": ("B", "H", "T", "T"), "weights": ("B", "H", "T", "T")}
        inner = "B", "T", "M"
        return (
            Stage(
                f"block {layer}: attention",
                "x + softmax(Q Kᵀ / √D) V Wo",
                {prefix + name: shape for name, shape in attention.items()},
                {"normed": stream, **heads, **scores, "mixed": ("B", "T", "H", "D"), "x": stream},
                (
                    ("B·T", "E", "H·D"), ("B·T", "E", "G·D"), ("B·T", "E", "G·D"),
                    ("B·H·T", "D", "T"), ("B·H·T", "T", "D"), ("B·T", "H·D", "E"),
                ),
                {f"keys.{layer}": keys, f"values.{layer}": keys},
            ),
            Stage(
                f"block {layer}: SwiGLU",
                "x + down(silu(gate(x)) · up(x))",
                {prefix + name: shape for name, shape in mlp.items()},
                {"normed": stream, "gate": inner, "up": inner, "product": inner, "x": stream},
                (("B·T", "E", "M"), ("B·T", "E", "M"), ("B·T", "M", "E")),
            ),
        )  # fmt: skip

    def inspectable(self) -> tuple[str, ...]:
        """See `LanguageModel.inspectable`."""
        return "inputs", "hidden", "attention", "contributions", "terms", "layer_logits"

    def _inspect(self, ids: Tensor, state: State | None, parts: frozenset[str]) -> Inspection:
        before, rotation, mask = self._positions(ids, state)
        inputs = hidden = self.dropout(self.embed_tokens(ids))
        residual, attention, caches = [], [], []
        blocks: Any = self.layers
        for layer, cache in zip(blocks, self._caches(state, ids.shape[1]), strict=True):
            # Maps grow with the square of the text: they are made if they are asked for.
            if "attention" in parts:
                hidden, maps, cache = layer.inspect(hidden, rotation, cache, mask)
                attention.append(maps)
            else:
                hidden, cache = layer(hidden, rotation, cache, mask, state is None)
            caches.append(cache)
            residual.append(hidden)
        added, after = self.tables(ids, state, make_state(before + ids.shape[1], caches, state))
        head, vectors = self._head(), self.norm(hidden)
        contributions = {}
        if parts & {"contributions", "terms"}:
            contributions = head.contributions(vectors, self.tables.contributions(ids, state))
        lens = residual if "layer_logits" in parts else []
        return Inspection(
            head.logits(vectors, added),
            after,
            inputs=inputs if "inputs" in parts else None,
            hidden=tuple(residual) if "hidden" in parts else (),
            attention=tuple(attention),
            contributions=contributions if "contributions" in parts else {},
            terms=head.terms(contributions) if "terms" in parts else {},
            layer_logits=tuple(head.logits(self.norm(each), added) for each in lens),
        )


@functools.lru_cache(maxsize=8)
def first_rotary_tables(
    batch: int, time: int, head_size: int, theta: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """`rotary_tables` from position 0, cached because all training steps use the same."""
    # Tensors made in inference mode cannot be used in training.
    with torch.inference_mode(False), torch.no_grad():
        cosines, sines = rotary_tables(torch.arange(time, device=device)[None], head_size, theta)
        return cosines.expand(batch, -1, -1, -1).contiguous(), sines.expand(batch, -1, -1, -1).contiguous()


def rotary_tables(positions: Tensor, head_size: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines (B, T, 1, D/2) float32 of the rotary angles of `positions` (B, T)."""
    exponents = torch.arange(0, head_size, 2, dtype=torch.float32, device=positions.device) / head_size
    angles = positions[..., None, None].float() * theta**-exponents
    return angles.cos(), angles.sin()


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate (B, T, H, D) by position, in float32; dimension i is paired with i + D/2, as in Llama."""
    first, second = heads.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def make_state(lengths: Tensor, caches: Sequence[Cache], before: State | None) -> State:
    """The state of rows of these lengths (B,), after the state `before`."""
    tensors = {}
    for index, (keys, values) in enumerate(caches):
        tensors[f"keys.{index}"], tensors[f"values.{index}"] = keys, values
    ragged, reserved = before is not None and before.ragged, before is not None and before.reserved
    return State({"lengths": lengths} | tensors, growing=frozenset(tensors), ragged=ragged, reserved=reserved)


def cache_mask(state: State, time: int) -> Tensor | None:
    """The attention mask of T new positions over the L + T keys, for `scaled_dot_product_attention`.

    Returns:
        bool, True where a query attends to a key: (T, L + T), or (B, 1, T, L + T) for rows of different length, or
        (B, 1, T, P) for buffers of P positions; None if every query attends to all keys.
    """
    cached = state.tensors["keys.0"].shape[1]
    device = state.tensors["lengths"].device
    if state.reserved:
        last = state.tensors["lengths"][:, None] + torch.arange(time, device=device)
        return torch.arange(cached, device=device) <= last[:, None, :, None]
    if time == 1 and not state.ragged:
        return None
    causal = torch.ones(time, cached + time, dtype=torch.bool, device=device).tril(cached)
    if not state.ragged:
        return causal
    # Caches are aligned at their end: the keys of a row of length n are the last n of the L cached ones.
    valid = torch.arange(cached + time, device=device) >= cached - state.tensors["lengths"][:, None]
    return causal & valid[:, None, None, :]
