"""An n-gram model: smoothed counts of the tokens after each context, made in one pass without gradients.

    ids ─► the last order - 1 tokens ─► counts, longest context first ─► log-probabilities

The state is those last tokens. Counts and smoothing are in `lm.models.kneser_ney`. Evaluation, sampling and the saved
file use compact counts. Only training needs the raw ones: `fit` makes both.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor

from lm.errors import DeviceError
from lm.models.base import Inspection, LanguageModel, MixturePart, ModelOptions, State
from lm.models.contributions import UNIFORM, count_terms, mixture_terms
from lm.models.counts_by_order import distributions_by_order
from lm.models.counts_in_torch import CountTables
from lm.models.kneser_ney import NGramCounts, count_text, histories_of
from lm.models.layout import Stage, Symbol

REGISTERS = {"ngram": "NGram"}

HISTORY = "history"
"""The state's tensor: the last order - 1 tokens (B, K) int64, newest last; -1 before the start of the text."""

log = logging.getLogger(__name__)

DEFAULT_MAX_TOKENS = 20_000_000
"""Counting takes 70 to 120 bytes a token for 8-grams of characters and 240 for 5-grams of words: 5 GB at most."""
SAMPLE_TOKENS = 100_000
"""Tokens from the start of a text from which the memory for its counts is estimated."""
TOKEN_BYTES, CONTEXT_BYTES, PAIR_BYTES = 60, 40, 16
"""Memory of counting: temporary arrays for each token of the text, and what is kept of its contexts and pairs."""


class CountingOptions(ModelOptions):
    """Options of models that count a text."""

    max_tokens: int | None = Field(
        DEFAULT_MAX_TOKENS,
        ge=1,
        description="Count only this many tokens from the start of the training split, to limit memory; none: all.",
    )


class NGramOptions(CountingOptions):
    """Options of the n-gram model."""

    type: Literal["ngram"] = Field("ngram", description="The n-gram model.")
    order: int = Field(
        6, ge=1, le=32, description="Length of the longest n-gram: a token and the order - 1 tokens before it."
    )


