"""Compare runs on one text; see `lm.comparison`."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from lm.comparison import places as where
from lm.comparison.bootstrap import RESAMPLES, Blocks, Floats, Interval, mean_interval, widening
from lm.comparison.byte_nats import bits
from lm.comparison.compared_text import ComparedText, of_conversations, of_text
from lm.comparison.passages import passages
from lm.comparison.result import Candidate, Comparison, Difference
from lm.comparison.scored import ScoredRun, score_run
from lm.comparison.seeds import group_name, grouped, seed_margin, spread
from lm.comparison.sentences import difference_sentence, notes
from lm.comparison.texts import split_text, training_start
from lm.comparison.verdict import judge
from lm.corpora import PreparedCorpus, Progress
from lm.corpora.text import Text
from lm.errors import ConfigError, LMError
from lm.runs.run import Run, load
from lm.runs.training_text import cached_text
from lm.version import __version__

if TYPE_CHECKING:
    from lm.device import Precision

Against = Literal["best", "first"]
FIGURE = "bits per byte with the spelling of unknown words and white space"


def compare(
    runs: Sequence[Run | str],
    *,
    text: str | Text | None = None,
    split: str | None = None,
    name: str = "text",
    against: Against | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
    precision: Precision = "fp32",
    runs_dir: Path | str | None = None,
    device: str | None = None,
    data_dir: Path | None = None,
    corpus: Path | str | None = None,
    progress: Callable[[int, int], None] | None = None,
    reading: Progress | None = None,
) -> Comparison:
    """Compare runs on one text: verdict, ranked table, differences with intervals, places and passages.

    All figures are bits per byte with the spelling cost, so runs with different tokenizers are comparable. Runs that
    differ by their seed alone are one candidate. Of conversations, the answers alone count, for every run.

    Args:
        runs: at least two: runs, or names as in `lm.load`.
        text: the text to predict; of conversations (`lm.corpora.open_text` of instruction data) the answers alone
            count. None: a split of the first run's corpus.
        split: train, valid or test; None is test if the first run has one, else valid.
        name: of `text`.
        against: the candidate that each other one is compared with; None is the first of two, the best of more.
        resamples: of the bootstrap.
        seed: of the bootstrap.
        precision: of the matrix products; fp32 is the reference.
        runs_dir: folder of the runs that are given by name.
        device: of these runs.
        data_dir: folder of the named corpora.
        corpus: where the text of the runs is now, if it has moved; it must be the same text.
        progress: called with tokens done and tokens in all, over all runs.
        reading: called while a text is read.

    Raises:
        ConfigError: fewer than two runs, a run twice, or both a text and a split.
        CorpusError: the text is empty, or the split's text is not here any more.
        RunError: a run cannot be loaded.
    """
    begun = time.perf_counter()
    if text is not None and split is not None:
        raise ConfigError("text and split are two different texts: give only one.")
    opened = [load(run, runs_dir=runs_dir, device=device) if isinstance(run, str) else run for run in runs]
    labels = _labels(opened)
    own = [True] * len(opened)
    if text is None:
        split, sha256 = _split_of(opened[0], split)
        content = split_text(opened, sha256, split, corpus=corpus, data_dir=data_dir, progress=reading)
        own = [_split_sha256(run, split) == sha256 for run in opened]
        name = str(opened[0].record["corpus"]["name"])
    else:
        content = _given(text)
    is_text = content.conversations is None
    trained_on = [_training(run, corpus, data_dir, reading) for run in opened]
    scored: list[ScoredRun] = []
    for index, run in enumerate(opened):
        # A run that was opened here goes with its weights before the next one is loaded.
        used = run if run is runs[index] else Run(run.folder, run.checkpoint, device=device)
        follow = None if progress is None else _part_of(progress, index, len(opened))
        scored.append(
            score_run(
                used, labels[index], content, name=name, prepared=trained_on[index], own_split=own[index],
                reads_answers=_other_kind(trained_on[index], is_text=is_text), precision=precision, progress=follow,
            )
        )  # fmt: skip
    verdict = judge([each.facts for each in scored], split=split)
    ranked, first = _candidates(scored)
    source, counts = _training_words(opened, labels, trained_on, corpus, data_dir)
    work = _Work(
        content, content.blocks(), where.divisions(content.text, counts, sizes=content.sizes), ranked, resamples, seed,
        verdict.comparable,
    )  # fmt: skip
    known = [each for each in ranked if each.nats is not None]
    reference = _reference(known, first, against) if known else None
    differences = tuple(work.difference(reference, each) for each in known if reference and each is not reference)
    part = scored[0].part
    return Comparison(
        text=name,
        split=split or "text",
        text_sha256=part.sha256,
        answers=None if content.conversations is None else sum(len(each.answers) for each in content.conversations),
        bytes=part.counts.bytes,
        characters=part.counts.characters,
        lines=part.counts.lines,
        verdict=verdict,
        candidates=tuple(each.candidate for each in ranked),
        differences=differences,
        training_text=source,
        notes=tuple(
            notes(
                [each.candidate for each in ranked], differences, source, trained_on,
                seeds_alone=len({each.configuration for each in scored}) == 1,
            )
        ),
        figure=FIGURE if is_text else f"{FIGURE}; the answers alone count",
        resamples=resamples,
        seed=seed,
        precision=precision,
        seconds=time.perf_counter() - begun,
        version=__version__,
    )  # fmt: skip


# -- texts ------------------------------------------------------------------------------------------------


def _labels(runs: Sequence[Run]) -> list[str]:
    """A name for each run: NAME or NAME@CHECKPOINT; the path where two folders have one name."""
    if len(runs) < 2:
        raise ConfigError(f"A comparison needs two runs or more, and {len(runs)} is given: lm compare RUN OTHER.")
    ends = ["" if run.checkpoint == "best" else f"@{run.checkpoint}" for run in runs]
    names = [f"{run.name}{end}" for run, end in zip(runs, ends, strict=True)]
    times = Counter(names)
    labels = [
        name if times[name] == 1 else f"{run.folder.path}{end}"
        for run, name, end in zip(runs, names, ends, strict=True)
    ]
    again = next((label for label, count in Counter(labels).items() if count > 1), None)
    if again is not None:
        raise ConfigError(f"{again} is given twice: give each run once, or another checkpoint of it, such as RUN@last.")
    return labels


def _given(text: str | Text) -> ComparedText:
    """A text from elsewhere."""
    if isinstance(text, str):
        return of_text(text)
    return of_text("".join(text.chunks())) if text.conversations is None else of_conversations(text.conversations())


def _other_kind(trained_on: PreparedCorpus | None, *, is_text: bool) -> bool | None:
    """See `Facts.reads_answers`; None too if the training text is not here."""
    if trained_on is None:
        return None
    learned_answers = trained_on.splits["train"].marks is not None
    return learned_answers if learned_answers is is_text else None


def _split_of(run: Run, split: str | None) -> tuple[str, str]:
    """The name of a run's split, and the hash of its text."""
    split = run.existing_split(split)
    return split, str(run.record["corpus"]["splits"][split]["sha256"])


