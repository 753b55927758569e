"""Memory of tensors: blocks are counted once, freed when they go, and stopped before they are taken."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lm import host
from lm.profiling.tensor_memory import Block, TensorMemory, TooMuchMemory, gradients, state_tensors, timeline

CPU = torch.device("cpu")
FLOAT = 4


def test_a_block_counts_once_however_many_views_it_has_and_until_the_last_one_goes():
    with TensorMemory(CPU) as memory:
        whole = torch.zeros(100, 10)
        view = whole[5:].T
        assert memory.now == 1000 * FLOAT
        del whole
        assert memory.now == 1000 * FLOAT
        del view
        assert memory.now == 0
    assert memory.peak == 1000 * FLOAT


def test_what_backward_keeps_is_held_until_backward_is_done():
    weight = torch.ones(50, 50, requires_grad=True)
    with TensorMemory(CPU) as memory:
        # relu keeps its output, the sum nothing, and the product of the two weights only those.
        loss = (weight @ weight).relu().sum()
        assert memory.now == 2500 * FLOAT + FLOAT
        loss.backward()
        del loss
        assert memory.now == 2500 * FLOAT
        assert [block.size for block in memory.blocks_of([weight.grad])] == [2500 * FLOAT]


def test_sparse_gradients_are_counted_as_the_rows_that_they_have():
    table = nn.Embedding(1000, 8, sparse=True)
    with TensorMemory(CPU) as memory:
        table(torch.tensor([1, 2, 3])).sum().backward()
        blocks = memory.blocks_of(gradients(table))
    assert sum(block.size for block in blocks) <= 3 * 8 * FLOAT + 3 * 8
    assert len(blocks) == 2


def test_what_was_there_before_is_not_counted_when_it_is_looked_at():
    before = torch.zeros(100)
    with TensorMemory(CPU) as memory:
        before.view(10, 10).T[3].add_(1)
        assert memory.now == 0


def test_moments_are_found_in_every_optimizer(make_trial):
    with TensorMemory(CPU) as memory:
        trainer = make_trial("gru", **{"model.table_orders": "2"})
        trainer.run_step()
        sizes = sum(block.size for block in memory.blocks_of(state_tensors(trainer.step.optimizers)))
    numbers = [parameter.numel() for parameter in trainer.step.model.parameters()]
    rows = trainer.step.model.tables["2"].num_embeddings
    dense = sum(numbers) - trainer.step.model.tables["2"].weight.numel()
    # Two moments and a counter for each of AdamW's parameters; one number a row of the table.
    assert sizes == 2 * FLOAT * dense + FLOAT * (len(numbers) - 1) + FLOAT * rows


def test_beyond_the_limit_nothing_is_taken():
    host.reset_peak_resident()
    before = host.peak_resident_bytes()
    with TensorMemory(CPU, limit=1e6) as memory:
        kept = torch.zeros(1000)
        with pytest.raises(TooMuchMemory):
            torch.empty(500_000_000).fill_(1.0)
        assert memory.now == kept.nbytes
    assert before is not None and host.peak_resident_bytes() - before < 100e6


def test_a_timeline_is_what_was_held_after_each_change():
    weights, step, later = Block(100, "", 0.0), Block(10, "", 1.0, freed=2.0), Block(5, "", 9.0)
    found = timeline([(weights, "weights"), (step, "kept"), (later, "other")], 0.5, 3.0)
    assert [moment for moment, _ in found] == [0.5, 1.0, 2.0]
    assert [(held["weights"], held["kept"], held["other"]) for _, held in found] == [
        (100, 0, 0),
        (100, 10, 0),
        (100, 0, 0),
    ]
