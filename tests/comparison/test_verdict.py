"""The verdict: each reason why figures are not comparable, and each caution."""

from __future__ import annotations

from dataclasses import replace

from lm.comparison.verdict import Facts, judge

A = Facts(
    run="a", text_sha256="1", bits_per_byte=2.0, tokenizer="char", tokenizer_sha256="t", unknown_tokens=0,
    unknown_policy="replace", spelling_bits_per_byte=0.0, spelling_rule="8 bits per byte", context="state carried",
    precision="fp32", training_overlap=0.0,
)  # fmt: skip
B = replace(A, run="b", bits_per_byte=1.9)


def kinds(*facts: Facts) -> tuple[bool, list[str], list[str]]:
    verdict = judge(facts, split="valid")
    return (
        verdict.comparable, [each.kind for each in verdict.problems], [each.kind for each in verdict.cautions]
    )  # fmt: skip


def test_the_same_text_and_tokenizer_are_comparable() -> None:
    assert kinds(A, B) == (True, [], [])
    assert judge([A, B]).sentence == "Comparable: the same text, the same tokenizer."


def test_figures_of_another_text_are_not_comparable() -> None:
    assert kinds(A, replace(B, text_sha256="2")) == (False, ["text"], [])
    assert "b was measured on another text than a" in judge([A, replace(B, text_sha256="2")]).sentence


def test_symbols_that_were_left_out_are_a_problem() -> None:
    skipping = replace(B, bits_per_byte=None, unknown_policy="skip", spelling_bits_per_byte=None)
    assert kinds(A, skipping) == (False, ["unknown symbols"], [])


def test_a_text_in_the_training_text_of_one_run_is_a_problem() -> None:
    assert kinds(A, replace(B, training_overlap=0.9)) == (False, ["training text"], [])
    # As common phrases are.
    assert kinds(A, replace(B, training_overlap=0.05)) == (True, [], [])


def test_a_text_in_the_training_text_of_all_compares_what_they_memorised() -> None:
    facts = [replace(each, training_overlap=1.0) for each in (A, B)]
    assert kinds(*facts) == (True, [], ["training text"])
    assert "with a doubt" in judge(facts).sentence


def test_a_training_text_that_is_gone_is_a_doubt() -> None:
    assert kinds(A, replace(B, training_overlap=None)) == (True, [], ["unknown overlap"])


def test_other_tokenizers_are_compared_in_bits_per_byte_alone() -> None:
    words = replace(
        B, tokenizer="word", tokenizer_sha256="u", unknown_tokens=7, spelling_bits_per_byte=0.2,
        spelling_rule="letter by letter",
    )  # fmt: skip
    assert kinds(A, words) == (True, [], ["tokenizer", "unknown symbols", "spelling"])
    assert "spelling cost of each tokenizer" in judge([A, words]).sentence
    assert "b: 0.200 bits per byte" in judge([A, words]).cautions[2].sentence


def test_other_context_rules_precisions_and_splits_are_cautions() -> None:
    other = replace(B, context="sliding window of 64 tokens, stride 32", precision="bf16", own_split=False)
    assert kinds(A, other) == (True, [], ["own text", "context", "precision"])
