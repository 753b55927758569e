"""Messages to the visitor: error messages, and handlers that show them."""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import logging
import re
from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr

from lm.errors import LMError
from lm.html_parts import escape
from serve.http_errors import RequestError

log = logging.getLogger(__name__)

_COMMAND = re.compile(
    r"(?<![\w-])--[a-z]|\blm (bench|chat|eval|init|prepare|sample|serve|show|state|train)\b|\bpip install\b"
)
_FLAG = re.compile(r"(?<![\w-])--([a-z][a-z-]*)")
_SENTENCE = re.compile(r"(?<=[.!?]) (?=[A-Z])")
_CLAUSE = re.compile(r"(?=, or |, and |; |: |, )")


def without_commands(message: str) -> str:
    """A message of the library without advice to type a command or a flag: a visitor has no command line.

    A sentence ends before the clause with such advice. A sentence with no other clause is left out. If no sentence
    remains, the result is the first clause of the message, with flags as plain words.
    """
    kept = []
    # "--precision bf16: …" at the beginning names the subject of the message.
    for sentence in _SENTENCE.split(re.sub(r"^--(?=[a-z])", "", message)):
        clauses = _CLAUSE.split(sentence)
        good = list(itertools.takewhile(lambda clause: not _COMMAND.search(clause), clauses))
        if len(good) == len(clauses):
            kept.append(sentence)
            continue
        if len(good) > 1 and clauses[len(good)].startswith(": ") and good[-1].startswith((", or ", ", and ", "; ")):
            # This clause only introduces the advice.
            good.pop()
        if good:
            kept.append("".join(good).rstrip(" .") + ".")
    first = _FLAG.sub(lambda flag: flag[1].replace("-", " "), _CLAUSE.split(message)[0])
    return " ".join(kept) or first.rstrip(" .") + "."


def page_error(message: str) -> gr.Error:
    """An error to raise: the page shows it in a corner."""
    return gr.Error(escape(message), print_exception=False)


def attach(event: Any, handler: Callable[..., Any], inputs: Any, outputs: Any, **settings: Any) -> Any:
    """Run a handler (coroutine or asynchronous generator) at an event, or at each of a list of events.

    Errors become messages. Handlers of several visitors run at the same time, and no progress bar covers the outputs.
    """
    listen = functools.partial(gr.on, event) if isinstance(event, list) else event
    return listen(
        with_error_messages(handler), inputs, outputs, concurrency_limit=None, api_visibility="private",
        show_progress="hidden", **settings,
    )  # fmt: skip


def with_error_messages(handler: Callable[..., Any]) -> Callable[..., Any]:
    """A handler (coroutine or asynchronous generator) whose errors the page shows as a sentence."""
    if inspect.isasyncgenfunction(handler):

        @functools.wraps(handler)
        async def stream(*args: Any, **kwargs: Any) -> Any:
            with _errors_as_messages():
                async with contextlib.aclosing(handler(*args, **kwargs)) as values:
                    async for value in values:
                        yield value

        return stream

    @functools.wraps(handler)
    async def answer(*args: Any, **kwargs: Any) -> Any:
        with _errors_as_messages():
            return await handler(*args, **kwargs)

    return answer


@contextlib.contextmanager
def _errors_as_messages() -> Iterator[None]:
    try:
        yield
    except gr.Error:
        raise
    except (LMError, RequestError) as error:
        raise page_error(without_commands(error.detail if isinstance(error, RequestError) else str(error))) from None
    except Exception as error:
        log.exception("The page failed.")
        raise page_error("Internal error. The server's log has the details.") from error
