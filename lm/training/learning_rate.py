"""The learning rate over the plan, as a share of the peak."""

from __future__ import annotations

import math

from lm.config import TrainingConfig


def learning_rate_share(step: int, plan_steps: int, config: TrainingConfig) -> float:
    """The share of the peak learning rate that the update of `step` uses.

    Args:
        step: 0 for the first update.
        plan_steps: updates in the whole plan; the decay ends at the last one.
        config: schedule and its options. `plateau` is constant here; the trainer applies its decays after validation.
    """
    warmup = min(config.warmup_steps, plan_steps // 10)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, plan_steps - 1 - warmup)
    floor = config.learning_rate_floor
    match config.schedule:
        case "cosine":
            return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
        case "linear":
            return floor + (1 - floor) * (1 - min(done, 1.0))
        case "step":
            return float(config.decay_factor ** (step // config.decay_every))
        case "constant" | "plateau":
            return 1.0
