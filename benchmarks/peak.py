"""The matrix products of a training step, and the fastest product of this machine.

A share of the peak is at most 1: it divides products that are computed by the best product in the same number format,
over sizes and libraries.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lm.kernels.autograd import product
from lm.kernels.compiled import native
from lm.kernels.dispatch import bf16_instruction_set

SIZES = (512, 512, 512), (512, 2048, 512), (1024, 1024, 1024), (4096, 512, 1536), (2048, 2048, 2048)
"""Rows, depth and columns of the products that are tried."""
SECONDS = 0.1
"""Of each product."""
FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16}
GATES = {"rnn": 1, "gru": 3, "lstm": 4}


def flops(rows: int, depth: int, columns: int) -> int:
    """A multiplication and an addition for each of the products in C (rows, columns) = A (rows, depth) B."""
    return 2 * rows * depth * columns


def recurrent_flops(
    kind: str, *, layers: int, hidden: int, vocab_size: int, batch: int, bptt: int, input_rows: int | None = None
) -> int:
    """Floating-point operations of all products in a training step of a recurrent model with E = H and an output layer.

    Args:
        kind: "rnn", "gru" or "lstm".
        layers: of the cell.
        hidden: H, also the width of the embedding.
        vocab_size: columns of the output layer.
        batch: rows of a batch.
        bptt: time steps of a batch, which continues a carried state.
        input_rows: rows of the products with the input weights of the first layer; None: one for each token. A step
            that reads the table "embedding times input weights" has one for each token of the vocabulary.
    """
    tokens, width = batch * bptt, GATES[kind] * hidden
    total = 0
    for layer in range(layers):
        rows = tokens if layer or input_rows is None else input_rows
        # Forward, the gradient of the weights, the gradient of the inputs.
        total += 3 * flops(rows, hidden, width)
        # The gradient of the hidden state ends at the first step: the state before is a constant.
        total += 2 * flops(tokens, hidden, width) + flops(tokens - batch, width, hidden)
    return total + 3 * flops(tokens, hidden, vocab_size)


def rows_of_inputs(vocab_size: int, batch: int, bptt: int) -> int:
    """`input_rows` of our step without dropout of the inputs; as `Recurrent` decides."""
    tokens = batch * bptt
    return vocab_size if 2 * vocab_size < tokens else tokens


def peaks() -> dict[str, float]:
    """Floating-point operations a second of the fastest product, by number format."""
    return {name: max(_rates(dtype)) for name, dtype in FORMATS.items()}


def _rates(dtype: torch.dtype) -> Iterator[float]:
    for rows, depth, columns in SIZES:
        left, right = torch.randn(rows, depth).to(dtype), torch.randn(depth, columns).to(dtype)
        out, operations = torch.empty(rows, columns, dtype=dtype), flops(rows, depth, columns)
        yield _rate(partial(torch.mm, left, right, out=out), operations)
        # B with contiguous columns, as weights have it.
        turned: Tensor = right.T.contiguous().T
        yield _rate(partial(torch.mm, left, turned, out=out), operations)
        if native() is None or (dtype == torch.bfloat16 and bf16_instruction_set() is None):
            continue
        # Ours take fp32 operands, and round them to bf16 under autocast.
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            yield _rate(partial(product, left.float(), right.float()), operations)


def _rate(multiply: Callable[[], Any], operations: int) -> float:
    """Of the fastest of many calls: another program may have had the cores during the others."""
    best, begun = float("inf"), time.perf_counter()
    while time.perf_counter() - begun < SECONDS:
        before = time.perf_counter()
        multiply()
        best = min(best, time.perf_counter() - before)
    return operations / best
