"""The layout of a model: the shapes of its tensors in symbols, stage by stage.

    Stage("layer 0", parameters={"cell.weight_hh_l0": ("3·H", "H"), …}, outputs={"hidden": ("B", "T", "H")},
          products=(("B·T", "H", "3·H"),))

A model declares its stages (`LanguageModel.layout`) and what each symbol stands for (`LanguageModel.symbols`). A
dimension is a sum of products of symbols and whole numbers, such as "3·H" or "V + 1".
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

Shape = tuple[str, ...]


@dataclass(frozen=True)
class Symbol:
    """A letter of shapes."""

    value: int
    meaning: str


@dataclass(frozen=True)
class Stage:
    """One stage of a step, in the order of the computation."""

    name: str
    formula: str = ""
    """What it computes, as courses write it."""
    parameters: Mapping[str, Shape] = field(default_factory=dict)
    """By the parameter's name; one that two stages share belongs to the first."""
    outputs: Mapping[str, Shape] = field(default_factory=dict)
    """Its activations of a training step, by name."""
    products: tuple[tuple[str, str, str], ...] = ()
    """Its matrix products: (m, k, n) is a product of (m, k) and (k, n), which has m · n · k multiplications."""
    state: Mapping[str, Shape] = field(default_factory=dict)
    """What it passes to the next chunk of the text, by name of the state's tensor."""
    stored_bytes: int | None = None
    """Of parameters that are not tensors of torch."""


def value_of(dimension: str, numbers: Mapping[str, int]) -> int:
    """The number of a dimension: "3·H" with H = 4 is 12."""
    terms = (term.split("·") for term in dimension.replace(" ", "").split("+"))
    return sum(math.prod(int(factor) if factor.isdigit() else numbers[factor] for factor in term) for term in terms)
