"""Context tables: the selected rows, the added logits, and updates of the selected rows only."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lm.config import Section, TrainingConfig
from lm.errors import ConfigError
from lm.models.base import LanguageModel, State, build_model
from lm.models.context_tables import ROWS, ContextTable, ContextTables, TableOptions
from lm.training.optimizers import RowAdagrad, make_optimizers


def tables(*orders: int, vocab_size: int = 5, buckets: int = 65_536) -> ContextTables:
    return ContextTables(TableOptions(type="gru", table_orders=orders, table_buckets=buckets), vocab_size)


def rows(found: ContextTables, ids: list[int], state: State | None = None) -> dict[int, list[int]]:
    held = [-1] * found.num_earlier if state is None else state.tensors["recent"][0].tolist()
    contexts = found.contexts(torch.tensor([held + ids]), len(ids))
    return {order: row[0].tolist() for order, row in contexts.items()}


def model(kind: str = "gru", **options: object) -> LanguageModel:
    small = {"hidden_size": 8, "table_orders": (2, 3), **options}
    return build_model(Section(type=kind, **small), 5, seed=1)


def test_an_exact_row_is_the_last_tokens_read_as_one_number_in_base_v() -> None:
    # Previous · 5 + current; the first token has no trigram, so it gets the row after the last, 25.
    assert rows(tables(2, 3), [3, 1, 4]) == {2: [3, 1, 4], 3: [25, 3 * 5 + 1, 1 * 5 + 4]}


def test_a_row_depends_on_the_tokens_of_an_earlier_chunk() -> None:
    found = tables(4)
    _, state = found(torch.tensor([[3, 1, 4]]), None, State({}))
    assert state.tensors["recent"].tolist() == [[1, 4]]
    assert rows(found, [2, 0], state) == {4: [(1 * 5 + 4) * 5 + 2, (4 * 5 + 2) * 5]}


def test_a_context_of_more_than_the_buckets_is_hashed_as_the_native_step_hashes_it() -> None:
    # The tokens 1, 4, last one first: (0 · f + 4 + 1) · f + 1 + 1 in 32 bits; then the mixed bits modulo the buckets.
    factor = 1_540_483_477
    hashed = (5 * factor + 2) % 2**32
    spread = (hashed ^ hashed >> 15) * factor % 2**32
    assert rows(tables(3, buckets=7), [1, 4])[3] == [7, (spread ^ spread >> 13) % 7]


def test_hashed_contexts_spread_over_the_buckets() -> None:
    found = tables(4, vocab_size=65, buckets=65_536)
    text = torch.cartesian_prod(*(torch.arange(40),) * 3)
    taken = len(torch.unique(found.contexts(text, 1)[4]))
    # 64,000 random contexts leave e^(-64,000/65,536) of 65,536 buckets empty.
    assert taken == pytest.approx(65_536 * (1 - math.exp(-64_000 / 65_536)), rel=0.03)


@pytest.mark.parametrize("kind", ["gru", "transformer"])
def test_training_starts_with_the_network_alone(kind: str) -> None:
    ids = torch.tensor([[0, 1, 2, 3]])
    with_tables, plain = model(kind), model(kind, table_orders=())
    assert torch.equal(with_tables(ids)[0], plain(ids)[0])
    assert set(with_tables.arrays()) - set(plain.arrays()) == {"tables.2.weight", "tables.3.weight"}


@pytest.mark.parametrize("kind", ["gru", "transformer"])
def test_the_rows_of_all_orders_are_added_to_the_logits(kind: str) -> None:
    found = model(kind).eval()
    ids = torch.tensor([[3, 1]])
    before = found(ids)[0]
    arrays = found.arrays()
    arrays["tables.2.weight"][1] = [1, 2, 3, 4, 5]
    arrays["tables.3.weight"][16] = [10, 0, 0, 0, 0]
    found.load_arrays(arrays)
    added = found(ids)[0] - before
    assert added[0].tolist() == [pytest.approx([0] * 5), pytest.approx([11, 2, 3, 4, 5], rel=1e-5)]


def test_dropout_drops_whole_rows_of_each_order_independently_and_preserves_their_mean() -> None:
    found = tables(2, 3).train()
    found.dropout = 0.75
    for value, weight in zip((1.0, 10.0), found.parameters(), strict=True):
        torch.nn.init.constant_(weight.data[:-1], value)
    torch.manual_seed(0)
    added = found(torch.zeros(1, 20_000, dtype=torch.int64), None, State({}))[0].detach()
    assert torch.equal(added, added[..., :1].expand_as(added))
    # Divided by the quarter that is not dropped: 4 or 0 and 40 or 0.
    assert set(added.unique().tolist()) == {0.0, 4.0, 40.0, 44.0}
    assert float(added.mean()) == pytest.approx(11, rel=0.05)
    assert found.eval()(torch.tensor([[0, 0]]), None, State({}))[0][0, :, 0].tolist() == [1.0, 11.0]


@pytest.fixture(params=["native", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With and without the native step."""
    monkeypatch.setenv("INKLING_NATIVE", "1" if request.param == "native" else "0")
    return str(request.param)


