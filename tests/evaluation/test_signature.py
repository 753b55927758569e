"""Signatures: one line behind a figure, that another machine can check."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lm.errors import ConfigError
from lm.evaluation.signature import EXAMPLE, check, context_code, convention_signature, parse


def test_a_line_is_parsed_and_printed_again() -> None:
    signature = parse(EXAMPLE)
    assert str(signature) == EXAMPLE
    assert (signature.kind, signature.value, signature.context, signature.unknown) == (
        "bpb", 1.6234, "carried", "replace+spelling"
    )  # fmt: skip
    with_convention = EXAMPLE.replace("|v:", "|conv:lm-eval|v:")
    assert parse(with_convention).convention == "lm-eval" and str(parse(with_convention)) == with_convention


@pytest.mark.parametrize(
    ("rule", "code"),
    [
        ("state carried over the whole split", "carried"),
        ("state carried within each of 64 equal parts of the split", "carried-64"),
        ("state carried within each of 8 equal parts of the split, each after the 32 tokens before it",
         "carried-8-warm-32"),
        ("sliding window of 1,024 tokens, stride 512", "window-1024-512"),
        ("sliding window of 64 tokens, stride 32", "window-64-32"),
        ("each conversation by itself; answers only: 66 tokens of 409", "conversations"),
        ("all of the text before the token", "other"),
    ],
)  # fmt: skip
def test_the_context_rule_of_a_report_has_a_code_that_parses(rule: str, code: str) -> None:
    assert context_code(rule) == code
    signature = parse(EXAMPLE.replace("ctx:carried", f"ctx:{code}"))
    assert signature.stride == (int(code.rpartition("-")[2]) if code.startswith("window") else None)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("1.6234", "is not NAME:VALUE"),
        (EXAMPLE.replace("|den:bytes", ""), "the part den is missing"),
        (EXAMPLE.replace("bpb:1.6234|", ""), "needs one value"),
        (EXAMPLE.replace("den:bytes", "den:tokens"), "is divided by bytes"),
        (EXAMPLE.replace("bpb:1.6234", "bpb:low"), "is no number"),
        (EXAMPLE.replace("text:", "txt:"), "no part 'txt'. Did you mean 'text'"),
        (EXAMPLE.replace("tok:9be17a3344f0", "tok:xyz"), "is no hash"),
        (EXAMPLE + "|v:0.3.0", "given twice"),
        (EXAMPLE.replace("bpb:", "ppl:"), "ppl is a figure of another program, so it needs the part conv"),
        (EXAMPLE.replace("|v:", "|conv:nltk|v:"), "conv:nltk is none of lm-eval, kenlm, srilm"),
        (EXAMPLE.replace("|v:", "|conv:kenlm|v:"), "the figure of conv:kenlm is ppl, not bpb"),
        (EXAMPLE.replace("bpb:", "ppl:").replace("|v:", "|conv:srilm|v:"), "ppl is divided by known-words+sentences"),
        (EXAMPLE.replace("ctx:carried", "ctx:a b"), "is no context rule"),
    ],
)
def test_a_damaged_signature_is_refused_in_one_sentence(line: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(line)
    assert problem in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"value": 1.6236}, "The value is 1.6236"),
        ({"text": "000000000000"}, "The text is another one"),
        ({"tokenizer": "000000000000"}, "The tokenizer is another one"),
        ({"precision": "bf16"}, "The precision is bf16"),
        ({"context": "window-64-32"}, "The context is window-64-32"),
        ({"unknown": "skip"}, "The policy for unknown symbols is skip"),
        ({"convention": "kenlm"}, "The convention is kenlm; the signature has none"),
        ({"value": float("nan")}, "The value is nan"),
    ],
)
def test_a_check_names_the_part_that_differs(change: dict[str, object], named: str) -> None:
    found = check(parse(EXAMPLE), replace(parse(EXAMPLE), **change))  # type: ignore[arg-type]
    assert not found.reproduces and named in found.sentence and len(found.differences) == 1


def test_rounding_and_another_version_do_not_matter() -> None:
    found = check(parse(EXAMPLE), replace(parse(EXAMPLE), value=1.62344, version="0.3.0"))
    assert found.reproduces and "this is 0.3.0" in found.notes[0]
    # A shorter hash, as people quote it, and less precise products.
    short = parse(EXAMPLE.replace("text:3f2a9c01d4e5", "text:3f2a…").replace("prec:fp32", "prec:bf16"))
    assert check(short, replace(parse(EXAMPLE), value=1.6244, precision="bf16")).reproduces


def test_the_figure_of_a_convention_has_another_signature() -> None:
    static = parse(EXAMPLE)
    kenlm = convention_signature(static, "kenlm", {"perplexity_including_oovs": 21992.664})
    assert str(kenlm) == (
        "ppl:21992.6640|den:words+lines|ctx:carried|unk:replace|text:3f2a9c01d4e5|tok:9be17a3344f0|prec:fp32|conv:kenlm|"
        "v:0.2.0"
    )
    assert kenlm is not None and parse(str(kenlm)) == kenlm
    # A perplexity reproduces within a share of it.
    assert check(kenlm, replace(kenlm, value=21993.5)).reproduces
    assert not check(kenlm, replace(kenlm, value=21996)).reproduces
    harness = convention_signature(static, "lm-eval", {"bits_per_byte": 1.5})
    assert str(harness).startswith("bpb:1.5000|den:bytes|ctx:carried|unk:replace|")
    assert convention_signature(static, "srilm", {"ppl": None}) is None
