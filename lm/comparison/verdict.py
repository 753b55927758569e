"""Whether the figures of runs are comparable, and why not.

Bits per byte with the spelling cost are comparable if they are of the same text, the text is determined by the
tokens, and the text is new to all runs. What else differs is a caution: token-level figures (loss, perplexity,
accuracy) of other tokenizers, the context rule, the spelling rule, the precision.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lm.comparison.result import Finding, Verdict
from lm.evaluation.report import MAX_OVERLAP, MIN_NOTED_BITS


@dataclass(frozen=True)
class Facts:
    """What the verdict depends on, of one run."""

    run: str
    text_sha256: str
    """Of the text that was scored."""
    bits_per_byte: float | None
    """With the spelling cost; None if it is unknown."""
    tokenizer: str
    tokenizer_sha256: str
    unknown_tokens: int
    unknown_policy: str
    spelling_bits_per_byte: float | None
    spelling_rule: str
    context: str
    precision: str
    training_overlap: float | None
    """None if the training text is not here."""
    own_split: bool = True
    """Whether the text is the run's own split of that name, or not a split at all."""
    reads_answers: bool | None = None
    """Whether the run learned the answers of conversations, if the text is of the other kind; else None."""


def judge(facts: Sequence[Facts], *, split: str | None = None) -> Verdict:
    """The verdict on runs.

    Args:
        facts: of each run.
        split: name of the split that was scored, if it was one.
    """
    problems = tuple(_problems(facts))
    cautions = tuple(_cautions(facts, split))
    if problems:
        sentence = f"Not comparable: {problems[0].sentence}"
    elif any(fact.kind in ("training text", "unknown overlap") for fact in cautions):
        sentence = "Comparable in bits per byte, with a doubt: see the cautions."
    elif len({fact.tokenizer_sha256 for fact in facts}) > 1:
        sentence = "Comparable in bits per byte: the same text, with the spelling cost of each tokenizer."
    else:
        sentence = "Comparable: the same text, the same tokenizer."
    return Verdict(comparable=not problems, sentence=sentence, problems=problems, cautions=cautions)


_OTHER_KIND = {
    True: "learned the answers of conversations alone. Here all tokens of a text count.",
    False: "learned text, not conversations. Here the answers alone count.",
}
"""A caution, by what a run has learned."""


def _problems(facts: Sequence[Facts]) -> Iterator[Finding]:
    others = [fact for fact in facts if fact.text_sha256 != facts[0].text_sha256]
    if others:
        yield Finding(
            kind="text",
            runs=_names(others),
            sentence=f"{_joined(others)} {_was(others)} measured on another text than {facts[0].run}. Give one text "
            "for all: --text FILE.",
        )
    left_out = [fact for fact in facts if fact.bits_per_byte is None]
    if left_out:
        yield Finding(
            kind="unknown symbols",
            runs=_names(left_out),
            sentence=f"The tokenizer of {_joined(left_out)} leaves symbols of this text out (unknown = skip), so the "
            "tokens do not determine the text, and there are no bits per byte.",
        )
    seen = [fact for fact in facts if (fact.training_overlap or 0) > MAX_OVERLAP]
    if seen and len(seen) < len(facts):
        shares = ", ".join(f"{100 * (fact.training_overlap or 0):.0f} %" for fact in seen)
        yield Finding(
            kind="training text",
            runs=_names(seen),
            sentence=f"About {shares} of this text is in the training text of {_joined(seen)}, whose figure shows "
            "memorised text. Give a text that is new to all: --text FILE.",
        )


def _cautions(facts: Sequence[Facts], split: str | None) -> Iterator[Finding]:
    every = _names(facts)
    if all((fact.training_overlap or 0) > MAX_OVERLAP for fact in facts):
        yield Finding(
            kind="training text",
            runs=every,
            sentence="This text is in the training text of all runs: the figures compare how well they memorised it, "
            "not how well they predict new text.",
        )
    unknown = [fact for fact in facts if fact.training_overlap is None]
    if unknown:
        yield Finding(
            kind="unknown overlap",
            runs=_names(unknown),
            sentence=f"The training text of {_joined(unknown)} is not here, so it is unknown whether it contains this "
            "text.",
        )
    foreign = [fact for fact in facts if not fact.own_split]
    if foreign:
        own = "has its own text" if len(foreign) == 1 else "have their own texts"
        yield Finding(
            kind="own text",
            runs=_names(foreign),
            sentence=f"{_joined(foreign)} {own}, with another {split} split: here all predict that of {facts[0].run}.",
        )
    for learned_answers, sentence in _OTHER_KIND.items():
        if others := [fact for fact in facts if fact.reads_answers is learned_answers]:
            yield Finding(kind="conversations", runs=_names(others), sentence=f"{_joined(others)} {sentence}")
    if len({fact.tokenizer_sha256 for fact in facts}) > 1:
        kinds = _grouped([(fact.tokenizer, fact.run) for fact in facts])
        yield Finding(
            kind="tokenizer",
            runs=every,
            sentence=f"The tokenizers differ ({kinds}). Compare bits per byte alone: loss, perplexity and accuracy are "
            "per token, and tokens differ.",
        )
    with_unknown = [fact for fact in facts if fact.unknown_tokens]
    if with_unknown and len({fact.unknown_tokens for fact in facts}) > 1:
        counts = ", ".join(f"{fact.run}: {fact.unknown_tokens:,}, {fact.unknown_policy}" for fact in with_unknown)
        yield Finding(
            kind="unknown symbols",
            runs=_names(with_unknown),
            sentence=f"Unknown tokens ({counts}) hide words from loss and perplexity. Bits per byte charge their "
            "spelling.",
        )
    spelled = [fact for fact in facts if (fact.spelling_bits_per_byte or 0) >= MIN_NOTED_BITS]
    if spelled and len({fact.spelling_rule for fact in facts}) > 1:
        costs = ", ".join(f"{fact.run}: {fact.spelling_bits_per_byte:.3f}" for fact in spelled)
        yield Finding(
            kind="spelling",
            runs=_names(spelled),
            sentence=f"The spelling rules differ; spelling is a part of the figure ({costs} bits per byte).",
        )
    if len({fact.context for fact in facts}) > 1:
        rules = _grouped([(fact.context, fact.run) for fact in facts])
        yield Finding(
            kind="context",
            runs=every,
            sentence=f"The context rules differ ({rules}). The figures compare the models as they are used, not at "
            "equal context.",
        )
    if len({fact.precision for fact in facts}) > 1:
        formats = _grouped([(fact.precision, fact.run) for fact in facts])
        yield Finding(kind="precision", runs=every, sentence=f"The precisions differ ({formats}).")


def _grouped(pairs: Sequence[tuple[str, str]]) -> str:
    """Each value with the runs that have it."""
    values = dict.fromkeys(value for value, _ in pairs)
    return "; ".join(f"{value}: {', '.join(run for found, run in pairs if found == value)}" for value in values)


def _names(facts: Sequence[Facts]) -> tuple[str, ...]:
    return tuple(fact.run for fact in facts)


def _joined(facts: Sequence[Facts]) -> str:
    names = [fact.run for fact in facts]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _was(facts: Sequence[Facts]) -> str:
    return "was" if len(facts) == 1 else "were"
