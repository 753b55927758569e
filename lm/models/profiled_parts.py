"""Names for the parts of a model's work that are no call of a module, for whoever watches (`lm profile`).

    logits = part("output", linear, hidden, weight, bias)

The native kernels do the work of several modules at once, or of a part of one, and an output layer is none at all where
its matrix is the embedding: hooks on modules do not see such work. A named part is seen whichever way it runs. Without
a watcher it is the plain call.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
Watcher = Callable[[str, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
"""Gets the name of a part, its work and what that is given; does it, and returns what it gave."""

LOSS = "loss"
"""The part that a step's loss is computed in, and all that follows it."""
OUTPUT_AND_LOSS = "output and loss"
"""The same, where logits and loss are computed together."""

_watcher: ContextVar[Watcher | None] = ContextVar("watcher", default=None)


def part(name: str, work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """`work(*args, **kwargs)`, shown to the watcher under this name."""
    watcher = _watcher.get()
    if watcher is None:
        return work(*args, **kwargs)
    result: R = watcher(name, work, args, kwargs)
    return result


@contextlib.contextmanager
def watched_by(watcher: Watcher) -> Iterator[None]:
    """Inside, `watcher` sees the parts that run in this thread."""
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)
