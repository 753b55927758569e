"""RNN, GRU and LSTM: one family, on torch's own recurrent layers.

    ids ─► embedding ─► dropout ─► num_layers × cell (dropout between) ─► dropout ─► [projection] ─► logits

The state is the hidden state of every layer, a few kilobytes however long the text.

Sources: Elman 1990; Cho et al. 2014 (GRU); Hochreiter and Schmidhuber 1997 (LSTM); Press and Wolf 2017 (tied weights);
Gal and Ghahramani 2016 (locked and embedding dropout); Merity et al. 2018 (weight drop, activation penalties).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import _VF, Tensor, nn

from lm.kernels import training
from lm.models.base import LanguageModel, State, TrainingLoss
from lm.models.context_tables import ContextTables, TableOptions
from lm.models.output_head import HeadOptions, Tails, make_tails, output_logits, output_loss
from lm.models.profiled_parts import part

REGISTERS = {"rnn": "Recurrent", "gru": "Recurrent", "lstm": "Recurrent"}

WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
"""Of a layer of torch's cells, in their order."""


class RecurrentOptions(HeadOptions, TableOptions):
    """Options of the recurrent family."""

    type: Literal["rnn", "gru", "lstm"] = Field("gru", description="The cell: rnn, gru or lstm.")
    nonlinearity: Literal["tanh", "relu"] = Field("tanh", description="Of the rnn cell; the others have their own.")
    embedding_size: int = Field(128, ge=1, description="Width of the token embeddings (E).")
    hidden_size: int = Field(256, ge=1, description="Width of the hidden state (H).")
    num_layers: int = Field(1, ge=1, description="Recurrent layers, one above the other.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on inputs, between layers and on outputs.")
    input_dropout: float | None = Field(None, ge=0, lt=1, description="Dropout on the embeddings; default: dropout.")
    layer_dropout: float | None = Field(None, ge=0, lt=1, description="Dropout between layers; default: dropout.")
    output_dropout: float | None = Field(
        None, ge=0, lt=1, description="Dropout on the last layer's output; default: dropout."
    )
    locked_dropout: bool = Field(
        False, description="Drop the same units at every time step of a batch, instead of others at each."
    )
    embedding_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout of whole words of the embedding.")
    weight_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the hidden-to-hidden weights.")
    activation_penalty: float = Field(
        0.0, ge=0, description="Weight of the mean square of the last layer's output (after dropout) in the objective."
    )
    change_penalty: float = Field(
        0.0, ge=0, description="Weight of the mean square of its change from one time step to the next."
    )


