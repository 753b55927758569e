"""The native training layers equal torch's."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lm.config import Section
from lm.errors import DeviceError
from lm.generation.open_decoder import open_decoder
from lm.kernels import autograd, compiled, dispatch, layers
from lm.kernels.compiled import native
from lm.models.base import LanguageModel, build_model
from lm.models.transformer import rotary_tables
from lm.training.optimizers import AdamW

V = 11
CELLS: dict[str, type[nn.RNNBase]] = {"gru": nn.GRU, "lstm": nn.LSTM}


@pytest.fixture(params=["avx512", "avx2", "plain"])
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name: str = request.param if request.param in native().instruction_sets() else "plain"
    monkeypatch.setattr(dispatch, "isa", name)
    return name


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * max(1e-3, float(wanted.detach().abs().max())))


def weights_of(cell: nn.RNNBase, layer: int = 0) -> list[Tensor]:
    return [getattr(cell, f"{name}_l{layer}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]


def both_ways(
    kind: str, hidden: int, batch: int, time: int, *, states: bool, looked_up: bool, num_layers: int = 1
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, last states and all gradients of torch's layers and of the native ones."""
    torch.manual_seed(hidden + batch)
    cell = CELLS[kind](7, hidden, num_layers, batch_first=True)
    embedding = torch.randn(V, 7, requires_grad=True)
    ids = torch.randint(V, (batch, time))
    count = 2 if kind == "lstm" else 1
    first = [(torch.randn(num_layers, batch, hidden) / 2).requires_grad_() for _ in range(count)] if states else []

    def of_torch() -> list[Tensor]:
        begun = (tuple(first) if kind == "lstm" else first[0]) if states else None
        outputs, last = cell(F.embedding(ids, embedding), begun)
        return [outputs, *(last if kind == "lstm" else [last])]

    def of_ours() -> list[Tensor]:
        inputs = embedding if looked_up else F.embedding(ids, embedding)
        lasts = []
        for layer in range(num_layers):
            begun = [part[layer] for part in first] if states else None
            look = ids if looked_up and layer == 0 else None
            inputs, *last = autograd.recurrent_layer(kind, inputs, weights_of(cell, layer), begun, ids=look)
            lasts.append(last)
        return [inputs, *(torch.stack(parts) for parts in zip(*lasts, strict=True))]

    leaves = [*cell.parameters(), embedding, *first]
    found = []
    for way in (of_torch, of_ours):
        torch.manual_seed(5)
        results = way()
        loss = sum(((result * torch.randn(result.shape)).sum() for result in results), torch.zeros(()))
        found.append([result.detach() for result in results] + list(torch.autograd.grad(loss, leaves)))
    return found[0], found[1]


@pytest.mark.parametrize("looked_up", [False, True])
@pytest.mark.parametrize("states", [False, True])
@pytest.mark.parametrize(("hidden", "batch", "time"), [(5, 1, 9), (17, 33, 8), (100, 3, 12), (64, 33, 1)])
@pytest.mark.parametrize("kind", CELLS)
def test_outputs_and_gradients_equal_those_of_torch(
    kind: str, hidden: int, batch: int, time: int, states: bool, looked_up: bool, isa: str
) -> None:
    wanted, found = both_ways(kind, hidden, batch, time, states=states, looked_up=looked_up)
    for one, other in zip(found, wanted, strict=True):
        close(one, other)


@pytest.mark.parametrize("kind", CELLS)
def test_two_layers_equal_those_of_torch(kind: str) -> None:
    wanted, found = both_ways(kind, 96, 32, 20, states=True, looked_up=True, num_layers=2)
    for one, other in zip(found, wanted, strict=True):
        close(one, other)


