"""A short sample during training, to see what the model has learned."""

from __future__ import annotations

from lm.generation.decoder import Decoder
from lm.generation.engine import Engine
from lm.generation.open_decoder import has_kernel, open_decoder
from lm.generation.options import SamplingOptions
from lm.generation.request import Request
from lm.generation.torch_decoder import TorchDecoder
from lm.models.base import LanguageModel
from lm.registry import KERNELS
from lm.tokenizers.base import Tokenizer
from lm.training.module_needs import module_needs
from lm.training.train_step import TrainStep

OPTIONS = SamplingOptions(seed=1, temperature=0.8)
"""One seed, so that samples of different steps differ by their weights only."""

USUAL_PARAMETERS = 2e6
"""Of a model whose samples take the usual time on a CPU; a token takes longer with more of them."""
TORCH_COST = 4.0
"""Time of a token in torch, in tokens of native decoding."""
MAX_WORK = 1e9
"""Tokens of the sample at a validation, times parameters, on a CPU: about two seconds."""


def relative_cost(step: TrainStep) -> float:
    """The expected time of a `native_preview`, in samples of a usual model: at least 1."""
    if step.device.type != "cpu":
        return 1.0
    return max(1.0, _read_per_token(step) / USUAL_PARAMETERS * (TORCH_COST if step.model.has_adapters else 1.0))


def affordable_tokens(step: TrainStep, tokens: int) -> int:
    """The tokens of a `preview_step`: so many, or fewer if a large model would need long for them."""
    if step.device.type != "cpu":
        return tokens
    return max(1, min(tokens, int(MAX_WORK / _read_per_token(step))))


def _read_per_token(step: TrainStep) -> int:
    """The parameters that a token needs: all but tables, of which it looks up a few rows."""
    needs = module_needs(step.model)
    return max(1, sum(each.numel() for each, need in needs.items() if need.optimizer_kind != "row_adagrad"))


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
        return _sample(TorchDecoder(model), tokenizer, tokens, prompt)
    finally:
        model.train(was_training)


def preview_step(step: TrainStep, tokenizer: Tokenizer, tokens: int, prompt: str = "") -> str | None:
    """A sample of the weights that a validation would use; None for a model that is sharded over processes."""
    if step.parallel.sharded:
        return None
    with step.averaged(), step.mixed.computing():
        return preview_sample(step.model, tokenizer, tokens, prompt)


def native_preview(step: TrainStep, tokenizer: Tokenizer, tokens: int, prompt: str = "") -> str | None:
    """As `preview_step`, by native decoding where it can be used: for a small model ten times as fast.

    The probabilities may differ in the last bits.
    """
    options = step.model.options.model_dump()
    kind = str(options["type"])
    # With adapters, `step.weights` are not the whole model.
    in_torch = step.parallel.sharded or step.model.has_adapters
    if in_torch or not has_kernel(kind, str(step.device)) or KERNELS.resolve(kind).lacks(options):
        return preview_step(step, tokenizer, tokens, prompt)
    return _sample(open_decoder(options, step.weights, lambda: step.model), tokenizer, tokens, prompt)


def _sample(decoder: Decoder, tokenizer: Tokenizer, tokens: int, prompt: str) -> str:
    ids = (tokenizer.start_id, *tokenizer.encode(prompt, unknown="replace").tolist())
    request = Request(ids, OPTIONS.model_copy(update={"max_tokens": tokens}))
    return "".join(event.text for event in Engine(decoder, tokenizer).run(request))