class Recurrent(LanguageModel):
    """A recurrent language model; `options.type` picks the cell."""

    Options = RecurrentOptions
    batching = "streams"

    options: RecurrentOptions

    def __init__(self, options: RecurrentOptions, vocab_size: int) -> None:
        super().__init__(options, vocab_size)

        def rate(own: float | None) -> float:
            return options.dropout if own is None else own

        size, hidden = options.embedding_size, options.hidden_size
        # Tied weights get a dense gradient from the output layer; those of the rows looked up are added to it as rows.
        as_rows = options.tie_weights and len(options.adaptive_cutoffs) > 0
        self.embedding = training.Embedding(vocab_size, size, sparse=as_rows)
        dropout = LockedDropout if options.locked_dropout else training.Dropout
        self.input_dropout = dropout(rate(options.input_dropout))
        between = rate(options.layer_dropout) if options.num_layers > 1 else 0.0
        self.cell: nn.RNNBase
        match options.type:
            case "rnn":
                self.cell = nn.RNN(
                    size, hidden, options.num_layers, options.nonlinearity, batch_first=True, dropout=between
                )
            case "gru":
                self.cell = nn.GRU(size, hidden, options.num_layers, batch_first=True, dropout=between)
            case "lstm":
                self.cell = nn.LSTM(size, hidden, options.num_layers, batch_first=True, dropout=between)
        self.layer_dropout = dropout(between)
        self.output_dropout = dropout(rate(options.output_dropout))
        self.projection = nn.Linear(hidden, size, bias=False) if options.tie_weights and hidden != size else None
        self.output = None if options.tie_weights else nn.Linear(hidden, vocab_size)
        self.output_bias = nn.Parameter(torch.zeros(vocab_size)) if options.tie_weights else None
        bias = self.output_bias if self.output is None else self.output.bias
        self.tails = make_tails(options, vocab_size, size if options.tie_weights else hidden, bias)
        self.tables = ContextTables(options, vocab_size)
        self._initialise()

    def _initialise(self) -> None:
        if self.options.tie_weights:
            # As output weights, embeddings of unit variance would start with logits of size sqrt(E).
            nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        if self.options.type == "lstm":
            hidden = self.options.hidden_size
            for layer in range(self.options.num_layers):
                # Gates lie in the order input, forget, cell, output. A forget gate that starts open keeps gradients.
                bias = getattr(self.cell, f"bias_hh_l{layer}")
                nn.init.ones_(bias.data[hidden : 2 * hidden])

    def forward(self, ids: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """See `LanguageModel.forward`."""
        outputs, added, after = self._read(ids, state)
        return output_logits(self._project(self.output_dropout(outputs)), *self._output_layer(), added=added), after

    def training_loss(
        self, ids: Tensor, targets: Tensor, state: State | None = None, *, label_smoothing: float = 0.0
    ) -> TrainingLoss:
        """See `LanguageModel.training_loss`; adds the penalties, and saves work where the vocabulary is large."""
        outputs, added, after = self._read(ids, state)
        dropped = self.output_dropout(outputs)
        objective, nats, logits = output_loss(
            self._project(dropped),
            targets,
            *self._output_layer(),
            added=added,
            label_smoothing=label_smoothing,
            dtype=self.loss_dtype,
        )
        return TrainingLoss(objective + self._penalties(outputs, dropped), nats, after, logits)

    def _read(self, ids: Tensor, state: State | None) -> tuple[Tensor, Tensor | None, State]:
        """The last layer's outputs (B, T, H), what context tables add to the logits, and the state."""
        outputs, after = self._run_cell(ids, state)
        return outputs, *self.tables(ids, state, after)

    def _embed(self, ids: Tensor) -> Tensor:
        vectors = self.embedding(ids)
        rate = self.options.embedding_dropout
        if self.training and rate > 0:
            words = F.dropout(torch.ones(self.vocab_size, 1, device=ids.device, dtype=vectors.dtype), rate)
            vectors = vectors * words[ids]
        dropped: Tensor = self.input_dropout(vectors)
        return dropped

    def _project(self, outputs: Tensor) -> Tensor:
        return outputs if self.projection is None else self.projection(outputs)

    def _output_layer(self) -> tuple[Tensor, Tensor | None, Tails | None]:
        if self.output is None:
            return self.embedding.weight, self.output_bias, self.tails
        return self.output.weight, self.output.bias, self.tails

    def _penalties(self, outputs: Tensor, dropped: Tensor) -> Tensor | float:
        penalties: list[Tensor] = []
        if weight := self.options.activation_penalty:
            penalties.append(weight * dropped.float().square().mean())
        if (weight := self.options.change_penalty) and outputs.shape[1] > 1:
            penalties.append(weight * outputs.float().diff(dim=1).square().mean())
        return sum(penalties, 0.0)

    def _run_cell(self, ids: Tensor, state: State | None) -> tuple[Tensor, State]:
        # A hook on the cell waits for torch's module to be called.
        native = ids.shape[1] >= training.FEWEST_STEPS and not self.cell._forward_hooks
        own = self.cell.get_parameter("weight_hh_l0")
        native = native and training.usable(self.options.type, own) and not training.stays_in_fp32(own)
        looked_up = native and self._looks_up(ids)
        inputs = self.embedding.weight if looked_up else self._embed(ids)
        names = ("hidden", "cell") if self.options.type == "lstm" else ("hidden",)
        # torch keeps its state (layers, B, H); ours is batch first.
        first = None
        if state is not None:
            first = tuple(state.tensors[name].transpose(0, 1).contiguous() for name in names)
        if native:
            hidden, last = self._run_native(inputs, first, ids if looked_up else None)
        elif self.training and (self.options.locked_dropout or self.options.weight_dropout > 0):
            found = training.in_its_format(own, self._run_layers, inputs, first)
            hidden, last = training.cast_floats(found, inputs.dtype) if training.stays_in_fp32(own) else found
        elif self.options.type == "lstm":
            hidden, last = self.cell(inputs, first)
        else:
            hidden, only = self.cell(inputs, None if first is None else first[0])
            last = (only,)
        return hidden, State({name: part.transpose(0, 1) for name, part in zip(names, last, strict=True)})

    def _run_layers(self, inputs: Tensor, first: tuple[Tensor, ...] | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The layers one by one, with the dropout that torch's own stack of layers does not have."""
        options = self.options
        call: Any = getattr(_VF, f"rnn_{options.nonlinearity}" if options.type == "rnn" else options.type)
        if first is None:
            zeros = inputs.new_zeros(options.num_layers, len(inputs), options.hidden_size)
            first = (zeros, zeros) if options.type == "lstm" else (zeros,)
        lasts = []
        for layer in range(options.num_layers):
            if layer > 0:
                inputs = self.layer_dropout(inputs)
            weights = self._weights(layer)
            begun = tuple(part[layer : layer + 1] for part in first)
            # With biases, one layer, no dropout of its own, in training, in one direction, batch first.
            settings: Any = True, 1, 0.0, True, False, True
            first_state = begun if options.type == "lstm" else begun[0]
            inputs, *last = part(f"cell.l{layer}", call, inputs, first_state, weights, *settings)
            lasts.append(last)
        return inputs, tuple(torch.cat(parts) for parts in zip(*lasts, strict=True))

    def _run_native(
        self, inputs: Tensor, first: tuple[Tensor, ...] | None, ids: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The layers one by one on the native kernels; with `ids`, the inputs are the embedding."""
        lasts = []
        for layer in range(self.options.num_layers):
            if layer > 0:
                inputs, ids = self.layer_dropout(inputs), None
            begun = None if first is None else [part[layer] for part in first]
            inputs, *last = part(
                f"cell.l{layer}", training.layer, self.options.type, inputs, self._weights(layer), begun, ids=ids
            )
            lasts.append(last)
        return inputs, tuple(torch.stack(parts) for parts in zip(*lasts, strict=True))

    def _looks_up(self, ids: Tensor) -> bool:
        """Whether the first layer sees the rows of the embedding as they are, and few enough to gain by that."""
        dropped = self.training and (self.input_dropout.p > 0 or self.options.embedding_dropout > 0)
        return not dropped and not self.embedding.sparse and training.worth_looking_up(self.vocab_size, ids.numel())

    def _weights(self, layer: int) -> list[Tensor]:
        weights = [getattr(self.cell, f"{name}_l{layer}") for name in WEIGHTS]
        if self.training and self.options.weight_dropout > 0:
            weights[1] = F.dropout(weights[1], self.options.weight_dropout)
        return weights


class LockedDropout(nn.Module):
    """Dropout of the same units of (B, T, H) at every time step."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, inputs: Tensor) -> Tensor:
        """(B, T, H) → (B, T, H)."""
        if not self.training or self.p == 0:
            return inputs
        return inputs * F.dropout(torch.ones_like(inputs[:, :1]), self.p)
