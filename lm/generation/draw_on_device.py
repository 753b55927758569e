"""Draws tokens where the logits are, so that a step on a GPU sends only ids to the host.

The filters are those of `lm.generation.filters` and keep the same tokens. They compute in float32, because some GPUs
have no float64, and with weights rounded to integers, whose sums are exact in any order. So a draw differs from that of
the numpy filters only if the random number is within about a millionth of the border between two tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lm.device import send_ids
from lm.generation.decoder import DrawPlan
from lm.generation.filters import keep_min_p, keep_top_k, keep_top_p

BITS = 31
"""Of a random number and of the largest weight."""
MIN_TEMPERATURE = 1e-6


def draw_rows(logits: Tensor, plan: DrawPlan, numbers: Sequence[float]) -> Tensor:
    """One token for each row of logits (B, V) float32; (B,) int64 on the same device.

    Args:
        logits: of the model.
        plan: that `can_draw` accepts.
        numbers: (B,) random numbers in [0, 1); not read at temperature 0.
    """
    size = logits.shape[-1]
    if len(plan.bans):
        logits = logits.index_fill(1, _on_device(plan.bans.tobytes(), logits.device), -torch.inf)
    # As `ensure_finite_row`, without asking the device whether it is needed.
    huge = torch.finfo(torch.float32).max
    logits = torch.nan_to_num(logits, nan=-torch.inf, posinf=huge, neginf=-torch.inf)
    largest = logits.amax(dim=1, keepdim=True)
    if plan.temperature == 0:
        ids = torch.arange(size, device=logits.device)
        # Among equals the lowest id, as numpy has it.
        likeliest = torch.where(logits == largest, ids, size).amin(dim=1)
        return torch.where(largest[:, 0] == -torch.inf, plan.fallback, likeliest)
    masked = largest == -torch.inf
    logits = (logits - torch.where(masked, 0.0, largest)) / plan.temperature
    logits[:, plan.fallback] = torch.where(masked[:, 0], 0.0, logits[:, plan.fallback])
    if plan.filters:
        ordered, ids = logits.sort(dim=1, descending=True, stable=True)
        for function, values in plan.filters:
            ordered = ON_DEVICE[function](ordered, *values)
        logits = torch.empty_like(logits).scatter_(1, ids, ordered)
    cumulative = _weights(logits).cumsum(dim=1)
    chosen = send_ids([int(number * 2**BITS) for number in numbers], logits.device)
    tokens: Tensor = (cumulative <= _share(cumulative[:, -1:], chosen[:, None])).sum(dim=1)
    return tokens


@functools.lru_cache(maxsize=256)
def _on_device(ids: bytes, device: torch.device) -> Tensor:
    """int64 ids on the device, sent once: they are the same in every step."""
    return torch.from_numpy(np.frombuffer(ids, np.int64).copy()).to(device)


def _weights(logits: Tensor) -> Tensor:
    """Weights (B, V) int64 of logits whose maximum is 0."""
    return (logits.exp() * 2.0**BITS).long()


def _share(total: Tensor, numbers: Tensor | int) -> Tensor:
    """floor(total · numbers / 2^BITS), exactly, for totals below 2^(2 BITS)."""
    low = total & (2**BITS - 1)
    share: Tensor = (total >> BITS) * numbers + ((low * numbers) >> BITS)
    return share


# Rows are sorted, the most likely token first and among equals the lower id.


def _top_k(ordered: Tensor, top_k: int) -> Tensor:
    return ordered.index_fill(1, torch.arange(min(top_k, ordered.shape[1]), ordered.shape[1], device=ordered.device),
                              -torch.inf)  # fmt: skip


def _top_p(ordered: Tensor, top_p: float) -> Tensor:
    if top_p >= 1:
        return ordered
    mass = _weights(ordered).cumsum(dim=1)
    enough = _share(mass[:, -1:], int(top_p * 2**BITS))
    # The mass before each token decides, so that the token which crosses the border stays.
    kept = torch.nn.functional.pad(mass[:, :-1] < enough, (1, 0), value=True)
    return ordered.masked_fill(~kept, -torch.inf)


def _min_p(ordered: Tensor, min_p: float) -> Tensor:
    return ordered.masked_fill(ordered.exp() < min_p, -torch.inf)


ON_DEVICE: Mapping[Any, Callable[..., Tensor]] = {keep_top_k: _top_k, keep_top_p: _top_p, keep_min_p: _min_p}
"""The filters that have a form for sorted rows on a device."""


def can_draw(plan: DrawPlan) -> bool:
    """Whether `draw_rows` knows all filters, and the temperature is none that overflows float32."""
    known = all(function in ON_DEVICE for function, _ in plan.filters)
    return known and (plan.temperature == 0 or plan.temperature > MIN_TEMPERATURE)