def _split_sha256(run: Run, split: str) -> str | None:
    found = run.record["corpus"]["splits"].get(split)
    return None if found is None else str(found["sha256"])


def _training(
    run: Run, corpus: Path | str | None, data_dir: Path | None, reading: Progress | None
) -> PreparedCorpus | None:
    """A run's own text from the cache, or read again from its files; None if it is not here. Downloads nothing."""
    found = cached_text(run.record["corpus"], run.tokenizer)
    if found is not None:
        return found
    for source in (corpus, run.config.corpus.source):
        if source is not None and Path(source).expanduser().exists():
            # The new path may be that of another run's text.
            with suppress(LMError):
                return run.own_text(source, split="train", data_dir=data_dir, progress=reading)
    return None


def _training_words(
    runs: Sequence[Run],
    labels: Sequence[str],
    trained_on: Sequence[PreparedCorpus | None],
    corpus: Path | str | None,
    data_dir: Path | None,
) -> tuple[str | None, Counter[str] | None]:
    """The first run whose training text is here, and how often each word is in it."""
    for run, label, prepared in zip(runs, labels, trained_on, strict=True):
        text = None if prepared is None else training_start(run, prepared, corpus=corpus, data_dir=data_dir)
        if text is not None:
            return label, where.word_counts(text)
    return None, None


def _part_of(progress: Callable[[int, int], None], index: int, runs: int) -> Callable[[int, int], None]:
    """The progress of one of several runs, each with as many tokens as this one."""
    return lambda done, total: progress(index * total + done, runs * total)


