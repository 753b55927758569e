"""Engines over real small models."""

from __future__ import annotations

import pytest

from tests.generation.house import MODELS, House


@pytest.fixture(params=sorted(MODELS))
def house(request: pytest.FixtureRequest) -> House:
    """A GRU and a Transformer over the characters of one sentence."""
    return House(request.param)


@pytest.fixture
def gru() -> House:
    """A GRU over the characters of one sentence."""
    return House()
