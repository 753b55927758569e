"""What this machine has, and what training and sampling take here unless an option says otherwise."""

from __future__ import annotations

from typing import Any

import torch

from lm import machine
from lm.config import TrainingConfig
from lm.device import pick_device
from lm.kernels.compiled import default_threads, native
from lm.training.precision import choose_format, formats


def describe() -> dict[str, Any]:
    """Everything, as `lm devices` shows it."""
    known = machine.describe()
    for gpu in known["gpus"]:
        gpu["formats"] = _formats(gpu["device"])
    known["cpu"]["formats"] = _formats("cpu")
    return {**known, "defaults": defaults()}


def defaults() -> dict[str, Any]:
    """What is chosen where nothing is asked for."""
    device = pick_device()
    kernels = native() is not None
    return {
        "device": str(device),
        "format": str(choose_format(TrainingConfig(), device)),
        "threads": torch.get_num_threads(),
        "training": "native kernels" if kernels and device.type == "cpu" else "torch",
        "sampling": f"native step on the CPU, threads: {default_threads()}" if kernels else f"torch on {device}",
    }


def _formats(device: str) -> list[str]:
    return [str(each) for each in formats(torch.device(device))]
