"""RNN, GRU and LSTM: one family, over torch's recurrent layers.

    ids ─► embedding ─► dropout ─► num_layers × cell (dropout between) ─► dropout ─► [projection] ─► logits

The state is the hidden state of every layer: a few kilobytes for a text of any length.

Sources: Elman 1990; Cho et al. 2014 (GRU); Hochreiter and Schmidhuber 1997 (LSTM); Press and Wolf 2017 (tied weights);
Gal and Ghahramani 2016 (locked and embedding dropout); Merity et al. 2018 (weight drop, activation penalties).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from lm.kernels import autograd, layers
from lm.kernels.dispatch import MIN_STEPS, cast_floats, in_its_format, stays_in_fp32, usable
from lm.models.base import Inspection, LanguageModel, State, TrainingLoss, declare
from lm.models.context_tables import ContextTables, TableOptions
from lm.models.layout import Shape, Stage, Symbol
from lm.models.lora import with_adapter
from lm.models.onnx_cells import onnx_layer
from lm.models.output_head import HeadOptions, OutputHead, make_tails, output_stage, tail_positions
from lm.models.profiled_parts import run_part
from lm.models.target_scores import TargetScores
from lm.models.unrolled_cells import UnrolledLayer, unroll
from lm.torch_private import has_hooks, recurrent_function

REGISTERS = {"rnn": "Recurrent", "gru": "Recurrent", "lstm": "Recurrent"}

WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
"""The weights of one layer of torch's cells, in their order."""

NUM_GATES = {"rnn": 1, "gru": 3, "lstm": 4}
"""Blocks of H rows in the weights of a layer."""
FORMULAS = {
    "rnn": "h = tanh(W x + U h' + b)",
    "gru": "h = z h' + (1 - z) tanh(W x + r U h' + b)",
    "lstm": "c = f c' + i g, h = o tanh(c)",
}
ACTIVATIONS = {"rnn": (), "gru": ("r", "z", "n"), "lstm": ("i", "f", "g", "o", "c")}
"""Of a layer in a training step, without the hidden state: see `lm.models.unrolled_cells`."""


class RecurrentOptions(HeadOptions, TableOptions):
    """Options of the recurrent family."""

    type: Literal["rnn", "gru", "lstm"] = Field("gru", description="The cell: rnn, gru or lstm.")
    nonlinearity: Literal["tanh", "relu"] = Field("tanh", description="Nonlinearity of the rnn cell.")
    embedding_size: int = Field(128, ge=1, description="Width of the token embeddings (E).")
    hidden_size: int = Field(256, ge=1, description="Width of the hidden state (H).")
    num_layers: int = Field(1, ge=1, description="Number of recurrent layers.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout probability of inputs, layers and outputs.")
    input_dropout: float | None = Field(
        None, ge=0, lt=1, description="Dropout probability of the embeddings; default: dropout."
    )
    layer_dropout: float | None = Field(
        None, ge=0, lt=1, description="Dropout probability between layers; default: dropout."
    )
    output_dropout: float | None = Field(
        None, ge=0, lt=1, description="Dropout probability of the last layer's output; default: dropout."
    )
    locked_dropout: bool = Field(
        False, description="Locked (variational) dropout: drop the same units at every time step of a batch."
    )
    embedding_dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Dropout probability of a token's whole embedding, for all its positions in a batch.",
    )
    weight_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout probability of the hidden-to-hidden weights.")
    activation_penalty: float = Field(
        0.0, ge=0, description="Weight in the objective of the mean square of the last layer's output (after dropout)."
    )
    change_penalty: float = Field(
        0.0, ge=0, description="Weight in the objective of the mean square change of that output between time steps."
    )

    @property
    def bf16_on_cpu(self) -> bool:
        """See `ModelOptions.bf16_on_cpu`; the rnn has no native kernel."""
        return self.type != "rnn"


