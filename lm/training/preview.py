"""A short sample in the middle of training. It leaves no trace in the random state."""

from __future__ import annotations

from lm.generation.engine import Engine
from lm.generation.options import SamplingOptions
from lm.generation.request import Request
from lm.generation.torch_decoder import TorchDecoder
from lm.models.base import LanguageModel
from lm.tokenizers.base import Tokenizer

LOOK = SamplingOptions(seed=1, temperature=0.8)
"""The same draws each time, so that texts of different steps show what the weights learned in between."""


def preview_sample(model: LanguageModel, tokenizer: Tokenizer, tokens: int) -> str:
    """A text of so many tokens, from its start.

    No random generator of training is touched: the draws are numpy's, with a seed of their own.
    """
    was_training = model.training
    try:
        engine = Engine(TorchDecoder(model), tokenizer)
        options = LOOK.model_copy(update={"max_tokens": tokens})
        return "".join(event.text for event in engine.run(Request((tokenizer.start_id,), options)))
    finally:
        model.train(was_training)
