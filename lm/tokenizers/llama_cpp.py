"""What a tokenizer is called in llama.cpp, which reads it from a GGUF file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Types of tokens in GGUF."""
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
"""A space inside a token, for llama and t5."""


@dataclass(frozen=True)
class LlamaCppVocabulary:
    """A tokenizer as llama.cpp knows it."""

    model: str
    """gpt2 (byte-level BPE), llama (BPE of sentencepiece with bytes) or t5 (unigram without bytes)."""
    tokens: Sequence[str]
    """By id; all different."""
    types: Sequence[int]
    end_id: int
    """The token that ends a text there."""
    scores: Sequence[float] | None = None
    """By id; None for gpt2."""
    merges: Sequence[str] | None = None
    """For gpt2: pairs of tokens, with a space between them."""
    split: str | None = None
    """For gpt2: the name of the rule that cuts a text into words before the merges."""
    unknown_id: int | None = None
    adds_start: bool = True
    """Whether llama.cpp puts the start token before a text."""
    adds_space: bool = False
    """For llama: whether it puts a space before a text."""
    chat_template: str | None = None
    notes: tuple[str, ...] = ()
    """Texts that have other tokens there."""
