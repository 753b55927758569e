"""The signature of a figure: one line that says how it was measured, so that anyone can measure it again.

    bpb:1.6234|den:bytes|ctx:carried|unk:replace+spelling|text:3f2a9c01d4e5|tok:9be17a3344f0|prec:fp32|v:0.2.0

part    means
bpb     bits per byte; or loss, nats per token, where bits per byte are unknown; or ppl, perplexity per word, of a
        convention
den     what the figure is divided by: bytes, tokens, or what the convention counts
ctx     context rule: carried; carried-ROWS or carried-ROWS-warm-TOKENS in parallel parts; window-TOKENS-STRIDE;
        conversations: each by itself, and the answers alone
unk     policy for unknown symbols; +spelling if their spelling is part of the figure
text    start of the SHA-256 of the UTF-8 text
tok     start of the SHA-256 of the tokenizer's file
prec    number format of the matrix products
conv    how another program counts, if the figure follows it: lm-eval, kenlm or srilm
v       version of Inkling

The idea is SacreBLEU's (Post 2018, "A Call for Clarity in Reporting BLEU Scores"). Needs no torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

from lm.errors import ConfigError
from lm.registry import did_you_mean

if TYPE_CHECKING:
    from lm.evaluation.report import Report

Kind = Literal["bpb", "loss", "ppl"]
DENOMINATORS: dict[Kind, str] = {"bpb": "bytes", "loss": "tokens"}
"""Of the figures of the report."""
CONVENTION_FIGURES: dict[str, tuple[Kind, str, str]] = {
    "lm-eval": ("bpb", "bits_per_byte", "bytes"),
    "kenlm": ("ppl", "perplexity_including_oovs", "words+lines"),
    "srilm": ("ppl", "ppl", "known-words+sentences"),
}
"""Convention → kind, name and denominator of its figure, as `lm.evaluation.conventions` gives it."""
SPELLING = "+spelling"
HASH = 12
"""Hexadecimal digits of a hash."""
DECIMALS = 4
"""Of the value."""
TOLERANCE = 1e-4
"""Largest difference of a value that reproduces; processors and thread counts round differently. A share for `ppl`."""
ROUGH_TOLERANCE = 2e-3
"""The same with less precise products than fp32."""
EXACT = ("fp32",)
"""Precisions with `TOLERANCE`."""
EXAMPLE = "bpb:1.6234|den:bytes|ctx:carried|unk:replace+spelling|text:3f2a9c01d4e5|tok:9be17a3344f0|prec:fp32|v:0.2.0"

_NAMES = {
    "den": "denominator", "ctx": "context", "unk": "unknown", "text": "text", "tok": "tokenizer",
    "prec": "precision", "conv": "convention", "v": "version",
}  # fmt: skip
"""Name of a part in the line → field, in their order."""
_OPTIONAL = ("convention",)
_WINDOW = re.compile(r"sliding window of ([\d,]+) tokens, stride ([\d,]+)")
_ROWS = re.compile(r"within each of ([\d,]+) equal parts")
_WARM = re.compile(r"after the ([\d,]+) tokens before it")
_CONTEXT = re.compile(r"carried(-\d+(-warm-\d+)?)?|window-(\d+)-(\d+)|\w[\w.-]*")


@dataclass(frozen=True)
class Signature:
    """How a figure was measured, and its value."""

    kind: Kind
    value: float
    denominator: str
    context: str
    unknown: str
    text: str
    tokenizer: str
    precision: str
    version: str
    convention: str | None = None

    def __str__(self) -> str:
        parts = [f"{self.kind}:{self.value:.{DECIMALS}f}"]
        for name, field in _NAMES.items():
            value = getattr(self, field)
            if value is not None:
                parts.append(f"{name}:{value}")
        return "|".join(parts)

    @property
    def tolerance(self) -> float:
        """Largest difference of a value that reproduces."""
        scale = max(1.0, self.value) if self.kind == "ppl" else 1.0
        return scale * (TOLERANCE if self.precision in EXACT else ROUGH_TOLERANCE)

    @property
    def stride(self) -> int | None:
        """Stride of the sliding window; None if there is no window."""
        found = _CONTEXT.fullmatch(self.context)
        return int(found[4]) if found and found[4] else None

    def is_of_text(self, sha256: str) -> bool:
        """Whether the figure is of the text with this hash."""
        return _same_hash(self.text, sha256)


@dataclass(frozen=True)
class Check:
    """Whether a figure reproduces."""

    expected: Signature
    measured: Signature
    differences: tuple[str, ...]
    """A sentence for each part that differs, the value last; empty if the figure reproduces."""
    notes: tuple[str, ...] = ()
    """Differences that do not matter."""

    @property
    def reproduces(self) -> bool:
        """Whether nothing that matters differs."""
        return not self.differences

    @property
    def sentence(self) -> str:
        """The result in one sentence."""
        if self.reproduces:
            gap = abs(self.measured.value - self.expected.value)
            return f"The figure reproduces: {self.measured.value:.6f}, within {gap:.6f} of the signature's."
        return f"The figure does not reproduce: {' '.join(self.differences)}"


def signature_of(report: Report, *, unknown: str, tokenizer_sha256: str) -> Signature:
    """The signature of a report's bits per byte; of its loss where these are unknown.

    Args:
        report: the report.
        unknown: policy for unknown symbols.
        tokenizer_sha256: hash of the tokenizer's file.
    """
    known = report.bits_per_byte is not None
    kind: Kind = "bpb" if known else "loss"
    value = report.bits_per_byte if report.bits_per_byte is not None else report.loss
    return Signature(
        kind=kind,
        value=value,
        denominator=DENOMINATORS[kind],
        context=context_code(report.context),
        unknown=unknown + SPELLING if known else unknown,
        text=report.text_sha256[:HASH],
        tokenizer=tokenizer_sha256[:HASH],
        precision=report.precision,
        version=report.version,
    )


def convention_signature(static: Signature, convention: str, figures: Mapping[str, Any]) -> Signature | None:
    """The signature of the figure of another program's convention; None if the figure is unknown or infinite.

    Args:
        static: of the report with the same nats.
        convention: one of `CONVENTION_FIGURES`.
        figures: from `lm.evaluation.conventions`.
    """
    kind, name, denominator = CONVENTION_FIGURES[convention]
    if figures[name] is None:
        return None
    return replace(
        static, kind=kind, value=float(figures[name]), denominator=denominator,
        unknown=static.unknown.removesuffix(SPELLING), convention=convention,
    )  # fmt: skip


def context_code(rule: str) -> str:
    """A report's context rule as the part `ctx`; "other" if it is none of `lm.evaluation.perplexity`."""
    if window := _WINDOW.search(rule):
        return f"window-{_digits(window[1])}-{_digits(window[2])}"
    if rows := _ROWS.search(rule):
        warm = _WARM.search(rule)
        return f"carried-{_digits(rows[1])}" + (f"-warm-{_digits(warm[1])}" if warm else "")
    if rule.startswith("each conversation by itself"):
        return "conversations"
    return "carried" if rule.startswith("state carried over the whole") else "other"