@pytest.mark.usefixtures("way")
def test_a_step_of_adagrad_by_row_by_hand() -> None:
    table = torch.nn.Embedding.from_pretrained(torch.zeros(4, 2), freeze=False, sparse=True)
    optimizer = RowAdagrad(table.parameters(), lr=0.5)
    for target in ([3.0, 4.0], [0.0, 12.0]):
        optimizer.zero_grad()
        (table(torch.tensor([2])) * torch.tensor(target)).sum().backward()
        optimizer.step()
    # First by 0.5 · (3, 4) / 5, then by 0.5 · (0, 12) / sqrt(25 + 144).
    assert table.weight.detach()[2].tolist() == pytest.approx([-0.3, -0.4 - 6 / 13])
    assert table.weight.detach()[[0, 1, 3]].abs().max() == 0


@pytest.mark.usefixtures("way")
def test_a_row_that_occurs_several_times_gets_the_sum_of_its_gradients() -> None:
    table = torch.nn.Embedding.from_pretrained(torch.zeros(3, 2), freeze=False, sparse=True)
    optimizer = RowAdagrad(table.parameters(), lr=1.0)
    (table(torch.tensor([2, 0, 2])) * torch.tensor([[1.0, 0.0], [0.0, 5.0], [2.0, 4.0]])).sum().backward()
    optimizer.step()
    # Row 2: (3, 4) of length 5; row 0: (0, 5).
    assert table.weight.detach().flatten().tolist() == pytest.approx([0, -1, 0, 0, -0.6, -0.8])


def test_the_native_step_equals_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(40, (6, 200), generator=generator)
    grads = torch.randn(6, 200, 33, generator=generator)
    found = []
    for native in ("1", "0"):
        monkeypatch.setenv("INKLING_NATIVE", native)
        table = torch.nn.Embedding.from_pretrained(torch.zeros(40, 33), freeze=False, padding_idx=39, sparse=True)
        optimizer = RowAdagrad(table.parameters(), lr=0.5)
        for part, grad in zip(ids, grads, strict=True):
            optimizer.zero_grad()
            (table(part) * grad).sum().backward()
            optimizer.step()
        found.append(table.weight.detach())
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-4)
    assert found[0][39].abs().max() == 0


def test_a_training_step_changes_only_the_selected_rows_and_never_that_of_incomplete_contexts() -> None:
    found = model()
    optimizers = make_optimizers(found, TrainingConfig(), fused=False)
    found.training_loss(torch.tensor([[3, 1]]), torch.tensor([[1, 0]])).objective.backward()
    for optimizer in optimizers:
        optimizer.step()
    touched = {order: np.flatnonzero(found.arrays()[f"tables.{order}.weight"].any(axis=1)).tolist() for order in (2, 3)}
    assert touched == {2: [1, 3], 3: [16]}


