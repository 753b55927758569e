"""How much of a run's samples stands word for word in its training text, against held-out text of the same author.

Held-out text also shares phrases with the training text: names, sayings, boilerplate. So the figures of samples alone
say little. The baseline is as many passages of the validation split, each as long as the sample that it stands for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from lm.config import Options
from lm.copies import LENGTHS, Copies, CopyFigures, CopyIndex, figures_of

if TYPE_CHECKING:
    from lm.generation.options import SamplingOptions

STANDARD_ERRORS = 2.0
"""A difference of shares below this many standard errors is no evidence."""
MIN_NOTED_RUN = 50
"""Characters of a longest run that the sentence names, if no run of the held-out text is as long."""


class CopiedText(Options):
    """The figures of some texts together. Lengths are in characters."""

    texts: int = Field(description="Number of texts.")
    characters: int = Field(description="Characters of all texts.")
    longest_run: int = Field(description="Longest verbatim run from the training text.")
    longest_text: str = Field(description="That run.")
    longest_line: int | None = Field(description="A line of the training text where it begins; null if there is none.")
    share_20: float = Field(description="Share of the characters in verbatim runs of at least 20 characters.")
    share_50: float = Field(description="Share of the characters in verbatim runs of at least 50 characters.")


class CopyReport(Options):
    """What `lm eval --copy` prints."""

    samples: CopiedText = Field(description="The samples of the run.")
    held_out: CopiedText = Field(description="As many passages of held-out text, of the same lengths.")
    split: str = Field(description="The split of the held-out text.")
    copies_more: bool = Field(
        description="Whether the share of 20 or of 50 characters is above that of held-out text by more than two "
        "standard errors of the difference."
    )
    sentence: str = Field(description="The same in plain words.")
    prompt: str = Field(description="Prompt of the samples.")
    options: dict[str, Any] = Field(description="Sampling options that repeat the samples.")


def copy_report(
    index: CopyIndex,
    samples: Sequence[str],
    held_out: str,
    *,
    split: str,
    prompt: str = "",
    options: SamplingOptions | None = None,
) -> CopyReport:
    """The figures of samples and of as much held-out text.

    Args:
        index: of the training text.
        samples: the texts that the model wrote.
        held_out: the whole held-out text; passages are spread over it evenly.
        split: name of the held-out text.
        prompt: of the samples.
        options: of the samples.
    """
    passages = passages_like(samples, held_out)
    ours, theirs = [index.find(text) for text in samples], [index.find(text) for text in passages]
    figures, baseline = figures_of(ours), figures_of(theirs)
    higher = [length for length in LENGTHS if _is_higher(ours, theirs, length)]
    return CopyReport(
        samples=_copied(index, samples, ours, figures),
        held_out=_copied(index, passages, theirs, baseline),
        split=split,
        copies_more=bool(higher),
        sentence=_sentence(figures, baseline, higher),
        prompt=prompt,
        options={} if options is None else options.model_dump(mode="json", exclude_unset=True) | {"seed": options.seed},
    )


def passages_like(samples: Sequence[str], held_out: str) -> list[str]:
    """As many passages of a text, each as long as a sample, in order and without overlap; shorter if it is short."""
    lengths = [len(sample) for sample in samples]
    if (total := sum(lengths)) > len(held_out):
        lengths = [length * len(held_out) // total for length in lengths]
    gap = (len(held_out) - sum(lengths)) / max(len(samples), 1)
    passages, used = [], 0
    for number, length in enumerate(lengths):
        start = used + int(gap * (number + 0.5))
        passages.append(held_out[start : start + length])
        used += length
    return passages


def _copied(index: CopyIndex, texts: Sequence[str], found: Sequence[Copies], figures: CopyFigures) -> CopiedText:
    best = max(range(len(found)), key=lambda number: found[number].longest.length, default=None)
    run = None if best is None or not figures.longest else found[best].longest
    return CopiedText(
        texts=figures.texts,
        characters=figures.characters,
        longest_run=figures.longest,
        longest_text="" if run is None or best is None else texts[best][run.start : run.start + run.length],
        longest_line=None if run is None else index.place(run.source).line,
        share_20=figures.shares[20],
        share_50=figures.shares[50],
    )


def _is_higher(ours: Sequence[Copies], theirs: Sequence[Copies], minimum: int) -> bool:
    """Whether the mean share is higher by more than STANDARD_ERRORS of the difference of two means."""
    shares = [np.array([each.share(minimum) for each in found]) for found in (ours, theirs)]
    if not all(map(len, shares)):
        return False
    error = math.sqrt(sum(float(np.var(each, ddof=1)) / len(each) if len(each) > 1 else 0.0 for each in shares))
    return float(shares[0].mean() - shares[1].mean()) > STANDARD_ERRORS * error


def _sentence(samples: CopyFigures, held_out: CopyFigures, higher: Sequence[int]) -> str:
    if higher:
        length = higher[-1]
        return (
            f"The samples copy more than held-out text of the same author does: {samples.shares[length]:.1%} of their "
            f"characters stand in verbatim runs of {length} or more, against {held_out.shares[length]:.1%}."
        )
    if samples.longest >= MIN_NOTED_RUN and samples.longest > held_out.longest:
        return (
            "The samples copy no larger share than held-out text of the same author does, but one verbatim run has "
            f"{samples.longest:,} characters, against {held_out.longest:,}."
        )
    return "The samples copy no more than held-out text of the same author does."
