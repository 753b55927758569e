"""The recurrent cells as operators of ONNX, for a model that is traced by `torch.onnx.export`.

Torch's tracer unrolls a cell over the time steps of its example, so the number of steps would be fixed. ONNX has each
cell as one operator for any number of steps; it has the gates in another order than torch.

Shapes: B batch, T time, E width of the inputs, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

OPERATORS = {"rnn": "RNN", "gru": "GRU", "lstm": "LSTM"}
ORDERS = {"rnn": (0,), "gru": (1, 0, 2), "lstm": (0, 3, 1, 2)}
"""For each block of gates in ONNX, its number in torch."""
VERSION = 14
"""Of the operators."""


def onnx_layer(
    kind: str, nonlinearity: str, inputs: Tensor, weights: Sequence[Tensor], first: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Run one layer.

    Args:
        kind: "rnn", "gru" or "lstm".
        nonlinearity: of an rnn, "tanh" or "relu".
        inputs: (B, T, E).
        weights: those of torch's cell: W (gates · H, E), U (gates · H, H) and the bias of each.
        first: the hidden state (B, H), and the cell state (B, H) of an lstm.

    Returns:
        Outputs (B, T, H), and the last of each of `first` (B, H).
    """
    from torch.onnx.ops import symbolic_multi_out

    hidden = weights[1].shape[1]
    input_weight, hidden_weight, *biases = (_in_order(kind, weight) for weight in weights)
    attributes: dict[str, Any] = {"hidden_size": hidden}
    if kind == "rnn":
        attributes["activations"] = [nonlinearity.capitalize()]
    if kind == "gru":
        attributes["linear_before_reset"] = 1
    batch, time, _ = inputs.shape
    last = [1, batch, hidden]
    outputs, *states = symbolic_multi_out(
        OPERATORS[kind],
        [
            inputs.transpose(0, 1),
            input_weight[None],
            hidden_weight[None],
            torch.cat(biases)[None],
            None,
            *(part[None] for part in first),
        ],
        attributes,
        dtypes=[inputs.dtype] * (1 + len(first)),
        shapes=[[time, 1, batch, hidden], *[last] * len(first)],
        version=VERSION,
    )
    return outputs.squeeze(1).transpose(0, 1), *(state.squeeze(0) for state in states)


def _in_order(kind: str, weight: Tensor) -> Tensor:
    """A weight with its blocks of gates in the order of ONNX."""
    order = ORDERS[kind]
    hidden = weight.shape[0] // len(order)
    return torch.cat([weight[number * hidden : (number + 1) * hidden] for number in order])