@pytest.mark.parametrize("kind", CELLS)
def test_a_gradient_equals_the_finite_difference_of_the_loss(kind: str) -> None:
    torch.manual_seed(0)
    cell, inputs = CELLS[kind](3, 4, batch_first=True), torch.randn(2, 8, 3)
    weight = cell.weight_hh_l0
    assert isinstance(weight, Tensor)

    def loss() -> Tensor:
        return autograd.recurrent_layer(kind, inputs, weights_of(cell), None)[0].square().sum()

    (grad,) = torch.autograd.grad(loss(), weight)
    for place in [(0, 0), (5, 2), (11, 3)]:
        with torch.no_grad():
            weight[place] += 1e-2
            above = loss()
            weight[place] -= 2e-2
            below = loss()
            weight[place] += 1e-2
        assert float(above - below) / 2e-2 == pytest.approx(float(grad[place]), rel=0.01, abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", CELLS)
def test_any_number_of_threads_gives_the_same_bits(kind: str, threads: None) -> None:
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        torch.manual_seed(0)
        cell, ids = CELLS[kind](24, 256, batch_first=True), torch.randint(V, (40, 10))
        embedding = torch.randn(V, 24, requires_grad=True)
        outputs = autograd.recurrent_layer(kind, F.embedding(ids, embedding), weights_of(cell), None)[0]
        again = autograd.recurrent_layer(kind, embedding, weights_of(cell), None, ids=ids)[0]
        product = autograd.linear(outputs, weights_of(cell)[1])
        (product.square().sum() + again.square().sum()).backward()
        results.append([outputs, product, embedding.grad, *(weight.grad for weight in cell.parameters())])
    for result in results[1:]:
        for one, other in zip(result, results[0], strict=True):
            assert one is not None and other is not None and torch.equal(one, other)


@pytest.mark.slow
def test_a_transformer_has_the_same_bits_on_any_number_of_threads(threads: None) -> None:
    model = build_model(Section(type="transformer", hidden_size=128, num_layers=1, num_heads=4, dropout=0.1), V, seed=1)
    ids = torch.randint(V, (16, 65))
    results = []
    for count in (1, 2, 3, 12):
        torch.set_num_threads(count)
        torch.manual_seed(0)
        logits, _ = model(ids)
        results.append([logits, *torch.autograd.grad(logits, list(model.parameters()), torch.ones_like(logits))])
    for result in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(result, results[0], strict=True))


@pytest.mark.slow
def test_a_state_that_is_cut_from_the_graph_gets_no_gradient() -> None:
    cell, inputs = nn.GRU(3, 16, batch_first=True), torch.randn(2, 8, 3)
    before = torch.zeros(2, 16, requires_grad=True)
    first, last = autograd.recurrent_layer("gru", inputs, weights_of(cell), [before])
    (second, _) = autograd.recurrent_layer("gru", inputs, weights_of(cell), [last.detach()])
    assert torch.autograd.grad(second.sum(), before, allow_unused=True, retain_graph=True) == (None,)
    (grad,) = torch.autograd.grad(first.sum(), before)
    assert float(grad.abs().sum()) > 0


def test_a_second_backward_pass_is_refused() -> None:
    cell = nn.GRU(3, 16, batch_first=True)
    outputs = autograd.recurrent_layer("gru", torch.randn(2, 8, 3), weights_of(cell), None)[0]
    outputs.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass only"):
        outputs.sum().backward()


def test_a_token_outside_the_embedding_is_refused() -> None:
    cell = nn.GRU(3, 16, batch_first=True)
    with pytest.raises(IndexError, match="outside the embedding"):
        autograd.recurrent_layer("gru", torch.randn(V, 3), weights_of(cell), None, ids=torch.full((2, 8), V))


def test_nan_does_not_stay_in_a_buffer() -> None:
    # Buffers are reused, and their padding is multiplied by zeros.
    cell = nn.GRU(3, 5, batch_first=True)
    autograd.recurrent_layer("gru", torch.full((2, 8, 3), torch.nan), weights_of(cell), None)[0].sum().backward()
    cell.zero_grad()
    wanted, found = both_ways("gru", 5, 2, 8, states=True, looked_up=False)
    for one, other in zip(found, wanted, strict=True):
        close(one, other)


