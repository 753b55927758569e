"""A hybrid: n-gram counts, a recurrent network, and a gate that learns how far each is to be trusted.

    p = (1 - g) · the network's + g · the counts'        g = sigmoid(gate(hidden state, entropy of the counts'))

The network learns as it would alone: only the gate learns from p. So it is never worse for the counts, and goes on
learning where these are right already; a mixture of two that err in different places is better than both.

The counts are those of `lm.models.ngram`, of the training text, made before the first step. While the gate learns on
that same text, each token's own occurrence is left out of them: else they would seem to know every token. In use they
are whole. The state is the network's, and the last order - 1 tokens.

What it scores is no score of a neural network alone, and is labelled wherever it is shown.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import numpy.typing as npt
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from lm.models.base import LanguageModel, State, TrainingLoss, cross_entropies
from lm.models.ngram import HISTORY, CountingOptions, NGram, NGramOptions
from lm.models.output_head import output_logits
from lm.models.profiled_parts import LOSS, part
from lm.models.recurrent import Recurrent, RecurrentOptions

REGISTERS = {"hybrid": "Hybrid"}

COUNTS = "ngram."
"""What the names of the arrays of counts begin with."""
FIRST_TRUST = 2.0
"""The gate's bias at first: the network knows nothing yet, so the counts have 0.88 of the mixture."""


class HybridOptions(RecurrentOptions, CountingOptions):
    """Options of the hybrid: those of its network, and those of its counts."""

    type: Literal["hybrid"] = Field("hybrid", description="N-gram counts and a network.")  # type: ignore[assignment]
    cell: Literal["rnn", "gru", "lstm"] = Field("gru", description="The network's cell: rnn, gru or lstm.")
    order: int = Field(
        6, ge=1, le=32, description="Length of the longest n-gram: a token and the order - 1 tokens before it."
    )


class Hybrid(LanguageModel):
    """A recurrent network and n-gram counts; before `fit`, the counts know nothing."""

    Options = HybridOptions
    trained_by = "both"
    kind = "hybrid: n-gram counts and a network"
    batching = "streams"

    options: HybridOptions

    def __init__(self, options: HybridOptions, vocab_size: int) -> None:
        super().__init__(options, vocab_size)
        shared = {name: getattr(options, name) for name in RecurrentOptions.model_fields if name != "type"}
        network = RecurrentOptions(type=options.cell, **shared)
        counted = NGramOptions(order=options.order, max_tokens=options.max_tokens)
        self.network = _BesideCounts(network, vocab_size, NGram(counted, vocab_size))

    def forward(self, ids: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """See `LanguageModel.forward`."""
        return self.network.forward(ids, state)

    def training_loss(
        self, ids: Tensor, targets: Tensor, state: State | None = None, *, label_smoothing: float = 0.0
    ) -> TrainingLoss:
        """See `LanguageModel.training_loss`; with counts that are without the targets' own occurrences."""
        return self.network.training_loss(ids, targets, state, label_smoothing=label_smoothing)

    def fit(self, ids: npt.NDArray[Any]) -> None:
        """See `LanguageModel.fit`: makes the counts; the network is untouched."""
        self.network.ngram.fit(ids)
        self.notes = self.network.ngram.notes

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


class _BesideCounts(Recurrent):
    """The network, mixed with the counts."""

    def __init__(self, options: RecurrentOptions, vocab_size: int, ngram: NGram) -> None:
        super().__init__(options, vocab_size)
        self.ngram = ngram
        self.gate = nn.Linear(options.hidden_size + 1, 1)
        nn.init.zeros_(self.gate.weight)
        nn.init.constant_(self.gate.bias, FIRST_TRUST)

    def forward(self, ids: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """See `LanguageModel.forward`; the logits are log-probabilities."""
        outputs, added, after = self._read(ids, state)
        logits = output_logits(self._project(self.output_dropout(outputs)), *self._output_layer(), added=added)
        logs, history = self.ngram.look_up(ids, state)
        return self._mixed(outputs, logits, logs), _remembering(after, history)

    def training_loss(
        self, ids: Tensor, targets: Tensor, state: State | None = None, *, label_smoothing: float = 0.0
    ) -> TrainingLoss:
        """See `LanguageModel.training_loss`: the network's own objective, and for the gate the mixture's nats."""
        outputs, added, after = self._read(ids, state)
        dropped = self.output_dropout(outputs)
        logits = part("output", output_logits, self._project(dropped), *self._output_layer(), added=added)
        own, _ = part(LOSS, cross_entropies, logits, targets, label_smoothing, self.loss_dtype)
        logs, history = self.ngram.look_up(ids, state, targets)
        # The counts are less than one occurrence worse on their own text, and so seem better than they are on a new
        # one: a network that learned from the mixture would leave all to them.
        mixed = self._mixed(outputs.detach(), logits.detach(), logs)
        nats = F.nll_loss(mixed.flatten(0, 1), targets.flatten())
        objective = own + nats + self._penalties(outputs, dropped)
        return TrainingLoss(objective, nats.detach(), _remembering(after, history), mixed.detach())

    def _mixed(self, outputs: Tensor, logits: Tensor, logs: Tensor) -> Tensor:
        """Log-probabilities (B, T, V) of the mixture.

        Args:
            outputs: (B, T, H) of the cell.
            logits: (B, T, V) of the network.
            logs: (B, T, V) log-probabilities of the counts.
        """
        entropy = -(logs.exp() * logs).sum(dim=-1, keepdim=True)
        trust = self.gate(torch.cat([outputs, entropy.to(outputs.dtype)], dim=-1)).float()
        network = logits.float().log_softmax(dim=-1)
        return torch.logaddexp(network + F.logsigmoid(-trust), logs + F.logsigmoid(trust))


def _remembering(state: State, history: Tensor) -> State:
    return replace(state, tensors={**state.tensors, HISTORY: history})
