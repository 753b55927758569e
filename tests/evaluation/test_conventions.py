"""A text of ten words, counted by hand as each program counts it."""

from __future__ import annotations

import math
import re

import pytest
import torch

from lm.config import Section
from lm.corpora import encode_text
from lm.evaluation.conventions import WordCounts, WordSums, kenlm, lm_eval, srilm
from lm.evaluation.per_token import Scored
from lm.evaluation.perplexity import score
from lm.evaluation.report import Report, make_report
from lm.models.base import build_model
from lm.tokenizers.base import Tokenizer
from lm.tokenizers.byte import ByteTokenizer
from lm.tokenizers.char import CharTokenizer
from lm.tokenizers.word import WordTokenizer

TEXT = "the cat sat on the mat\n\nthe dog ran off\n"
"""Ten words, three lines of which one is blank. The model does not know "dog"."""
BITS = {
    "\n": 2, "the": 2, "cat": 3, "<unk>": 4, "sat": 4, "on": 4, "mat": 4, "ran": 4, "off": 4,
}  # fmt: skip
"""-log2 of the probabilities, which sum to 1: the whole text has 39 bits, dog 4, the blank line 2."""
FACTS = {
    "run": "r", "state": "best", "step": 1, "corpus": "c", "split": "valid", "text_sha256": "0",
    "device": "cpu", "precision": "fp32", "version": "0",
}  # fmt: skip


def measure(text: str, tokenizer: Tokenizer, bits: dict[str, float] | None = None) -> tuple[Report, WordCounts]:
    """The report and the counts of a model that gives each token these bits; None: equal probabilities."""
    model = build_model(Section(type="gru", hidden_size=4, embedding_size=4), tokenizer.vocab_size)
    with torch.no_grad():
        model.output.weight.zero_()
        model.output.bias.zero_()
        for token in range(tokenizer.vocab_size if bits else 0):
            model.output.bias[token] = -math.log(2) * bits[tokenizer.decode([token])]
    part, words = encode_text("t", text, tokenizer), WordSums(tokenizer)
    scores = score(model, part.ids, unknown_id=tokenizer.unknown_id, watchers=[words.add])
    return make_report(scores, part.counts, **FACTS), words.end()


@pytest.fixture
def by_words() -> tuple[Report, WordCounts]:
    words = [word for word in BITS if word not in ("\n", "<unk>")]
    return measure(TEXT, WordTokenizer.train([f"{' '.join(words)}\n"], WordTokenizer.Options()), BITS)


def test_the_probabilities_sum_to_one() -> None:
    assert sum(2.0**-bits for bits in BITS.values()) == 1


def test_the_harness_counts_parts_between_white_space_and_bytes(by_words: tuple[Report, WordCounts]) -> None:
    figures = lm_eval(by_words[0])
    # The newline at the end gives an eleventh, empty part.
    assert (figures["words"], figures["bytes"]) == (len(re.split(r"\s+", TEXT)), 40) == (11, 40)
    assert figures["word_perplexity"] == pytest.approx(2 ** (39 / 11), rel=1e-6)
    assert figures["byte_perplexity"] == pytest.approx(2 ** (39 / 40), rel=1e-6)
    assert figures["bits_per_byte"] == pytest.approx(39 / 40, rel=1e-6)


def test_the_functions_of_the_harness_itself_give_these_figures(by_words: tuple[Report, WordCounts]) -> None:
    from lm_eval.api.metrics import bits_per_byte, weighted_perplexity

    report, figures = by_words[0], lm_eval(by_words[0])
    loglikelihood = -report.loss * report.tokens
    assert figures["word_perplexity"] == pytest.approx(weighted_perplexity([(loglikelihood, figures["words"])]))
    assert figures["byte_perplexity"] == pytest.approx(weighted_perplexity([(loglikelihood, figures["bytes"])]))
    assert figures["bits_per_byte"] == pytest.approx(bits_per_byte([(loglikelihood, figures["bytes"])]))


