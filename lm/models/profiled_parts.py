"""Names for the parts of a model's work that no module call covers, for `lm profile`.

    logits = run_part("output", linear, hidden, weight, bias)

A native kernel does the work of several modules in one call, and a tied output layer has no module, so hooks on modules
cannot observe them. Without an observer a part is a plain call, and always while torch compiles: the compiler cannot
trace a context variable.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")
Observer = Callable[[str, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
"""Gets the name of a part, its function and the arguments; calls the function and returns its result."""

LOSS = "loss"
"""The part that computes a step's loss."""
OUTPUT_AND_LOSS = "output and loss"
"""The same, if logits and loss are computed together."""

_observer: ContextVar[Observer | None] = ContextVar("observer", default=None)


def run_part(name: str, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """`function(*args, **kwargs)`, observed under this name."""
    observer = None if torch.compiler.is_compiling() else _observer.get()
    if observer is None:
        return function(*args, **kwargs)
    result: R = observer(name, function, args, kwargs)
    return result


@contextlib.contextmanager
def observe_parts(observer: Observer) -> Iterator[None]:
    """Inside, `observer` observes the parts that this thread runs."""
    token = _observer.set(observer)
    try:
        yield
    finally:
        _observer.reset(token)
