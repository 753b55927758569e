"""A hybrid: a gated mixture of a recurrent network and n-gram counts.

    p = (1 - g) · p(network) + g · p(counts)        g = sigmoid(gate(hidden state, entropy of p(counts)))

The network trains as it would alone, and only the gate trains on p. So the counts do not keep the network from learning
what they already predict, and the mixture is better than either part.

The counts (`lm.models.ngram`) are made from the training split before the first step, also of a resumed run. In
training they leave out each target's own occurrence, because with it they would predict almost every token of the
training split. Evaluation, sampling and the saved file use the compact counts. The state is the network's, and the last
order - 1 tokens.

Reports label the scores, because they are not those of a neural network alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from lm.models.base import Inspection, LanguageModel, MixturePart, State, TrainingLoss, cross_entropies, declare
from lm.models.contributions import NETWORK, count_terms, mixture_terms, total
from lm.models.layout import Stage, Symbol
from lm.models.ngram import HISTORY, CountingOptions, NGram, NGramOptions
from lm.models.profiled_parts import LOSS, run_part
from lm.models.recurrent import Recurrent, RecurrentOptions
from lm.models.target_scores import TargetScores

REGISTERS = {"hybrid": "Hybrid"}

COUNTS = "ngram."
"""Prefix of the names of the counts' arrays."""
OF_TARGETS, ENTROPY = "counted log-probabilities", "entropies of counts"
"""Host inputs, (B, T, 1) each: of the targets, and of the distributions. The counts are on the host, so a step on a GPU
would wait for their (B, T, V) log-probabilities."""
INITIAL_GATE_BIAS = 2.0
"""Gives the counts a weight of 0.88 before the network has learned anything."""


class HybridOptions(RecurrentOptions, CountingOptions):
    """Options of the hybrid: those of its network and those of its counts."""

    type: Literal["hybrid"] = Field("hybrid", description="N-gram counts and a network.")  # type: ignore[assignment]
    cell: Literal["rnn", "gru", "lstm"] = Field("gru", description="The network's cell: rnn, gru or lstm.")
    order: int = Field(
        6, ge=1, le=32, description="Length of the longest n-gram: a token and the order - 1 tokens before it."
    )

    @property
    def bf16_on_cpu(self) -> bool:
        """See `ModelOptions.bf16_on_cpu`; by the network's cell."""
        return self.cell != "rnn"


