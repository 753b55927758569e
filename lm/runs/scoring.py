"""The nats of each token of a text under a model, and its logits. Needs torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from lm.device import TO_USE, computing, enough_memory
from lm.errors import ConfigError
from lm.evaluation.perplexity import score
from lm.models.base import LanguageModel
from lm.tokenizers.base import Ids, Tokenizer


def score_tokens(model: LanguageModel, tokenizer: Tokenizer, ids: Ids) -> list[tuple[str, int, float]]:
    """The text, id and nats of each token; see `lm.runs.run.TokenScore`.

    Args:
        model: of the run.
        tokenizer: of the run.
        ids: (N + 1,) the start token, then the N tokens.
    """
    parts: list[npt.NDArray[np.float64]] = []
    with enough_memory(TO_USE):
        score(model, ids, each=parts.append)
    stream, tokens = tokenizer.stream(), ids[1:].tolist()
    texts = [stream.feed(token) for token in tokens]
    texts[-1] += stream.end()
    return list(zip(texts, tokens, np.concatenate(parts).tolist(), strict=True))


def logits_of(model: LanguageModel, ids: Sequence[int], device: torch.device) -> npt.NDArray[np.float32]:
    """The logits (T, V) after each of T tokens, the first of which is the start token.

    Raises:
        ConfigError: there are more tokens than the model's context length.
    """
    longest = model.context_length
    if longest is not None and len(ids) > longest:
        raise ConfigError(
            f"The text and the start token are {len(ids):,} tokens, but the model's context length is {longest:,}: "
            "give a shorter text."
        )
    with torch.inference_mode(), enough_memory(TO_USE), computing(device, "fp32"):
        logits, _ = model(torch.tensor([ids], device=device))
    found: npt.NDArray[np.float32] = logits[0].float().cpu().numpy()
    return found
