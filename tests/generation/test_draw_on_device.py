"""Drawing on the device keeps and draws the tokens of the numpy filters."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from lm.generation.decoder import Draw
from lm.generation.distribution import uniforms
from lm.generation.draw_on_device import can_draw, draw_rows
from lm.generation.engine import Engine
from lm.generation.filters import SamplingContext
from lm.generation.options import SamplingOptions
from lm.generation.sampler import Sampler
from lm.generation.torch_decoder import TorchDecoder
from lm.tokenizers.byte import ByteTokenizer
from tests.generation.house import House, finish

TOKENIZER = ByteTokenizer(ByteTokenizer.Options())
V = TOKENIZER.vocab_size
OPTIONS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 5},
    {"temperature": 1.3, "top_p": 0.8},
    {"temperature": 0.9, "top_k": 30, "top_p": 0.9, "min_p": 0.02},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 1.0, "top_k": 2 * V},
    {"temperature": 2.0, "banned_tokens": (3, 7, 8)},
]


def sampler_of(**options: Any) -> Sampler:
    return Sampler(SamplingOptions.model_validate(options), TOKENIZER)


def both(logits: np.ndarray, seed: int = 5, **options: Any) -> tuple[list[int], list[int]]:
    """The tokens that numpy draws, and those of torch."""
    sampler = sampler_of(**options)
    assert sampler.plan is not None and can_draw(sampler.plan)
    numbers = uniforms(seed, 0, 0, len(logits))
    drawn = draw_rows(torch.from_numpy(logits.copy()), sampler.plan, numbers)
    return sampler.draw(logits, [SamplingContext(0)] * len(logits), numbers), drawn.tolist()


@pytest.mark.parametrize("options", OPTIONS)
def test_tokens_are_those_of_the_numpy_filters(options: dict[str, Any]) -> None:
    logits = (np.random.default_rng(0).normal(size=(3000, V)) * 4).astype(np.float32)
    expected, drawn = both(logits, **options)
    assert drawn == expected


@pytest.mark.parametrize("options", OPTIONS)
def test_among_equals_the_lower_ids_stay(options: dict[str, Any]) -> None:
    # Quarters: many equal logits, also at the borders of top-k and top-p.
    logits = (np.random.default_rng(1).integers(-8, 8, size=(500, V)) / 4).astype(np.float32)
    expected, drawn = both(logits, **options)
    assert drawn == expected


def test_rows_that_are_not_finite_draw_what_numpy_draws() -> None:
    logits = np.zeros((5, V), np.float32)
    logits[0], logits[1, 4:], logits[2, 9], logits[3, 2:4] = np.nan, -np.inf, np.inf, (np.nan, np.inf)
    logits[4] = -np.inf
    for options in OPTIONS[:5]:
        expected, drawn = both(logits, **options)
        assert drawn == expected, options


def test_a_large_vocabulary_differs_only_at_a_border() -> None:
    logits = (np.random.default_rng(2).normal(size=(200, 50_000)) * 3).astype(np.float32)
    numbers = uniforms(3, 0, 0, len(logits))
    plan = sampler_of(temperature=1.0).plan
    assert plan is not None
    drawn = draw_rows(torch.from_numpy(logits), plan, numbers).numpy()
    weights = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    cumulative = weights.cumsum(axis=1) / weights.sum(axis=1, keepdims=True)
    rows = np.arange(len(logits))
    after, before = cumulative[rows, drawn], cumulative[rows, drawn] - weights[rows, drawn] / weights.sum(axis=1)
    assert (before - 1e-6 <= numbers).all() and (numbers <= after + 1e-6).all()


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0, "typical_p": 0.5},
        {"temperature": 1.0, "presence_penalty": 1.0},
        {"temperature": 1.0, "logit_bias": {3: 1.0}},
        {"temperature": (0.5, 1.0)},
        {"temperature": 1e-9},
    ],
)
def test_options_that_need_more_are_left_to_numpy(options: dict[str, Any]) -> None:
    plan = sampler_of(**options).plan
    assert plan is None or not can_draw(plan)


REQUESTS: list[dict[str, Any]] = [
    {"seed": 1, "top_k": 5},
    {"seed": 2, "temperature": 0},
    {"seed": 3, "top_p": 0.7, "logprobs": 2},
    {"seed": 3, "top_p": 0.7},
    {"seed": 4, "typical_p": 0.5},
    {"seed": 5, "frequency_penalty": 1.0},
    {"seed": 6, "n": 2, "max_tokens": 25},
    {"num_beams": 3, "max_tokens": 6},
]


@pytest.mark.parametrize("name", ["gru", "transformer"])
def test_an_engine_gives_the_same_texts_and_scores_wherever_tokens_are_drawn(name: str) -> None:
    def texts(**settings: Any) -> list[Any]:
        house = House(name)
        engine = Engine(TorchDecoder(house.model, **settings), house.tokenizer, max_batch=32)
        jobs = [engine.submit(house.request("the "[: 1 + number % 4], **each)) for number, each in enumerate(REQUESTS)]
        return [[sample.facts for sample in samples] for samples in finish(engine, *jobs)]

    assert texts(draws=True) == texts(draws=False)
    # In one call the last bits differ, which shows in scores, and in a text only at a border.
    separate, joined = texts(), texts(joined=True, draws=True)
    assert [[facts[:2] for facts in samples] for samples in joined] == [
        [facts[:2] for facts in samples] for samples in separate
    ]


def test_logits_stay_on_the_device_unless_they_are_needed() -> None:
    decoder = TorchDecoder(House().model, joined=True, draws=True)
    slots = [decoder.open() for _ in range(5)]
    for slot in slots:
        decoder.prefill(slot, [1, 2])
    plan = sampler_of(temperature=1.0).plan
    draws = [Draw(2, plan, [0.1, 0.9], needs_logits=False), Draw(1), Draw(2, plan, [0.5, 0.2])]
    (tokens, none), (no_tokens, rows), (others, scored) = decoder.step_and_draw(slots, [3, 4, 5, 6, 7], draws)
    assert tokens is not None and len(tokens) == 2 and none is None
    assert no_tokens is None and rows is not None and rows.shape == (1, decoder.vocab_size)
    assert others is not None and len(others) == 2 and scored is not None and scored.shape == (2, decoder.vocab_size)