# -- candidates ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Ranked:
    candidate: Candidate
    nats: Floats | None
    """(B,) nats of each byte, the mean of its runs."""


def _candidates(scored: Sequence[ScoredRun]) -> tuple[list[_Ranked], _Ranked]:
    """The candidates, best first; and the one of the first run."""
    groups = [[scored[index] for index in indices] for indices in grouped([each.configuration for each in scored])]
    found = [_candidate(group) for group in groups]
    ranked = sorted(found, key=lambda each: (each.candidate.bits_per_byte is None, each.candidate.bits_per_byte or 0))
    return ranked, found[0]


def _candidate(group: Sequence[ScoredRun]) -> _Ranked:
    facts, counts = [each.facts for each in group], group[0].part.counts
    figures = [fact.bits_per_byte for fact in facts]
    known = [figure for figure in figures if figure is not None]
    complete = len(known) == len(figures)
    overlaps = [fact.training_overlap for fact in facts if fact.training_overlap is not None]
    nats = [each.nats for each in group if each.nats is not None]
    candidate = Candidate(
        name=group_name([fact.run for fact in facts]),
        runs=tuple(fact.run for fact in facts),
        seeds=tuple(each.seed for each in group),
        bits_per_byte=sum(known) / len(known) if complete else None,
        run_bits_per_byte=tuple(figures),
        seed_spread=spread(figures),
        token_bits_per_byte=bits(sum(each.token_nats for each in group) / len(group), counts.bytes),
        spelling_bits_per_byte=facts[0].spelling_bits_per_byte,
        tokens=counts.tokens,
        unknown_tokens=counts.unknown_tokens,
        bytes_per_token=counts.bytes / counts.tokens,
        tokenizer=facts[0].tokenizer,
        context=facts[0].context,
        parameters=group[0].parameters,
        training_overlap=max(overlaps) if overlaps else None,
    )
    return _Ranked(candidate, np.mean(nats, axis=0) if complete else None)


def _reference(known: Sequence[_Ranked], first: _Ranked, against: Against | None) -> _Ranked:
    """The candidate that the others are compared with."""
    by_order = against == "first" or (against is None and len(known) == 2)
    return first if by_order and first in known else known[0]


# -- differences --------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Work:
    """What all differences of a comparison share."""

    text: ComparedText
    blocks: Blocks
    divided: Sequence[where.Division]
    ranked: Sequence[_Ranked]
    resamples: int
    seed: int
    comparable: bool

    def difference(self, a: _Ranked, b: _Ranked) -> Difference:
        """The difference of two candidates, with places and passages."""
        assert a.nats is not None and b.nats is not None
        gap = b.nats - a.nats
        span, blocks = mean_interval(gap, self.blocks, resamples=self.resamples, seed=self.seed)
        span = None if span is None else Interval(bits(span.low, 1), bits(span.high, 1))
        estimate = bits(float(gap.sum()), len(gap))
        margin = seed_margin(*([x for x in each.candidate.run_bits_per_byte if x is not None] for each in (a, b)))
        beyond = None if margin is None else abs(estimate) > margin[1]
        sure = span is not None and span.excludes_zero and beyond is not False and self.comparable
        names = a.candidate.name, b.candidate.name
        wins_a, wins_b = passages(self.text.text, a.nats, b.nats, names, sizes=self.text.sizes)
        nats = [each.nats for each in self.ranked if each.nats is not None]
        return Difference(
            a=names[0],
            b=names[1],
            bits_per_byte=estimate,
            low=span.low if span else None,
            high=span.high if span else None,
            better=names[estimate < 0] if sure else None,
            sentence=difference_sentence(*names, estimate, span, margin, comparable=self.comparable),
            seed_standard_error=margin[0] if margin else None,
            beyond_seeds=beyond,
            blocks=len(blocks.starts),
            block_bytes=blocks.size / len(blocks.starts),
            places=tuple(
                where.places(
                    self.divided, nats, a.nats, b.nats, blocks, widen=widening(blocks, gap) if span else 1.0,
                    resamples=self.resamples, seed=self.seed,
                )
            ),
            passages_a=tuple(wins_a),
            passages_b=tuple(wins_b),
        )  # fmt: skip
