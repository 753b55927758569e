"""Chat templates: a conversation as the text that the model was trained to continue.

A template is a program in the language Jinja that comes with a model from elsewhere. It runs in a sandbox: it reads
the messages and returns text, and can change nothing.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, NoReturn

from lm.errors import TokenizerError

if TYPE_CHECKING:
    import jinja2

Message = Mapping[str, Any]
"""A turn: "role" ("system", "user" or "assistant") and "content"."""


def render_chat(
    template: str, messages: Sequence[Message], *, tokens: Mapping[str, str], add_generation_prompt: bool = True
) -> str:
    """The text of a conversation, as `apply_chat_template` of the library transformers renders it.

    Args:
        template: the source in Jinja.
        messages: the turns, in order.
        tokens: the special tokens that a template may name, such as "bos_token".
        add_generation_prompt: end with the beginning of a reply.

    Raises:
        TokenizerError: the template has an error, refuses these messages, or gives no prompt.
    """
    import jinja2

    compiled = _compiled(template)
    try:
        text = compiled.render(
            messages=[dict(message) for message in messages],
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **tokens,
        )
    except jinja2.exceptions.TemplateError as error:
        raise TokenizerError(f"The chat template of the model refuses these messages: {error.message}") from None
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        raise TokenizerError(f"The chat template of the model failed on these messages: {error}.") from None
    if add_generation_prompt and not text:
        raise TokenizerError("The chat template of the model gives no text for these messages.")
    return text


@functools.lru_cache(maxsize=16)
def _compiled(template: str) -> jinja2.Template:
    """The template in the environment that templates of models are written for.

    Raises:
        TokenizerError: it is not a template.
    """
    import jinja2
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_generation_tag(), loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.now().astimezone().strftime(pattern)
    try:
        return environment.from_string(template)
    except jinja2.exceptions.TemplateError as error:
        line = getattr(error, "lineno", None)
        where = f", line {line}" if line else ""
        raise TokenizerError(f"The chat template of the model is not valid Jinja{where}: {error.message}") from None


@functools.cache
def _generation_tag() -> type[jinja2.ext.Extension]:
    """The tag `{% generation %}`, which marks replies for training in some templates: its content alone."""
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.parser import Parser

    class Generation(Extension):
        tags = {"generation"}

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    return Generation


def _raise_exception(message: str) -> NoReturn:
    import jinja2

    raise jinja2.exceptions.TemplateError(message)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Jinja's own filter escapes characters for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
