"""A short sample during training, to see what the model has learned."""

from __future__ import annotations

from lm.generation.engine import Engine
from lm.generation.options import SamplingOptions
from lm.generation.request import Request
from lm.generation.torch_decoder import TorchDecoder
from lm.models.base import LanguageModel
from lm.tokenizers.base import Tokenizer

OPTIONS = SamplingOptions(seed=1, temperature=0.8)
"""One seed, so that samples of different steps differ by their weights only."""


def preview_sample(model: LanguageModel, tokenizer: Tokenizer, tokens: int) -> str:
    """A sample of `tokens` tokens. It leaves the random generators of training and the model's mode unchanged."""
    was_training = model.training
    try:
        engine = Engine(TorchDecoder(model), tokenizer)
        request = Request((tokenizer.start_id,), OPTIONS.model_copy(update={"max_tokens": tokens}))
        return "".join(event.text for event in engine.run(request))
    finally:
        model.train(was_training)
