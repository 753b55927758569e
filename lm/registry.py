"""Short name → class; a class is imported at its first use.

A file in `lm/models/`, `lm/tokenizers/` or `lm/kernels/` registers its classes with one literal line:

    REGISTERS = {"gru": "Recurrent", "lstm": "Recurrent"}

The registry reads that line from the source, so that listing the names imports neither torch nor any model. A new model
or tokenizer is one new file.
"""

from __future__ import annotations

import ast
import difflib
import functools
import importlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from lm.errors import ConfigError

if TYPE_CHECKING:
    from lm.kernels.decoding import Kernel
    from lm.models.base import LanguageModel
    from lm.tokenizers.base import Tokenizer

T = TypeVar("T")

MIN_PREFIX = 2
"""Letters that count as the start of a name."""
MAX_SUGGESTIONS = 8


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """ " Did you mean 'gru'?" for names that start with `name`, else for the most similar one; "" if none is."""
    names = list(known)
    near = [each for each in names if each.startswith(name)] if len(name) >= MIN_PREFIX else []
    near = [repr(each) for each in near or difflib.get_close_matches(name, names, n=1, cutoff=0.5)]
    if not near:
        return ""
    *others, last = near[:MAX_SUGGESTIONS]
    return f" Did you mean {', '.join(others)} or {last}?" if others else f" Did you mean {last}?"


class Registry(Generic[T]):
    """The classes of one kind, by name, in the files of one package."""

    def __init__(self, kind: str, package: str) -> None:
        self.kind = kind
        self._package = package
        self._added: dict[str, str] = {}

    @functools.cached_property
    def _found(self) -> dict[str, str]:
        folder = Path(__file__).parent.joinpath(*self._package.split(".")[1:])
        found: dict[str, str] = {}
        for file in sorted(folder.glob("*.py")):
            for node in ast.parse(file.read_text("utf-8")).body:
                match node:
                    case ast.Assign(targets=[ast.Name(id="REGISTERS")], value=value):
                        for name, cls in ast.literal_eval(value).items():
                            found[name] = f"{self._package}.{file.stem}:{cls}"
        return found

    def add(self, name: str, import_string: str) -> None:
        """Register a class of another package, as "package.module:Class"."""
        self._added[name] = import_string

    def names(self) -> tuple[str, ...]:
        """All registered names, sorted. Imports nothing."""
        return tuple(sorted({**self._found, **self._added}))

    def resolve(self, name: str) -> type[T]:
        """The class registered under `name`.

        Raises:
            ConfigError: the name is not registered.
        """
        strings = {**self._found, **self._added}
        if name not in strings:
            raise ConfigError(
                f"Unknown {self.kind} {name!r}.{did_you_mean(name, strings)} Known: {', '.join(sorted(strings))}."
            )
        module, _, attribute = strings[name].partition(":")
        return cast("type[T]", getattr(importlib.import_module(module), attribute))


MODELS: Registry[LanguageModel] = Registry("model", "lm.models")
TOKENIZERS: Registry[Tokenizer] = Registry("tokenizer", "lm.tokenizers")
KERNELS: Registry[Kernel] = Registry("kernel", "lm.kernels")
"""Native decoding kernels, by the type of the model."""
ALL: dict[str, Registry[Any]] = {"model": MODELS, "tokenizer": TOKENIZERS}
