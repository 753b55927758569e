"""A short sample during training, to see what the model has learned."""

from __future__ import annotations

from lm.generation.engine import Engine
from lm.generation.options import SamplingOptions
from lm.generation.request import Request
from lm.generation.torch_decoder import TorchDecoder
from lm.models.base import LanguageModel
from lm.tokenizers.base import Tokenizer
from lm.training.train_step import TrainStep

OPTIONS = SamplingOptions(seed=1, temperature=0.8)
"""One seed, so that samples of different steps differ by their weights only."""


def preview_sample(model: LanguageModel, tokenizer: Tokenizer, tokens: int, prompt: str = "") -> str:
    """A sample of `tokens` tokens. It leaves the random generators of training and the model's mode unchanged.

    Args:
        model: of the training.
        tokenizer: of the model.
        tokens: at most.
        prompt: the sample continues it; a symbol outside the vocabulary is read as unknown.
    """
    was_training = model.training
    try:
        engine = Engine(TorchDecoder(model), tokenizer)
        ids = (tokenizer.start_id, *tokenizer.encode(prompt, unknown="replace").tolist())
        request = Request(ids, OPTIONS.model_copy(update={"max_tokens": tokens}))
        return "".join(event.text for event in engine.run(request))
    finally:
        model.train(was_training)


def preview_step(step: TrainStep, tokenizer: Tokenizer, tokens: int, prompt: str = "") -> str | None:
    """A sample of the weights that a validation would use; None for a model that is sharded over processes."""
    if step.parallel.sharded:
        return None
    with step.averaged(), step.mixed.computing():
        return preview_sample(step.model, tokenizer, tokens, prompt)
