"""Each private interface of torch, by name: a test here fails if a release of torch changes it."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW, Optimizer

from lm import torch_private

LIBRARIES = Path(torch.__file__).parent / "lib"


def library_mentions(pattern: str, name: str) -> bool:
    """Whether a library that torch ships contains a string."""
    folders = LIBRARIES, LIBRARIES.parent.parent / "torch.libs"
    return any(name.encode() in path.read_bytes() for folder in folders for path in folder.glob(pattern))


@pytest.mark.skipif(sys.platform != "linux", reason="libgomp is torch's OpenMP on Linux")
def test_gomp_spincount() -> None:
    assert library_mentions("libgomp*", "GOMP_SPINCOUNT")
    assert os.environ["GOMP_SPINCOUNT"]


@pytest.mark.skipif(sys.platform != "linux", reason="torch uses huge pages on Linux")
def test_thp_mem_alloc_enable() -> None:
    assert library_mentions("libc10.*", "THP_MEM_ALLOC_ENABLE")
    assert os.environ["THP_MEM_ALLOC_ENABLE"]


def test_the_environment_is_set_on_import_unless_the_user_has_set_it() -> None:
    code = "import os, lm; print(os.environ['GOMP_SPINCOUNT'], os.environ['THP_MEM_ALLOC_ENABLE'])"
    environment = {name: value for name, value in os.environ.items() if name not in torch_private.ENVIRONMENT}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**environment, "THP_MEM_ALLOC_ENABLE": "0"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["1000", "0"]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_mallopt() -> None:
    import ctypes

    library = ctypes.CDLL(None)
    with torch_private.keep_freed_memory():
        # mallopt returns 1 for an option that it knows.
        assert [library.mallopt(option, value) for option, value in torch_private._KEEP.items()] == [1, 1, 1]
        assert hasattr(library, "malloc_trim")


def test_optimizer_step_is_wrapped() -> None:
    step = torch_private.plain_step(AdamW)
    assert hasattr(AdamW.step, "__wrapped__") and step is not AdamW.step
    weight = nn.Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    with torch.no_grad():
        step(AdamW([weight], lr=0.5, weight_decay=0.0))
    assert weight.tolist() == pytest.approx([0.5] * 3, abs=1e-6)


def test_dynamo_disable() -> None:
    torch_private.keep_compiler_away_from_optimizers()
    for name in ("add_param_group", "load_state_dict", "state_dict", "zero_grad"):
        plain = getattr(Optimizer, name).__wrapped__
        assert plain.__dynamo_disable is plain, name


def test_foreach_mul() -> None:
    tensors = [torch.ones(2), torch.full((1,), 3.0)]
    torch_private.foreach("mul", tensors, 0.5)
    assert [each.tolist() for each in tensors] == [[0.5, 0.5], [1.5]]


def test_foreach_copy() -> None:
    targets = [torch.zeros(2, dtype=torch.bfloat16)]
    torch_private.foreach("copy", targets, [torch.tensor([1.0, 2.0])])
    assert targets[0].tolist() == [1.0, 2.0]


def test_foreach_lerp() -> None:
    targets = [torch.zeros(2)]
    torch_private.foreach("lerp", targets, [torch.full((2,), 4.0)], 0.25)
    assert targets[0].tolist() == [1.0, 1.0]


def test_foreach_sub() -> None:
    found = torch_private.foreach_differences([torch.ones(2), torch.zeros(1)], [torch.zeros(2), torch.ones(1)])
    assert [each.tolist() for each in found] == [[1.0, 1.0], [-1.0]]


def test_foreach_norm_adds_squares_beyond_fp16_in_fp32() -> None:
    found = torch_private.foreach_norms([torch.full((4,), 1000.0, dtype=torch.float16), torch.ones(9)])
    assert [(float(each), each.dtype) for each in found] == [(2000.0, torch.float32), (3.0, torch.float32)]


@pytest.mark.parametrize("kind", [AdamW, SGD])
def test_a_fused_optimizer_divides_its_gradients_or_does_nothing_by_flags(kind: type[Any]) -> None:
    weights = [torch.ones(3, requires_grad=True) for _ in range(3)]
    optimizers = [kind([weight], lr=0.5, fused=True) for weight in weights]
    for weight, optimizer, divisor, skip in zip(weights, optimizers, (1.0, 64.0, 64.0), (0.0, 0.0, 1.0), strict=True):
        weight.grad = torch.full((3,), 0.25 * divisor)
        with torch_private.optimizer_flags(optimizer, torch.tensor(divisor), torch.tensor(skip)) as can:
            optimizer.step()
        assert can and not hasattr(optimizer, "found_inf")
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], torch.ones(3))
    assert torch.equal(weights[2], torch.ones(3))
    assert all(not each.any() for each in optimizers[2].state.get(weights[2], {}).values() if each is not None)


def test_an_optimizer_that_is_not_fused_has_no_flags() -> None:
    optimizer = SGD([torch.ones(1, requires_grad=True)], lr=1.0)
    with torch_private.optimizer_flags(optimizer, torch.ones(()), torch.zeros(())) as can:
        assert not can and not hasattr(optimizer, "grad_scale")


def test_indices_and_values_of_a_sparse_tensor() -> None:
    rows = torch.tensor([2, 0, 2])
    gradient = torch.sparse_coo_tensor(rows[None], torch.ones(3, 4), (3, 4), check_invariants=False)
    found, values = torch_private.sparse_rows(gradient)
    assert found.tolist() == [2, 0, 2] and values.shape == (3, 4)
    values.mul_(2)
    assert gradient.to_dense()[2].tolist() == [4.0] * 4


def test_cdata_of_a_storage() -> None:
    tensor = torch.ones(3)
    ((own, storage),) = torch_private.storages(tensor)
    assert storage.nbytes() == 12
    assert (
        [key for key, _ in torch_private.storages(tensor[1:])] == [own] != torch_private.storages(torch.ones(3))[0][0]
    )
    sparse = torch.sparse_coo_tensor(torch.tensor([[1]]), torch.ones(1), (2,), check_invariants=False)
    assert len(torch_private.storages(sparse)) == 2


def test_pytree() -> None:
    @dataclass
    class Pair:
        left: Tensor
        right: list[Tensor]

    torch_private.register_tree(Pair)
    torch_private.register_tree(Pair)
    tensors = [torch.tensor(number) for number in range(3)]
    found = torch_private.tree_tensors({"pair": (Pair(tensors[0], tensors[1:]), "no tensor")})
    assert [int(each) for each in found] == [0, 1, 2]


def test_python_dispatch_mode_and_should_skip_dynamo() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    from lm.profiling.tensor_memory import TensorMemory

    assert issubclass(TensorMemory, TorchDispatchMode)
    assert hasattr(TorchDispatchMode, "_should_skip_dynamo")


def test_modules_of_a_shallow_copy() -> None:
    module = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    twin = torch_private.shallow_copy(module)
    assert twin[0] is module[0] and twin[1] is module[1]
    twin[1] = nn.Identity()
    assert isinstance(twin[1], nn.Identity) and isinstance(module[1], nn.Linear)


@pytest.mark.parametrize(
    "register",
    ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"],
)
def test_forward_and_backward_hooks(register: str) -> None:
    module = nn.Linear(1, 1)
    assert not torch_private.has_hooks(module)
    handle = getattr(module, register)(lambda *_: None)
    assert torch_private.has_hooks(module)
    handle.remove()
    assert not torch_private.has_hooks(module)


def test_backward_pre_hooks() -> None:
    module = nn.Linear(1, 1)
    module.register_full_backward_pre_hook(lambda *_: None)
    assert torch_private.has_hooks(module)


@pytest.mark.parametrize("kind", ["rnn_tanh", "rnn_relu", "gru", "lstm"])
def test_vf(kind: str) -> None:
    cells = {"rnn_tanh": nn.RNN, "rnn_relu": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}
    options = {"nonlinearity": kind.removeprefix("rnn_")} if kind.startswith("rnn") else {}
    cell = cells[kind](2, 3, batch_first=True, **options)
    inputs, first = torch.randn(4, 5, 2), torch.zeros(1, 4, 3)
    weights = [getattr(cell, f"{name}_l0") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
    state = (first, first) if kind == "lstm" else first
    outputs = torch_private.recurrent_function(kind)(inputs, state, weights, True, 1, 0.0, True, False, True)[0]
    torch.testing.assert_close(outputs, cell(inputs)[0])


def test_set_params_and_buffers_to_ignore_for_model() -> None:
    module = nn.Linear(1, 1)
    torch_private.ignore_in_ddp(module, ["bias"])
    assert hasattr(DistributedDataParallel, "_set_params_and_buffers_to_ignore_for_model")
    # DistributedDataParallel reads the names from this attribute.
    assert module._ddp_params_and_buffers_to_ignore == ["bias"]


def test_execution_engine_queue_callback() -> None:
    calls: list[str] = []
    outputs = torch.ones(2, requires_grad=True).square()
    node = outputs.grad_fn
    assert node is not None
    node.register_prehook(lambda *_: torch_private.after_backward(lambda: calls.append("end")))
    node.register_hook(lambda *_: calls.append("node"))
    outputs.sum().backward()
    assert calls == ["node", "end"]


def test_forward_cls_of_a_node() -> None:
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, inputs: Tensor) -> Tensor:
            return 2 * inputs

    outputs: Tensor = Double.apply(torch.ones(2, requires_grad=True))  # type: ignore[no-untyped-call]
    assert outputs.grad_fn is not None
    assert torch_private.function_of_node(outputs.grad_fn) is Double
    total = outputs.sum().grad_fn
    assert total is not None and torch_private.function_of_node(total) is None
