"""The minGRU's recurrence, against figures worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from lm.config import Section
from lm.models.base import build_model
from lm.models.mingru import Block, MinGRU, linear_scan, scan_by_doubling, scan_by_steps


def test_the_recurrence_by_hand() -> None:
    decay, values = torch.tensor([[[0.5], [0.25], [1.0]]]), torch.tensor([[[1.0], [2.0], [3.0]]])
    # 0.5 · 4 + 1 = 3; 0.25 · 3 + 2 = 2.75; 2.75 + 3 = 5.75.
    assert scan_by_steps(decay, values, torch.tensor([[4.0]])).flatten().tolist() == [3.0, 2.75, 5.75]


@pytest.mark.parametrize("time", [1, 2, 7, 64, 100])
def test_doubling_gives_what_one_step_after_another_gives(time: int) -> None:
    generator = torch.Generator().manual_seed(time)
    decay, values = (torch.rand(3, time, 5, generator=generator) for _ in range(2))
    first = torch.rand(3, 5, generator=generator)
    steps = scan_by_steps(decay, values, first)
    torch.testing.assert_close(scan_by_doubling(decay, values, first), steps, atol=1e-6, rtol=1e-5)


def test_the_recurrence_has_the_gradient_that_differences_show() -> None:
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.rand(2, 5, 3, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    first = torch.rand(2, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(linear_scan, (*inputs, first))


def test_gates_that_are_almost_shut_or_open_stay_finite_over_a_long_text() -> None:
    decay = torch.tensor([0.0, 1e-30, 1.0]).expand(1, 2000, 3).clone().requires_grad_()
    hidden = linear_scan(decay, torch.ones(1, 2000, 3), torch.zeros(1, 3))
    assert hidden[0, -1].tolist() == [1.0, 1.0, 2000.0]
    hidden.sum().backward()
    assert decay.grad is not None and bool(decay.grad.isfinite().all())


def test_one_layer_by_hand() -> None:
    # Width 1 and a convolution of one token that hands on what it sees: RMSNorm makes every embedding its sign.
    model = build_model(Section(type="mingru", hidden_size=1, num_layers=1, conv_size=1, mlp_size=1), 2).eval()
    assert isinstance(model, MinGRU)
    block = model.layers[0]
    assert isinstance(block, Block) and block.conv.bias is not None
    with torch.no_grad():
        model.embedding.weight.copy_(torch.tensor([[2.0], [-3.0]]))
        block.conv.weight.fill_(1.0)
        block.conv.bias.zero_()
        block.gates.weight.copy_(torch.tensor([[0.5], [2.0]]))
        block.gates.bias.copy_(torch.tensor([0.1, 0.3]))
    _, state = model(torch.tensor([[0, 1]]))

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    first = sigmoid(0.6) * (2.3 + 0.5)  # g(2.3), above zero
    second = (1 - sigmoid(-0.4)) * first + sigmoid(-0.4) * sigmoid(-1.7)  # g(-1.7), below
    assert float(state.tensors["hidden"][0, 0, 0].detach()) == pytest.approx(second, abs=1e-5)
