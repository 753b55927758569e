"""What a decoder computes, scored by the one exact evaluator."""

from __future__ import annotations

import numpy as np
import pytest

from lm.config import Section
from lm.evaluation.perplexity import score
from lm.generation.decoder_model import DecoderModel
from lm.generation.open_decoder import open_decoder
from lm.models.base import build_model

IDS = np.random.default_rng(1).integers(0, 30, size=400)
SHAPES = {
    "lstm": {"hidden_size": 32, "embedding_size": 16},
    "transformer": {"hidden_size": 32, "num_heads": 2, "num_layers": 2, "context_length": 24},
}


@pytest.mark.parametrize("stride", [None, 5, 24])
@pytest.mark.parametrize("name", SHAPES)
def test_a_native_decoder_scores_as_its_torch_model(name: str, stride: int | None) -> None:
    model = build_model(Section(type=name, **SHAPES[name]), 30, seed=2)
    options, arrays = model.options.model_dump(), model.arrays()
    losses = {}
    for precision in ("fp32", "int8"):
        # One slot is enough: windows are read one after the other.
        decoder = open_decoder(options, lambda: arrays, lambda: model, precision=precision)
        scores = score(DecoderModel(decoder), IDS, stride=stride)
        assert scores.tokens == 399
        losses[precision] = scores.loss
    exact = score(model, IDS, stride=stride)
    assert losses["fp32"] == pytest.approx(exact.loss, abs=1e-5)
    assert losses["int8"] == pytest.approx(exact.loss, rel=5e-3)
    assert losses["int8"] != losses["fp32"]
