"""An n-gram model: how often each token followed the last few, smoothed; no gradients, trained in one pass.

    ids ─► the last order - 1 tokens ─► counts, longest context first ─► log-probabilities

The state is those last tokens. The counting and smoothing are in `lm.models.kneser_ney`.
"""

from __future__ import annotations

import logging
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor

from lm.errors import DeviceError
from lm.models.base import LanguageModel, ModelOptions, State
from lm.models.kneser_ney import NGramCounts, count_text, histories_of

REGISTERS = {"ngram": "NGram"}

HISTORY = "history"
"""The state's tensor: the last order - 1 tokens (B, K) int64, the newest last; -1 where the text has not begun."""


log = logging.getLogger(__name__)

MOST_COUNTED = 20_000_000
"""Tokens that are counted unless an option says otherwise. A token takes at most 85 bytes for 7-grams of characters and
170 for 5-grams of words while it is counted: 4 GB at most together."""


class CountingOptions(ModelOptions):
    """Options of models that count a text."""

    max_tokens: int | None = Field(
        MOST_COUNTED,
        ge=1,
        description="Count the first so many tokens of the training split, which bounds the memory; none: all.",
    )


class NGramOptions(CountingOptions):
    """Options of the n-gram model."""

    type: Literal["ngram"] = Field("ngram", description="The n-gram model.")
    order: int = Field(
        6, ge=1, le=32, description="Length of the longest n-gram: a token and the order - 1 tokens before it."
    )


class NGram(LanguageModel):
    """Interpolated modified Kneser-Ney counts; before `fit`, all tokens are alike."""

    Options = NGramOptions
    trained_by = "counting"
    kind = "n-gram counts, no network"

    options: NGramOptions

    def __init__(self, options: NGramOptions, vocab_size: int) -> None:
        super().__init__(options, vocab_size)
        self.counts = count_text(np.zeros(1), order=options.order, vocab_size=vocab_size)

    def forward(self, ids: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """See `LanguageModel.forward`; the logits are log-probabilities."""
        logs, history = self.look_up(ids, state)
        return logs, State({HISTORY: history})

    def look_up(self, ids: Tensor, state: State | None = None, targets: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Log-probabilities (B, T, V) of the token after each token, and the last tokens (B, K) for the state.

        Args:
            ids: (B, T) int64.
            state: whose tensor `HISTORY` holds what stood before; None at the start of a text.
            targets: (B, T) int64 of the text that was counted: each one's own occurrence is left out of the counts.
        """
        text = ids if state is None else torch.cat([state.tensors[HISTORY], ids], dim=1)
        histories = histories_of(text.cpu().numpy(), self.counts.reach)[:, -ids.shape[1] :]
        positions = histories.reshape(ids.numel(), self.counts.reach)
        if targets is None:
            values = self.counts.probabilities(positions)
        else:
            values = self.counts.left_out(positions, targets.flatten().cpu().numpy())
        np.log(values, out=values)
        logs = torch.from_numpy(values).view(*ids.shape, self.vocab_size)
        return logs.to(ids.device), torch.from_numpy(histories[:, -1].copy()).to(ids.device)

    def fit(self, ids: npt.NDArray[Any]) -> None:
        """See `LanguageModel.fit`.

        Raises:
            DeviceError: there is not enough memory for the counts.
        """
        order, limit, total = self.options.order, self.options.max_tokens, len(ids) - 1
        if limit is not None and total > limit:
            self.notes = (f"the counts are of the first {limit:,} of its {total:,} tokens (model.max_tokens)",)
            log.warning("The model counts the first %s of %s tokens (model.max_tokens).", f"{limit:,}", f"{total:,}")
            ids = ids[: limit + 1]
        self.counted_tokens = len(ids) - 1
        try:
            self.counts = count_text(ids, order=order, vocab_size=self.vocab_size)
        except MemoryError:
            raise DeviceError(
                f"The memory is not enough to count {self.counted_tokens:,} tokens at order {order}: lower "
                "model.max_tokens or model.order."
            ) from None

    def num_parameters(self) -> int:
        """Counts that are stored."""
        return self.num_counts()

    def num_counts(self) -> int:
        """See `LanguageModel.num_counts`."""
        return self.counts.size

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """See `LanguageModel.arrays`."""
        return self.counts.arrays()

    def load_arrays(self, arrays: dict[str, npt.NDArray[Any]]) -> None:
        """See `LanguageModel.load_arrays`."""
        self.counts = NGramCounts.from_arrays(arrays, order=self.options.order, vocab_size=self.vocab_size)
