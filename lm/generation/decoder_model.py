"""A decoder as a LanguageModel, so that the one exact evaluator can score what decoding computes."""

from __future__ import annotations

import torch
from torch import Tensor

from lm.generation.decoder import Decoder
from lm.models.base import LanguageModel, State


class Decoded(LanguageModel):
    """The logits of a decoder; for evaluation alone, since it has no weights to train.

    A carried state is a slot, so that there must be as many as rows; windows are read one after the other.
    """

    def __init__(self, decoder: Decoder) -> None:
        super().__init__(None, decoder.vocab_size)
        self._decoder = decoder
        self._open: set[int] = set()

    @property
    def context_length(self) -> int | None:
        """The decoder's."""
        return self._decoder.context_length

    def forward(self, ids: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """See `LanguageModel.forward`."""
        going_on = [] if state is None else state.tensors["slots"].tolist()
        for slot in self._open.difference(going_on):
            self._close(slot)
        rows, slots = [], []
        for index, row in enumerate(ids.tolist()):
            slot = going_on[index] if going_on else self._decoder.open()
            self._open.add(slot)
            rows.append(torch.from_numpy(self._decoder.prefill(slot, row)))
            slots.append(slot)
            if self.context_length is not None:
                self._close(slot)
        return torch.stack(rows), State({"slots": torch.tensor(slots)})

    def _close(self, slot: int) -> None:
        self._open.discard(slot)
        self._decoder.close(slot)
