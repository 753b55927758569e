"""The nats of each token of a text under a model, and its logits. Needs torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from lm.corpora.answers import ANSWER, Marks
from lm.device import TO_USE, computing, enough_memory
from lm.errors import ConfigError
from lm.evaluation.perplexity import score
from lm.models.base import LanguageModel
from lm.tokenizers.base import Ids, Tokenizer


def score_tokens(
    model: LanguageModel, tokenizer: Tokenizer, ids: Ids, marks: Marks | None = None
) -> list[tuple[str, int, float]]:
    """The text, id and nats of each token; see `lm.runs.run.TokenScore`.

    Args:
        model: of the run.
        tokenizer: of the run.
        ids: (N + 1,) the start token, then the N tokens.
        marks: (N + 1,) of conversations; then tokens that are context alone have NaN for nats, and special tokens have
            their names for texts.
    """
    parts: list[npt.NDArray[np.float64]] = []
    with enough_memory(TO_USE):
        score(model, ids, marks=marks, each=parts.append)
    nats, tokens = np.concatenate(parts), ids[1:].tolist()
    if marks is not None:
        answers, nats = nats, np.full(len(tokens), np.nan)
        nats[np.asarray(marks[1:]) == ANSWER] = answers
    return list(zip(token_texts(tokenizer, tokens, names=marks is not None), tokens, nats.tolist(), strict=True))


def token_texts(tokenizer: Tokenizer, tokens: Sequence[int], *, names: bool = False) -> list[str]:
    """The text that each token completes; joined, that of all tokens. With `names`, special tokens have their names."""
    stream = tokenizer.stream()
    texts = [stream.feed(token) for token in tokens]
    texts[-1] += stream.end()
    if names:
        special = {token: tokenizer.pieces([token])[0] for token in {*tokens} if not tokenizer.decode([token])}
        texts = [special.get(token, text) for token, text in zip(tokens, texts, strict=True)]
    return texts


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