class Hybrid(LanguageModel):
    """A recurrent network and n-gram counts; before `fit`, the counts are uniform."""

    Options = HybridOptions
    trained_by = "both"
    kind = "hybrid: n-gram counts and a network"

    options: HybridOptions

    def __init__(self, options: HybridOptions, vocab_size: int) -> None:
        super().__init__(options, vocab_size)
        shared = {name: getattr(options, name) for name in RecurrentOptions.model_fields if name != "type"}
        network = RecurrentOptions(type=options.cell, **shared)
        counts = NGramOptions(order=options.order, max_tokens=options.max_tokens)
        self.network = _GatedNetwork(network, vocab_size, NGram(counts, vocab_size))
        self.recurrent_tensors = self.network.recurrent_tensors
        self.host_context = max(options.order - 1, self.network.host_context or 0)

    def forward(self, ids: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """See `LanguageModel.forward`."""
        return self.network.forward(ids, state)

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
        """See `LanguageModel.training_loss`; the counts leave out the targets' own occurrences."""
        return self.network.training_loss(
            ids, targets, state, label_smoothing=label_smoothing, soft_targets=soft_targets, host_inputs=host_inputs,
            learned=learned,
        )  # fmt: skip

    def host_inputs(
        self, ids: npt.NDArray[np.int64], targets: npt.NDArray[np.int64], earlier: npt.NDArray[np.int64] | None = None
    ) -> dict[str, Tensor]:
        """See `LanguageModel.host_inputs`: the network's, and what the gate needs of the counts."""
        return self.network.host_inputs(ids, targets, earlier)

    def held_out_logits(self, ids: Tensor, targets: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """See `LanguageModel.held_out_logits`."""
        return self.network.held_out_logits(ids, targets, state)

    def traceable(self) -> contextlib.AbstractContextManager[None]:
        """See `LanguageModel.traceable`."""
        return self.network.ngram.traceable()

    def symbols(self) -> dict[str, Symbol]:
        """See `LanguageModel.symbols`."""
        return self.network.symbols()

    def layout(self) -> tuple[Stage, ...]:
        """See `LanguageModel.layout`; the counts are not trained, so their numbers are no parameters."""
        return tuple(
            replace(stage, parameters={f"network.{name}": shape for name, shape in stage.parameters.items()})
            for stage in self.network.layout()
        )

    def inspectable(self) -> tuple[str, ...]:
        """See `LanguageModel.inspectable`."""
        return self.network.inspectable()

    def _inspect(self, ids: Tensor, state: State | None, parts: frozenset[str]) -> Inspection:
        return self.network._inspect(ids, state, parts)

    def fit(self, ids: npt.NDArray[Any]) -> None:
        """See `LanguageModel.fit`; makes the counts and does not change the network."""
        self.network.ngram.fit(ids)
        self.notes = self.network.ngram.notes

    def fit_bytes(self, ids: npt.NDArray[Any]) -> int:
        """See `LanguageModel.fit_bytes`."""
        return self.network.ngram.fit_bytes(ids)

    def fitted(self) -> Any:
        """See `LanguageModel.fitted`."""
        return self.network.ngram.fitted()

    def use_fitted(self, fitted: Any) -> None:
        """See `LanguageModel.use_fitted`."""
        self.network.ngram.use_fitted(fitted)
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


class _GatedNetwork(Recurrent):
    """The network, the counts and the gate."""

    def __init__(self, options: RecurrentOptions, vocab_size: int, ngram: NGram) -> None:
        super().__init__(options, vocab_size)
        self.ngram = ngram
        self.gate = declare(nn.Linear(options.hidden_size + 1, 1), optimizer_kind="muon")
        nn.init.zeros_(self.gate.weight)
        nn.init.constant_(self.gate.bias, INITIAL_GATE_BIAS)

    def forward(self, ids: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """See `LanguageModel.forward`; the logits are log-probabilities."""
        return super().forward(ids, state)

    def target_scores(self, ids: Tensor, targets: Tensor, state: State | None = None) -> tuple[TargetScores, State]:
        """See `LanguageModel.target_scores`; the mixture needs all logits."""
        return LanguageModel.target_scores(self, ids, targets, state)

    def held_out_logits(self, ids: Tensor, targets: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """See `LanguageModel.held_out_logits`."""
        return self._predict(ids, state, *self._hidden(ids, state), targets)

    def _predict(
        self,
        ids: Tensor,
        state: State | None,
        outputs: Tensor,
        added: Tensor | None,
        after: State,
        targets: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """As in `Recurrent`; with `targets`, the counts leave out their occurrences."""
        logits = self._head().logits(self.output_dropout(outputs), added)
        logs, history = self.ngram.log_probabilities(ids, state, targets)
        return _mix(self._gate(outputs, entropies(logs)), logits, logs), _with_history(after, history)

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
        """See `LanguageModel.training_loss`: the network's own objective, and for the gate the mixture's nats."""
        assert learned is None, "a job refuses conversations for models that count"
        outputs, added, after = self._hidden(ids, state, host_inputs)
        dropped = self.output_dropout(outputs)
        logits = self._head().logits(dropped, added)
        own, _ = run_part(LOSS, cross_entropies, logits, targets, label_smoothing, self.loss_dtype, soft_targets)
        penalties = self._penalties(outputs, dropped)
        logs: Tensor | None = None
        if host_inputs is None:
            logs, _ = self.ngram.log_probabilities(ids, state, targets)
            host_inputs = _counted(logs, targets)
        # Even without the target's occurrence, counts predict the text that they were made from better than a new one.
        # A network that trained on the mixture would rely on them too much.
        outputs, logits = outputs.detach(), logits.detach().float()
        gate = self._gate(outputs, host_inputs[ENTROPY])
        # The gate needs the probabilities of the targets alone, not the whole mixture.
        network = logits.gather(-1, targets[..., None]) - logits.logsumexp(dim=-1, keepdim=True)
        mixed = torch.logaddexp(network + F.logsigmoid(-gate), host_inputs[OF_TARGETS] + F.logsigmoid(gate))
        nats = -mixed.mean()
        objective = own + nats + penalties
        after = _with_history(after, self.ngram.history_after(ids, state))

        def mixture() -> Tensor:
            all_logs = self.ngram.log_probabilities(ids, state, targets)[0] if logs is None else logs
            return _mix(gate.detach(), logits, all_logs)

        return TrainingLoss(objective, nats.detach(), after, mixture)

    def host_inputs(
        self, ids: npt.NDArray[np.int64], targets: npt.NDArray[np.int64], earlier: npt.NDArray[np.int64] | None = None
    ) -> dict[str, Tensor]:
        """See `LanguageModel.host_inputs`: the network's, and what the gate needs of the counts."""
        size = self.ngram.counts.context_size
        before = np.full((len(ids), size), -1) if earlier is None else earlier[:, max(0, earlier.shape[1] - size) :]
        state = State({HISTORY: torch.from_numpy(before)})
        following = torch.from_numpy(targets)
        logs, _ = self.ngram.log_probabilities(torch.from_numpy(ids), state, following)
        return {**super().host_inputs(ids, targets, earlier), **_counted(logs, following)}

    def _gate(self, outputs: Tensor, entropy: Tensor) -> Tensor:
        """The log-odds (B, T, 1) of the counts' weight, from outputs (B, T, H) and `entropies` of the counts."""
        gate: Tensor = self.gate(torch.cat([outputs, entropy.to(outputs.dtype)], dim=-1)).float()
        return gate

    def layout(self) -> tuple[Stage, ...]:
        """See `LanguageModel.layout`."""
        logits = "B", "T", "V"
        weights = {"gate.weight": ("1", "H + 1"), "gate.bias": ("1",)}
        gate = Stage(
            "gate", "g = sigmoid(w [h, entropy] + b)", weights, {"g": ("B", "T", "1")}, (("B·T", "H + 1", "1"),)
        )
        counts = Stage("counts", "log p(counts)", outputs={"log p(counts)": logits})
        mixture = Stage(
            "mixture", "log((1 - g) p(network) + g p(counts))", outputs={"log p(network)": logits, "log p": logits}
        )
        return (*super().layout(), counts, gate, mixture)

    def inspectable(self) -> tuple[str, ...]:
        """See `LanguageModel.inspectable`."""
        return *super().inspectable(), "mixture"

    def _sums(self, ids: Tensor, state: State | None, outputs: Tensor) -> dict[str, dict[str, Any]]:
        """The parts of both, weighted with the share that each has of a token's probability; and "mixture"."""
        network = super()._sums(ids, state, outputs)
        logs, _ = self.ngram.log_probabilities(ids, state)
        gate = self._gate(outputs, entropies(logs))[..., 0]
        counts = self.ngram.mixture(ids, state)
        mixture = {
            NETWORK: MixturePart(torch.sigmoid(-gate), total(network["terms"])),
            "counts": MixturePart(torch.sigmoid(gate), logs),
        }
        terms = mixture_terms(
            mixture, {NETWORK: network["terms"], "counts": mixture_terms(counts, count_terms(counts))}
        )
        return {"contributions": terms, "terms": terms, "mixture": mixture}


def entropies(logs: Tensor) -> Tensor:
    """The entropies (B, T, 1) in nats of log-probabilities (B, T, V)."""
    return -(logs.exp() * logs).sum(dim=-1, keepdim=True)


def _mix(gate: Tensor, logits: Tensor, logs: Tensor) -> Tensor:
    """Log-probabilities (B, T, V) of the mixture.

    Args:
        gate: (B, T, 1) log-odds of the counts' weight.
        logits: (B, T, V) of the network.
        logs: (B, T, V) log-probabilities of the counts.
    """
    network = logits.float().log_softmax(dim=-1)
    return torch.logaddexp(network + F.logsigmoid(-gate), logs + F.logsigmoid(gate))


def _counted(logs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """`OF_TARGETS` and `ENTROPY` of log-probabilities (B, T, V)."""
    return {OF_TARGETS: logs.gather(-1, targets[..., None]), ENTROPY: entropies(logs)}


def _with_history(state: State, history: Tensor) -> State:
    return replace(state, tensors={**state.tensors, HISTORY: history})
