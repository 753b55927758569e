"""The learning rate over the plan, as a share of the peak."""

from __future__ import annotations

import math

from lm.config import TrainingConfig

WARM_UP_SHARE = 0.1
"""The warm-up ends at this share of a plan by time at the latest."""


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
    return _decayed(step, (step - warmup) / max(1, plan_steps - 1 - warmup), config)


def timed_learning_rate_share(updates: int, progress: float, per_step: float, config: TrainingConfig) -> float:
    """The same for a plan by time, whose steps are not known in advance.

    Args:
        updates: before this one. The warm-up ends after `warmup_steps` of them, or at a tenth of the plan.
        progress: share of the plan before this step, 0 to 1.
        per_step: progress of this step; the decay ends with the step that ends the plan.
        config: schedule and its options.
    """
    rise = max((updates + 1) / (config.warmup_steps + 1), (progress + per_step) / WARM_UP_SHARE)
    # From 0 in the first step to 1 in the last one, as in a plan of 1 / per_step steps.
    done = 0.0 if progress == 0 else min(1.0, progress / max(1 - per_step, progress))
    return min(rise, _decayed(updates, done, config))


def _decayed(step: int, done: float, config: TrainingConfig) -> float:
    """The share after the warm-up; `done`: 0 at the peak to 1 in the last step."""
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