def _digits(number: str) -> str:
    return number.replace(",", "")


def parse(line: str) -> Signature:
    """The signature that a line holds; the order of its parts does not matter.

    Raises:
        ConfigError: a part is unknown, missing, given twice or has no valid value.
    """
    given: dict[str, str] = {}
    for part in line.strip().split("|"):
        name, colon, value = (piece.strip() for piece in part.partition(":"))
        if not colon or not value:
            raise ConfigError(f"Signature: {part!r} is not NAME:VALUE. A signature is one line, such as {EXAMPLE}")
        if name in given:
            raise ConfigError(f"Signature: the part {name} is given twice.")
        given[name] = value
    kinds = [name for name in given if name in get_args(Kind)]
    known = [*get_args(Kind), *_NAMES]
    if unknown := [name for name in given if name not in known]:
        hint = did_you_mean(unknown[0], known)
        raise ConfigError(f"Signature: there is no part {unknown[0]!r}.{hint} Parts: {', '.join(known)}.")
    if len(kinds) != 1:
        raise ConfigError(f"Signature: it needs one value, such as bpb:1.6234, and has {len(kinds)}.")
    missing = [name for name, field in _NAMES.items() if name not in given and field not in _OPTIONAL]
    if missing:
        raise ConfigError(f"Signature: the part {missing[0]} is missing. Copy the whole line, such as {EXAMPLE}")
    kind: Kind = kinds[0]  # type: ignore[assignment]
    try:
        figure = float(given[kind])
    except ValueError:
        raise ConfigError(f"Signature: {kind}:{given[kind]} is no number.") from None
    for name in ("text", "tok"):
        given[name] = given[name].rstrip("….").lower()
        if not re.fullmatch(r"[0-9a-f]{4,64}", given[name]):
            raise ConfigError(f"Signature: {name}:{given[name]} is no hash of at least 4 hexadecimal digits.")
    convention = given.get("conv")
    if convention is not None and convention not in CONVENTION_FIGURES:
        raise ConfigError(f"Signature: conv:{convention} is none of {', '.join(CONVENTION_FIGURES)}.")
    known_kind, _, denominator = CONVENTION_FIGURES[convention] if convention else (kind, "", DENOMINATORS.get(kind))
    if denominator is None:
        raise ConfigError(f"Signature: {kind} is a figure of another program, so it needs the part conv.")
    if kind != known_kind:
        raise ConfigError(f"Signature: the figure of conv:{convention} is {known_kind}, not {kind}.")
    if given["den"] != denominator:
        raise ConfigError(f"Signature: {kind} is divided by {denominator}, and den is {given['den']!r}.")
    if not _CONTEXT.fullmatch(given["ctx"]):
        raise ConfigError(f"Signature: ctx:{given['ctx']} is no context rule, such as carried or window-256-128.")
    parts = {field: given[name] for name, field in _NAMES.items() if name in given}
    return Signature(kind=kind, value=figure, **parts)


