"""A pretrained tokenizer for the page of an export: its steps and its merges, as html_assets/tokenizers.js takes them.

The page does what the library `tokenizers` does with the same tokenizer.json: added tokens, normal forms, words, byte
pair encoding. A step that the page does not have is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from lm.errors import UnsupportedExportError
from lm.tokenizers.byte import byte_alphabet
from lm.tokenizers.gguf_vocabulary import GPT2_WORDS
from lm.tokenizers.javascript_pattern import javascript_pattern
from lm.tokenizers.tokenizer_json import prepend_scheme, steps_of

Step = dict[str, Any]


def page_parts(library: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    """The parts of a tokenizer that follow from its tokenizer.json: JSON values and arrays.

    Args:
        library: the content of tokenizer.json.
        vocab_size: ids of the tokenizer.

    Raises:
        UnsupportedExportError: the page does not have a step of it.
    """
    model = library["model"]
    if model.get("type", "BPE") != "BPE":
        raise _refused(f"the model {model['type']}")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise _refused(f"the option {name} of BPE")
    forms = [*_normal_forms(library.get("normalizer"))]
    words = [*_words(library.get("pre_tokenizer"))]
    byte_level = {"form": "bytes"} in words
    vocabulary: list[str | None] = [None] * vocab_size
    for name, token in model["vocab"].items():
        vocabulary[token] = name
    pairs = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"]]
    ids = model["vocab"]
    added, special = _added_tokens(
        library.get("added_tokens") or (), changes=any(form["form"] != "nfc" for form in forms)
    )
    unknown = model.get("unk_token")
    return {
        "vocabulary": vocabulary,
        "left": np.array([ids[left] for left, _ in pairs], np.uint32),
        "right": np.array([ids[right] for _, right in pairs], np.uint32),
        "merged": np.array([ids[left + right] for left, right in pairs], np.uint32),
        "added": added,
        "special": special,
        "normal_forms": forms,
        "words": [step for step in words if "form" not in step],
        "alphabet": byte_alphabet() if byte_level else None,
        "whole_words": bool(model.get("ignore_merges")),
        "fallback": bool(model.get("byte_fallback")),
        "unknown_token": None if unknown is None else ids.get(unknown),
        "fuses_unknown": bool(model.get("fuse_unk")),
    }


def _refused(what: str) -> UnsupportedExportError:
    return UnsupportedExportError(
        f"The tokenizer of this model has {what}, which no html page has: export to hf, gguf or onnx."
    )


def _added_tokens(tokens: Any, *, changes: bool) -> tuple[list[tuple[str, int]], list[str]]:
    """The added tokens that are found in text, with their ids; and the special ones, which are not.

    Args:
        tokens: of tokenizer.json.
        changes: whether a normal form changes more than how characters are composed.
    """
    added = []
    for token in tokens:
        if token["special"]:
            continue
        for option in ("single_word", "lstrip", "rstrip"):
            if token.get(option):
                raise _refused(f"the token {token['content']!r} with the option {option}")
        if token.get("normalized") and changes:
            raise _refused(f"the token {token['content']!r}, which is looked for in a normal form")
        added.append((str(token["content"]), int(token["id"])))
    return added, [token["content"] for token in tokens if token["special"]]


def _normal_forms(normalizer: Mapping[str, Any] | None) -> Iterator[Step]:
    for part in steps_of(normalizer, "normalizers"):
        kind = part["type"]
        if kind == "NFC":
            yield {"form": "nfc"}
        elif kind == "Prepend":
            yield {"form": "prepend", "to": part["prepend"]}
        elif kind == "Replace" and "String" in part["pattern"]:
            yield {"form": "replace", "from": part["pattern"]["String"], "to": part["content"]}
        else:
            raise _refused(f"the normal form {kind}")


def _words(pre_tokenizer: Mapping[str, Any] | None) -> Iterator[Step]:
    """How text is cut into words; the step {"form": "bytes"} is the alphabet of bytes, the last of byte-level BPE."""
    is_bytes = False
    for part in steps_of(pre_tokenizer, "pretokenizers"):
        kind = part["type"]
        if is_bytes:
            raise _refused(f"the step {kind} after its bytes")
        if kind == "Split":
            if part["behavior"] != "Isolated" or part.get("invert"):
                raise _refused(f"words that are {part['behavior']}{', inverted' if part.get('invert') else ''}")
            pattern = part["pattern"]
            if "Regex" not in pattern:
                raise _refused("words cut at a text")
            yield {"pattern": javascript_pattern(pattern["Regex"])}
        elif kind == "Digits":
            yield {"pattern": r"\p{N}" if part["individual_digits"] else r"\p{N}+"}
        elif kind == "ByteLevel":
            if part.get("add_prefix_space"):
                raise _refused("a space before each text (add_prefix_space)")
            if part.get("use_regex", True):
                yield {"pattern": javascript_pattern(GPT2_WORDS)}
            is_bytes = True
            yield {"form": "bytes"}
        elif kind == "Metaspace":
            splits = bool(part.get("split", True))
            yield {"space": part["replacement"], "prepends": prepend_scheme(part), "splits": splits}
        else:
            raise _refused(f"the words of {kind}")
