"""RNN, GRU and LSTM: one family, on torch's own recurrent layers.

    ids ─► embedding ─► dropout ─► num_layers × cell (dropout between) ─► dropout ─► [projection] ─► logits

The state is the hidden state of every layer, a few kilobytes however long the text.

Sources: Elman 1990; Cho et al. 2014 (GRU); Hochreiter and Schmidhuber 1997 (LSTM); Press and Wolf 2017 (tied weights).
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from lm.models.base import LanguageModel, ModelOptions, State

REGISTERS = {"rnn": "Recurrent", "gru": "Recurrent", "lstm": "Recurrent"}


class RecurrentOptions(ModelOptions):
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
    tie_weights: bool = Field(
        False, description="Use the embedding as output layer; a projection from H to E is added where they differ."
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
        self.embedding = nn.Embedding(vocab_size, size)
        self.input_dropout = nn.Dropout(rate(options.input_dropout))
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
        self.output_dropout = nn.Dropout(rate(options.output_dropout))
        self.projection = nn.Linear(hidden, size, bias=False) if options.tie_weights and hidden != size else None
        self.output = None if options.tie_weights else nn.Linear(hidden, vocab_size)
        self.output_bias = nn.Parameter(torch.zeros(vocab_size)) if options.tie_weights else None
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
        embedded = self.input_dropout(self.embedding(ids))
        hidden, state = self._run_cell(embedded, state)
        hidden = self.output_dropout(hidden)
        if self.output is not None:
            return self.output(hidden), state
        if self.projection is not None:
            hidden = self.projection(hidden)
        return F.linear(hidden, self.embedding.weight, self.output_bias), state

    def _run_cell(self, embedded: Tensor, state: State | None) -> tuple[Tensor, State]:
        # torch keeps its state (layers, B, H); ours is batch first.
        if self.options.type == "lstm":
            pair = None
            if state is not None:
                pair = tuple(state.tensors[name].transpose(0, 1).contiguous() for name in ("hidden", "cell"))
            hidden, (last, cell) = self.cell(embedded, pair)
            return hidden, State({"hidden": last.transpose(0, 1), "cell": cell.transpose(0, 1)})
        first = None if state is None else state.tensors["hidden"].transpose(0, 1).contiguous()
        hidden, last = self.cell(embedded, first)
        return hidden, State({"hidden": last.transpose(0, 1)})
