"""Neurons: the values of single units along a text, and the search for units that track a feature of the text.

A unit is one number of a layer's outputs ("hidden" of `LanguageModel.inspect`) after each token. Layers and units are
counted from 0, as in the names of the weights.

The search, for each feature of `lm.inspection.features`:

1. The first half of the text fits: does a unit rise or fall with the feature, and at which value is the border?
2. The second half gives the score: AUC of a feature that is 0 or 1, correlation r of any other.
3. Circular shifts of the feature against the text give scores by chance. A shift keeps how the feature and the units
   change over time, so neighbouring tokens do not count as independent evidence.
4. A unit is named if its score is above the 99th percentile of the best score of each of 100 shifts, and large:
   AUC >= 0.8 or |r| >= 0.4.

Sources: Karpathy, Johnson and Li 2015, "Visualizing and Understanding Recurrent Networks"; Hewitt and Liang 2019,
"Designing and Interpreting Probes with Control Tasks" (the need of a baseline).

Shapes: N tokens, F features, U units (of all layers), S shifts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from lm.corpora import TokenSplit
from lm.device import TO_USE, enough_memory
from lm.errors import ConfigError, CorpusError
from lm.inspection.features import FEATURES, Feature
from lm.inspection.subject import text_ids

if TYPE_CHECKING:
    from lm.models.base import LanguageModel, State
    from lm.runs.run import Run
    from lm.tokenizers.base import Tokenizer

Floats = npt.NDArray[np.float32]

HIDDEN = "hidden"
"""The part of a model that this view needs."""
MIN_TOKENS = 500
"""A shorter text has too little evidence."""
MAX_TOKENS = 50_000
MAX_BYTES = 256 << 20
"""Of all units along the text; a longer text is cut."""
MIN_MARKED = 20
"""Tokens with a feature, and tokens without it, that each half needs."""
SHIFTS, PERCENTILE = 100, 99.0
LEAST_AUC, LEAST_CORRELATION = 0.8, 0.4
RULE = (
    f"A unit is named if its score on the second half of the text is above the {PERCENTILE:.0f}th percentile of the "
    f"best score of {SHIFTS} circular shifts of the feature, and AUC >= {LEAST_AUC} or |r| >= {LEAST_CORRELATION}."
)
BEST = 5
"""Units in the ranking of a feature."""
_TOKENS_AT_ONCE = 256
_UNITS_AT_ONCE = 256
_SEED = 0
"""Of the shifts, so that the same text gives the same names."""


@dataclass(frozen=True)
class UnitScore:
    """How well one unit tracks one feature, on the second half of the text."""

    layer: int
    unit: int
    score: float
    """AUC in [0, 1], or correlation in [-1, 1], in the direction of the first half; negative or below 0.5: it does not
    hold on the second half."""
    direction: int
    """1: the unit rises with the feature; -1: it falls."""
    accuracy: float | None
    """Of a feature that is 0 or 1: mean of the accuracies with and without it, with the border of the first half."""
    named: bool
    """Whether the evidence is strong: see `RULE`."""


@dataclass(frozen=True)
class Ranking:
    """The units that track a feature best."""

    feature: str
    description: str
    measure: str
    """AUC or correlation."""
    share: float
    """Mean of the feature over the text; of a feature that is 0 or 1, the share of the tokens that have it."""
    baseline: float | None
    """The percentile of the best scores of circular shifts; None if the feature was not searched."""
    units: tuple[UnitScore, ...]
    """The best first."""
    skipped: str | None = None
    """Why the feature was not searched."""


@dataclass(frozen=True)
class UnitValues:
    """The values of one unit along the text."""

    layer: int
    unit: int
    values: Floats
    """(N,) after each token."""
    scores: dict[str, UnitScore]
    """By feature."""

    @property
    def name(self) -> str:
        """LAYER.UNIT."""
        return f"{self.layer}.{self.unit}"

    def levels(self) -> Floats:
        """(N,) in [-1, 1]: the values minus their median, over the 98th percentile of their distance from it."""
        distances = self.values - np.median(self.values)
        return np.clip(distances / (np.percentile(np.abs(distances), 98) or 1.0), -1, 1).astype(np.float32)


@dataclass(frozen=True)
class Neurons:
    """What single units of a model track in a text."""

    run: str
    text: str
    """Name of the text."""
    pieces: tuple[str, ...]
    """The text of each of N tokens; "" if a later token completes the character."""
    layer_sizes: tuple[int, ...]
    """Units of each layer."""
    rankings: tuple[Ranking, ...]
    """One a feature."""
    shown: tuple[UnitValues, ...]
    """The chosen unit; without one, the best named unit of each feature."""
    chosen: bool
    """Whether the unit was chosen."""
    notes: tuple[str, ...]

    @property
    def tokens(self) -> int:
        """N."""
        return len(self.pieces)

    @property
    def fitted(self) -> int:
        """Tokens of the first half."""
        return self.tokens // 2

    def to_json(self) -> dict[str, Any]:
        """The view as JSON values; unit values have four significant digits."""
        return {
            "run": self.run, "text": self.text, "tokens": self.tokens, "fitted_tokens": self.fitted,
            "layer_sizes": list(self.layer_sizes), "rule": RULE,
            "features": [asdict(ranking) for ranking in self.rankings],
            "units": [
                {
                    "layer": unit.layer, "unit": unit.unit,
                    "scores": {name: asdict(score) for name, score in unit.scores.items()},
                    "values": [float(f"{value:.4g}") for value in unit.values.tolist()],
                }
                for unit in self.shown
            ],
            "pieces": list(self.pieces), "notes": list(self.notes),
        }  # fmt: skip


def neurons(run: Run, text: str | TokenSplit, *, unit: str | None = None, name: str = "text") -> Neurons:
    """Find the units of a run that track features of a text.

    Args:
        run: from `lm.load`.
        text: at least `MIN_TOKENS` tokens; a very long one is cut, and a note says so.
        unit: "LAYER.UNIT", counted from 0: also give the values of this unit. None: of the best named units.
        name: of the text.

    Raises:
        ConfigError: the model has no hidden units, or not this one.
        CorpusError: the text is too short.
    """
    model = run.model
    # Refuses a model without hidden units, and a wrong unit, before the long work.
    sizes = _layer_sizes(model, run.tokenizer.start_id)
    place = None if unit is None else _place(unit, sizes, run.name)
    ids = text_ids(run, text, name)
    found, limit = len(ids) - 1, min(MAX_TOKENS, MAX_BYTES // (4 * sum(sizes)))
    if found < MIN_TOKENS:
        raise CorpusError(
            f"{name} has {found:,} tokens, too few to say what a unit tracks: give a text of at least "
            f"{MIN_TOKENS:,} tokens."
        )
    ids = ids[: limit + 1]
    with enough_memory(TO_USE):
        values = hidden_values(model, ids, sum(sizes))
    pieces = _pieces(run.tokenizer, ids[1:])
    marks = feature_values(pieces, FEATURES)
    scores = score_units(values, marks, [feature.binary for feature in FEATURES])
    rankings, every = _rank(values, marks, scores, sizes)
    if place is not None:
        places = [place]
    else:
        best = [ranking.units[0] for ranking in rankings if ranking.units and ranking.units[0].named]
        places = list(dict.fromkeys((score.layer, score.unit) for score in best))
    shown = []
    for layer, number in places:
        column = sum(sizes[:layer]) + number
        shown.append(UnitValues(layer, number, np.ascontiguousarray(values[:, column]), every(column)))
    notes = [] if found <= limit else [f"only the first {limit:,} of {found:,} tokens are used"]
    if any(len(piece) != 1 for piece in pieces):
        notes.append(
            "a token has the features of its last character that is no space, and is upper case if one character is"
        )
    return Neurons(
        run.name, name, tuple(pieces), sizes, rankings, tuple(shown), chosen=place is not None, notes=tuple(notes)
    )


# -- the values of the units ------------------------------------------------------------------------------


def unit_values(run: Run, ids: Sequence[int], unit: str) -> UnitValues:
    """The values of one unit of a run along a text, without scores.

    Args:
        run: from `lm.load`.
        ids: (N + 1,) the start token, then the N tokens.
        unit: "LAYER.UNIT", counted from 0.

    Raises:
        ConfigError: the model has no hidden units, or not this one.
    """
    sizes = _layer_sizes(run.model, run.tokenizer.start_id)
    layer, number = _place(unit, sizes, run.name)
    with enough_memory(TO_USE):
        values = hidden_values(run.model, np.array(ids, dtype=np.int64), sum(sizes))
    return UnitValues(layer, number, np.ascontiguousarray(values[:, sum(sizes[:layer]) + number]), {})


def _layer_sizes(model: LanguageModel, start_id: int) -> tuple[int, ...]:
    with torch.inference_mode():
        first = model.inspect(torch.tensor([[start_id]], device=_device(model)), parts=(HIDDEN,))
    return tuple(layer.shape[-1] for layer in first.hidden)


def _place(unit: str, sizes: Sequence[int], run: str) -> tuple[int, int]:
    """Layer and unit of "LAYER.UNIT"."""
    layer, _, number = unit.partition(".")
    if not (layer.isdecimal() and number.isdecimal()):
        raise ConfigError(f"unit {unit!r}: give LAYER.UNIT, counted from 0, such as 0.17.")
    if int(layer) >= len(sizes):
        layers = "1 layer, number 0" if len(sizes) == 1 else f"{len(sizes)} layers, 0 to {len(sizes) - 1}"
        raise ConfigError(f"unit {unit}: {run} has {layers}.")
    if int(number) >= sizes[int(layer)]:
        raise ConfigError(f"unit {unit}: layer {layer} of {run} has units 0 to {sizes[int(layer)] - 1}.")
    return int(layer), int(number)


def hidden_values(model: LanguageModel, ids: npt.NDArray[Any], units: int) -> Floats:
    """The values (N, U) of all layers' units after each token but the first.

    A state is carried over the whole text. A model with a context length reads windows of that length, and each value
    has at least half of it as context.

    Args:
        model: has "hidden".
        ids: (N + 1,) the start token, then the N tokens.
        units: U.
    """
    values = np.empty((len(ids), units), np.float32)
    state: State | None = None
    with torch.inference_mode():
        for begin, end, skip in _windows(len(ids), model.context_length):
            inputs = torch.from_numpy(ids[begin:end].astype(np.int64))[None].to(_device(model))
            seen = model.inspect(inputs, state, parts=(HIDDEN,))
            state = seen.state if model.context_length is None else None
            layers = [layer[0, skip:].float().cpu().numpy() for layer in seen.hidden]
            values[begin + skip : end] = np.concatenate(layers, axis=1)
    return values[1:]


def _windows(count: int, context: int | None) -> Iterator[tuple[int, int, int]]:
    """Begin and end of what the model reads at once, and how many of its first tokens are context only."""
    length = context or _TOKENS_AT_ONCE
    done = 0
    while done < count:
        begin = max(0, done - (length - length // 2)) if context else done
        end = min(begin + length, count)
        yield begin, end, done - begin
        done = end


def _device(model: LanguageModel) -> torch.device:
    return next(model.parameters(), torch.empty(0)).device


# -- the features of the tokens ---------------------------------------------------------------------------


def _pieces(tokenizer: Tokenizer, ids: npt.NDArray[Any]) -> list[str]:
    stream = tokenizer.stream()
    pieces = [stream.feed(token) for token in ids.tolist()]
    pieces[-1] += stream.end()
    return pieces


def feature_values(pieces: Sequence[str], features: Sequence[Feature]) -> Floats:
    """(F, N): each feature at the last character of each token that is not a space, or anywhere in the token."""
    text = "".join(pieces)
    ends = np.cumsum([len(piece) for piece in pieces])
    begins = ends - [len(piece) for piece in pieces]
    spaces = [len(piece) - len(piece.rstrip(" ")) if piece.strip(" ") else 0 for piece in pieces]
    # A token without text counts as the character before it.
    last = np.maximum(ends - 1 - np.array(spaces), 0)
    found = []
    for feature in features:
        values = feature.values(text)
        if feature.anywhere:
            sums = np.concatenate([[0], np.cumsum(values)])
            found.append((sums[ends] > sums[begins]).astype(np.float32))
        else:
            found.append(values[last])
    return np.stack(found)


# -- the search -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scores:
    """Scores of U units for F features."""

    fitted: Floats
    """(F, U) on the first half: AUC - 0.5 or correlation."""
    held_out: Floats
    """(F, U) on the second half, in the direction of the first: AUC or correlation."""
    baselines: Floats
    """(F,) the percentile of the best scores of shifts; NaN if the feature was not searched."""
    skipped: tuple[str | None, ...]
    """F reasons."""


def score_units(values: Floats, marks: Floats, binary: Sequence[bool], *, shifts: int = SHIFTS) -> Scores:
    """Score each unit for each feature, and for the feature's circular shifts.

    Args:
        values: (N, U) of the units.
        marks: (F, N) of the features.
        binary: of each feature, whether it is 0 or 1.
        shifts: S.
    """
    count, units = values.shape
    halves = slice(0, count // 2), slice(count // 2, count)
    skipped = tuple(_reason(mark, halves, is_binary) for mark, is_binary in zip(marks, binary, strict=True))
    lags = (0, *_lags(count, shifts))
    fitted = np.zeros((len(marks), units), np.float32)
    held = np.zeros((len(marks), units), np.float32)
    best = np.full((len(marks), shifts), -1.0, np.float32)
    for begin in range(0, units, _UNITS_AT_ONCE):
        block = slice(begin, begin + _UNITS_AT_ONCE)
        # AUC needs the ranks of the values; both halves are ranked apart.
        ranks = [_ranks(values[half, block]) for half in halves]
        scaled = [_standardised(values[half, block]) for half in halves]
        for index, (mark, is_binary) in enumerate(zip(marks, binary, strict=True)):
            if skipped[index] is not None:
                continue
            shifted = np.stack([np.roll(mark, lag) for lag in lags])
            first, second = (
                _areas(shifted[:, half], ranks[side]) if is_binary else _correlations(shifted[:, half], scaled[side])
                for side, half in enumerate(halves)
            )
            second *= np.where(first < 0, -1, 1)
            fitted[index, block], held[index, block] = first[0], second[0]
            best[index] = np.maximum(best[index], second[1:].max(axis=1))
    baselines = np.percentile(best, PERCENTILE, axis=1).astype(np.float32)
    middle = np.where(binary, 0.5, 0.0).astype(np.float32)
    baselines[[reason is not None for reason in skipped]] = np.nan
    return Scores(fitted, held + middle[:, None], baselines + middle, skipped)


def _lags(count: int, shifts: int) -> list[int]:
    """Shifts of at least a twentieth of the text, so that the shifted feature is another text's."""
    least = max(1, count // 20)
    choices = np.arange(least, count - least)
    return np.random.default_rng(_SEED).choice(choices, shifts, replace=len(choices) < shifts).tolist()  # type: ignore[no-any-return]


def _reason(mark: Floats, halves: Sequence[slice], binary: bool) -> str | None:
    """Why a feature cannot be searched."""
    if not binary:
        return None if all(mark[half].std() > 0 for half in halves) else "it is the same at all tokens"
    for half, name in zip(halves, ("first", "second"), strict=True):
        having = int(mark[half].sum())
        for number, what in ((having, "have it"), (len(mark[half]) - having, "lack it")):
            if number < MIN_MARKED:
                return f"{number} tokens of the {name} half {what} ({MIN_MARKED} needed)"
    return None


def _standardised(values: Floats) -> Floats:
    """(N, U) with mean 0 and norm 1 over N; a constant unit becomes 0."""
    centred = values - values.mean(axis=0)
    norms = np.linalg.norm(centred, axis=0)
    # The mean of equal float32 numbers may differ from them in the last bit.
    constant = np.ptp(values, axis=0) == 0
    return np.where(constant, 0, centred / np.where(constant, 1, norms)).astype(np.float32)


def _ranks(values: Floats) -> Floats:
    """(N, U) the ranks over N, from 1; equal values have their mean rank."""
    ranks = np.empty(values.shape, np.float32)
    for column in range(values.shape[1]):
        order = np.argsort(values[:, column])
        ordered = values[order, column]
        first = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
        after = np.append(first[1:], len(ordered))
        ranks[order, column] = np.repeat((first + after + 1) / 2, after - first)
    return ranks


def _correlations(marks: Floats, scaled: Floats) -> Floats:
    """(S, U) of features (S, N) and standardised units (N, U)."""
    return _standardised(marks.T).T @ scaled


def _areas(marks: Floats, ranks: Floats) -> Floats:
    """(S, U) AUC - 0.5 of features (S, N) in {0, 1} and ranks (N, U); 0 if a shifted feature is constant."""
    having = marks.sum(axis=1, keepdims=True)
    lacking = marks.shape[1] - having
    # Ranks around their mean keep the sums exact enough in float32.
    sums = marks @ (ranks - (len(ranks) + 1) / 2)
    areas: Floats = (sums / np.maximum(having * lacking, 1)).astype(np.float32)
    return areas


# -- the ranking ------------------------------------------------------------------------------------------


def _rank(
    values: Floats, marks: Floats, scores: Scores, sizes: Sequence[int]
) -> tuple[tuple[Ranking, ...], Callable[[int], dict[str, UnitScore]]]:
    """The rankings, and a function that gives all scores of a column."""
    borders = np.cumsum(sizes)

    def scored(index: int, column: int) -> UnitScore:
        layer = int(np.searchsorted(borders, column, side="right"))
        feature, held = FEATURES[index], float(scores.held_out[index, column])
        direction = -1 if scores.fitted[index, column] < 0 else 1
        least = LEAST_AUC if feature.binary else LEAST_CORRELATION
        return UnitScore(
            layer, column - int(borders[layer] - sizes[layer]), held, direction,
            _accuracy(direction * values[:, column], marks[index]) if feature.binary else None,
            named=bool(held > scores.baselines[index] and held >= least),
        )  # fmt: skip

    searched = [index for index, reason in enumerate(scores.skipped) if reason is None]
    rankings = []
    for index, feature in enumerate(FEATURES):
        best = np.argsort(-scores.held_out[index], kind="stable")[:BEST].tolist() if index in searched else []
        rankings.append(
            Ranking(
                feature=feature.name,
                description=feature.description,
                measure="AUC" if feature.binary else "correlation",
                share=float(marks[index].mean()),
                baseline=float(scores.baselines[index]) if index in searched else None,
                units=tuple(scored(index, column) for column in best),
                skipped=scores.skipped[index],
            )
        )
    return tuple(rankings), lambda column: {FEATURES[index].name: scored(index, column) for index in searched}


def _accuracy(values: Floats, mark: Floats) -> float:
    """Balanced accuracy on the second half of "above the border", with the best border of the first half."""
    half = len(values) // 2
    order = np.argsort(values[:half])
    having = mark[order] > 0
    # If the border is before the k-th value in order: those with the feature above it, those without below it.
    above = having.sum() - np.concatenate([[0], np.cumsum(having)])
    below = np.concatenate([[0], np.cumsum(~having)])
    best = int(np.argmax(above / max(having.sum(), 1) + below / max((~having).sum(), 1)))
    ordered = values[order]
    border = -np.inf if best == 0 else np.inf if best == half else (ordered[best - 1] + ordered[best]) / 2
    guess, truth = values[half:] > border, mark[half:] > 0
    return float((guess[truth].mean() + (~guess[~truth]).mean()) / 2)
