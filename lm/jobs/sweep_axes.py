"""The options that a sweep varies, and the values that a search takes from them.

    preset=gru-char,lstm-char               two values
    model.table_orders=[2,3],[2,3,4]        two values that are lists
    training.learning_rate=1e-3..1e-2       a range, for random search

A grid has all combinations of the values. Random search draws N of them. Ranges are drawn from N strata of equal width,
one value from each, on a logarithmic scale if the range is above 0. So no two draws are close by chance.

Source of the strata: McKay, Beckman and Conover 1979 (Latin hypercube sampling).
"""

from __future__ import annotations

import itertools
import json
import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from lm.config import TrainingConfig, parse_value
from lm.errors import ConfigError
from lm.registry import ALL, did_you_mean

CHOICES = ("preset", "family", "tokens")
"""Axes that are no option, but choose many of them."""
SECTIONS = ("tokenizer", "model", "training")
SET_BY_SWEEP = {
    "training.seed": "--seeds sets it",
    "training.devices": "each run is one process",
    "training.shard": "each run is one process",
    "training.ensemble": "the seeds of ensembles would overlap",
    "training.student": "the seeds of ensembles would overlap",
}
"""Options that a sweep does not vary, with the reason."""
DIGITS = 3
"""Significant digits of a drawn value."""

Values = dict[str, Any]
"""Axis → value, of one configuration."""


@dataclass(frozen=True)
class Axis:
    """An option that varies."""

    name: str
    """preset, family, tokens or SECTION.FIELD."""
    values: tuple[Any, ...] = ()
    bounds: tuple[float, float] | None = None
    """The ends of a range; None: `values` lists all."""
    is_whole: bool = False
    """Whether the values of the range are whole numbers."""

    def at(self, share: float) -> Any:
        """The value at a share of the axis, 0 to 1."""
        if self.bounds is None:
            return self.values[min(int(share * len(self.values)), len(self.values) - 1)]
        low, high = self.bounds
        drawn = low * (high / low) ** share if low > 0 else low + (high - low) * share
        if self.is_whole:
            return min(max(round(drawn), int(low)), int(high))
        return min(max(float(f"{drawn:.{DIGITS}g}"), low), high)


def parse_over(entries: Sequence[str]) -> dict[str, str]:
    """["preset=gru-char,lstm-char"] → {"preset": "gru-char,lstm-char"}.

    Raises:
        ConfigError: an entry is not NAME=VALUES, or a name comes twice.
    """
    found: dict[str, str] = {}
    for entry in entries:
        match = re.fullmatch(r"\s*([\w.]+)\s*=(.*)", entry, re.DOTALL)
        if match is None or not match[2].strip():
            raise ConfigError(
                f"--over {entry!r}: write NAME=VALUE,VALUE, for example training.learning_rate=1e-3,3e-3."
            )
        if match[1] in found:
            raise ConfigError(f"--over {match[1]} is given twice: write all its values in one --over.")
        found[match[1]] = match[2].strip()
    return found


def parse_axes(over: Mapping[str, str | Sequence[Any]]) -> list[Axis]:
    """The axes of a sweep; a text has values separated by commas, or a range LOW..HIGH.

    Raises:
        ConfigError: a name is unknown or is no option to vary, or a range is not one of numbers.
    """
    return [_axis(name, values) for name, values in over.items()]


def _axis(name: str, given: str | Sequence[Any]) -> Axis:
    _check_name(name)
    if isinstance(given, str):
        if (ends := re.fullmatch(r"\s*(.+?)\s*\.\.\s*(.+?)\s*", given)) is not None:
            return _range(name, ends[1], ends[2])
        given = [parse_value(part) for part in _split(given)]
    values = list(given)
    if not values:
        raise ConfigError(f"--over {name}: give at least one value.")
    return Axis(name, tuple(value for place, value in enumerate(values) if value not in values[:place]))