def test_tables_for_a_large_vocabulary_are_refused_with_a_remedy() -> None:
    with pytest.raises(ConfigError, match="lower table_buckets"):
        build_model(Section(type="gru", table_orders=(2,)), 33_000)


@pytest.mark.parametrize("orders", ["2,4,3", [4, 3, 2], (2, 3, 4)])
def test_orders_can_be_given_as_text_and_are_sorted(orders: object) -> None:
    assert Section(type="gru", table_orders=orders).resolve("model").table_orders == (2, 3, 4)


@pytest.mark.parametrize("orders", [1, (2, 2), (17,), "two"])
def test_invalid_orders_are_refused(orders: object) -> None:
    with pytest.raises(ConfigError, match="table_orders"):
        build_model(Section(type="gru", table_orders=orders), 5)


def trained_table(*, sparse: bool, native: bool, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """A table of 40 rows after six steps over 200 ids of its first 30."""
    monkeypatch.setenv("INKLING_NATIVE", "1" if native else "0")
    generator = torch.Generator().manual_seed(0)
    table = ContextTable.from_pretrained(torch.zeros(40, 33), freeze=False, padding_idx=39, sparse=sparse)
    optimizer = RowAdagrad(table.parameters(), lr=0.5)
    for _ in range(6):
        optimizer.zero_grad()
        ids = torch.randint(30, (200,), generator=generator)
        ids[::7] = 39
        (table(ids) * torch.randn(200, 33, generator=generator)).sum().backward()
        assert table.weight.grad is not None
        assert table.weight.grad.is_sparse == sparse
        optimizer.step()
    return table.weight.detach()


def test_dense_gradients_train_a_table_as_sparse_ones_do(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = trained_table(sparse=False, native=True, monkeypatch=monkeypatch)
    for native in (True, False):
        sparse = trained_table(sparse=True, native=native, monkeypatch=monkeypatch)
        torch.testing.assert_close(dense, sparse, atol=1e-6, rtol=1e-5)
    assert not dense[30:].any()
    assert dense[:30].any(dim=1).all()


def test_a_dense_step_leaves_the_bits_of_rows_without_a_gradient() -> None:
    table = ContextTable.from_pretrained(torch.randn(6, 3), freeze=False, sparse=False)
    optimizer = RowAdagrad(table.parameters(), lr=1.0)
    before = table.weight.detach().clone()
    table(torch.tensor([1, 4])).sum().backward()
    optimizer.step()
    assert torch.equal(table.weight.detach()[[0, 2, 3, 5]], before[[0, 2, 3, 5]])
    assert not torch.equal(table.weight.detach()[[1, 4]], before[[1, 4]])


def test_a_table_is_unchanged_if_the_device_found_an_overflow() -> None:
    table = ContextTable.from_pretrained(torch.ones(3, 2), freeze=False, sparse=False)
    optimizer = RowAdagrad(table.parameters(), lr=1.0)
    for overflow in (0.0, 1.0):
        optimizer.zero_grad()
        (table(torch.tensor([1])) * (math.inf if overflow else 3.0)).sum().backward()
        optimizer.found_inf = torch.tensor(overflow)
        optimizer.step()
    # One step, of length 1 along (3, 3).
    assert table.weight.detach()[1].tolist() == pytest.approx([1 - 0.5**0.5] * 2)
    assert optimizer.state[table.weight]["squares"].flatten().tolist() == pytest.approx([0, 18, 0])


@pytest.mark.parametrize("known", [0, 1, 2, 5])
def test_rows_from_the_host_are_those_that_a_step_computes(known: int) -> None:
    found = tables(2, 4)
    text = np.random.default_rng(0).integers(5, size=(2, 12))
    expected = found.contexts(
        torch.from_numpy(np.concatenate([np.full((2, 2), -1), text], axis=1))[:, max(0, known) :], 12 - known
    )
    given = found.host_inputs(text[:, known:], text[:, :known])[ROWS]
    for order, own in zip((2, 4), given, strict=True):
        assert torch.equal(own, expected[order])
