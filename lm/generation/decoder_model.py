"""A decoder as a LanguageModel: the evaluator can score it."""

from __future__ import annotations

import torch
from torch import Tensor

from lm.generation.decoder import Decoder
from lm.models.base import LanguageModel, State


class DecoderModel(LanguageModel):
    """The logits of a decoder, for evaluation: it has no weights.

    A carried state is a slot: the decoder needs one for each row. Windows are read one after the other in one slot.
    """

    def __init__(self, decoder: Decoder) -> None:
        super().__init__(None, decoder.vocab_size)
        self._decoder = decoder
        self._open: set[int] = set()

    @property
    def context_length(self) -> int | None:
        """See `Decoder.context_length`."""
        return self._decoder.context_length

    def forward(self, ids: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """See `LanguageModel.forward`."""
        carried = [] if state is None else state.tensors["slots"].tolist()
        for slot in self._open.difference(carried):
            self._close(slot)
        rows, slots = [], []
        for index, row in enumerate(ids.tolist()):
            slot = carried[index] if carried else self._decoder.open()
            self._open.add(slot)
            rows.append(torch.from_numpy(self._decoder.prefill(slot, row)))
            slots.append(slot)
            if self.context_length is not None:
                self._close(slot)
        return torch.stack(rows), State({"slots": torch.tensor(slots)})

    def _close(self, slot: int) -> None:
        self._open.discard(slot)
        self._decoder.close(slot)
