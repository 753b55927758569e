"""The recurrent cells in plain torch, one time step after another, for `LanguageModel.inspect`.

    rnn     h = tanh(W x + U h' + b)                                        h' is the hidden state of the step before
    gru     h = z · h' + (1 - z) · n        n = tanh(W x + r · (U h' + b))      r: reset gate, z: update gate
    lstm    c = f · c' + i · g, h = o · tanh(c)                             i: input, f: forget, o: output gate

The gates are sigmoids of W x + U h' + b, and g = tanh(W x + U h' + b). Biases that are added together are one b here.
An update gate that is open (1) keeps the state.

Shapes: B batch, T time, E width of the inputs, H hidden.

Sources: Elman 1990; Cho et al. 2014 (GRU); Hochreiter and Schmidhuber 1997 (LSTM).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

GATES = {"gru": ("reset", "update"), "lstm": ("input", "forget", "output")}


@dataclass
class UnrolledLayer:
    """What one layer computed: of each list, entry t is (B, H) of time step t."""

    hidden: list[Tensor] = field(default_factory=list)
    cells: list[Tensor] = field(default_factory=list)
    """Of an LSTM; else empty."""
    gates: dict[str, list[Tensor]] = field(default_factory=dict)
    candidates: list[Tensor] = field(default_factory=list)
    """Of an rnn its hidden states, of a gru n, of an lstm g."""
    outputs: Tensor = field(default_factory=lambda: torch.empty(0))
    """(B, T, H): the hidden states together."""

    def stacked_gates(self) -> dict[str, Tensor]:
        """By name, (B, T, H)."""
        return {name: torch.stack(values, dim=1) for name, values in self.gates.items()}


def unroll(
    kind: str, inputs: Tensor, weights: Sequence[Tensor], first: Sequence[Tensor] | None = None
) -> UnrolledLayer:
    """Run one layer.

    Args:
        kind: "rnn_tanh", "rnn_relu", "gru" or "lstm".
        inputs: (B, T, E).
        weights: those of torch's cell: W (gates · H, E), U (gates · H, H) and the bias of each.
        first: the hidden state (B, H), and the cell state (B, H) of an lstm; None: zeros.
    """
    input_weight, hidden_weight, input_bias, hidden_bias = weights
    size = hidden_weight.shape[1]
    zeros = inputs.new_zeros(len(inputs), size)
    hidden, cell = (first or [zeros])[0], (first or [zeros, zeros])[-1]
    layer = UnrolledLayer(gates={name: [] for name in GATES.get(kind, ())})
    for from_input in F.linear(inputs, input_weight, input_bias).unbind(dim=1):
        from_hidden = F.linear(hidden, hidden_weight, hidden_bias)
        if kind == "gru":
            gates = torch.sigmoid(from_input[:, : 2 * size] + from_hidden[:, : 2 * size]).chunk(2, dim=1)
            reset, update = gates
            candidate = torch.tanh(from_input[:, 2 * size :] + reset * from_hidden[:, 2 * size :])
            hidden = candidate + update * (hidden - candidate)
        elif kind == "lstm":
            into, forget, new, out = (from_input + from_hidden).chunk(4, dim=1)
            gates = torch.sigmoid(into), torch.sigmoid(forget), torch.sigmoid(out)
            candidate = torch.tanh(new)
            cell = gates[1] * cell + gates[0] * candidate
            hidden = gates[2] * torch.tanh(cell)
            layer.cells.append(cell)
        else:
            gates = ()
            hidden = candidate = (torch.tanh if kind == "rnn_tanh" else torch.relu)(from_input + from_hidden)
        layer.hidden.append(hidden)
        layer.candidates.append(candidate)
        for values, gate in zip(layer.gates.values(), gates, strict=True):
            values.append(gate)
    layer.outputs = torch.stack(layer.hidden, dim=1)
    return layer
