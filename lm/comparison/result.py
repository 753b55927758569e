"""What a comparison gives: plain values, which `lm compare --json` prints and the page shows."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from lm.config import Options
from lm.evaluation import report_fields as shared

FindingKind = Literal[
    "text", "training text", "unknown symbols", "tokenizer", "context", "spelling", "precision", "own text",
    "unknown overlap", "conversations",
]  # fmt: skip


class Finding(Options):
    """One reason why figures are not comparable, or one fact to know when they are compared."""

    kind: FindingKind = Field(description="What it is about.")
    runs: tuple[str, ...] = Field(description="The runs that it concerns.")
    sentence: str = Field(description="The fact.")


class Verdict(Options):
    """Whether the bits per byte of runs are comparable."""

    comparable: bool = Field(description="Whether bits per byte rank these runs.")
    sentence: str = Field(description="The verdict in one sentence.")
    problems: tuple[Finding, ...] = Field((), description="Why they are not comparable; empty if they are.")
    cautions: tuple[Finding, ...] = Field((), description="Facts to know when the figures are compared.")


class Candidate(Options):
    """A run, or the runs of one configuration that differ by their seed alone."""

    name: str = Field(description="Name of the run, or of the group.")
    runs: tuple[str, ...] = Field(description="The runs.")
    seeds: tuple[int, ...] = Field(description="Their seeds.")
    bits_per_byte: float | None = Field(
        description="Bits per byte with the spelling cost, mean of the runs; null if symbols were left out."
    )
    run_bits_per_byte: tuple[float | None, ...] = Field(description="Of each run.")
    seed_spread: float | None = Field(
        description="Standard deviation of bits per byte across the seeds; null for one run."
    )
    token_bits_per_byte: float = Field(description="Bits of the tokens alone per byte, without the spelling cost.")
    spelling_bits_per_byte: float | None = Field(description="The spelling cost in bits per byte.")
    tokens: int = Field(description="Tokens that count: of the text, or of the answers.")
    unknown_tokens: shared.UnknownTokens
    bytes_per_token: float = Field(description="Mean bytes of a token; the nats of a token are spread over them.")
    tokenizer: str = Field(description="Type of the tokenizer.")
    context: shared.Context
    parameters: int = Field(description="Parameters of one run.")
    training_overlap: float | None = Field(
        description="About the share of the text that is in the training text; null if unknown."
    )


class Place(Options):
    """A part of the text, with how well each run predicts it."""

    group: str = Field(description="How the text was divided, such as: frequency of the word.")
    name: str = Field(description="The part, such as: 1 to 9 times.")
    bytes: int = Field(description="Bytes of the part.")
    bits_per_byte: tuple[float, ...] = Field(description="Of each ranked candidate, in their order.")
    difference: float = Field(description="Bits per byte of `b` less those of `a`; below 0, `b` is better.")
    low: float | None = Field(description="95 % interval of the difference; null if the part is in too few blocks.")
    high: float | None = Field(description="Its other end.")


class PassageWord(Options):
    """A word of a passage, with the white space before it."""

    text: str = Field(description="White space and word.")
    bits: float = Field(description="Bits that `b` needs less those that `a` needs.")


class Passage(Options):
    """A passage on which one of two candidates wins most."""

    winner: str = Field(description="Name of the candidate.")
    line: int = Field(description="Line of the text, from 1.")
    begin: int = Field(description="First byte in the text.")
    bytes: int = Field(description="Length in bytes.")
    text: str = Field(description="The passage.")
    bits_a: float = Field(description="Bits that `a` needs.")
    bits_b: float = Field(description="Bits that `b` needs.")
    words: tuple[PassageWord, ...] = Field(description="The words, each with the difference in bits.")


class Difference(Options):
    """The difference between two candidates on the text."""

    a: str = Field(description="Name of the first candidate.")
    b: str = Field(description="Name of the second candidate.")
    bits_per_byte: float = Field(description="Bits per byte of `b` less those of `a`; below 0, `b` is better.")
    low: float | None = Field(description="95 % interval of it; null if the text is too short.")
    high: float | None = Field(description="Its other end.")
    better: str | None = Field(description="The candidate that is better; null if it may be chance.")
    sentence: str = Field(description="The result in plain words.")
    seed_standard_error: float | None = Field(
        description="Standard error of the difference across seeds; null without several seeds."
    )
    beyond_seeds: bool | None = Field(
        description="Whether the difference is larger than seeds make; null without several seeds."
    )
    blocks: int = Field(description="Blocks of the bootstrap.")
    block_bytes: float = Field(description="Mean bytes of a block.")
    places: tuple[Place, ...] = Field((), description="Where the two differ.")
    passages_a: tuple[Passage, ...] = Field((), description="Passages where `a` wins most, best first.")
    passages_b: tuple[Passage, ...] = Field((), description="Passages where `b` wins most, best first.")


class Comparison(Options):
    """Runs compared on one text."""

    text: str = Field(description="Name of the text.")
    split: shared.Split
    text_sha256: shared.TextHash
    answers: int | None = Field(
        None, description="Answers of the conversations that were compared; null for a text. They alone count."
    )
    bytes: int = Field(description="Its UTF-8 bytes; of conversations, those of the answers.")
    characters: shared.Characters
    lines: shared.Lines
    verdict: Verdict
    candidates: tuple[Candidate, ...] = Field(description="Ranked by bits per byte, best first.")
    differences: tuple[Difference, ...] = Field(description="Each candidate against one of them.")
    training_text: str | None = Field(
        description="Run whose training text gave the frequencies of words; null if none is here."
    )
    notes: tuple[str, ...] = Field((), description="What was left out, and other facts.")
    figure: str = Field(description="What is ranked.")
    resamples: int = Field(description="Resamples of the bootstrap.")
    seed: int = Field(description="Seed of the bootstrap.")
    precision: shared.Precision
    seconds: float = Field(description="Time of the comparison.")
    version: shared.Version