def _check_name(name: str) -> None:
    if name in SET_BY_SWEEP:
        raise ConfigError(f"--over {name}: a sweep does not vary it ({SET_BY_SWEEP[name]}).")
    section, _, field = name.partition(".")
    if section == "corpus":
        raise ConfigError(f"--over {name}: the runs of a sweep need the same text, so give it with --set.")
    if name in CHOICES or (field and section in SECTIONS):
        return
    fields = {field: f"{section}.{field}" for section, field in _fields()}
    near = did_you_mean(name, [*CHOICES, *fields, *fields.values()])
    for field, path in fields.items():
        near = near.replace(f"'{field}'", f"'{path}'")
    raise ConfigError(f"--over {name}: there is no such option.{near} Write preset, family, tokens or SECTION.FIELD.")


def _fields() -> list[tuple[str, str]]:
    """Section and name of all options that may vary. Imports the models."""
    owners = {"training": [TrainingConfig]} | {
        kind: [known.resolve(each).Options for each in known.names()] for kind, known in ALL.items()
    }
    return [(section, field) for section, classes in owners.items() for each in classes for field in each.model_fields]


def _range(name: str, low: str, high: str) -> Axis:
    try:
        bounds = float(low), float(high)
    except ValueError:
        bounds = math.nan, math.nan
    if not (math.isfinite(bounds[0]) and math.isfinite(bounds[1]) and bounds[0] < bounds[1]):
        raise ConfigError(f"--over {name}={low}..{high}: a range is two numbers, the lower one first.")
    is_whole = _is_whole(name)
    if is_whole and not all(end.is_integer() for end in bounds):
        raise ConfigError(f"--over {name}={low}..{high}: the option takes whole numbers, so write whole numbers.")
    return Axis(name, bounds=bounds, is_whole=is_whole)


def _is_whole(name: str) -> bool:
    """Whether an option takes whole numbers only."""
    section, _, field = name.partition(".")
    classes: list[Any] = [TrainingConfig]
    if section in ALL:
        classes = [ALL[section].resolve(each).Options for each in ALL[section].names()]
    for each in classes:
        if field in each.model_fields:
            annotation = each.model_fields[field].annotation
            kinds = get_args(annotation) or (annotation,)
            return int in kinds and float not in kinds
    return False


def _split(text: str) -> list[str]:
    """The parts between commas that are outside brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for sign in text:
        if quote:
            quote = "" if sign == quote else quote
        elif sign == '"':
            quote = sign
        elif sign in "[{":
            depth += 1
        elif sign in "]}":
            depth -= 1
        if sign == "," and depth == 0 and not quote:
            parts.append("")
        else:
            parts[-1] += sign
    return [part.strip() for part in parts if part.strip()]


# -- searches ---------------------------------------------------------------------------------------------


def grid(axes: Sequence[Axis]) -> list[Values]:
    """All combinations; the last axis varies first.

    Raises:
        ConfigError: an axis is a range.
    """
    for axis in axes:
        if axis.bounds is not None:
            low, high = axis.bounds
            raise ConfigError(
                f"--over {axis.name}={low:g}..{high:g} is a range: add --random N to draw N configurations, or list "
                "its values."
            )
    names = [axis.name for axis in axes]
    return [
        dict(zip(names, combination, strict=True)) for combination in itertools.product(*(axis.values for axis in axes))
    ]


def draw(axes: Sequence[Axis], number: int, seed: int) -> list[Values]:
    """`number` different combinations, or all if there are fewer; the same for the same seed."""
    source = random.Random(seed)
    if all(axis.bounds is None for axis in axes):
        known = grid(axes)
        return source.sample(known, min(number, len(known)))
    columns = []
    for axis in axes:
        strata = list(range(number))
        source.shuffle(strata)
        columns.append([axis.at((stratum + source.random()) / number) for stratum in strata])
    names = [axis.name for axis in axes]
    drawn = [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
    return [values for place, values in enumerate(drawn) if values not in drawn[:place]]


def label(values: Values) -> str:
    """The values of a configuration in one line, such as gru-char, learning_rate=0.003."""
    return ", ".join(
        str(value) if name in CHOICES else f"{name.partition('.')[2]}={_shown(value)}" for name, value in values.items()
    )


def _shown(value: Any) -> str:
    """A value as typed."""
    if value is None:
        return "none"
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
