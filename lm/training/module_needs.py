"""The needs that modules declare: their kind of optimizer, fp32 weights, whole weights in each process.

A module declares them as attributes, for its own parameters and not those of its submodules (`lm.models.base`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from lm.config import RunConfig
from lm.models.base import LanguageModel, build_model
from lm.models.lora import trainable_model


@dataclass(frozen=True)
class Needs:
    """The needs of one parameter."""

    module: str
    """The name of its module in the model."""
    optimizer_kind: str
    """ "adamw": the optimizer of the options; "muon": Muon, for matrices, if the options choose it; "row_adagrad"."""
    stays_fp32: bool
    shardable: bool


def module_needs(model: nn.Module) -> dict[nn.Parameter, Needs]:
    """The needs of each parameter, in the order of `model.parameters()`."""
    owners = {
        parameter: (name, module)
        for name, module in model.named_modules()
        for parameter in module.parameters(recurse=False)
    }
    found = {}
    for parameter in model.parameters():
        name, module = owners[parameter]
        found[parameter] = Needs(
            name,
            getattr(module, "optimizer_kind", "adamw"),
            getattr(module, "stays_fp32", False),
            getattr(module, "shardable", True),
        )
    return found


def build_on_meta(section: Any, vocab_size: int) -> LanguageModel:
    """A model without memory for its weights, on torch's meta device: to read its sizes and needs.

    Args:
        section: the `model` section of a configuration.
        vocab_size: of the tokenizer.
    """
    with torch.device("meta"), _SkipInPlace():
        return build_model(section, vocab_size)


def trainable_on_meta(config: RunConfig, vocab_size: int) -> LanguageModel:
    """As `build_on_meta`, with the adapters of the options.

    Raises:
        ConfigError: the model gets no such adapters.
    """
    with torch.device("meta"), _SkipInPlace():
        return trainable_model(config, vocab_size)


class _SkipInPlace(TorchFunctionMode):
    """Skips in-place operators: on the meta device they would first load a second's worth of torch."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__
        if name.endswith("_") and not name.endswith("__"):
            return next(iter((*args, *(kwargs or {}).values())))
        return func(*args, **(kwargs or {}))
