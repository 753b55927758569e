"""The graph of a deep model from that of its first two layers.

Tracing takes seconds for each layer. Layers are alike: the nodes of the second are copied for each further one, with
its own weights and its own tensors of the state.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

LAYERS = 2
"""That are traced; the second has one before it, as all further ones have."""
_SCOPES = "pkg.torch.onnx.name_scopes"  # of a node: the modules that it comes from


def add_layers(
    model: Any, prefix: str, weights: Mapping[str, npt.NDArray[Any]], state: Sequence[str], next_: str
) -> None:
    """Add the layers after the second to a graph (`onnx.ModelProto`).

    Args:
        model: the traced graph; it is changed.
        prefix: of the names of a layer's weights before its number, as in the graph, such as "model.layers.".
        weights: of all layers, by their names in the graph.
        state: names of the tensors of the whole state, in their order; those of a layer end with its number.
        next_: before the names of the state after the ids.
    """
    graph, from_second = model.graph, f"{prefix}{LAYERS - 1}."
    layer = re.compile(rf"{re.escape(prefix)}(\d+)(?:\.|$)")
    count = 1 + max(int(found[1]) for name in weights if (found := layer.match(name)))
    layers = [_layer_of(node, layer) for node in graph.node]
    numbered = [*zip(graph.node, layers, strict=True)]
    second = [node for node, number in numbered if number == LAYERS - 1]
    # Constants of the first are shared by all.
    first = [node for node, number in numbered if number == LAYERS - 2 and node.op_type != "Constant"]
    results = {output.name for output in graph.output}
    used = {name for node, number in numbered if number != LAYERS - 1 for name in node.input}
    made = {name for node in second for name in node.output if name}
    # What the second layer gets from the first, and what it gives.
    (before,) = {name for node in second for name in node.input} & {name for node in first for name in node.output}
    (after,) = (made & used) - results

    last, copies = after, []
    for number in range(LAYERS, count):

        def renamed(name: str, number: int = number, last: str = last) -> str:
            if name == before:
                return last
            if name.startswith(from_second):
                return f"{prefix}{number}.{name.removeprefix(from_second)}"
            if name in state or name.removeprefix(next_) in state:
                return re.sub(rf"\.{LAYERS - 1}$", f".{number}", name)
            return f"{name}/{number}" if name in made else name

        copies += [_copied(node, renamed, number) for node in second]
        last = f"{after}/{number}"
    place = 1 + max(index for index, number in enumerate(layers) if number == LAYERS - 1)
    nodes = [*graph.node]
    for node in nodes[place:]:
        node.input[:] = [last if name == after else name for name in node.input]
    _replace(graph.node, [*nodes[:place], *copies, *nodes[place:]])
    _add_weights(graph, from_second, prefix, weights)
    ends = f".{LAYERS - 1}"
    for values, before_name in ((graph.input, ""), (graph.output, next_)):
        known = {value.name: value for value in values}
        of_second = {name.removesuffix(ends): value for name, value in known.items() if name.endswith(ends)}
        more = [before_name + name for name in state if before_name + name not in known]
        for name in more:
            value = known[name] = type(values[0])()
            value.CopyFrom(of_second[name.rpartition(".")[0]])
            value.name = name
        others = [name for name in known if name.removeprefix(before_name) not in state]
        _replace(values, [known[name] for name in [*others, *(before_name + name for name in state)]])


def _layer_of(node: Any, layer: re.Pattern[str]) -> int | None:
    """The number of the layer that a node belongs to."""
    scopes = next((each.value for each in node.metadata_props if each.key == _SCOPES), "[]")
    found = next(filter(None, (layer.match(str(scope)) for scope in ast.literal_eval(scopes))), None)
    return None if found is None else int(found[1])


def _copied(node: Any, renamed: Callable[[str], str], number: int) -> Any:
    copy = type(node)()
    copy.CopyFrom(node)
    copy.name = f"{node.name}/{number}"
    copy.input[:] = [renamed(name) for name in node.input]
    copy.output[:] = [renamed(name) for name in node.output]
    del copy.metadata_props[:]
    return copy


def _add_weights(graph: Any, from_second: str, prefix: str, weights: Mapping[str, npt.NDArray[Any]]) -> None:
    """The weights of the further layers, those that the second has."""
    from onnx import numpy_helper

    wanted = [each.name.removeprefix(from_second) for each in graph.initializer if each.name.startswith(from_second)]
    known = {each.name for each in graph.initializer}
    for name, array in weights.items():
        own = name.removeprefix(prefix).partition(".")[2]
        if name.startswith(prefix) and name not in known and own in wanted:
            graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(array), name))


def _replace(items: Any, by: Sequence[Any]) -> None:
    """Set a repeated field of protobuf."""
    copies = []
    for item in by:
        copy = type(item)()
        copy.CopyFrom(item)
        copies.append(copy)
    del items[:]
    items.extend(copies)
