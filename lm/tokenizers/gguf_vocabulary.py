"""The vocabulary of a GGUF file as the JSON of a tokenizer of the library `tokenizers`.

GGUF keeps the tokens, their types, and merges (byte-level BPE) or scores (SentencePiece), but only a name for how text
is cut into words before merging: `tokenizer.ggml.pre`. The patterns behind the names are those of the tokenizer.json of
the models that introduced them.

Source: docs/gguf.md of the repository ggml-org/ggml, and the loader of llama.cpp, which reads the same keys.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lm.errors import TokenizerError
from lm.registry import did_you_mean

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
"""How SentencePiece writes a space inside a piece."""

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
"""Values of `tokenizer.ggml.token_type`."""

_DIGIT = r"\p{N}"
GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""The words of ByteLevel of the library `tokenizers`."""
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = _ENDINGS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST
_LLAMA3 = _ENDINGS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*")
_CASED_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = "|".join(_CASED) + r"|\p{N}" + _CASED_REST
_GPT4O = "|".join(f"{word}{_ENDINGS}?" for word in _CASED) + r"|\p{N}{1,3}" + _CASED_REST
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", GPT2_WORDS, r"\p{N}+", "[0-9][0-9][0-9]")


class _Words(NamedTuple):
    """How byte-level BPE cuts text into words."""

    patterns: tuple[str, ...]
    """Applied in order; matches and what lies between them are words."""
    whole_words: bool = False
    """Whether a word that is a token is that token, whatever the merges give."""
    adds_bos: bool = False
    """Whether a text begins with the BOS token, if the file does not say."""


_LLAMA3_WORDS = _Words((_LLAMA3,), whole_words=True, adds_bos=True)
WORDS: dict[str, _Words] = {
    "default": _Words(_DEFAULT),
    **dict.fromkeys(("gpt-2", "phi-2", "olmo", "mpt", "trillion", "exaone4"), _Words((GPT2_WORDS,))),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
                    _Words((_DIGIT, GPT2_WORDS))),
    **dict.fromkeys(("qwen2", "stablelm2", "deepseek-r1-qwen", "megrez", "hunyuan"), _Words((_QWEN2,))),
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "lfm2"), _LLAMA3_WORDS),
    **dict.fromkeys(("dbrx", "smaug-bpe", "glm4", "chatglm-bpe"), _Words((_LLAMA3,))),
    "tekken": _Words((_TEKKEN,), whole_words=True, adds_bos=True),
    **dict.fromkeys(("gpt-4o", "llama4"), _Words((_GPT4O,))),
}  # fmt: skip
"""By `tokenizer.ggml.pre`."""


def words_name(pre_tokenizer: Mapping[str, Any] | None, *, whole_words: bool) -> str | None:
    """The name in WORDS of the words that the pre-tokenizer of a tokenizer.json makes; None: it has none."""
    steps = (pre_tokenizer or {}).get("pretokenizers") or [pre_tokenizer or {}]
    patterns = []
    for step in steps:
        if step.get("type") == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
            patterns.append(step["pattern"].get("Regex"))
        elif step.get("type") == "Digits" and step["individual_digits"]:
            patterns.append(_DIGIT)
        elif step.get("type") != "ByteLevel":
            return None
        elif step.get("use_regex", True):
            patterns.append(GPT2_WORDS)
    for name, words in WORDS.items():
        if words.patterns == tuple(patterns) and words.whole_words == whole_words:
            return name
    return None


class Vocabulary(NamedTuple):
    """A tokenizer of a GGUF file."""

    library: dict[str, Any]
    """The content of a tokenizer.json."""
    config: dict[str, Any]
    """What tokenizer_config.json would say, as `PretrainedTokenizer.from_json` reads it."""


def read_vocabulary(fields: Mapping[str, Any]) -> Vocabulary:
    """The tokenizer that the fields of a GGUF file describe.

    Args:
        fields: by key of the file, such as "tokenizer.ggml.tokens"; values are Python numbers, strings and lists.

    Raises:
        TokenizerError: there is no vocabulary, it contradicts itself, or it is of a kind that is not supported.
    """
    keys = {key.removeprefix("tokenizer.ggml."): value for key, value in fields.items()}
    kind, tokens = keys.get("model"), keys.get("tokens")
    if kind is None or tokens is None:
        raise TokenizerError(
            "The GGUF file has no vocabulary: tokenizer.ggml.model or tokenizer.ggml.tokens is missing."
        )
    tokens = [str(token) for token in tokens]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) < len(tokens):
        twice = next(token for index, token in enumerate(tokens) if vocabulary[token] != index)
        raise TokenizerError(f"The GGUF file is damaged: its vocabulary has the token {twice!r} twice.")
    types = list(keys.get("token_type") or [NORMAL] * len(tokens))
    if len(types) != len(tokens):
        raise TokenizerError(f"The GGUF file is damaged: {len(tokens):,} tokens have {len(types):,} token types.")
    if kind == "gpt2":
        library, adds_bos = _byte_level(vocabulary, keys)
    elif kind == "llama":
        library, adds_bos = _sentencepiece(vocabulary, types, keys)
    else:
        raise TokenizerError(
            f"The GGUF file has a tokenizer of the kind {kind!r}; supported are gpt2 (byte-level BPE) and llama "
            "(SentencePiece)."
        )
    library["added_tokens"] = [
        {
            "id": index, "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
            "special": types[index] != USER_DEFINED,
        }
        for index, token in enumerate(tokens) if types[index] in (UNKNOWN, CONTROL, USER_DEFINED)
    ]  # fmt: skip
    return Vocabulary(library, _config(fields, keys, tokens, adds_bos))


