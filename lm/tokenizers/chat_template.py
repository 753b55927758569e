"""Chat templates: a conversation as the text that the model was trained to continue.

A template is a program in the language Jinja that comes with a model from elsewhere. It runs in a sandbox: it reads
the messages and returns text, and can change nothing.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, NoReturn

from lm.errors import TokenizerError

if TYPE_CHECKING:
    import jinja2

Message = Mapping[str, Any]
"""A turn: "role" ("system", "user" or "assistant") and "content"."""


MAX_STEPS = 100_000
"""Of the loops and macros of a template, in a conversation; more is refused."""
MAX_CHARACTERS = 16 << 20
"""Of the text of a conversation; more is refused."""
_MAX_POWER = 64
_STEP, _CONCAT = "_step", "_concat"
_PADDING = ("center", "ljust", "rjust", "zfill", "expandtabs", "format", "format_map")
"""Methods that make a text of any length of a short one."""


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

    compiled, steps, parts, size = _compiled(template), itertools.count(1), [], 0
    try:
        for part in compiled.generate(
            messages=[dict(message) for message in messages],
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **{**tokens, _STEP: lambda: _checked_size(next(steps), MAX_STEPS, "steps")},
        ):
            size = _checked_size(size + len(part), MAX_CHARACTERS, "characters")
            parts.append(part)
        text = "".join(parts)
    except jinja2.exceptions.TemplateError as error:
        raise TokenizerError(f"The chat template of the model refuses these messages: {error.message}") from None
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError, MemoryError) as error:
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
    from jinja2 import nodes
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.visitor import NodeTransformer

    class _Bounded(NodeTransformer):
        """Texts are joined by a function that knows the limit."""

        def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
            self.generic_visit(node)
            return nodes.Call(nodes.Name(_CONCAT, "load"), node.nodes, [], None, None).set_lineno(node.lineno)

    class Environment(ImmutableSandboxedEnvironment):
        """Counts the steps of loops and macros, and refuses to make a text that fills the memory."""

        intercepted_binops = frozenset(["*", "**", "%", "+"])

        def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
            tree = super()._parse(source, name, filename)
            node: Any
            for node in [*tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock))]:
                count = nodes.Call(nodes.Name(_STEP, "load"), [], [], None, None)
                node.body.insert(0, nodes.ExprStmt(count).set_lineno(node.lineno))
            bounded: nodes.Template = _Bounded().visit(tree)
            bounded.set_environment(self)
            return bounded

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if operator == "%" and isinstance(left, str):
                raise _refused("formats a text with %")
            if operator == "+" and isinstance(left, str | list | tuple) and isinstance(right, str | list | tuple):
                _checked_size(len(left) + len(right), MAX_CHARACTERS, "characters")
            if operator == "*":
                for text, times in ((left, right), (right, left)):
                    if isinstance(text, str | list | tuple) and isinstance(times, int):
                        _checked_size(len(text) * times, MAX_CHARACTERS, "characters")
            if operator == "**" and max(abs(left), abs(right)) > _MAX_POWER:
                raise _refused("has a power that is too large")
            return super().call_binop(context, operator, left, right)

        def call(self, context: Any, obj: Any, /, *args: Any, **given: Any) -> Any:
            if isinstance(text := getattr(obj, "__self__", None), str):
                # Jinja adds them to calls inside loops and blocks.
                kwargs = {key: value for key, value in given.items() if key not in ("_loop_vars", "_block_vars")}
                if obj.__name__ == "replace":
                    return _replace(text, *args, **kwargs)
                if obj.__name__ == "join" and len(args) == 1:
                    return _join(args[0], text)
                return super().call(context, obj, *args, **kwargs)
            return super().call(context, obj, *args, **given)

        def wrap_str_format(self, value: Any) -> None:
            """No text has the method format."""

        def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
            return attr not in _PADDING and super().is_safe_attribute(obj, attr, value)

    environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_generation_tag(), loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.filters["replace"] = _replace
    environment.filters["join"] = _join
    environment.globals[_CONCAT] = lambda *parts: _join(parts)
    for name in ("center", "batch", "slice", "format", "indent", "wordwrap"):
        del environment.filters[name]
    for name in ("lipsum", "cycler", "joiner"):
        del environment.globals[name]
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


def _checked_size(size: int, most: int, unit: str) -> int:
    """`size`, if it is at most `most`."""
    if size > most:
        raise _refused(f"takes more than {most:,} {unit}")
    return size


def _replace(text: Any, old: Any, new: Any, count: int | None = None) -> str:
    """`str.replace` within the limit."""
    whole, before, after = str(text), str(old), str(new)
    found = whole.count(before) if count is None or count < 0 else min(whole.count(before), count)
    _checked_size(len(whole) + found * (len(after) - len(before)), MAX_CHARACTERS, "characters")
    return whole.replace(before, after, found)


def _join(parts: Any, between: Any = "", attribute: str | None = None) -> str:
    """`str.join` within the limit, as the filter `join`: of an attribute of each part if one is named."""
    if attribute is not None:
        parts = [part[attribute] for part in parts]
    texts, separator = [str(part) for part in parts], str(between)
    _checked_size(sum(map(len, texts)) + len(separator) * len(texts), MAX_CHARACTERS, "characters")
    return separator.join(texts)


def _refused(what: str) -> Exception:
    import jinja2

    return jinja2.exceptions.SecurityError(f"it {what}.")


def _raise_exception(message: str) -> NoReturn:
    import jinja2

    raise jinja2.exceptions.TemplateError(message)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Jinja's own filter escapes characters for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
