"""Figures of the evaluator, against a computation that shares no code with it and against figures by hand."""

from __future__ import annotations

import math
from unittest import mock

import numpy as np
import pytest
import torch

from lm.config import Section
from lm.corpora import encode_text
from lm.evaluation.perplexity import score
from lm.evaluation.report import make_report
from lm.models.base import LanguageModel, build_model
from lm.tokenizers.char import CharTokenizer
from lm.tokenizers.word import WordTokenizer

FACTS = {
    "run": "r", "state": "best", "step": 1, "corpus": "c", "split": "valid", "text_sha256": "0",
    "device": "cpu", "precision": "fp32", "version": "0",
}  # fmt: skip
TEXT = "the cat sat on the mat.\n\n  a dog, too  \n" * 3


def brute_force(model: LanguageModel, ids: np.ndarray, reach: list[int]) -> list[float]:
    """Nats of each token from a forward pass of its own over the tokens it may look back on, softmax in float64."""
    model.eval()
    nats = []
    for position in range(1, len(ids)):
        context = torch.tensor(ids[reach[position - 1] : position].astype(np.int64))[None]
        with torch.no_grad():
            logits = model(context)[0][0, -1].double().numpy()
        shares = np.exp(logits - logits.max())
        nats.append(-math.log(shares[int(ids[position])] / shares.sum()))
    return nats


def tokens(seed: int, count: int, vocab: int = 7) -> np.ndarray:
    return np.random.default_rng(seed).integers(vocab, size=count + 1).astype(np.uint8)


@pytest.mark.parametrize("count", [1, 2, 50, 131])
def test_a_carried_state_scores_every_token_as_full_prefixes_do(count: int) -> None:
    model = build_model(Section(type="gru", hidden_size=16, embedding_size=8), 7, seed=3)
    ids = tokens(0, count)
    expected = brute_force(model, ids, [0] * count)
    scores = score(model, ids)
    assert scores.tokens == count
    assert scores.nats == pytest.approx(sum(expected), rel=1e-6)
    deviation = np.std(expected) / math.sqrt(count)
    assert scores.standard_error == pytest.approx(deviation, abs=1e-6)
    assert scores.context == "state carried over the whole split"


@pytest.mark.parametrize("count", [1, 7, 8, 9, 12, 13, 40, 43])
@pytest.mark.parametrize("stride", [1, 3, 4, 8])
def test_a_sliding_window_scores_every_token_from_the_tokens_it_holds(count: int, stride: int) -> None:
    model = build_model(
        Section(type="transformer", hidden_size=16, num_heads=2, num_layers=2, context_length=8), 7, seed=3
    )
    ids = tokens(1, count)
    # Target i (from 0) lies in the first window that holds it: window k reads the inputs k·stride … k·stride + 7.
    reach = []
    for target in range(count):
        window = 0
        while target >= window * stride + 8:
            window += 1
        reach.append(window * stride)
    if count > 8 and (count - 8) % stride:
        # The tail is scored in one last window that ends with the text and is as long as the others.
        whole = (count - 8) // stride
        for target in range(8 + whole * stride, count):
            reach[target] = count - 8
    scores = score(model, ids, stride=stride)
    assert scores.tokens == count
    assert scores.nats == pytest.approx(sum(brute_force(model, ids, reach)), rel=1e-5)
    assert scores.context == f"sliding window of 8 tokens, stride {stride}"


def test_the_default_stride_is_half_the_context() -> None:
    model = build_model(Section(type="transformer", hidden_size=16, num_heads=2, num_layers=1, context_length=8), 7)
    assert score(model, tokens(0, 30)).context == "sliding window of 8 tokens, stride 4"


