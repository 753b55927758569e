"""docs/options.md: every option there is, written from the fields that declare them.

    python docs/make_options.py        # or: make options

A test in tests/repo fails while the page says something else than the fields.
"""

from __future__ import annotations

import itertools
import types
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ByteSize, ValidationError
from pydantic.fields import FieldInfo

from lm.config import CorpusConfig, TrainingConfig
from lm.generation.options import SamplingOptions
from lm.registry import MODELS, TOKENIZERS, Registry
from serve.settings import ServeOptions

PAGE = Path(__file__).with_name("options.md")

HEAD = """\
# Every option

<!-- Written by `make options` from the fields that declare the options: change those, not this page. -->

`lm train SOURCE --set SECTION.FIELD=VALUE` sets any option of the first four sections, also to `none` where its values
say so; `--config run.toml` holds the same sections and fields. Presets (`lm/presets/`) change some of the defaults.
What the options do to training: [training.md](training.md); to a text: [corpora.md](corpora.md); to a sample:
[sampling.md](sampling.md).
"""
SECTIONS = {
    "training": "The same for every model.",
    "corpus": "`lm train SOURCE` is `corpus.source`, which `--set` does not take; `--text-column`, `--encoding` and "
    "`--split-fractions` are flags too.",
    "sampling": "Flags of `lm sample`: `top_k` is `--top-k`, `n` is `-n`, `banned_tokens` is `--banned-token` and may "
    "be given several times, `logit_bias` is JSON. Left out, `--seed` is a new one each time.",
    "serve": "Flags of `lm serve`, which takes `runs` as arguments: `max_batch` is `--max-batch`. Sizes are written "
    "`2GB`, `64MiB`. What they mean together: [serving.md](serving.md).",
}
NUMBERS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


def page() -> str:
    """The whole page."""
    parts = [
        HEAD,
        section("training", TrainingConfig),
        section("corpus", CorpusConfig),
        *registered(TOKENIZERS),
        *registered(MODELS),
        section("sampling", SamplingOptions),
        section("serve", ServeOptions),
    ]
    return "\n".join(parts)


def section(name: str, options: type[BaseModel]) -> str:
    """One section with its heading."""
    return f"## {name}\n\n{SECTIONS[name]}\n\n{table(options)}"


def registered(registry: Registry[Any]) -> Iterator[str]:
    """One table for each class of options, under the registered names that share it."""
    kind = registry.kind
    yield f"## {kind}\n\n`{kind}.type` says which one; each has options of its own.\n"

    def owner(name: str) -> type[BaseModel]:
        options: type[BaseModel] = registry.resolve(name).Options
        return options

    names = sorted(registry.names(), key=lambda name: (owner(name).__name__, name))
    for options, shared in itertools.groupby(names, key=owner):
        title = ", ".join(f"`{kind}.type={name}`" for name in shared)
        yield f"### {title}\n\n{table(options, leave_out=('type',))}"


def table(options: type[BaseModel], *, leave_out: tuple[str, ...] = ()) -> str:
    """A line for each field."""
    rows = ["| option | default | values | what it is |", "|---|---|---|---|"]
    for name, field in options.model_fields.items():
        if name not in leave_out:
            cells = (f"`{name}`", default(field), values(options, name), escaped(field.description or ""))
            rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def escaped(text: str) -> str:
    """Plain text as Markdown in a table."""
    return text.replace("<", "&lt;").replace("|", "\\|")


def default(field: FieldInfo) -> str:
    """As it is written after `--set`."""
    if field.is_required():
        return "has to be given"
    value = field.get_default(call_default_factory=True)
    match value:
        case None:
            return "none"
        case () | dict() if not value:
            return "empty"
        case ByteSize():
            return f"`{value.human_readable()}`"
        case bool():
            return f"`{str(value).lower()}`"
        case tuple():
            return f"`[{','.join(map(str, value))}]`"
    return f"`{value}`"


def values(options: type[BaseModel], name: str) -> str:
    """The choices, or the type with its bounds."""
    field = options.model_fields[name]

    def refused(choice: str) -> bool:
        # A class may narrow the choices of the one that it is made from by a validator.
        try:
            options.__pydantic_validator__.validate_assignment(options.model_construct(), name, choice)
        except ValidationError:
            return True
        return False

    limits = dict.fromkeys([*bounds(field.metadata), *inner_bounds(field.annotation)])
    return ", ".join([kind(field.annotation, refused), *limits])


def bounds(metadata: Iterable[Any]) -> Iterator[str]:
    """The limits of a number."""
    for limit in metadata:
        for bound, sign in NUMBERS.items():
            if hasattr(limit, bound):
                yield f"{sign} {number(getattr(limit, bound))}"


def inner_bounds(annotation: Any) -> Iterator[str]:
    """The limits of the numbers in a list, a choice or a map's values."""
    for part in getattr(annotation, "__metadata__", ()):
        yield from bounds(getattr(part, "metadata", ()))
    arguments = get_args(annotation)
    for each in arguments[1:] if get_origin(annotation) is dict else arguments:
        yield from inner_bounds(each)


def number(value: float) -> str:
    """2**63 - 1 rather than nineteen digits."""
    return "2^63 - 1" if value == 2**63 - 1 else f"{value:,}"


def kind(annotation: Any, refused: Callable[[str], bool]) -> str:
    """A type in words."""
    arguments = get_args(annotation)
    origin = get_origin(annotation)
    if origin is Literal:
        return ", ".join(f"`{choice}`" for choice in arguments if not refused(choice))
    if origin in (Union, types.UnionType):
        return " or ".join(kind(each, refused) for each in arguments)
    if origin is tuple:
        several = "list of" if arguments[-1] is Ellipsis else f"{len(arguments)}"
        return f"{several} {kind(arguments[0], refused)}s"
    if origin is dict:
        return f"map of {' to '.join(f'{kind(each, refused)}s' for each in arguments)}"
    if hasattr(annotation, "__metadata__"):
        return kind(arguments[0], refused)
    words = {int: "integer", float: "number", str: "text", bool: "`true` or `false`", type(None): "none"}
    words |= {ByteSize: "size", Path: "path"}
    return words.get(annotation, getattr(annotation, "__name__", str(annotation)))


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