def test_kenlm_counts_words_and_line_ends_with_and_without_unknown_words(by_words: tuple[Report, WordCounts]) -> None:
    figures = kenlm(by_words[1])
    assert (figures["tokens"], figures["oovs"]) == (13, 1)
    assert figures["log10_total"] == pytest.approx(-39 * math.log10(2), rel=1e-6)
    assert figures["perplexity_including_oovs"] == pytest.approx(2 ** (39 / 13), rel=1e-6)
    assert figures["perplexity_excluding_oovs"] == pytest.approx(2 ** (35 / 12), rel=1e-6)


def test_for_a_word_model_kenlm_counts_as_the_report(by_words: tuple[Report, WordCounts]) -> None:
    report, figures = by_words[0], kenlm(by_words[1])
    assert figures["perplexity_including_oovs"] == pytest.approx(report.perplexity, rel=1e-9)
    assert figures["perplexity_excluding_oovs"] == pytest.approx(report.perplexity_without_unknown, rel=1e-9)


def test_srilm_leaves_unknown_words_and_blank_lines_out(by_words: tuple[Report, WordCounts]) -> None:
    figures = srilm(by_words[1])
    counts = [figures[name] for name in ("sentences", "words", "oovs", "zeroprobs")]
    assert counts == [2, 10, 1, 0]
    assert figures["logprob"] == pytest.approx(-33 * math.log10(2), rel=1e-6)
    # 33 bits over 9 words and 2 line ends; then over the 9 words.
    assert figures["ppl"] == pytest.approx(2 ** (33 / 11), rel=1e-6)
    assert figures["ppl1"] == pytest.approx(2 ** (33 / 9), rel=1e-6)


def test_a_character_model_gives_a_word_the_nats_of_its_characters_and_of_the_space_before_it() -> None:
    known = CharTokenizer.train(["the cason mrfnd\n"], CharTokenizer.Options())
    assert "g" not in known.vocabulary
    report, counts = measure(TEXT, known)
    assert (counts.words, counts.lines, counts.blank_lines, counts.unknown_words) == (10, 3, 1, 1)
    nats = math.log(known.vocab_size)
    # "off\n" and the others: each character is in one word or line end.
    assert counts.nats == pytest.approx(40 * nats, rel=1e-6)
    assert kenlm(counts)["perplexity_including_oovs"] == pytest.approx(report.word_eos_perplexity, rel=1e-9)
    # " dog" has 4 characters, the blank line one.
    assert counts.unknown_nats == pytest.approx(4 * nats, rel=1e-6)
    assert srilm(counts)["ppl1"] == pytest.approx(math.exp(35 * nats / 9), rel=1e-5)


@pytest.mark.parametrize("text", ["ab cd\nef", "é ü\n \nß  ", "  a\r\nb\r\n", "\n", " "])
@pytest.mark.parametrize("kind", [ByteTokenizer, CharTokenizer])
def test_words_and_lines_are_those_of_the_report_and_no_nats_are_lost(kind: type, text: str) -> None:
    tokenizer = kind.train([text], kind.Options())
    report, counts = measure(text, tokenizer)
    assert (counts.words, counts.lines) == (report.words, report.lines)
    assert counts.nats == pytest.approx(report.loss * report.tokens, rel=1e-6)


def test_a_word_of_probability_0_is_a_zeroprob_of_srilm_and_has_no_perplexity_in_kenlm() -> None:
    tokenizer = WordTokenizer.train(["a b\n"], WordTokenizer.Options())
    words, ids = WordSums(tokenizer), tokenizer.encode("a b a\n")
    words.add(Scored(torch.zeros(4, 4), torch.tensor(ids.tolist()), torch.tensor([1.0, math.inf, 1.0, 2.0])))
    figures = srilm(words.end())
    assert (figures["zeroprobs"], figures["ppl"]) == (1, pytest.approx(math.exp(4 / 3)))
    assert kenlm(words.end())["perplexity_including_oovs"] is None


def test_a_text_without_words_has_no_perplexity() -> None:
    assert srilm(WordCounts())["ppl"] is None and kenlm(WordCounts())["perplexity_excluding_oovs"] is None