@pytest.mark.parametrize(("rows", "width", "wide"), [(70, 5, 9), (1536, 64, 65), (64, 700, 33)])
def test_a_linear_layer_equals_that_of_torch(rows: int, width: int, wide: int, isa: str) -> None:
    torch.manual_seed(0)
    leaves = [torch.randn(shape, requires_grad=True) for shape in ((rows, width), (wide, width), (wide,))]
    grad = torch.randn(rows, wide)
    found = []
    for linear in (F.linear, autograd.linear):
        outputs = linear(*leaves)
        found.append([outputs.detach(), *torch.autograd.grad(outputs, leaves, grad)])
    for one, other in zip(found[1], found[0], strict=True):
        close(one, other)


@pytest.mark.parametrize(("rows", "depth", "wide"), [(1, 40, 31), (9, 20, 1000), (40, 1100, 50), (60, 200, 2500)])
def test_a_product_of_any_shape_equals_that_of_torch(rows: int, depth: int, wide: int, isa: str, threads: None) -> None:
    torch.manual_seed(0)
    a, b, bias = torch.randn(rows, depth), torch.randn(depth, wide), torch.randn(wide)
    wanted = torch.addmm(bias, a, b)
    for left in (a, a.T.contiguous().T):
        for right in (b, b.T.contiguous().T):
            results = []
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                found = autograd.product(left, right, bias=bias)
                close(found, wanted)
                results += [found, autograd.product(left, right, into=found.clone())]
            close(results[1], wanted + a @ b)
            assert all(torch.equal(*pair) for pair in zip(results[2:], results[:2] * 2, strict=True))


@pytest.mark.parametrize(("rows", "wide"), [(1, 1), (7, 40), (90, 1003)])
def test_cross_entropies_and_their_gradients_equal_torchs(rows: int, wide: int, isa: str, threads: None) -> None:
    torch.manual_seed(0)
    logits, targets = (10 * torch.randn(rows, wide)).requires_grad_(), torch.randint(wide, (rows,))
    wanted = F.cross_entropy(logits, targets, reduction="none")
    (grads,) = torch.autograd.grad(wanted.sum(), logits)
    for count in (1, 2):
        torch.set_num_threads(count)
        found, d_bias = logits.detach().clone(), torch.ones(wide)
        close(autograd.entropies(found, targets, into=found, d_bias=d_bias), wanted)
        close(found, grads)
        close(d_bias, 1 + grads.sum(0))
    with pytest.raises(IndexError, match="outside the logits"):
        autograd.entropies(found, targets + wide, into=found)


def test_a_logit_that_is_not_finite_gives_a_loss_that_is_not_finite(isa: str) -> None:
    for odd in (torch.nan, torch.inf):
        logits = torch.zeros(2, 40)
        logits[1, 3] = odd
        nats = autograd.entropies(logits, torch.zeros(2, dtype=torch.int64), into=logits)
        assert nats.isfinite().tolist() == [True, False]


@pytest.mark.parametrize("factor", [1.0, 0.25])
def test_a_mean_cross_entropy_and_its_gradient_are_those_of_torch(factor: float, isa: str, threads: None) -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(33, 70, requires_grad=True), torch.randint(65, (70,))
    wanted = F.cross_entropy(logits.T[:, :33], targets % 33)
    found = autograd.cross_entropy(logits.T[:, :33], targets % 33)
    close(found, wanted)
    for _ in range(2):
        (grad,) = torch.autograd.grad(factor * found, logits, retain_graph=True)
        close(grad, torch.autograd.grad(factor * wanted, logits, retain_graph=True)[0])


