"""Shapes: every tensor of a model, in symbols and in numbers, with parameters, FLOPs and bytes.

    found = shapes(run.model, batch=32, length=128)
    for stage in found.stages:
        for tensor in stage.parameters:
            print(tensor.name, tensor.symbols, tensor.sizes)          # cell.weight_hh_l0 (3·H, H) (768, 256)

FLOPs are those of the matrix products: a multiplication and an addition are two. Elementwise work, softmax and table
rows are left out; they are small. Backward needs two products for each product of forward: one gives the gradient of
each factor.

Activations are those that the formulas name, in the weights' number format. A kernel may keep fewer or more.

Shapes: B rows of text, T tokens of a row; the other letters are the model's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from lm.errors import ConfigError
from lm.models.layout import Shape, Stage, Symbol, value_of

if TYPE_CHECKING:
    from lm.models.base import LanguageModel

MAX_SIZE = 1 << 30
"""Of batch and length."""


@dataclass(frozen=True)
class TensorShape:
    """One tensor."""

    name: str
    symbols: Shape
    """("3·H", "E")"""
    sizes: tuple[int, ...]
    """(768, 64)"""
    bytes: int

    @property
    def count(self) -> int:
        """Its numbers."""
        return math.prod(self.sizes)


@dataclass(frozen=True)
class StageShapes:
    """One stage of a step."""

    name: str
    formula: str
    parameters: tuple[TensorShape, ...]
    activations: tuple[TensorShape, ...]
    state: tuple[TensorShape, ...]
    """What is carried to the next chunk of the text."""
    forward_flops: int

    @property
    def backward_flops(self) -> int:
        """Of the products for the gradients."""
        return 2 * self.forward_flops


@dataclass(frozen=True)
class Shapes:
    """All tensors of a step."""

    type: str
    batch: int
    length: int
    legend: dict[str, Symbol]
    """By letter, B and T first."""
    stages: tuple[StageShapes, ...]

    @property
    def parameters(self) -> int:
        """Trained numbers; those of an n-gram model are its counts."""
        return sum(tensor.count for stage in self.stages for tensor in stage.parameters)

    @property
    def parameter_bytes(self) -> int:
        """Of all parameters."""
        return sum(tensor.bytes for stage in self.stages for tensor in stage.parameters)

    @property
    def activation_bytes(self) -> int:
        """Of all activations of a step."""
        return sum(tensor.bytes for stage in self.stages for tensor in stage.activations)

    @property
    def state_bytes(self) -> int:
        """Of the state after a step."""
        return sum(tensor.bytes for stage in self.stages for tensor in stage.state)

    @property
    def forward_flops(self) -> int:
        """Of a step."""
        return sum(stage.forward_flops for stage in self.stages)

    @property
    def backward_flops(self) -> int:
        """Of a step."""
        return sum(stage.backward_flops for stage in self.stages)

    def to_json(self) -> dict[str, Any]:
        """Plain values, with the totals."""
        plain = asdict(self)
        for found, stage in zip(plain["stages"], self.stages, strict=True):
            found["backward_flops"] = stage.backward_flops
        names = (
            "parameters", "parameter_bytes", "activation_bytes", "state_bytes", "forward_flops", "backward_flops",
        )  # fmt: skip
        return plain | {"totals": {name: getattr(self, name) for name in names}}


def shapes(model: LanguageModel, *, batch: int = 1, length: int = 64) -> Shapes:
    """The tensors of a training step on `batch` rows of `length` tokens.

    Raises:
        ConfigError: a size is out of bounds, or the text is longer than the model's context.
    """
    for name, size in (("batch", batch), ("length", length)):
        if not 1 <= size <= MAX_SIZE:
            raise ConfigError(f"{name} {size}: give a number from 1 to {MAX_SIZE:,}.")
    if model.context_length is not None and length > model.context_length:
        raise ConfigError(f"length {length}: this model depends on {model.context_length} tokens at most.")
    legend = {
        "B": Symbol(batch, "rows of text (batch)"), "T": Symbol(length, "tokens of a row (length)"), **model.symbols()
    }  # fmt: skip
    numbers = {letter: symbol.value for letter, symbol in legend.items()}
    widths = {name: parameter.element_size() for name, parameter in model.named_parameters()}
    stages = tuple(_stage(stage, numbers, widths) for stage in model.layout())
    return Shapes(model.options.type, batch, length, legend, stages)


def _stage(stage: Stage, numbers: Mapping[str, int], widths: Mapping[str, int]) -> StageShapes:
    activation_width = max(widths.values(), default=4)

    def tensors(named: Mapping[str, Shape], width: int | None = None) -> tuple[TensorShape, ...]:
        return tuple(_tensor(name, shape, numbers, width or widths.get(name, 4)) for name, shape in named.items())

    parameters = tensors(stage.parameters)
    if stage.stored_bytes is not None:
        parameters = tuple(
            TensorShape(tensor.name, tensor.symbols, tensor.sizes, stage.stored_bytes) for tensor in parameters
        )
    return StageShapes(
        stage.name,
        stage.formula,
        parameters,
        tensors(stage.outputs, activation_width),
        tensors(stage.state, activation_width),
        sum(2 * _product(product, numbers) for product in stage.products),
    )


def _tensor(name: str, shape: Shape, numbers: Mapping[str, int], width: int) -> TensorShape:
    sizes = tuple(value_of(dimension, numbers) for dimension in shape)
    return TensorShape(name, shape, sizes, math.prod(sizes) * width)


def _product(dimensions: Iterable[str], numbers: Mapping[str, int]) -> int:
    return math.prod(value_of(dimension, numbers) for dimension in dimensions)
