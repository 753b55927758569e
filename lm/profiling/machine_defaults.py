"""The hardware of this machine, and the defaults of training and sampling on it: `lm devices`."""

from __future__ import annotations

from typing import Any

import torch

from lm import machine
from lm.config import TrainingConfig
from lm.device import pick_device
from lm.kernels.compiled import default_threads, native
from lm.training.precision import choose_format, formats


def describe() -> dict[str, Any]:
    """Hardware, number formats and defaults."""
    known = machine.describe()
    for device, facts in [("cpu", known["cpu"]), *((gpu["device"], gpu) for gpu in known["gpus"])]:
        facts["formats"] = [str(each) for each in formats(torch.device(device))]
    return {**known, "defaults": defaults()}


def defaults() -> dict[str, Any]:
    """The choices that the program makes without options."""
    device = pick_device()
    kernels = native() is not None
    return {
        "device": str(device),
        "format": str(choose_format(TrainingConfig(), device)),
        "threads": torch.get_num_threads(),
        "training": "native kernels" if kernels and device.type == "cpu" else "torch",
        "sampling": f"native step on the CPU, threads: {default_threads()}" if kernels else f"torch on {device}",
    }