def test_an_embedding_and_its_gradient_are_those_of_torch(isa: str, threads: None) -> None:
    torch.manual_seed(0)
    embedding, ids = layers.Embedding(50, 37), torch.randint(50, (60, 40))
    grad = torch.randn(60, 40, 37)
    wanted = F.embedding(ids, embedding.weight)
    (gradient,) = torch.autograd.grad(wanted, embedding.weight, grad)
    found = []
    for count in (1, 2):
        torch.set_num_threads(count)
        assert torch.equal(embedding(ids), wanted)
        found.append(torch.autograd.grad(embedding(ids), embedding.weight, grad)[0])
    close(found[0], gradient)
    assert torch.equal(*found)
    for odd in (-1, 50):
        with pytest.raises(IndexError, match="outside the embedding"):
            embedding(torch.tensor([[3, odd]]))


@pytest.mark.parametrize("most", [0.5, 1e6])
def test_gradients_are_clipped_as_by_torch(most: float, isa: str, threads: None) -> None:
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.zeros(shape)) for shape in ((3,), (200, 300), (), (1, 17), (70_000,))]
    for weight in weights:
        weight.grad = torch.randn(weight.shape)
    copies = [weight.grad.clone() for weight in weights if weight.grad is not None]
    wanted = float(nn.utils.clip_grad_norm_(weights, most))
    norms = []
    for count in (1, 2):
        torch.set_num_threads(count)
        own = [each.clone() for each in copies]
        norms.append(autograd.clip_grad_norm(own, most))
        for one, weight in zip(own, weights, strict=True):
            assert weight.grad is not None
            close(one, weight.grad)
    assert norms[0] == norms[1] == pytest.approx(wanted, rel=1e-5)
    copies[1][3, 4] = torch.nan
    before = copies[0].clone()
    assert autograd.clip_grad_norm(copies, most) != autograd.clip_grad_norm(copies, most)
    assert torch.equal(copies[0], before)


