r"""Patterns of Oniguruma, which the library `tokenizers` cuts text with, in JavaScript.

    javascript_pattern(r"(?i:'s)|\s+")    "(?:'[sSſ])|[\t-\r\x20…]+"

The result is for the flags "gu". What has another meaning in JavaScript is written out; what is not known here is
refused, so that a browser never compiles what it does not have.
"""

from __future__ import annotations

import re

from lm.errors import UnsupportedExportError

_SPACE = r"\t-\r\x20\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_NO_SPACE = (
    r"\0-\x08\x0e-\x1f\x21-\x84\x86-\x9f\xa1-\u167f\u1681-\u1fff\u200b-\u2027\u202a-\u202e\u2030-\u205e\u2060-\u2fff"
    r"\u3001-\u{10ffff}"
)
_CATEGORY = re.compile("L[ultmo]?|M[nce]?|N[dlo]?|P[cdseifo]?|S[mcko]?|Z[slp]?|C[cfo]?")
_SCRIPT = re.compile("Arabic|Cyrillic|Devanagari|Greek|Han|Hangul|Hebrew|Hiragana|Katakana|Latin|Thai")
_PROPERTY = re.compile(r"([pP])\{(\^?)(\w+)\}")
_CODE = re.compile(r"x\{([0-9A-Fa-f]{1,6})\}|x([0-7][0-9A-Fa-f])|u([0-9A-Fa-f]{4})")
_GROUP = re.compile(r"\((?:\?(?:i:|:|=|!|<=|<!))?")
_COUNT = re.compile(r"\{(\d*)(,?)(\d*)\}")
_CONTROL = frozenset("rntfv")
_SYNTAX = frozenset(r"^$\.*+?()[]{}|/")
_OTHER_CASES = {"s": "\N{LATIN SMALL LETTER LONG S}", "k": "\N{KELVIN SIGN}"}
"""Letters outside ASCII that are equal to one of ASCII without regard to case."""


def javascript_pattern(pattern: str) -> str:
    """The pattern for `new RegExp(…, "gu")`.

    Raises:
        UnsupportedExportError: it has a part that is not known here.
    """
    return _Translation(pattern).result


class _Translation:
    """One pass over a pattern."""

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self.at = 0
        self.ignores_case = [False]  # of each open group
        parts = []
        while self.at < len(pattern):
            parts.append(self._part())
        self.result = "".join(parts)

    def _refused(self, what: str) -> UnsupportedExportError:
        shown = self.pattern if len(self.pattern) < 60 else f"{self.pattern[:60]}…"
        return UnsupportedExportError(
            f"The tokenizer cuts text into words by a pattern that no html page has ({what} in {shown!r}): export to "
            "hf or onnx."
        )

    def _take(self, expression: re.Pattern[str]) -> re.Match[str] | None:
        match = expression.match(self.pattern, self.at)
        if match is not None:
            self.at = match.end()
        return match

    def _next(self) -> str:
        self.at += 1
        return self.pattern[self.at - 1]

    def _part(self) -> str:
        """The next part outside of classes."""
        if match := self._take(_GROUP):
            if match[0] == "(" and self.pattern.startswith(("?", "*"), self.at):
                raise self._refused(f"({self.pattern[self.at : self.at + 2]}")
            self.ignores_case.append(match[0] == "(?i:" or self.ignores_case[-1])
            return "(?:" if match[0] in ("(", "(?i:") else match[0]
        char = self._next()
        if char == ")" and len(self.ignores_case) > 1:
            self.ignores_case.pop()
            return ")"
        if char == "[":
            return self._class()
        if char in "*+?{":
            return self._quantifier(char)
        if char == "\\":
            return self._escape(inside=False)
        if char == ".":
            return r"[^\n]"
        if char in "^$)":
            raise self._refused(char)
        return char if char == "|" else self._literal(char)

    def _quantifier(self, char: str) -> str:
        if char == "{":
            self.at -= 1
            match = self._take(_COUNT)
            if match is None or not (match[1] or match[3]):
                raise self._refused("{")
            char = f"{{{match[1] or 0}{match[2]}{match[3]}}}"
        if self.pattern.startswith("+", self.at):
            raise self._refused(f"{char}+")
        return char + (self._next() if self.pattern.startswith("?", self.at) else "")

    def _literal(self, char: str) -> str:
        """A character outside of classes."""
        cases = self._cases(char)
        return _escaped(char) if len(cases) == 1 else f"[{cases}]"

    def _cases(self, char: str) -> str:
        """A character, and those that are equal to it without regard to case, if that is so here."""
        if not self.ignores_case[-1] or char.lower() == char.upper():
            return char
        if not char.isascii():
            raise self._refused(f"{char} without regard to case")
        return char.lower() + char.upper() + _OTHER_CASES.get(char.lower(), "")

    def _escape(self, *, inside: bool) -> str:
        """An escape after its backslash; `inside` of a class."""
        if match := self._take(_PROPERTY):
            letter, name = match[1], match[3]
            if match[2]:
                letter = "P" if letter == "p" else "p"
            if _CATEGORY.fullmatch(name):
                return rf"\{letter}{{{name}}}"
            if _SCRIPT.fullmatch(name):
                return rf"\{letter}{{Script={name}}}"
            raise self._refused(rf"\{match[0]}")
        if match := self._take(_CODE):
            return self._literal(chr(int(match[1] or match[2] or match[3], 16)))
        if self.at == len(self.pattern):
            raise self._refused("\\")
        char = self._next()
        if char in _CONTROL:
            return f"\\{char}"
        if char in "sS":
            content = _SPACE if char == "s" else _NO_SPACE
            return content if inside else f"[{content}]"
        if char in "dD":
            return r"\p{Nd}" if char == "d" else r"\P{Nd}"
        if char.isalnum():
            raise self._refused(f"\\{char}")
        return _escaped(char)

    def _class(self) -> str:
        """A class after its "["."""
        parts = ["[^" if self.pattern.startswith("^", self.at) else "["]
        self.at += len(parts[0]) - 1
        before = None  # the last character, if it may begin a range
        while True:
            if self.at >= len(self.pattern):
                raise self._refused("[")
            if self.pattern.startswith("&&", self.at):
                raise self._refused("&&")
            char = self._next()
            if char == "]" and len(parts) > 1:
                return "".join(parts) + "]"
            if char == "[":
                raise self._refused("a class in a class")
            if char == "-" and before is not None and not self.pattern.startswith("]", self.at):
                parts.append(self._range(before))
                before = None
                continue
            if char == "\\":
                begin = self.at
                text = self._escape(inside=True)
                single = self.pattern[begin : self.at]
                before = single if len(single) == 1 and not single.isalnum() else None
            else:
                text, before = "".join(map(_escaped, self._cases(char))), char
            parts.append(text)

    def _range(self, before: str) -> str:
        """The end of a range of a class, from its "-"."""
        char = self._next()
        if char == "\\":
            char = self._next()
        if char in "[\\" or char.isalnum() != before.isalnum():
            raise self._refused(f"{before}-{char}")
        if self.ignores_case[-1]:
            raise self._refused(f"{before}-{char} without regard to case")
        return f"-{_escaped(char)}"


def _escaped(char: str) -> str:
    """A character as itself, anywhere in a pattern of JavaScript."""
    if char == "-":
        return r"\x2d"
    return f"\\{char}" if char in _SYNTAX else char