@pytest.mark.parametrize(("count", "rows"), [(10, 3), (64, 8), (65, 8), (5, 9)])
def test_rows_read_side_by_side_score_each_token_once(count: int, rows: int) -> None:
    model = build_model(Section(type="lstm", hidden_size=16, embedding_size=8), 7, seed=3)
    ids = tokens(2, count)
    used = min(rows, count)
    length = count // used
    reach = [min(target // length, used - 1) * length for target in range(count)]
    scores = score(model, ids, rows=rows)
    assert scores.tokens == count
    assert scores.nats == pytest.approx(sum(brute_force(model, ids, reach)), rel=1e-6)


def test_each_row_but_the_first_reads_the_tokens_before_it() -> None:
    model = build_model(Section(type="lstm", hidden_size=16, embedding_size=8), 7, seed=3)
    ids = tokens(2, 65)
    # At least 4 tokens are scored for each of the 3 that warm up: 65 // 12 = 5 rows of (65 - 3) // 5 = 12 tokens. The
    # first scores its 15, and the 2 that are left over follow the last.
    reach = [0] * 15 + [12 * row for row in (1, 2, 3, 4) for _ in range(12)] + [12 * 4] * 2
    scores = score(model, ids, rows=99, warm_up=3)
    assert scores.tokens == 65
    assert scores.nats == pytest.approx(sum(brute_force(model, ids, reach)), rel=1e-6)
    assert (
        scores.context == "state carried within each of 5 equal parts of the split, each after the 3 tokens before it"
    )


def test_accuracies_count_the_first_and_the_first_five_choices() -> None:
    model = build_model(Section(type="gru", hidden_size=4, embedding_size=4), 7)
    with torch.no_grad():
        model.output.weight.zero_()
        model.output.bias.copy_(torch.arange(7, 0, -1).float())
    # Whatever came before, the order of choice is 0, 1, 2, …
    ids = np.array([0, 0, 0, 1, 4, 5, 6])
    scores = score(model, ids)
    assert (scores.top1, scores.top5) == (2, 4)


def test_a_large_split_is_scored_in_pieces_with_the_same_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model(Section(type="gru", hidden_size=16, embedding_size=8), 7, seed=3)
    ids = tokens(5, 300)
    whole = score(model, ids)
    monkeypatch.setattr("lm.evaluation.perplexity.LOGITS_AT_ONCE", 7 * 13)
    pieces = score(model, ids)
    assert pieces.nats == pytest.approx(whole.nats, rel=1e-6)
    assert pieces.tokens == whole.tokens == 300


def test_a_uniform_model_has_the_figures_worked_out_by_hand() -> None:
    tokenizer = CharTokenizer.train([TEXT], CharTokenizer.Options())
    model = build_model(Section(type="gru", hidden_size=4, embedding_size=4), tokenizer.vocab_size)
    with torch.no_grad():
        model.output.weight.zero_()
        model.output.bias.zero_()
    text = "the mat.\nä dog"  # 14 characters, 15 bytes, 4 words, 1 line end; ä is unknown
    part = encode_text("t", text, tokenizer)
    scores = score(model, part.ids, unknown_id=tokenizer.unknown_id)
    report = make_report(scores, part.counts, spelling="8 bits per byte", **FACTS)
    nats = math.log(tokenizer.vocab_size)
    assert report.loss == pytest.approx(nats, rel=1e-6)
    assert report.perplexity == pytest.approx(tokenizer.vocab_size, rel=1e-5)
    assert (report.tokens, report.characters, report.bytes) == (14, 14, 15)
    assert (report.words, report.lines, report.lm_eval_words) == (4, 1, 4)
    assert report.word_perplexity == pytest.approx(math.exp(14 * nats / 4), rel=1e-5)
    assert report.word_eos_perplexity == pytest.approx(math.exp(14 * nats / 5), rel=1e-5)
    # The token that stands for ä does not say its two bytes.
    bits = 14 * nats / math.log(2)
    assert report.bits_per_char == pytest.approx((bits + 16) / 14, rel=1e-6)
    assert report.bits_per_byte == pytest.approx((bits + 16) / 15, rel=1e-6)
    assert report.token_bits_per_byte == pytest.approx(bits / 15, rel=1e-6)
    assert report.spelling_nats == pytest.approx(16 * math.log(2)) and report.spelling == "8 bits per byte"
    assert report.unknown_nats == pytest.approx(nats, rel=1e-5)
    assert report.perplexity_without_unknown == pytest.approx(tokenizer.vocab_size, rel=1e-5)
    assert report.standard_error == pytest.approx(0, abs=1e-6)
    # All tokens tie: the lowest ids come first, which here are newline and space (ids 0 and 1), then , - . a
    order = [tokenizer.decode([token]) for token in range(5)]
    assert report.accuracy == pytest.approx(text.count(order[0]) / 14)
    assert report.top5_accuracy == pytest.approx(sum(text.count(symbol) for symbol in order) / 14)
    assert (report.unknown_tokens, report.unknown_rate) == (1, pytest.approx(1 / 14))
    assert "1 of the tokens" in report.notes[0]


def test_token_perplexity_of_a_word_model_is_the_wikitext_convention() -> None:
    tokenizer = WordTokenizer.train([TEXT], WordTokenizer.Options())
    model = build_model(Section(type="gru", hidden_size=4, embedding_size=4), tokenizer.vocab_size, seed=1)
    part = encode_text("t", TEXT, tokenizer)
    report = make_report(score(model, part.ids), part.counts, **FACTS)
    # 9 words and 3 line ends in each of 3 repetitions.
    assert (report.words, report.lines, report.tokens) == (27, 9, 36)
    assert report.word_eos_perplexity == pytest.approx(report.perplexity, rel=1e-9)
    assert report.notes == ()


def test_the_model_stays_in_the_mode_it_was_in() -> None:
    model = build_model(Section(type="gru", hidden_size=4, dropout=0.5), 7, seed=1).train()
    ids = tokens(0, 20)
    assert score(model, ids).nats == score(model, ids).nats
    assert model.training


@pytest.mark.parametrize("shares", [2, 3, 8])
@pytest.mark.parametrize("count", [29, 301])
@pytest.mark.parametrize("kind", ["carried", "warmed", "window"])
def test_the_shares_of_a_split_add_up_to_all_of_it(kind: str, count: int, shares: int) -> None:
    section = Section(type="lstm", hidden_size=16, embedding_size=8)
    if kind == "window":
        section = Section(type="transformer", context_length=8, hidden_size=16, num_heads=2, num_layers=1)
    model, ids = build_model(section, 7, seed=3), tokens(1, count)
    warm_up = 2 if kind == "warmed" else 0
    whole = score(model, ids, rows=5, stride=4, warm_up=warm_up)
    calls: list[int] = []
    parts = []
    for number in range(shares):
        with mock.patch.object(model, "target_scores", wraps=model.target_scores) as called:
            parts.append(score(model, ids, rows=5, stride=4, warm_up=warm_up, share=(number, shares)))
        calls.append(called.call_count)
    assert sum(part.tokens for part in parts) == whole.tokens == count
    assert sum(part.nats for part in parts) == pytest.approx(whole.nats, rel=1e-6)
    assert sum(part.top1 for part in parts) == whole.top1
    # As often in every process: a model that is spread over them waits for all.
    assert len(set(calls)) == 1
