"""The operations of a training step, counted by hand and by torch, and shares of the peak that cannot be above 1."""

import time

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import peak
from benchmarks.peak import flops, peaks, recurrent_flops, rows_of_inputs
from lm.config import Section
from lm.models.base import build_model


def test_a_product_is_a_multiplication_and_an_addition_for_each_of_its_terms():
    assert flops(2, 3, 5) == 60


def test_the_products_of_a_step_are_those_counted_by_hand():
    # Two rows of 3 steps, 4 units: 6 tokens, 12 gates. Inputs 3 · 2·6·4·12; hidden states 2 · 2·6·4·12 and backward,
    # without the first step, 2·4·12·4; output 3 · 2·6·4·7.
    sizes = {"hidden": 4, "vocab_size": 7, "batch": 2, "bptt": 3}
    assert recurrent_flops("gru", layers=1, **sizes) == 3 * 576 + 2 * 576 + 384 + 3 * 336
    assert recurrent_flops("gru", layers=2, **sizes) == 2 * (3 * 576 + 2 * 576 + 384) + 3 * 336
    # One row of the input product for each of 2 tokens of the vocabulary in place of 6.
    assert recurrent_flops("gru", layers=1, input_rows=2, **sizes) == 3 * 192 + 2 * 576 + 384 + 3 * 336


def test_the_products_of_a_plain_cell_are_those_that_torch_counts():
    batch, bptt, hidden, vocab_size = 4, 3, 8, 11
    cell, output = torch.nn.LSTMCell(hidden, hidden), torch.nn.Linear(hidden, vocab_size)
    inputs = torch.randn(bptt, batch, hidden, requires_grad=True)
    state = torch.randn(batch, hidden), torch.randn(batch, hidden)
    with FlopCounterMode(display=False) as counter:
        outputs = []
        for step in inputs:
            state = cell(step, state)
            outputs.append(output(state[0]))
        torch.stack(outputs).sum().backward()
    sizes = {"hidden": hidden, "vocab_size": vocab_size, "batch": batch, "bptt": bptt}
    assert recurrent_flops("lstm", layers=1, **sizes) == counter.get_total_flops()


@pytest.mark.parametrize("bptt", [5, 6])
def test_a_table_of_inputs_is_counted_where_the_model_reads_one(bptt):
    model = build_model(Section(type="gru", hidden_size=8, embedding_size=8), 11)
    reads_table = model._reads_embedding(torch.zeros(4, bptt, dtype=torch.int64))
    assert rows_of_inputs(11, 4, bptt) == (11 if reads_table else 4 * bptt)
    assert reads_table == (bptt == 6)


def test_no_single_product_is_faster_than_the_peak(monkeypatch):
    monkeypatch.setattr(peak, "SIZES", ((64, 64, 64), (256, 256, 256)))
    monkeypatch.setattr(peak, "SECONDS", 0.02)
    best = peaks()
    assert best.keys() == {"fp32", "bf16"}
    rates = list(peak._rates(torch.float32))
    # The best of many calls, again: only the clock can make them differ.
    assert max(rates) < 1.5 * best["fp32"]


def test_a_rate_is_that_of_the_fastest_call(monkeypatch):
    monkeypatch.setattr(peak, "SECONDS", 0.05)
    pauses = iter([0.01, 0.002, 0.02] + [0.01] * 100)
    assert 2 / 0.01 < peak._rate(lambda: time.sleep(next(pauses)), 2) <= 2 / 0.002
