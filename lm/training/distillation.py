"""Distillation: a model learns from the text and from the probabilities of another model, its teacher.

    objective = (1 - w) · cross-entropy with the text  +  w · KL(teacher ‖ model)          w = training.distill_weight

Up to a constant this is one cross-entropy with soft targets: 1 - w on the token of the text, and w times the
probabilities of the teacher. The teacher reads the same batches, in evaluation mode and in fp32. It carries a state if
the model does.

A teacher with counts has counted the text that it teaches. On that text its counts leave out each target's own
occurrence, as in the training of a hybrid.

Where all epochs have the same batches, the teacher's probabilities are computed in the first epoch and kept in fp16.

Source: Hinton, Vinyals and Dean 2015, "Distilling the knowledge in a neural network"; temperature 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lm.corpora.batches import Batch
from lm.models.base import LanguageModel, State

MAX_KEPT_BYTES = 1 << 29
"""Memory for probabilities of earlier batches."""


class Teacher:
    """Gives the soft targets of training batches.

    Args:
        model: with its weights, on any device; it is set to evaluation mode.
        weight: of its probabilities in the soft targets, 0 to 1.
        knows_text: whether it was trained on the same text.
    """

    def __init__(self, model: LanguageModel, weight: float, *, knows_text: bool) -> None:
        self._model = model.eval().requires_grad_(False)
        self._weight, self._knows_text = weight, knows_text
        self.state: State | None = None
        """After the last batch; None: the next batch begins without one."""
        self._kept: dict[int, tuple[Tensor, State | None]] = {}
        self._kept_bytes = 0

    def to(self, device: torch.device) -> None:
        """Move the model to a device."""
        self._model.to(device)

    def soft_targets(self, batch: Batch, inputs: Tensor, targets: Tensor, *, carries_state: bool) -> Tensor:
        """Probabilities (B, T, V) in fp32: the teacher's, and the text's own tokens.

        Args:
            batch: says whether the state is reset, and the batch's place in its epoch.
            inputs: (B, T) of the batch, on the teacher's device.
            targets: (B, T) of the batch.
            carries_state: whether the next batch continues the text of this one.
        """
        soft = self._probabilities(batch, inputs, targets, carries_state).float() * self._weight
        own = torch.full_like(targets, 1 - self._weight, dtype=soft.dtype)
        return soft.scatter_add_(-1, targets[..., None], own[..., None])

    def _probabilities(self, batch: Batch, inputs: Tensor, targets: Tensor, carries_state: bool) -> Tensor:
        kept = None if batch.place is None else self._kept.get(batch.place)
        if kept is not None:
            probabilities, self.state = kept
            return probabilities
        before = None if batch.fresh else self.state
        with torch.no_grad(), torch.autocast(inputs.device.type, enabled=False):
            if self._knows_text:
                logits, after = self._model.held_out_logits(inputs, targets, before)
            else:
                logits, after = self._model(inputs, before)
            # Always rounded, so that a resumed run, which has kept none of them, gets the same numbers.
            probabilities = logits.float().softmax(dim=-1).half()
        # The state of a limited window would grow with every batch.
        self.state = after if carries_state and self._model.context_length is None else None
        if batch.place is not None and self._kept_bytes + probabilities.nbytes <= MAX_KEPT_BYTES:
            self._kept[batch.place] = probabilities, self.state
            self._kept_bytes += probabilities.nbytes
        return probabilities
