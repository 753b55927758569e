"""Peers' models behind the contract: the exact evaluator gives them the loss that torch's own cross-entropy gives.

The modules here are small ones with the peers' interfaces: nanoGPT's `model(ids, targets)`, the word example's
time-first `model(ids, hidden)` with log-probabilities.
"""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.adapters import ids_of, plain_recurrent, windowed, word_language_model
from benchmarks.loops import PlainRecurrent, for_seconds, recurrent_steps
from lm.evaluation.perplexity import score
from lm.tokenizers.char import CharTokenizer
from lm.tokenizers.word import WordTokenizer

TEXT = "the cat sat\non the mat\nand the cat ran\n"


class BlockModel(nn.Module):
    """As nanoGPT's GPT is called: without targets it gives the last position alone."""

    def __init__(self, size: int, block: int) -> None:
        super().__init__()
        self.block = block
        self.tokens, self.places = nn.Embedding(size, 8), nn.Embedding(block, 8)
        self.head = nn.Linear(8, size)

    def forward(self, ids, targets=None):
        assert ids.shape[1] <= self.block
        hidden = self.tokens(ids) + self.places(torch.arange(ids.shape[1]))
        hidden = hidden.cumsum(dim=1).tanh()
        return (self.head(hidden), None) if targets is not None else (self.head(hidden[:, [-1]]), None)


class WordModel(nn.Module):
    """As the example's RNNModel is called: time first, scores as one long (T * B, W)."""

    def __init__(self, kind: str, size: int) -> None:
        super().__init__()
        self.kind, self.size = kind, size
        self.encoder = nn.Embedding(size, 6)
        self.rnn = getattr(nn, kind)(6, 6, 2)
        self.decoder = nn.Linear(6, size)

    def init_hidden(self, batch):
        zeros = torch.zeros(2, batch, 6)
        return (zeros, zeros) if self.kind == "LSTM" else zeros

    def forward(self, ids, hidden):
        out, hidden = self.rnn(self.encoder(ids), hidden)
        return F.log_softmax(self.decoder(out).view(-1, self.size), dim=1), hidden


def char_ids() -> tuple[CharTokenizer, np.ndarray]:
    tokenizer = CharTokenizer.train([TEXT], CharTokenizer.Options())
    return tokenizer, np.concatenate([[tokenizer.start_id], tokenizer.encode(TEXT)]).astype(np.int64)


def test_symbols_are_matched_by_what_they_are_and_the_unknown_one_has_no_partner():
    tokenizer = CharTokenizer.train(["ab\n"], CharTokenizer.Options())
    # Ours: newline, a, b, <unk>. Theirs: b, newline, z, a.
    assert ids_of(tokenizer, ["b", "\n", "z", "a"]).tolist() == [1, 3, 0, -1]


def test_a_block_model_has_the_loss_of_torchs_own_cross_entropy():
    torch.manual_seed(1)
    tokenizer, ids = char_ids()
    symbols = sorted(set(TEXT), reverse=True)
    table = ids_of(tokenizer, symbols)
    model = BlockModel(len(symbols), block=64).eval()
    scores = score(windowed(model, lambda each: model(each, each)[0], 64, table), ids)
    theirs = torch.tensor([symbols.index(symbol) for symbol in "\n" + TEXT])
    with torch.no_grad():
        expected = F.cross_entropy(model(theirs[None, :-1], theirs)[0][0], theirs[1:]).item()
    assert scores.tokens == len(TEXT)
    assert scores.loss == pytest.approx(expected, abs=1e-6)


def test_a_block_model_is_read_in_windows_that_slide_by_half():
    torch.manual_seed(1)
    tokenizer, ids = char_ids()
    symbols = sorted(set(TEXT))
    model = BlockModel(len(symbols), block=8).eval()
    scores = score(windowed(model, lambda each: model(each, each)[0], 8, ids_of(tokenizer, symbols)), ids)
    theirs = torch.tensor([symbols.index(symbol) for symbol in "\n" + TEXT])
    total, done = 0.0, 0
    with torch.no_grad():
        while done < len(TEXT):
            start = 0 if done == 0 else min(done - 4, len(TEXT) - 8)
            logits = model(theirs[None, start : start + 8], theirs)[0][0]
            nats = F.cross_entropy(logits, theirs[start + 1 : start + 9], reduction="none")
            total += nats[done - start :].sum().item()
            done = start + 8
    assert scores.tokens == len(TEXT)
    assert scores.context == "sliding window of 8 tokens, stride 4"
    assert scores.nats == pytest.approx(total, abs=1e-5)


