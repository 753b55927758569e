"""A line of metrics.jsonl, from the steps since the line before."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from lm.corpora import TokenSplit
from lm.device import memory_in_use
from lm.training.callbacks import Row
from lm.training.train_step import StepBatches, StepResult, TrainStep


@dataclass
class MetricsInterval:
    """The steps since the last line."""

    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    """Of the steps alone."""
    clipped: int = 0
    _last: StepResult = field(default_factory=StepResult)
    _pending_metrics: Row = field(default_factory=dict)

    def add(self, result: StepResult) -> None:
        """Add a step; its time is added to `seconds`."""
        self.losses.append(result.loss)
        self.clipped += result.is_clipped
        self._last = result
        if result.largest_activation is not None:
            name, value = result.largest_activation
            self._pending_metrics |= {"largest_activation": value, "largest_activation_in": name}
        if result.first_nonfinite is not None:
            self._pending_metrics.setdefault("first_nonfinite", result.first_nonfinite)

    def row(self, number: int, skipped_steps: int, step: TrainStep, batches: StepBatches, train: TokenSplit) -> Row:
        """The line after step `number`, without validation.

        Args:
            number: of the step.
            skipped_steps: in the whole run.
            step: that made them.
            batches: of the steps.
            train: the training split, for bits per byte.
        """
        losses = [loss for loss in self.losses if math.isfinite(loss)]
        steps, last = max(1, len(self.losses)), self._last
        loss = float(np.mean(losses)) if losses else None
        row: Row = {
            "step": number,
            "tokens": number * batches.tokens_per_step,
            "epoch": round(number / batches.steps_per_epoch, 4),
            "train_loss": loss,
            "train_accuracy": last.accuracy,
            "valid_loss": None,
            "valid_accuracy": None,
            "learning_rate": step.learning_rate,
            "grad_norm": last.grad_norm if math.isfinite(last.grad_norm) else None,
            "clip_rate": self.clipped / steps,
            "skipped_steps": skipped_steps,
            "tokens_per_second": steps * batches.tokens_per_step / max(self.seconds, 1e-9),
            "memory_bytes": memory_in_use(step.device),
            "train_bits_per_byte": None if loss is None else train.counts.bits_per_byte(loss),
        }
        if step.mixed.scale.enabled:
            row["loss_scale"] = step.mixed.scale.value
        return row | self._pending_metrics
