"""Patterns of a stranger's tokenizer: those of known models pass, and those that may take hours are refused."""

from __future__ import annotations

import json

import pytest

from lm.errors import TokenizerError
from lm.tokenizers.gguf_vocabulary import WORDS
from lm.tokenizers.pretrained import PretrainedTokenizer
from lm.tokenizers.safe_patterns import UnsafePatternError, check_patterns
from tests.tokenizers.tiny_pretrained import byte_level

DEEPSEEK = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CLASSES = r"[\p{Lu}\p{Lm}&&[^\p{Han}]]*[\p{Ll}&&[^\p{Han}]]+(?i:'s|'t|'re)?|[^(\s|[.,!?…])]+|[]^]+"


@pytest.mark.parametrize(
    "pattern",
    [*dict.fromkeys(pattern for words in WORDS.values() for pattern in words.patterns), DEEPSEEK, CLASSES,
     r"\d{1,3}(?=(?:\d{3})*\b)", r"(?i)[^\r\n\p{L}\p{N}]?+\p{L}++", r"<0x[0-9A-F]{2}>", r"(?<=\S)\n", " {2,}"],
)  # fmt: skip
def test_patterns_of_known_models_are_accepted(pattern: str) -> None:
    check_patterns({"pre_tokenizer": {"type": "Split", "pattern": {"Regex": pattern}}})


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("(a+)+b", "repeats whose own length varies"), ("(?:a|a)*b", "or that has a choice"),
        (r"(?i:\w+\s?)*$", "varies"), ("a{1,2}+b", "varies"), ("a{2,}{3,}", "varies"), ("((a?){9}){9}", "varies"),
        ("a*a*a*a*b", "more than 3 parts in a row"), ("a?" * 40 + "a" * 40, "more than 1,000 ways"),
        ("(?:a|a)" * 40, "more than 1,000 ways"), (r"(a)\1+", "refers to a group"), ("(?(1)a|b)", "kind of group"),
        ("(?x)a+ +", "kind of group"), ("a" * 10_001, "more than 10,000 characters"),
    ],
)  # fmt: skip
def test_patterns_that_may_take_hours_are_refused(pattern: str, reason: str) -> None:
    content = {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Replace", "pattern": {"Regex": pattern}}]}}
    with pytest.raises(UnsafePatternError, match="its normalizer has the pattern .* could take hours: .*" + reason):
        check_patterns(content)


def test_a_tokenizer_with_such_a_pattern_is_refused_in_one_sentence() -> None:
    content = json.loads(byte_level())
    content["pre_tokenizer"]["pretokenizers"][0] = {
        "type": "Split", "pattern": {"Regex": "(a+)+b"}, "behavior": "Isolated", "invert": False,
    }  # fmt: skip
    with pytest.raises(TokenizerError, match=r"cannot be imported: its pre_tokenizer has the pattern '\(a\+\)\+b'"):
        PretrainedTokenizer.from_json(json.dumps(content))