def check(expected: Signature, measured: Signature) -> Check:
    """Whether a measured figure is the expected one; names each part that differs."""
    differences = []
    for label, field in (("text", "text"), ("tokenizer", "tokenizer")):
        wanted, found = getattr(expected, field), getattr(measured, field)
        if not _same_hash(wanted, found):
            differences.append(f"The {label} is another one ({found}; the signature has {wanted}).")
    for label, field in (
        ("kind", "kind"), ("context", "context"), ("policy for unknown symbols", "unknown"),
        ("precision", "precision"), ("convention", "convention"),
    ):  # fmt: skip
        wanted, found = getattr(expected, field), getattr(measured, field)
        if wanted != found:
            differences.append(f"The {label} is {found or 'none'}; the signature has {wanted or 'none'}.")
    gap = abs(expected.value - measured.value)
    # The value may be given with fewer decimals.
    if gap > expected.tolerance or gap != gap:
        differences.append(
            f"The value is {measured.value:.6f}; the signature has {expected.value:g} (tolerance "
            f"{expected.tolerance:g})."
        )
    notes = []
    if expected.version != measured.version:
        notes.append(f"It was measured with Inkling {expected.version}; this is {measured.version}.")
    return Check(expected, measured, tuple(differences), tuple(notes))


def _same_hash(a: str, b: str) -> bool:
    """Whether the shorter hash begins the longer one."""
    size = min(len(a), len(b))
    return a[:size] == b[:size]


assert {field.name for field in fields(Signature)} == {"kind", "value", *_NAMES.values()}
