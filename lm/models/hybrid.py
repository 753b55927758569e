"""A hybrid: n-gram counts and a recurrent network, which learns what the counts leave to be said.

    logits = network's logits + gate · log-probabilities of the counts

The gate is a number that the network gives for each position, 1 at first: how far the counts are to be trusted there.

The counts are those of `lm.models.ngram`, of the training text, made before the first step. While the network learns on
that same text, each token's own occurrence is left out of them: else they would seem to know every token, and nothing
would be left to learn. In use they are whole. The state is the network's, and the last order - 1 tokens.

What it scores is no score of a neural network alone, and is labelled wherever it is shown.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor, nn

from lm.models.base import LanguageModel, State, TrainingLoss
from lm.models.ngram import HISTORY, NGram, NGramOptions
from lm.models.recurrent import Recurrent, RecurrentOptions

REGISTERS = {"hybrid": "Hybrid"}

COUNTS = "ngram."
"""What the names of the arrays of counts begin with."""


class HybridOptions(RecurrentOptions):
    """Options of the hybrid: those of its network, and the order of its counts."""

    type: Literal["hybrid"] = Field("hybrid", description="N-gram counts and a network.")  # type: ignore[assignment]
    cell: Literal["rnn", "gru", "lstm"] = Field("gru", description="The network's cell: rnn, gru or lstm.")
    order: int = Field(
        6, ge=1, le=32, description="Length of the longest n-gram: a token and the order - 1 tokens before it."
    )


class Hybrid(LanguageModel):
    """A recurrent network over n-gram counts; before `fit`, the counts know nothing."""

    Options = HybridOptions
    trained_by = "both"
    kind = "hybrid: n-gram counts and a network"
    batching = "streams"

    options: HybridOptions

    def __init__(self, options: HybridOptions, vocab_size: int) -> None:
        super().__init__(options, vocab_size)
        shared = {name: getattr(options, name) for name in RecurrentOptions.model_fields if name != "type"}
        network = RecurrentOptions(type=options.cell, **shared)
        self.network = _OverCounts(network, vocab_size, NGram(NGramOptions(order=options.order), vocab_size))

    def forward(self, ids: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """See `LanguageModel.forward`."""
        return self.network.forward(ids, state)

    def training_loss(
        self, ids: Tensor, targets: Tensor, state: State | None = None, *, label_smoothing: float = 0.0
    ) -> TrainingLoss:
        """See `LanguageModel.training_loss`; over counts without the targets' own occurrences."""
        return self.network.training_loss(ids, targets, state, label_smoothing=label_smoothing)

    def fit(self, ids: npt.NDArray[Any]) -> None:
        """See `LanguageModel.fit`: makes the counts; the network is untouched."""
        self.network.ngram.fit(ids)

    def num_counts(self) -> int:
        """See `LanguageModel.num_counts`."""
        return self.network.ngram.num_counts()

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """See `LanguageModel.arrays`."""
        counts = {COUNTS + name: array for name, array in self.network.ngram.arrays().items()}
        return {**super().arrays(), **counts}

    def load_arrays(self, arrays: dict[str, npt.NDArray[Any]]) -> None:
        """See `LanguageModel.load_arrays`."""
        counts = {name.removeprefix(COUNTS): array for name, array in arrays.items() if name.startswith(COUNTS)}
        super().load_arrays({name: array for name, array in arrays.items() if not name.startswith(COUNTS)})
        self.network.ngram.load_arrays(counts)


class _OverCounts(Recurrent):
    """The network, with the counts added to its logits."""

    def __init__(self, options: RecurrentOptions, vocab_size: int, ngram: NGram) -> None:
        super().__init__(options, vocab_size)
        self.ngram = ngram
        self.gate = nn.Linear(options.hidden_size, 1)
        nn.init.zeros_(self.gate.weight)
        nn.init.ones_(self.gate.bias)
        if self.output is not None:
            # Training begins at the counts, and not far from them in directions that mean nothing yet.
            nn.init.zeros_(self.output.bias)
            with torch.no_grad():
                self.output.weight *= 0.1

    def _added(
        self, ids: Tensor, outputs: Tensor, before: State | None, after: State, targets: Tensor | None = None
    ) -> tuple[Tensor | None, State]:
        """See `Recurrent._added`."""
        added, after = super()._added(ids, outputs, before, after)
        logs, history = self.ngram.look_up(ids, before, targets)
        counted = self.gate(outputs) * logs
        after = replace(after, tensors={**after.tensors, HISTORY: history})
        return counted if added is None else counted + added, after
