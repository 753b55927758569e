"""Text ↔ token ids: byte, char, word and subword, one file each, behind the contract of `base.py`."""

from lm.tokenizers.base import Tokenizer, TokenizerOptions, load_tokenizer

__all__ = ["Tokenizer", "TokenizerOptions", "load_tokenizer"]
