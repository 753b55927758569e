"""Native products in bf16: operands rounded to bf16, sums in fp32, under torch's autocast to bf16.

`amx_emulated` is the code of `amx_bf16` with the instructions for tiles as plain arrays, so that every CPU tests it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lm.config import Section
from lm.kernels import autograd, dispatch
from lm.kernels.compiled import compiled
from lm.models import output_head
from lm.models.base import build_model

EMULATED = "amx_emulated"
ISAS = [EMULATED, *(compiled().bf16_instruction_sets() if compiled() else [])]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(dispatch, "bf16_isa", request.param)
    return str(request.param)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def autocast(*, enabled: bool = True) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=enabled)


def rounded(tensor: Tensor) -> Tensor:
    return tensor.bfloat16().double()


def error(found: Tensor, wanted: Tensor) -> float:
    """The norm of the difference, as a share of the norm."""
    exact = wanted.detach().double()
    return float((found.detach().double() - exact).norm() / exact.norm().clamp(min=1e-9))


SHAPES = [(1, 1, 1), (5, 7, 3), (33, 77, 50), (40, 1100, 51), (70, 130, 530), (65, 512, 49)]


@pytest.mark.parametrize(("rows", "depth", "wide"), SHAPES)
def test_a_product_is_that_of_the_rounded_operands(rows: int, depth: int, wide: int, isa: str) -> None:
    torch.manual_seed(rows)
    a, b, bias = torch.randn(rows, depth), torch.randn(depth, wide), torch.randn(wide)
    exact = rounded(a) @ rounded(b)
    for left in (a, a.T.contiguous().T):
        for right in (b, b.T.contiguous().T):
            with autocast():
                found = autograd.product(left, right)
                with_bias = autograd.product(left, right, bias=bias)
                twice = autograd.product(left, right, into=found.clone())
            for result, wanted in ((found, exact), (with_bias, exact + bias), (twice, 2 * exact)):
                torch.testing.assert_close(result.double(), wanted, rtol=1e-6, atol=1e-6 * depth)


def test_the_error_of_a_product_is_the_stated_one(isa: str) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(64, 2000), torch.randn(2000, 64)
    exact = a.double() @ b.double()
    with autocast():
        found = autograd.product(a, b).double()
    assert float(((found - exact).abs() / (a.abs().double() @ b.abs().double())).max()) < 2**-7
    assert 2**-10 < float((found - exact).norm() / exact.norm()) < 2**-8


def test_what_is_no_number_stays_none(isa: str) -> None:
    a, b = torch.ones(20, 40), torch.ones(40, 20)
    a[3, 5], a[4, 6], b[7, 8] = math.nan, math.inf, -math.inf
    with autocast():
        found = autograd.product(a, b)
    wanted = a @ b
    assert torch.equal(found.isnan(), wanted.isnan()) and torch.equal(found.isinf(), wanted.isinf())


def test_numbers_are_rounded_to_the_nearest_and_ties_to_even(isa: str) -> None:
    numbers = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -1 - 2**-8, 3.3895e38, 1e-3])
    with autocast():
        found = autograd.product(torch.diag(numbers), torch.eye(len(numbers)))
    assert torch.equal(found.diag(), numbers.bfloat16().float())


def test_gradients_of_a_linear_layer_are_products_of_rounded_operands(isa: str) -> None:
    torch.manual_seed(1)
    inputs, weight = torch.randn(70, 33, requires_grad=True), torch.randn(19, 33, requires_grad=True)
    grad = torch.randn(70, 19)
    with autocast():
        outputs = autograd.linear(inputs, weight)
    outputs.backward(grad)
    assert outputs.dtype == torch.float32 and inputs.grad is not None and weight.grad is not None
    torch.testing.assert_close(inputs.grad.double(), rounded(grad) @ rounded(weight), atol=1e-5, rtol=0)
    torch.testing.assert_close(weight.grad.double(), rounded(grad.T) @ rounded(inputs), atol=1e-5, rtol=0)


def both_formats(model: nn.Module, loss: Callable[[], Tensor]) -> list[tuple[str, float]]:
    """For the loss and each gradient its name, and the error in bf16 against fp32."""
    found = []
    for enabled in (False, True):
        torch.manual_seed(7)
        with autocast(enabled=enabled):
            result = loss()
        found.append([result, *torch.autograd.grad(result, list(model.parameters()))])
    names = ["loss", *(name for name, _ in model.named_parameters())]
    assert any(not torch.equal(low, exact) for low, exact in zip(found[1], found[0], strict=True))
    return [(name, error(low, exact)) for name, low, exact in zip(names, found[1], found[0], strict=True)]


@pytest.mark.parametrize("kind", ["gru", "lstm"])
@pytest.mark.parametrize("hidden", [16, 33, 100])
def test_recurrent_models_stay_close_to_fp32(kind: str, hidden: int, isa: str) -> None:
    model = build_model(Section(type=kind, embedding_size=24, hidden_size=hidden, num_layers=2), 31, seed=1)
    ids = torch.randint(31, (37, 13))
    state = model.forward(ids)[1].detach()
    for name, share in both_formats(model, lambda: model.training_loss(ids, ids.roll(-1, 1), state).objective):
        assert share < 0.02, name


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_transformers_stay_close_to_fp32(kv_heads: int, isa: str) -> None:
    shape = {"hidden_size": 40, "num_heads": 4, "num_kv_heads": kv_heads, "num_layers": 2, "context_length": 70}
    model = build_model(Section(type="transformer", dropout=0.1, **shape), 31, seed=1)
    ids = torch.randint(31, (5, 70))
    for name, share in both_formats(model, lambda: model.training_loss(ids, ids.roll(-1, 1)).objective):
        assert share < 0.02, name


def test_an_adaptive_softmax_multiplies_natively_and_stays_close_to_fp32(
    isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = {"embedding_size": 24, "hidden_size": 32, "tie_weights": True, "adaptive_cutoffs": [10, 30]}
    model = build_model(Section(type="gru", **shape), 100, seed=1)
    ids = torch.randint(100, (20, 16))
    used = []

    def product(*operands: Tensor, way: tuple[str, int], **options: Tensor) -> Tensor:
        used.append(way[0])
        return autograd.product(*operands, way=way, **options)

    monkeypatch.setattr(output_head, "product", product)
    for name, share in both_formats(model, lambda: model.training_loss(ids, ids.roll(-1, 1)).objective):
        assert share < 0.02, name
    assert used == [dispatch.isa_and_threads()[0]] * 9 + [isa] * 9


@pytest.mark.parametrize("model", ["gru", "lstm", "transformer"])
def test_any_number_of_threads_gives_the_same_bits(model: str, isa: str, threads: None) -> None:
    # Large enough to be shared out.
    size = 64 if isa == EMULATED else 128
    options = {"num_heads": 4, "num_layers": 1} if model == "transformer" else {"embedding_size": 24}
    network = build_model(Section(type=model, hidden_size=size, **options), 31, seed=1)
    ids = torch.randint(31, (130, 12))
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        with autocast():
            loss = network.training_loss(ids, ids.roll(-1, 1)).objective
        results.append([loss, *torch.autograd.grad(loss, list(network.parameters()))])
    for result in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(result, results[0], strict=True))


def test_two_ways_to_multiply_in_bf16_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(2)
    a, b = torch.randn(60, 700), torch.randn(700, 90)
    found = []
    for name in ISAS:
        monkeypatch.setattr(dispatch, "bf16_isa", name)
        with autocast():
            found.append(autograd.product(a, b))
    for each in found:
        torch.testing.assert_close(each, found[0], rtol=0, atol=1e-4)


def test_a_weight_that_stays_in_fp32_and_code_without_autocast_multiply_in_fp32(isa: str) -> None:
    torch.manual_seed(3)
    inputs, weight = torch.randn(70, 30), nn.Parameter(torch.randn(20, 30))
    wanted = F.linear(inputs, weight)
    with autocast():
        low = autograd.linear(inputs, weight)
        with autocast(enabled=False):
            torch.testing.assert_close(autograd.linear(inputs, weight), wanted)
        dispatch.keep_in_fp32(weight)
        torch.testing.assert_close(autograd.linear(inputs, weight), wanted)
    assert error(low, wanted) > 1e-4


def test_fp16_and_cpus_without_bf16_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = torch.randn(70, 30)
    monkeypatch.setattr(dispatch, "bf16_isa", EMULATED)
    with torch.autocast("cpu", torch.float16):
        assert not dispatch.usable("linear", inputs)
    with autocast():
        assert dispatch.usable("linear", inputs)
        monkeypatch.setattr(dispatch, "bf16_isa", None)
        monkeypatch.setattr(dispatch, "_best_bf16_isa", lambda: None)
        assert not dispatch.usable("linear", inputs)
        assert autograd.linear(inputs, torch.randn(20, 30)).dtype == torch.bfloat16