def _config(
    fields: Mapping[str, Any], keys: Mapping[str, Any], tokens: Sequence[str], adds_bos: bool
) -> dict[str, Any]:
    config: dict[str, Any] = {"add_bos_token": keys.get("add_bos_token", adds_bos)}
    if template := fields.get("tokenizer.chat_template"):
        config["chat_template"] = template
    for name, key in (("bos_token", "bos"), ("eos_token", "eos"), ("pad_token", "padding"), ("unk_token", "unknown")):
        token = keys.get(f"{key}_token_id")
        if isinstance(token, int) and 0 <= token < len(tokens):
            config[name] = tokens[token]
    ends = [keys.get(f"{key}_token_id") for key in ("eos", "eot", "eom")]
    config["eos_token_id"] = [token for token in ends if isinstance(token, int) and 0 <= token < len(tokens)]
    return config


def _byte_level(vocabulary: dict[str, int], keys: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """The tokenizer, and whether texts begin with BOS."""
    pre = keys.get("pre", "default")
    if pre not in WORDS:
        raise TokenizerError(
            f"The GGUF file cuts text into words by {pre!r} (tokenizer.ggml.pre), which is not known."
            f"{did_you_mean(pre, WORDS)} Known: {', '.join(sorted(WORDS))}."
        )
    if "merges" not in keys:
        raise TokenizerError("The GGUF file has no tokenizer.ggml.merges, which byte-level BPE needs.")
    words = WORDS[pre]
    # A space can only be the first character of the first part.
    merges = [[merge[: (cut := merge.find(" ", 1))], merge[cut + 1 :]] for merge in keys["merges"]]
    splits = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in words.patterns
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    library = {
        "version": "1.0",
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, byte_level]},
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": merges, "ignore_merges": words.whole_words},
    }
    return library, words.adds_bos


def _sentencepiece(
    vocabulary: dict[str, int], types: Sequence[int], keys: Mapping[str, Any]
) -> tuple[dict[str, Any], bool]:
    """The tokenizer, and whether texts begin with BOS."""
    if "merges" in keys:
        merges = [merge.split(" ", 1) for merge in keys["merges"]]
    else:
        scores = keys.get("scores")
        if scores is None or len(scores) != len(vocabulary):
            raise TokenizerError(
                "The GGUF file has no tokenizer.ggml.scores for each of its tokens, which a SentencePiece vocabulary "
                "needs."
            )
        merges = merges_of_scores(
            {token: scores[index] for token, index in vocabulary.items() if types[index] == NORMAL}
        )
    unknown = next((token for token, index in vocabulary.items() if types[index] == UNKNOWN), None)
    spaces: dict[str, Any] = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prepend: dict[str, Any] = {"type": "Prepend", "prepend": SPACE}
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    normalizers = [spaces]
    if keys.get("add_space_prefix", True):
        normalizers.insert(0, prepend)
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    library = {
        "version": "1.0",
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE", "vocab": vocabulary, "merges": merges, "unk_token": unknown, "fuse_unk": True,
            "byte_fallback": True,
        },
    }  # fmt: skip
    return library, True


def merges_of_scores(scores: Mapping[str, float]) -> list[list[str]]:
    """The merges of a SentencePiece BPE vocabulary: each cut of a piece into two pieces, by the score of the piece.

    SentencePiece joins the pair whose joined piece has the highest score.
    """
    ranks = {piece: rank for rank, piece in enumerate(scores)}
    found = [
        (-score, ranks[piece[:cut]], ranks[piece[cut:]], piece[:cut], piece[cut:])
        for piece, score in scores.items()
        for cut in range(1, len(piece))
        if piece[:cut] in ranks and piece[cut:] in ranks
    ]
    return [[left, right] for *_, left, right in sorted(found)]