def test_a_symbol_that_the_peer_lacks_has_no_probability_and_cannot_be_read():
    tokenizer, ids = char_ids()
    symbols = sorted(set(TEXT) - {"m"})
    model = BlockModel(len(symbols), block=64).eval()
    adapted = windowed(model, lambda each: model(each, each)[0], 64, ids_of(tokenizer, symbols))
    start = int(tokenizer.start_id)
    logits, _ = adapted(torch.tensor([[start]]))
    assert logits[0, 0, int(tokenizer.encode("m")[0])] == -math.inf
    assert F.softmax(logits, dim=-1).sum().item() == pytest.approx(1)
    with pytest.raises(ValueError, match="the peer does not have"):
        score(adapted, ids)


@pytest.mark.parametrize("kind", ["GRU", "LSTM"])
def test_the_word_example_has_the_loss_of_torchs_own_cross_entropy_with_its_state_carried(kind):
    torch.manual_seed(1)
    tokenizer = WordTokenizer.train([TEXT], WordTokenizer.Options())
    ids = np.concatenate([[tokenizer.start_id], tokenizer.encode(TEXT)]).astype(np.int64)
    # The example numbers words as it meets them, and ends each line with <eos>.
    words = [word for line in TEXT.splitlines() for word in [*line.split(), "<eos>"]]
    symbols = [*dict.fromkeys(words), "<unk>"]
    model = WordModel(kind, len(symbols)).eval()
    adapted = word_language_model(model, ids_of(tokenizer, symbols))
    theirs = torch.tensor([symbols.index(word) for word in ["<eos>", *words]])
    with torch.no_grad():
        scores, _ = model(theirs[:-1, None], model.init_hidden(1))
        expected = F.nll_loss(scores, theirs[1:]).item()
        halves = [adapted(torch.from_numpy(ids[None, :5]))]
        halves.append(adapted(torch.from_numpy(ids[None, 5:-1]), halves[0][1]))
    found = score(adapted, ids)
    assert found.tokens == len(words) == 13
    assert found.loss == pytest.approx(expected, abs=1e-6)
    chunked = F.cross_entropy(torch.cat([logits for logits, _ in halves], dim=1)[0], torch.from_numpy(ids[1:])).item()
    assert chunked == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_a_plain_loops_model_has_the_loss_of_torchs_own_cross_entropy_however_it_is_read(kind):
    torch.manual_seed(1)
    tokenizer, ids = char_ids()
    module = PlainRecurrent(kind, tokenizer.vocab_size, 6, 8, 2).eval()
    with torch.no_grad():
        logits, _ = module(torch.from_numpy(ids[None, :-1]))
        expected = F.cross_entropy(logits[0], torch.from_numpy(ids[1:])).item()
    assert score(plain_recurrent(module, tokenizer.vocab_size), ids).loss == pytest.approx(expected, abs=1e-6)


def test_a_plain_loop_learns_and_starts_its_rows_afresh_at_the_end_of_the_text():
    torch.manual_seed(1)
    tokenizer, ids = char_ids()
    module = PlainRecurrent("gru", tokenizer.vocab_size, 8, 16, 1)
    step = recurrent_steps(module, ids, batch_size=2, bptt=8)
    losses = [step(1e-2) for _ in range(60)]
    assert losses[-1] < losses[0] / 2


def test_the_learning_rate_falls_over_the_whole_time_and_not_over_a_part_of_it():
    rates = []
    for_seconds(lambda rate: rates.append(rate) or 0.0, 0.001, rate=1.0, begin=50.0, whole=100.0)
    # Half of the time is over: half of the way from 1 to the floor of 0.05.
    assert rates[0] == pytest.approx(0.525, abs=1e-3)
    assert for_seconds(lambda rate: 0.0, 0.0, rate=1.0) == (0, pytest.approx(0, abs=1e-2))
