"""Filters: what changes the logits of a model before a token is drawn. The same for every decoder.

A filter is one row of `FILTERS`, in the order in which the filters act. The table gives the sampler its steps and its
batch key, `SamplingOptions` its fields (and so the flags, the API and docs/reference/options.md), and the page its
sliders.

To add a filter: write its function, declare its options in `FilterOptions`, and add a row to `FILTERS`.

Shapes: B rows, V vocabulary, float64. A masked token has the logit -inf. Each row keeps at least one token. The result
of a row does not depend on the other rows, to the last bit.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, ValidationError, ValidatorFunctionWrapHandler, field_validator

from lm._renamed import old_names
from lm.config import Options
from lm.generation.distribution import Logits, row_max, softmax
from lm.late_numpy import np

if TYPE_CHECKING:
    import numpy.typing as npt

    Ids = npt.NDArray[np.int64]

_MASKED = -math.inf
_HUGE = 1e300
"""Replaces infinity: differences of logits stay finite."""
_SMALL = 128
"""Rows of at most this many tokens are sorted whole."""

# -- options ------------------------------------------------------------------------------------------

Token = Annotated[int, Field(ge=0)]
Temperature = Annotated[float, Field(ge=0, le=100)]


class FilterOptions(Options):
    """The options of the filters, in the order of help and docs."""

    temperature: Temperature | Annotated[tuple[Temperature, ...], Field(min_length=1, max_length=1000)] = Field(
        0.8,
        description="Divides the logits. Below 1: safer text; above 1: more varied; 0: always the most likely token. "
        "Several values apply in turn, one a token.",
    )
    top_k: int | None = Field(None, ge=1, description="Draw only from the k most likely tokens.")
    top_p: float | None = Field(
        None, gt=0, le=1, description="Draw only from the smallest set of tokens that holds this share of probability."
    )
    min_p: float | None = Field(
        None, ge=0, le=1, description="Draw only from tokens with at least this share of the highest probability."
    )
    typical_p: float | None = Field(
        None, gt=0, le=1, description="Draw only from the tokens of most typical surprise that hold this share."
    )
    repetition_penalty: float | None = Field(
        None, gt=0, le=100, description="Above 1: makes tokens of the prompt and the generated text less likely."
    )
    presence_penalty: float = Field(
        0.0, ge=-100, le=100, description="Subtracted from the logit of each token that was generated before."
    )
    frequency_penalty: float = Field(
        0.0, ge=-100, le=100, description="Subtracted from the logit of a token for each time it was generated before."
    )
    penalty_window: int | None = Field(
        None, ge=1, description="The penalties count only this many of the last tokens; default: all."
    )
    logit_bias: dict[Token, Annotated[float, Field(ge=-100, le=100)]] = Field(
        default_factory=dict, description="Added to the logits of tokens, by id; -100 bans the token."
    )
    banned_tokens: tuple[Token, ...] = Field((), description="Tokens, by id, that are never drawn.")
    allow_unknown: bool = Field(False, description="Allow the unknown token.")

    @property
    def temperatures(self) -> tuple[float, ...]:
        """One value for each token, repeated."""
        return self.temperature if isinstance(self.temperature, tuple) else (self.temperature,)

    @field_validator("temperature", mode="wrap")
    @classmethod
    def _number_or_schedule(cls, value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        parts = [part.strip() for part in value.split(",")] if isinstance(value, str) else value
        try:
            return handler(parts[0] if isinstance(parts, list) and len(parts) == 1 else parts)
        except ValidationError:
            # One error: pydantic reports one for a number and one for a list.
            raise ValueError("give a number from 0 to 100, or several with commas between them") from None

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _pairs(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return json.loads(value)
        except ValueError:
            raise ValueError('write JSON such as {"13": -100}') from None


# -- what a filter may know of a text -------------------------------------------------------------------


class Counts:
    """How often each token occurs among the last `window` tokens of a text."""

    def __init__(self, vocab_size: int, window: int | None, tokens: Sequence[int] = ()) -> None:
        recent = tokens if window is None else tokens[-window:]
        self.counts: Ids = np.bincount(np.array(recent, dtype=np.int64), minlength=vocab_size)
        self._window = window
        self._recent = deque(() if window is None else recent)

    def add(self, token: int) -> None:
        """Count one more token, and drop the one that leaves the window."""
        self.counts[token] += 1
        if self._window is not None:
            self._recent.append(token)
            if len(self._recent) > self._window:
                self.counts[self._recent.popleft()] -= 1


@dataclass
class SamplingContext:
    """The text before the token that is drawn next."""

    position: int
    """Generated tokens so far."""
    text_counts: Counts | None = None
    """Tokens of the prompt and the generated text, if a filter counts them."""
    generated_counts: Counts | None = None
    """Tokens of the generated text, if a filter counts them."""

    @classmethod
    def after(
        cls, prompt: Sequence[int], generated: Sequence[int], options: FilterOptions, vocab_size: int
    ) -> SamplingContext:
        """The context after a prompt and some generated tokens."""
        counted = {each.counts for each in FILTERS if each.is_on(options)}
        window = options.penalty_window
        return cls(
            len(generated),
            Counts(vocab_size, window, (*prompt, *generated)) if "text_counts" in counted else None,
            Counts(vocab_size, window, generated) if "generated_counts" in counted else None,
        )

    def __post_init__(self) -> None:
        self.has_counts = self.text_counts is not None or self.generated_counts is not None

    def count(self, token: int) -> None:
        """Count a generated token."""
        if self.text_counts is not None:
            self.text_counts.add(token)
        if self.generated_counts is not None:
            self.generated_counts.add(token)


# -- the functions, in order ----------------------------------------------------------------------------


def ban(logits: npt.NDArray[np.floating[Any]], tokens: Sequence[int] | Ids) -> Logits:
    """Mask some tokens. Takes float32 or float64 and gives new float64 logits."""
    masked = logits.astype(np.float64)
    if len(tokens) == 1:
        # Much faster than a list of one.
        if len(masked) == 1:
            masked[0, tokens[0]] = -np.inf
        else:
            masked[:, tokens[0]] = -np.inf
    elif len(tokens):
        masked[:, tokens] = -np.inf
    return masked


def add_bias(logits: Logits, tokens: Sequence[int] | Ids, biases: Sequence[float] | Logits) -> Logits:
    """Add `biases` to the logits of `tokens`, which are all different."""
    biased = logits.copy()
    biased[:, tokens] += biases
    return biased


def penalise_repetition(logits: Logits, counts: npt.NDArray[Any], penalty: float) -> Logits:
    """Divide the positive logits (..., V) of tokens with counts (..., V) by `penalty`; multiply the negative ones.

    Source: Keskar et al. 2019, "CTRL".
    """
    # A tiny penalty overflows: infinite logits have no probabilities.
    with np.errstate(over="ignore"):
        changed = np.where(logits > 0, logits / penalty, logits * penalty).clip(max=_HUGE)
    return np.where(counts > 0, changed, logits)


def penalise_presence(logits: Logits, counts: npt.NDArray[Any], presence: float, frequency: float) -> Logits:
    """Subtract `presence` from the logits (..., V) of tokens with counts (..., V), and `frequency` times the count."""
    return logits - (presence * (counts > 0) + frequency * counts)


def ensure_finite_row(logits: Logits, fallback: int) -> Logits:
    """Replace NaN with -inf, clamp +inf, and keep `fallback` in rows (B, V) that are fully masked."""
    finite: Logits = np.minimum(np.where(np.isnan(logits), -np.inf, logits), _HUGE)
    finite[np.isneginf(finite).all(axis=-1), fallback] = 0.0
    return finite


def apply_temperature(
    logits: Logits, temperature: float | npt.NDArray[np.float64], largest: Logits | float | None = None
) -> Logits:
    """Divide by the temperature, above 0, of all rows or of each (B, 1). The maximum of a row, `largest`, becomes 0."""
    # Shifted first: a tiny temperature would overflow, and infinity minus infinity is NaN.
    shifted: Logits = logits - (row_max(logits) if largest is None else largest)
    if isinstance(temperature, float) and temperature > 1e-6:
        return shifted if temperature == 1.0 else shifted / temperature
    with np.errstate(over="ignore"):
        return shifted / temperature


def keep_top_k(logits: Logits, top_k: int) -> Logits:
    """Mask all but the k most likely tokens; among equals at the border the lower ids stay."""
    size = logits.shape[-1]
    if top_k >= size:
        return logits.copy()
    if len(logits) == 1 and size <= _SMALL:
        # Sorting a short row is as fast as partitioning it, and shows equals at the border.
        ordered = logits.copy()
        ordered.sort()
        border = ordered.item(size - top_k)
        if ordered.item(size - top_k - 1) < border:
            filtered = logits.copy()
            np.putmask(filtered, logits < border, _MASKED)
            return filtered
    parted = logits.copy()
    parted.partition(size - top_k, axis=-1)
    borders = parted[:, size - top_k, None] if len(logits) > 1 else parted.item(size - top_k)
    return _keep_from(logits, borders, top_k)


def _keep_from(logits: Logits, border: Logits | float, count: int | Ids) -> Logits:
    """Mask the logits below the border (B, 1), and the equals with the highest ids if more than `count` would stay."""
    masked = logits < border
    if masked.size - np.count_nonzero(masked) > (len(logits) * count if isinstance(count, int) else count.sum()):
        equal = logits == border
        room = count - (logits > border).sum(axis=-1, keepdims=True)
        masked |= equal & (equal.cumsum(axis=-1) > room)
    # Twice as fast as np.where.
    filtered = logits.copy()
    np.putmask(filtered, masked, _MASKED)
    return filtered


def keep_top_p(logits: Logits, top_p: float) -> Logits:
    """Mask the tokens outside the smallest set that holds `top_p` of the probability.

    Among equals at the border the lower ids stay.

    Source: Holtzman et al. 2019, "The Curious Case of Neural Text Degeneration".
    """
    if top_p >= 1.0:
        return logits.copy()
    size = logits.shape[-1]
    if size <= _SMALL:
        ordered = np.sort(logits, axis=-1)[:, ::-1]
        mass = np.add.accumulate(np.exp(ordered - ordered[:, :1]), axis=-1)
        enough = top_p * mass[:, -1:]
    else:
        largest = row_max(logits)
        enough = top_p * np.exp(logits - largest).sum(axis=-1, keepdims=True)
        # Sort only the most likely tokens: as many as hold this share.
        count = _SMALL
        while True:
            count = min(count, size)
            ordered = np.sort(np.partition(logits, size - count, axis=-1)[:, size - count :], axis=-1)[:, ::-1]
            mass = np.add.accumulate(np.exp(ordered - largest), axis=-1)
            if count == size or (mass[:, -1:] >= enough).all():
                break
            count *= 8
    # The mass before each token decides, so that the token which crosses the border stays.
    if len(logits) == 1:
        last = int(mass[0, :-1].searchsorted(enough.item()))
        return _keep_from(logits, ordered.item(last), last + 1)
    counts = 1 + (mass[:, :-1] < enough).sum(axis=-1, keepdims=True)
    return _keep_from(logits, np.take_along_axis(ordered, counts - 1, axis=-1), counts)


def keep_min_p(logits: Logits, min_p: float) -> Logits:
    """Mask the tokens with less than `min_p` times the probability of the most likely token.

    Source: Nguyen et al. 2024, "Turning Up the Heat: Min-p Sampling for Creative and Coherent LLM Outputs".
    """
    return np.where(np.exp(logits - row_max(logits)) >= min_p, logits, _MASKED)


def keep_typical_p(logits: Logits, typical_p: float) -> Logits:
    """Keep the tokens whose surprise is nearest to the entropy, until they hold `typical_p` of the probability.

    Among equals at the border the lower ids stay. The most likely token that stays gets 0.

    Source: Meister et al. 2022, "Locally Typical Sampling".
    """
    if typical_p >= 1.0:
        return logits.copy()
    probabilities = softmax(logits)
    possible = probabilities > 0
    surprise = -np.log(np.where(possible, probabilities, 1.0))
    entropy = (probabilities * surprise).sum(axis=-1, keepdims=True)
    distance = np.where(possible, np.abs(surprise - entropy), np.inf)
    order = np.argsort(distance, axis=-1, kind="stable")
    mass = np.take_along_axis(probabilities, order, axis=-1).cumsum(axis=-1)
    kept = np.empty(logits.shape, dtype=np.bool_)
    # The mass before each token decides, so that the token which crosses the border stays.
    np.put_along_axis(kept, order[:, 1:], mass[:, :-1] < typical_p, axis=-1)
    np.put_along_axis(kept, order[:, :1], np.True_, axis=-1)
    filtered: Logits = np.where(kept, logits, _MASKED)
    return filtered - row_max(filtered)


# -- the table ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Slider:
    """How the page shows an option."""

    minimum: float
    maximum: float
    step: float
    label: str
    off: float | None = None
    """The position that switches the filter off."""
    info: str | None = None
    """Replaces the description of the option, if that is too long or too technical."""


@dataclass(frozen=True)
class Filter:
    """A row of the table."""

    controls: Mapping[str, Slider | None]
    """The options that switch it on, with their sliders."""
    function: Callable[..., Logits] | None = None
    """Makes new logits (B, V) from logits, counts (B, V) if `counts` is set, and the values of the options.
    After the temperature, the maximum of each row is 0 and must stay 0. None: the sampler does it itself."""
    counts: Literal["text_counts", "generated_counts"] | None = None
    """Which counts of the contexts it reads."""
    off_in_requests: tuple[float, ...] = ()
    """Values that API clients send for "off", besides null."""
    fields: type[Options] = field(default=FilterOptions)
    """Declares the options."""

    def is_on(self, options: Any) -> bool:
        """Whether it changes anything: None, 0 and the `off` position of a slider switch it off."""
        values = [(getattr(options, name), slider) for name, slider in self.controls.items()]
        return any(value and not (slider and value == slider.off) for value, slider in values)


TEMPERATURE = Filter(
    {"temperature": Slider(0, 2, 0.05, "Temperature", info="Low: safe and repetitive. High: varied, then nonsense.")}
)
FILTERS: list[Filter] = [
    Filter({"banned_tokens": None, "allow_unknown": None}),
    Filter({"logit_bias": None}),
    Filter({"repetition_penalty": Slider(1, 2, 0.05, "Repetition penalty", off=1)}, penalise_repetition, "text_counts"),
    Filter(
        {"presence_penalty": Slider(-2, 2, 0.1, "Presence penalty"),
         "frequency_penalty": Slider(-2, 2, 0.1, "Frequency penalty")},
        penalise_presence, "generated_counts",
    ),
    TEMPERATURE,
    Filter(
        {"top_k": Slider(0, 100, 1, "Top-k", off=0, info="Draw only from the k most likely tokens; 0: from all.")},
        keep_top_k, off_in_requests=(0, -1),
    ),
    Filter({"top_p": Slider(0.01, 1, 0.01, "Top-p", off=1)}, keep_top_p),
    Filter({"min_p": Slider(0, 0.5, 0.01, "Min-p", off=0)}, keep_min_p),
    Filter({"typical_p": Slider(0.05, 1, 0.05, "Typical-p", off=1)}, keep_typical_p),
]  # fmt: skip
"""All filters, in the order in which they act."""


if not TYPE_CHECKING:
    __getattr__ = old_names(__name__)