class Recurrent(LanguageModel):
    """A recurrent language model; `options.type` is the cell."""

    Options = RecurrentOptions

    options: RecurrentOptions

    def __init__(self, options: RecurrentOptions, vocab_size: int) -> None:
        super().__init__(options, vocab_size)

        def rate(specific: float | None) -> float:
            return options.dropout if specific is None else specific

        size, hidden = options.embedding_size, options.hidden_size
        # Tied weights get a dense gradient from the output layer; to add a sparse one of the inputs is cheaper.
        sparse = options.tie_weights and len(options.adaptive_cutoffs) > 0
        self.embedding = layers.Embedding(vocab_size, size, sparse=sparse)
        dropout = LockedDropout if options.locked_dropout else layers.Dropout
        self.input_dropout = dropout(rate(options.input_dropout))
        between = rate(options.layer_dropout) if options.num_layers > 1 else 0.0
        kind: Any = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}[options.type]
        settings: dict[str, Any] = {"nonlinearity": options.nonlinearity} if options.type == "rnn" else {}
        cell: nn.RNNBase = kind(size, hidden, options.num_layers, batch_first=True, dropout=between, **settings)
        matrices = tuple(name for name, weight in cell.named_parameters() if weight.ndim == 2)
        self.cell = declare(cell, optimizer_kind="muon", adapts=matrices)
        self.layer_dropout = dropout(between)
        self.output_dropout = dropout(rate(options.output_dropout))
        self.projection = None
        if options.tie_weights and hidden != size:
            self.projection = declare(nn.Linear(hidden, size, bias=False), optimizer_kind="muon")
        self.output = None if options.tie_weights else nn.Linear(hidden, vocab_size)
        self.output_bias = nn.Parameter(torch.zeros(vocab_size)) if options.tie_weights else None
        bias = self.output_bias if self.output is None else self.output.bias
        self.tails = make_tails(options, vocab_size, size if options.tie_weights else hidden, bias)
        self.tables = ContextTables(options, vocab_size)
        self.host_context = self.tables.num_earlier if self.tables.orders or self.tails is not None else None
        self.recurrent_tensors = ("hidden", "cell") if options.type == "lstm" else ("hidden",)
        self._initialise()

    def _initialise(self) -> None:
        if self.options.tie_weights:
            # As output matrix, an embedding of unit variance would give logits of size sqrt(E).
            nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        if self.options.type == "lstm":
            hidden = self.options.hidden_size
            for layer in range(self.options.num_layers):
                # The gates are in the order input, forget, cell, output. An open forget gate preserves gradients.
                bias = getattr(self.cell, f"bias_hh_l{layer}")
                nn.init.ones_(bias.data[hidden : 2 * hidden])

    def forward(self, ids: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """See `LanguageModel.forward`."""
        return self._predict(ids, state, *self._hidden(ids, state))

    def _predict(
        self, ids: Tensor, state: State | None, outputs: Tensor, added: Tensor | None, after: State
    ) -> tuple[Tensor, State]:
        """The result of `forward`, from its arguments and the result of `_hidden`."""
        return self._head().logits(self.output_dropout(outputs), added), after

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
        """See `LanguageModel.training_loss`; the objective includes the penalties."""
        outputs, added, after = self._hidden(ids, state, host_inputs)
        dropped = self.output_dropout(outputs)
        loss = self._head().loss(
            dropped,
            targets,
            after,
            added=added,
            label_smoothing=label_smoothing,
            dtype=self.loss_dtype,
            soft_targets=soft_targets,
            host_inputs=host_inputs,
            learned=learned,
        )
        return replace(loss, objective=loss.objective + self._penalties(outputs, dropped))

    def target_scores(self, ids: Tensor, targets: Tensor, state: State | None = None) -> tuple[TargetScores, State]:
        """See `LanguageModel.target_scores`."""
        outputs, added, after = self._hidden(ids, state)
        return self._head().target_scores(self.output_dropout(outputs), targets, added), after

    @property
    def logits_per_target(self) -> int:
        """See `LanguageModel.logits_per_target`."""
        return self._head().logits_per_target(has_added=bool(self.tables.orders))

    def host_inputs(
        self, ids: npt.NDArray[np.int64], targets: npt.NDArray[np.int64], earlier: npt.NDArray[np.int64] | None = None
    ) -> dict[str, Tensor]:
        """See `LanguageModel.host_inputs`: rows of the context tables, positions of the tails."""
        return {**self.tables.host_inputs(ids, earlier), **tail_positions(targets, self.tails, self.vocab_size)}

    def symbols(self) -> dict[str, Symbol]:
        """See `LanguageModel.symbols`."""
        found = {
            "V": Symbol(self.vocab_size, "tokens of the vocabulary"),
            "E": Symbol(self.options.embedding_size, "width of the embeddings"),
            "H": Symbol(self.options.hidden_size, "units of a hidden state"),
        }
        if self.tails is not None:
            found["K"] = Symbol(len(self.tails.cutoffs), "tails of the adaptive softmax")
        return found | self.tables.symbols()

    def layout(self) -> tuple[Stage, ...]:
        """See `LanguageModel.layout`."""
        sizes = "B", "T", "H"
        gates = NUM_GATES[self.options.type]
        rows = f"{gates}·H" if gates > 1 else "H"
        stages = [Stage("embedding", "x = row of the token", {"embedding.weight": ("V", "E")}, {"x": ("B", "T", "E")})]
        for layer in range(self.options.num_layers):
            width = "H" if layer else "E"
            shapes: list[Shape] = [(rows, width), (rows, "H"), (rows,), (rows,)]
            parameters = {f"cell.{name}_l{layer}": shape for name, shape in zip(WEIGHTS, shapes, strict=True)}
            stages.append(
                Stage(
                    f"layer {layer}",
                    FORMULAS[self.options.type].replace("tanh", self.options.nonlinearity, 1),
                    parameters,
                    {**dict.fromkeys(ACTIVATIONS[self.options.type], sizes), "h": sizes},
                    (("B·T", width, rows), ("B·T", "H", rows)),
                    {f"{name} of layer {layer}": ("B", "H") for name in self.recurrent_tensors},
                )
            )
        stages += self.tables.stages("tables.")
        if self.projection is not None:
            shape = {"projection.weight": ("E", "H")}
            stages.append(Stage("projection", "P h", shape, {"projected": ("B", "T", "E")}, (("B·T", "H", "E"),)))
        if self.output is None:
            stages.append(output_stage({"output_bias": ("V",)}, "E", self.tails, shares="embedding.weight"))
        else:
            own: dict[str, Shape] = {"output.weight": ("V", "H"), "output.bias": ("V",)}
            stages.append(output_stage(own, "H", self.tails, shares=None))
        return tuple(stages)

    def inspectable(self) -> tuple[str, ...]:
        """See `LanguageModel.inspectable`."""
        kind, tanh = self.options.type, self.options.nonlinearity == "tanh"
        has = {"cells": kind == "lstm", "gates": kind != "rnn", "candidates": kind != "rnn" or tanh}
        return "inputs", "hidden", *(part for part, present in has.items() if present), "contributions", "terms"

    def _inspect(self, ids: Tensor, state: State | None, parts: frozenset[str]) -> Inspection:
        inputs = self._embed(ids)
        layers, after = self._unroll(inputs, state)
        logits, after = self._predict(ids, state, layers[-1].outputs, *self.tables(ids, state, after))
        sums = self._sums(ids, state, layers[-1].outputs) if parts & {"contributions", "terms", "mixture"} else {}
        sums = {part: values for part, values in sums.items() if part in parts}
        steps = {"hidden": tuple(layer.hidden for layer in layers), "cells": tuple(layer.cells for layer in layers)}
        return Inspection(
            logits,
            after,
            inputs=inputs if "inputs" in parts else None,
            hidden=tuple(layer.outputs for layer in layers) if "hidden" in parts else (),
            cells=tuple(torch.stack(layer.cells, dim=1) for layer in layers) if "cells" in parts else (),
            gates=tuple(layer.stacked_gates() for layer in layers) if "gates" in parts else (),
            candidates=tuple(torch.stack(layer.candidates, dim=1) for layer in layers) if "candidates" in parts else (),
            steps={part: values for part, values in steps.items() if part in parts},
            contributions=sums.get("contributions", {}),
            terms=sums.get("terms", {}),
            mixture=sums.get("mixture", {}),
        )

    def _sums(self, ids: Tensor, state: State | None, outputs: Tensor) -> dict[str, dict[str, Any]]:
        """The parts "contributions" and "terms", from the arguments of `forward` and the last layer's outputs."""
        head = self._head()
        contributions = head.contributions(self.output_dropout(outputs), self.tables.contributions(ids, state))
        return {"contributions": contributions, "terms": head.terms(contributions)}

    def _unroll(self, inputs: Tensor, state: State | None) -> tuple[list[UnrolledLayer], State]:
        """`_run_cell` of embeddings (B, T, E), with each time step as a part of the graph."""
        layers: list[UnrolledLayer] = []
        kind = f"rnn_{self.options.nonlinearity}" if self.options.type == "rnn" else self.options.type
        for index in range(self.options.num_layers):
            first = None if state is None else [state.tensors[name][:, index] for name in self.recurrent_tensors]
            inputs = self.layer_dropout(layers[-1].outputs) if layers else inputs
            layers.append(unroll(kind, inputs, self._weights(index), first))
        tensors = {"hidden": torch.stack([layer.hidden[-1] for layer in layers], dim=1)}
        if kind == "lstm":
            tensors["cell"] = torch.stack([layer.cells[-1] for layer in layers], dim=1)
        return layers, State(tensors)

    def _head(self) -> OutputHead:
        if self.output is None:
            return OutputHead(self.embedding.weight, self.output_bias, self.tails, self.projection)
        return OutputHead(self.output.weight, self.output.bias, self.tails)

    def _hidden(
        self, ids: Tensor, state: State | None, host_inputs: Mapping[str, Tensor] | None = None
    ) -> tuple[Tensor, Tensor | None, State]:
        """The last layer's outputs (B, T, H), the logits of context tables, and the state."""
        outputs, after = self._run_cell(ids, state)
        return outputs, *self.tables(ids, state, after, host_inputs)

    def _embed(self, ids: Tensor) -> Tensor:
        vectors = self.embedding(ids)
        rate = self.options.embedding_dropout
        if self.training and rate > 0:
            factors = F.dropout(torch.ones(self.vocab_size, 1, device=ids.device, dtype=vectors.dtype), rate)
            vectors = vectors * factors[ids]
        dropped: Tensor = self.input_dropout(vectors)
        return dropped

    def _penalties(self, outputs: Tensor, dropped: Tensor) -> Tensor | float:
        penalties: list[Tensor] = []
        if weight := self.options.activation_penalty:
            penalties.append(weight * dropped.float().square().mean())
        if (weight := self.options.change_penalty) and outputs.shape[1] > 1:
            penalties.append(weight * outputs.float().diff(dim=1).square().mean())
        return sum(penalties, 0.0)

    def _run_cell(self, ids: Tensor, state: State | None) -> tuple[Tensor, State]:
        weight = self.cell.get_parameter("weight_hh_l0")
        # A hook on the cell needs a call of torch's module.
        native = ids.shape[1] >= MIN_STEPS and not has_hooks(self.cell)
        native = native and usable(self.options.type, weight) and not stays_in_fp32(weight)
        from_embedding = native and self._reads_embedding(ids)
        inputs = self.embedding.weight if from_embedding else self._embed(ids)
        names = self.recurrent_tensors
        # Torch's state is (layers, B, H), ours is batch first.
        first = None
        if state is not None:
            first = tuple(state.tensors[name].transpose(0, 1).contiguous() for name in names)
        if native:
            hidden, last = self._run_layers(inputs, first, ids if from_embedding else None, native=True)
        elif torch.onnx.is_in_onnx_export():
            hidden, last = self._run_layers(inputs, first)
        elif layers.is_adapted(self.cell) or (
            self.training and (self.options.locked_dropout or self.options.weight_dropout > 0)
        ):
            result = in_its_format(weight, self._run_layers, inputs, first)
            hidden, last = cast_floats(result, inputs.dtype) if stays_in_fp32(weight) else result
        elif self.options.type == "lstm":
            hidden, last = self.cell(inputs, first)
        else:
            hidden, only = self.cell(inputs, None if first is None else first[0])
            last = (only,)
        return hidden, State({name: part.transpose(0, 1) for name, part in zip(names, last, strict=True)})

    def _run_layers(
        self, inputs: Tensor, first: tuple[Tensor, ...] | None, ids: Tensor | None = None, *, native: bool = False
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Layer by layer, with the dropout that `nn.RNNBase` does not have; with `ids`, `inputs` is the embedding."""
        lasts = []
        for layer in range(self.options.num_layers):
            if layer > 0:
                inputs, ids = self.layer_dropout(inputs), None
            name, initial = f"cell.l{layer}", None if first is None else [part[layer] for part in first]
            arguments = inputs, self._weights(layer), initial
            if native:
                inputs, *last = run_part(name, autograd.recurrent_layer, self.options.type, *arguments, ids=ids)
            else:
                inputs, *last = run_part(name, self._torch_layer, *arguments)
            lasts.append(last)
        return inputs, tuple(torch.stack(parts) for parts in zip(*lasts, strict=True))

    def _torch_layer(self, inputs: Tensor, weights: list[Tensor], initial: list[Tensor] | None) -> tuple[Tensor, ...]:
        kind, count = self.options.type, 2 if self.options.type == "lstm" else 1
        zeros = inputs.new_zeros(inputs.shape[0], self.options.hidden_size)
        if torch.onnx.is_in_onnx_export():
            return onnx_layer(kind, self.options.nonlinearity, inputs, weights, initial or [zeros] * count)
        first = [part[None] for part in initial or [zeros] * count]
        function = recurrent_function(f"rnn_{self.options.nonlinearity}" if kind == "rnn" else kind)
        # Biases, number of layers, dropout, training, bidirectional, batch first.
        settings = True, 1, 0.0, True, False, True
        outputs, *last = function(inputs, first if kind == "lstm" else first[0], weights, *settings)
        return outputs, *(part[0] for part in last)

    def _reads_embedding(self, ids: Tensor) -> bool:
        """Whether the first layer's inputs are unchanged rows of an embedding that is small enough."""
        dropped = self.training and (self.input_dropout.p > 0 or self.options.embedding_dropout > 0)
        return not dropped and not self.embedding.sparse and 2 * self.vocab_size < ids.numel()

    def _weights(self, layer: int) -> list[Tensor]:
        weights = [with_adapter(self.cell, f"{name}_l{layer}") for name in WEIGHTS]
        if self.training and self.options.weight_dropout > 0:
            weights[1] = F.dropout(weights[1], self.options.weight_dropout)
        return weights


class LockedDropout(nn.Module):
    """Dropout of the same units of (B, T, H) at all time steps."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, inputs: Tensor) -> Tensor:
        """(B, T, H) → (B, T, H)."""
        if not self.training or self.p == 0:
            return inputs
        return inputs * F.dropout(torch.ones_like(inputs[:, :1]), self.p)
