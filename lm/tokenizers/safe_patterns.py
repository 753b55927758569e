r"""Regular expressions of a stranger's tokenizer, which may not take hours on a text of ordinary length.

The library `tokenizers` searches by trying (Oniguruma). A pattern such as `(a+)+b` makes it try 2^N ways on N letters.
A pattern is accepted if this cannot happen:

- what repeats is a single symbol or class, or a group of fixed length without a choice: ` ?\p{L}+`, `(?:\d{3})*`;
- at most `MAX_REPEATS` parts of one alternative repeat without a small limit, so that the ways grow as a low power of
  the length; its other repeats and choices together have at most `MAX_WAYS` ways;
- it has no reference to a group, no call of one and no condition.

The patterns of GPT-2, GPT-4o, Llama 3, Qwen, DeepSeek and other known models are accepted.

Source: Kirrage, Rathnayake and Thielecke 2013, "Static Analysis for Regular Expression Denial-of-Service Attacks".
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

MAX_REPEATS = 3
SMALL = 16
"""A repeat of at most so many times has a small limit."""
MAX_WAYS = 1000
MAX_CHARACTERS = 10_000
"""Of a pattern."""
_SHOWN = 60
_QUANTIFIER = re.compile(r"[*+?][?+]?|\{(\d*)(,?)(\d*)\}")
_GROUP = re.compile(r"\((?:\?(?:[ims-]*:|[ims-]+\)|=|!|<=|<!|>|P?<\w+>|#[^)]*\)))?")
_ESCAPE = re.compile(r"\\(?:[pP]\{[^}]*\}|x\{[^}]*\}|x[0-9a-fA-F]{1,2}|u[0-9a-fA-F]{4}|.)", re.DOTALL)


class UnsafePatternError(ValueError):
    """A pattern may take too long."""


def check_patterns(content: Mapping[str, Any]) -> None:
    """Check the regular expressions with which a tokenizer.json changes and cuts text.

    Raises:
        UnsafePatternError: one may take too long; a sentence names it.
    """
    for part in ("normalizer", "pre_tokenizer"):
        for pattern in _expressions(content.get(part)):
            try:
                _check(pattern)
            except UnsafePatternError as error:
                shown = pattern if len(pattern) <= _SHOWN else f"{pattern[: _SHOWN - 1]}…"
                raise UnsafePatternError(
                    f"its {part} has the pattern {shown!r}, with which encoding could take hours: {error}."
                ) from None


def _expressions(part: Any) -> Iterator[str]:
    """The values of "Regex" anywhere in a part."""
    if isinstance(part, Mapping):
        for key, value in part.items():
            if key == "Regex" and isinstance(value, str):
                yield value
            else:
                yield from _expressions(value)
    elif isinstance(part, list):
        for each in part:
            yield from _expressions(each)


@dataclass
class _Group:
    """What is known of an open group; `repeats` and `ways` are those of the alternative that is read."""

    varies: bool = False
    """Whether its length may vary, or it has a choice."""
    repeats: int = 0
    ways: int = 1
    most_repeats: int = 0
    all_ways: int = 0
    """Of the alternatives before it."""
    last: _Group | None = None
    """What a quantifier would repeat, if that is not a single symbol or class."""

    def add(self, *, repeats: int = 0, ways: int = 1) -> None:
        """Add a part to the alternative that is read."""
        self.repeats += repeats
        self.ways *= ways
        if self.repeats > MAX_REPEATS:
            raise UnsafePatternError(f"more than {MAX_REPEATS} parts in a row repeat without a small limit")
        if self.ways > MAX_WAYS:
            raise UnsafePatternError(f"its repeats and choices have more than {MAX_WAYS:,} ways")

    def end_alternative(self) -> None:
        """The alternative is complete."""
        self.most_repeats = max(self.most_repeats, self.repeats)
        self.all_ways += self.ways
        self.repeats, self.ways, self.last = 0, 1, None


def _check(pattern: str) -> None:
    """Raises UnsafePatternError with the reason."""
    if len(pattern) > MAX_CHARACTERS:
        raise UnsafePatternError(f"it has more than {MAX_CHARACTERS:,} characters")
    groups, at = [_Group()], 0
    while at < len(pattern):
        here, char = groups[-1], pattern[at]
        if char == "\\":
            match = _ESCAPE.match(pattern, at)
            if match is None or match[0][1] in "123456789kgKX":
                raise UnsafePatternError("it refers to a group, or has an escape that is not supported")
            at, here.last = match.end(), None
        elif char == "[":
            at, here.last = _class_end(pattern, at), None
        elif char == "(":
            match = _GROUP.match(pattern, at)
            assert match is not None, "a parenthesis alone matches"
            at = match.end()
            if pattern.startswith("?", at):
                raise UnsafePatternError("it has a kind of group that is not supported")
            # "(?i)" and a comment are complete.
            if not match[0].endswith(")"):
                groups.append(_Group())
        elif char == ")":
            at += 1
            if len(groups) > 1:
                closed = groups.pop()
                closed.end_alternative()
                groups[-1].add(repeats=closed.most_repeats, ways=closed.all_ways)
                groups[-1].varies |= closed.varies
                groups[-1].last = closed
        elif char == "|":
            at += 1
            here.end_alternative()
            here.varies = True
        elif (match := _QUANTIFIER.match(pattern, at)) is not None:
            at = match.end()
            _repeat(here, match)
        else:
            at, here.last = at + 1, None


def _repeat(here: _Group, match: re.Match[str]) -> None:
    """A quantifier of what stands before it."""
    least, most = _bounds(match)
    if here.last is not None and here.last.varies and (most is None or most > 1):
        raise UnsafePatternError("a group repeats whose own length varies, or that has a choice")
    if most is None or most > SMALL:
        here.add(repeats=1)
    else:
        here.add(ways=most - least + 1)
    here.varies |= least != most
    # A second quantifier, as in "a{2}{3}", repeats all of it.
    here.last = _Group(varies=least != most)


def _bounds(match: re.Match[str]) -> tuple[int, int | None]:
    """How often a quantifier repeats, at least and at most; None: without a limit."""
    if match[0][0] in "*+?":
        return int(match[0][0] == "+"), 1 if match[0][0] == "?" else None
    least = int(match[1] or 0)
    return least, least if not match[2] else int(match[3]) if match[3] else None


def _class_end(pattern: str, at: int) -> int:
    """The place after a class in brackets; classes may be nested."""
    depth = 0
    while at < len(pattern):
        char = pattern[at]
        if char == "\\":
            at += 2
            continue
        at += 1
        if char == "[":
            depth += 1
            # A bracket at the begin is itself.
            at += pattern.startswith("^", at)
            at += pattern.startswith("]", at)
        elif char == "]":
            depth -= 1
            if depth == 0:
                return at
    return at