def test_adamw_equals_that_of_torch(isa: str) -> None:
    torch.manual_seed(0)
    shapes = [(3,), (200, 300), (1, 17)]
    begun = [torch.randn(shape) for shape in shapes]
    ways: list[list[nn.Parameter]] = []
    for make in (torch.optim.AdamW, AdamW):
        weights = [nn.Parameter(each.clone()) for each in begun]
        groups = [{"params": weights[:2], "weight_decay": 0.3}, {"params": weights[2:], "weight_decay": 0.0}]
        optimizer = make(groups, lr=1e-2, betas=(0.8, 0.95), fused=True)
        source = torch.Generator().manual_seed(3)
        for step in range(5):
            for weight in weights:
                # One weight has fewer steps than the others.
                weight.grad = None if step == 1 and weight.ndim == 1 else torch.randn(weight.shape, generator=source)
            optimizer.step()
        ways.append(weights)
        assert [float(optimizer.state[weight]["step"]) for weight in weights] == [4, 5, 5]
    for one, other in zip(*ways, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_dropout_drops_at_its_rate_and_uses_the_same_mask_in_backward() -> None:
    dropout, ones = layers.Dropout(0.25), torch.ones(500, 401, requires_grad=True)
    torch.manual_seed(1)
    dropped = dropout(ones)
    dropped.sum().backward()
    assert ones.grad is not None and torch.equal(ones.grad, dropped.detach())
    assert set(dropped.detach().unique().tolist()) == {0.0, float(torch.tensor(1 / 0.75))}
    # 200,500 draws: four standard deviations are 0.004.
    assert float((dropped == 0).float().mean()) == pytest.approx(0.25, abs=0.004)
    torch.manual_seed(1)
    assert torch.equal(dropout(ones), dropped) and not torch.equal(dropout(ones), dropped)
    assert torch.equal(dropout.eval()(ones), ones)


def test_instruction_sets_and_threads_drop_the_same() -> None:
    inputs, dropped = torch.ones(70_003), []
    for name in native().instruction_sets():
        for threads in (1, 3):
            outputs = torch.empty_like(inputs)
            native().drop(inputs.data_ptr(), outputs.data_ptr(), len(inputs), 77, 0.5, name, threads)
            dropped.append(outputs)
    assert all(torch.equal(one, dropped[0]) for one in dropped)


def refuse(*args: object, **options: object) -> None:
    raise AssertionError


def transformer_block(size: int, heads: int, kv_heads: int) -> tuple[nn.Module, Tensor, tuple[Tensor, Tensor]]:
    """A block with uneven norms, inputs for it, and rotations."""
    section = Section(type="transformer", hidden_size=size, num_heads=heads, num_kv_heads=kv_heads, num_layers=1)
    block: nn.Module = build_model(section, V, seed=1).layers[0]  # type: ignore[index, assignment]
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    positions = torch.arange(70).expand(3, 70)
    return block, torch.randn(3, 70, size, requires_grad=True), rotary_tables(positions, size // heads, 10_000.0)


@pytest.mark.parametrize(("size", "heads", "kv_heads"), [(64, 4, 2), (40, 2, 2)])
def test_a_block_in_one_call_has_the_keys_values_and_gradients_of_its_parts(
    size: int, heads: int, kv_heads: int, isa: str
) -> None:
    torch.manual_seed(size)
    block, inputs, rotation = transformer_block(size, heads, kv_heads)
    grads = torch.randn_like(inputs), torch.randn(3, 70, kv_heads, size // heads)
    found = []
    for watched in (False, True):
        handle = block.get_submodule("mlp").register_forward_hook(lambda *_: None) if watched else None
        outputs, (keys, values) = block(inputs, rotation, None, None, True)
        wanted = [inputs, *block.parameters()]
        # Keys and values are used directly too, as by a later chunk of the text.
        used = (outputs, keys, values), (grads[0], grads[1], grads[1])
        found.append([outputs, keys, values, *torch.autograd.grad(used[0], wanted, used[1])])
        if handle is not None:
            handle.remove()
    for one, other in zip(*found, strict=True):
        close(one, other)


def test_dropout_in_a_block_is_that_of_its_parts_in_the_mean_and_changes_with_the_generator() -> None:
    torch.manual_seed(3)
    block, inputs, rotation = transformer_block(64, 4, 4)
    whole = block(inputs, rotation, None, None, True)[0]
    for part in block.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.3
    block.get_submodule("self_attn").dropout = 0.3  # type: ignore[assignment]
    torch.manual_seed(4)
    drawn = torch.stack([block(inputs, rotation, None, None, True)[0].detach() for _ in range(400)])
    handle = block.get_submodule("mlp").register_forward_hook(lambda *_: None)
    by_parts = torch.stack([block(inputs, rotation, None, None, True)[0].detach() for _ in range(400)])
    handle.remove()
    torch.manual_seed(4)
    assert torch.equal(block(inputs, rotation, None, None, True)[0], drawn[0]) and not torch.equal(drawn[0], drawn[1])
    assert torch.equal(block.eval()(inputs, rotation, None, None, True)[0], whole)
    # Over 13,440 numbers, means and variances agree.
    assert float((drawn.mean(0) - by_parts.mean(0)).abs().mean()) < 0.1 * float(drawn.std(0).mean())
    assert float(drawn.var(0).mean()) == pytest.approx(float(by_parts.var(0).mean()), rel=0.02)


def test_gradients_through_dropout_in_a_block_equal_finite_differences() -> None:
    torch.manual_seed(5)
    block, inputs, rotation = transformer_block(64, 4, 2)
    for part in block.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.3

    def total() -> Tensor:
        torch.manual_seed(6)
        outputs: Tensor = block(inputs, rotation, None, None, True)[0].double()
        return (outputs * torch.linspace(-1, 1, outputs.numel()).view_as(outputs)).sum()

    for parameter in block.parameters():
        (grad,) = torch.autograd.grad(total(), parameter)
        way = torch.randn_like(parameter)
        with torch.no_grad():
            parameter.add_(1e-3 * way)
            above = total()
            parameter.sub_(2e-3 * way)
            below = total()
            parameter.add_(1e-3 * way)
        assert float(above - below) / 2e-3 == pytest.approx(float((grad * way).sum()), rel=0.02, abs=1e-2)


TRANSFORMERS: dict[str, dict[str, object]] = {
    "qk-norm": {},
    "bare": {"qk_norm": False, "tie_weights": True},
    "grouped": {"num_kv_heads": 2, "context_length": 150},
    "odd": {"hidden_size": 40, "num_heads": 2, "mlp_size": 13},
}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_transformer_has_the_logits_and_gradients_of_torch(
    name: str, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "context_length": 70, **TRANSFORMERS[name]}
    ids = torch.randint(V, (3, int(str(shape["context_length"])) + 1))
    found = []
    for switch in ("0", "1"):
        monkeypatch.setenv("INKLING_NATIVE", switch)
        model = build_model(Section(type="transformer", **shape), V, seed=1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
        loss = model.training_loss(ids[:, :-1], ids[:, 1:])
        loss.objective.backward()
        assert loss.logits is not None
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        assert len(gradients) == len(list(model.parameters()))
        found.append([loss.logits(), *gradients])
    for one, other in zip(found[1], found[0], strict=True):
        close(one, other)


# -- in a model --------------------------------------------------------------------------------------------------------


def losses(model: LanguageModel, steps: int) -> list[float]:
    # Each row counts in its own steps.
    ids = torch.arange(321) * torch.arange(1, 17)[:, None] % V
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    state, found = None, []
    for step in range(steps):
        piece = ids[:, step % 20 * 16 : step % 20 * 16 + 17]
        loss = model.training_loss(piece[:, :-1], piece[:, 1:], state)
        state = loss.state.detach()
        loss.objective.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss.nats))
    return found


@pytest.mark.parametrize("kind", CELLS)
def test_fifty_steps_of_training_follow_those_of_torch(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    section = Section(type=kind, hidden_size=40, embedding_size=12, num_layers=2)
    ours = losses(build_model(section, V, seed=1), 50)
    monkeypatch.setenv("INKLING_NATIVE", "0")
    assert ours == pytest.approx(losses(build_model(section, V, seed=1), 50), rel=1e-4)
    assert ours[-1] < ours[0] / 2


def test_the_switch_leaves_training_and_decoding_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model(Section(type="gru", hidden_size=16), V, seed=1)
    options, arrays = model.options.model_dump(mode="json"), model.arrays()
    monkeypatch.setenv("INKLING_NATIVE", "0")
    monkeypatch.setattr(autograd, "recurrent_layer", refuse)
    model(torch.zeros(2, 8, dtype=torch.int64))
    assert native() is None
    assert open_decoder(options, lambda: arrays, lambda: model).name.startswith("torch")
    with pytest.raises(DeviceError, match="INKLING_NATIVE=0 turns them off"):
        open_decoder(options, lambda: arrays, lambda: model, precision="int8")


def test_an_install_without_kernels_warns_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compiled, "compiled", lambda: None)
    monkeypatch.setattr(dispatch, "compiled", lambda: None)
    dispatch._warn_of_missing_kernels.cache_clear()
    model = build_model(Section(type="gru", hidden_size=16), V, seed=1)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            model(torch.zeros(2, 8, dtype=torch.int64))
    assert [record.message.split(":")[0] for record in caplog.records] == [
        "This install has no native kernels, because it was built without GCC or Clang"
    ]


def test_other_cells_short_texts_and_low_precision_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autograd, "recurrent_layer", refuse)
    ids = torch.zeros(2, 8, dtype=torch.int64)
    build_model(Section(type="rnn", hidden_size=16), V, seed=1)(ids)
    model = build_model(Section(type="gru", hidden_size=16), V, seed=1)
    model(ids[:, :7])
    with torch.autocast("cpu", dtype=torch.float16):
        model(ids)
    with pytest.raises(AssertionError):
        model(ids)