class NGram(LanguageModel):
    """Interpolated modified Kneser-Ney counts; before `fit`, the distribution is uniform."""

    Options = NGramOptions
    trained_by = "counting"
    kind = "n-gram counts, no network"

    options: NGramOptions

    def __init__(self, options: NGramOptions, vocab_size: int) -> None:
        super().__init__(options, vocab_size)
        self.counts = count_text(np.zeros(1), order=options.order, vocab_size=vocab_size)
        """For evaluation, sampling and the file: compact, or raw in the file of an older version."""
        self.training_counts: NGramCounts | None = self.counts
        """The raw counts that `fit` made; None after compact ones were loaded without `fit`."""
        self._tables: CountTables | None = None
        """The counts inside `traceable`."""

    def forward(self, ids: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """See `LanguageModel.forward`; the logits are log-probabilities."""
        logs, history = self.log_probabilities(ids, state)
        return logs, State({HISTORY: history})

    def held_out_logits(self, ids: Tensor, targets: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """See `LanguageModel.held_out_logits`."""
        logs, history = self.log_probabilities(ids, state, targets)
        return logs, State({HISTORY: history})

    def log_probabilities(
        self, ids: Tensor, state: State | None = None, targets: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities (B, T, V) of the token after each token, and the state's tensor `HISTORY` (B, K).

        Args:
            ids: (B, T) int64.
            state: with the tensor `HISTORY`; None at the start of a text.
            targets: (B, T) int64 of the counted text, in training: from the raw counts without each target's own
                occurrence.

        Raises:
            RuntimeError: `targets` are given, and there are no raw counts.
        """
        if self._tables is not None and state is not None and targets is None:
            text = torch.cat([state.tensors[HISTORY], ids], dim=1)
            return self._tables(text).log(), self.history_after(ids, state)
        histories = self._histories(ids, state)
        positions = histories.reshape(ids.numel(), self.counts.context_size)
        left_out = None if targets is None else targets.flatten().cpu().numpy()
        counts = self.counts if targets is None else self.training_counts
        if counts is None:
            raise RuntimeError("The counts were loaded from a file, which is for evaluation: call fit before training.")
        values = counts.probabilities(positions, left_out, threads=torch.get_num_threads())
        np.log(values, out=values)
        logs = torch.from_numpy(values).view(*ids.shape, self.vocab_size)
        if ids.device.type == "cuda":
            # Then the host does not wait for the copy.
            logs = logs.pin_memory()
        return logs.to(ids.device, non_blocking=True), self.history_after(ids, state)

    def history_after(self, ids: Tensor, state: State | None) -> Tensor:
        """The state's tensor `HISTORY` (B, K) after `ids` (B, T)."""
        size = self.counts.context_size
        before = ids.new_full((len(ids), size), -1) if state is None else state.tensors[HISTORY]
        text = torch.cat([before, ids], dim=1)
        return text[:, text.shape[1] - size :]

    @contextlib.contextmanager
    def traceable(self) -> Iterator[None]:
        """See `LanguageModel.traceable`."""
        self._tables = CountTables(self.counts)
        try:
            yield
        finally:
            self._tables = None

    def symbols(self) -> dict[str, Symbol]:
        """See `LanguageModel.symbols`."""
        return {
            "V": Symbol(self.vocab_size, "tokens of the vocabulary"),
            "C": Symbol(self.num_counts(), "stored counts"),
            "K": Symbol(self.counts.context_size, "tokens of the longest context"),
        }

    def layout(self) -> tuple[Stage, ...]:
        """See `LanguageModel.layout`."""
        stored = sum(array.nbytes for array in self.counts.arrays().values())
        formula, outputs = "log p, from the longest context to the shortest", {"log p": ("B", "T", "V")}
        return (
            Stage("counts", formula, {"counts": ("C",)}, outputs, state={HISTORY: ("B", "K")}, stored_bytes=stored),
        )

    def inspectable(self) -> tuple[str, ...]:
        """See `LanguageModel.inspectable`."""
        return "contributions", "terms", "mixture"

    def _inspect(self, ids: Tensor, state: State | None, parts: frozenset[str]) -> Inspection:
        logits, after = self(ids, state)
        mixture = self.mixture(ids, state) if parts else {}
        terms = mixture_terms(mixture, count_terms(mixture)) if parts - {"mixture"} else {}
        return Inspection(
            logits,
            after,
            contributions=terms if "contributions" in parts else {},
            terms=terms if "terms" in parts else {},
            mixture=mixture if "mixture" in parts else {},
        )

    def mixture(self, ids: Tensor, state: State | None) -> dict[str, MixturePart]:
        """The distributions that the model mixes: "counts N" of each order, and "uniform"; arguments as `forward`."""
        parts = distributions_by_order(self.counts, self._histories(ids, state).reshape(ids.numel(), -1))
        return {
            f"counts {order}" if order else UNIFORM: MixturePart(
                torch.from_numpy(weight).float().view(ids.shape).to(ids.device),
                torch.from_numpy(distribution).log().view(*ids.shape, -1).to(ids.device),
            )
            for order, (weight, distribution) in parts.items()
        }

    def _histories(self, ids: Tensor, state: State | None) -> npt.NDArray[Any]:
        """The last order - 1 tokens (B, T, K) up to each token of `ids`."""
        text = ids if state is None else torch.cat([state.tensors[HISTORY], ids], dim=1)
        histories: npt.NDArray[Any] = histories_of(text.cpu().numpy(), self.counts.context_size)[:, -ids.shape[1] :]
        return histories

    def fit(self, ids: npt.NDArray[Any]) -> None:
        """See `LanguageModel.fit`.

        Raises:
            DeviceError: the memory is not enough for the counts.
        """
        order, limit, total = self.options.order, self.options.max_tokens, len(ids) - 1
        if limit is not None and total > limit:
            self.notes = (f"the counts are of the first {limit:,} of its {total:,} tokens (model.max_tokens)",)
            log.warning("The model counts the first %s of %s tokens (model.max_tokens).", f"{limit:,}", f"{total:,}")
            ids = ids[: limit + 1]
        self.counted_tokens = len(ids) - 1
        try:
            self.training_counts = count_text(ids, order=order, vocab_size=self.vocab_size)
            compact = self.training_counts.compact_arrays()
            # One after the other, because the arrays of a long text are large.
            self.training_counts.free_arrays()
            self.counts = NGramCounts.from_arrays(compact, order=order, vocab_size=self.vocab_size)
            self.counts.free_arrays()
        except MemoryError:
            raise DeviceError(
                f"The memory is not enough to count {self.counted_tokens:,} tokens at order {order}: lower "
                "model.max_tokens or model.order."
            ) from None

    def fit_bytes(self, ids: npt.NDArray[Any]) -> int:
        """See `LanguageModel.fit_bytes`; a little too high, because a longer text has fewer pairs for each token."""
        tokens = min(len(ids) - 1, self.options.max_tokens or len(ids))
        sample = min(tokens, SAMPLE_TOKENS)
        if sample < 1:
            return 0
        levels = count_text(ids[: sample + 1], order=self.options.order, vocab_size=self.vocab_size).levels
        kept = sum(CONTEXT_BYTES * len(level.keys) + PAIR_BYTES * len(level.tokens) for level in levels)
        return tokens * (TOKEN_BYTES + kept // sample)

    def fitted(self) -> Any:
        """See `LanguageModel.fitted`."""
        return self.training_counts, self.counts, self.counted_tokens, self.notes

    def use_fitted(self, fitted: Any) -> None:
        """See `LanguageModel.use_fitted`."""
        self.training_counts, self.counts, self.counted_tokens, self.notes = fitted

    def num_parameters(self) -> int:
        """The number of counts."""
        return self.num_counts()

    def num_counts(self) -> int:
        """See `LanguageModel.num_counts`."""
        return self.counts.size

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """See `LanguageModel.arrays`."""
        return self.counts.arrays()

    def load_arrays(self, arrays: dict[str, npt.NDArray[Any]]) -> None:
        """See `LanguageModel.load_arrays`; training uses the raw counts of `fit`, before or after."""
        self.counts = NGramCounts.from_arrays(arrays, order=self.options.order, vocab_size=self.vocab_size)
        if self.counted_tokens == 0:
            self.training_counts = self.counts if self.counts.can_leave_out else None
