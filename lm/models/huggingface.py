"""What a model is called in Hugging Face transformers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class HuggingFaceModel:
    """A model as transformers knows it."""

    architecture: str
    """The class that opens it, such as LlamaForCausalLM."""
    config: Mapping[str, Any]
    """The content of config.json that belongs to the model, `model_type` included."""
    tensors: Mapping[str, Tensor]
    """Weights by the names of that class."""
