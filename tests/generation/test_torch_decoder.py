"""The reference decoder, on real small models."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lm.config import Section
from lm.generation.torch_decoder import TorchDecoder
from lm.models.base import LanguageModel, build_model

MODELS = {
    "gru": {"hidden_size": 16, "embedding_size": 8},
    "transformer": {"hidden_size": 16, "num_heads": 2, "num_layers": 2, "context_length": 8},
}


def model_of(name: str, vocab_size: int) -> LanguageModel:
    return build_model(Section(type=name, **MODELS[name]), vocab_size, seed=4)


@pytest.mark.parametrize("name", MODELS)
def test_logits_do_not_depend_on_how_the_text_arrived(name: str) -> None:
    ids = np.random.default_rng(0).integers(9, size=29).tolist()
    at_once, in_steps = TorchDecoder(model_of(name, 9)), TorchDecoder(model_of(name, 9))
    one, two = at_once.open(), in_steps.open()
    whole = at_once.prefill(one, ids)
    single = np.concatenate([in_steps.step([two], [token]) for token in ids])
    assert whole.shape == (29, 9)
    np.testing.assert_allclose(whole, single, atol=1e-5)


def test_a_full_window_slides_by_half() -> None:
    model = model_of("transformer", 9).eval()
    ids = np.random.default_rng(1).integers(9, size=10).tolist()
    decoder = TorchDecoder(model)
    logits = decoder.prefill(decoder.open(), ids)
    with torch.no_grad():
        # Eight are held when the ninth comes: the newer four stay.
        expected = model(torch.tensor([ids[4:10]]))[0][0, 4:]
    np.testing.assert_allclose(logits[8:], expected.numpy(), atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_a_fork_goes_on_by_itself(name: str) -> None:
    decoder = TorchDecoder(model_of(name, 9))
    slot = decoder.open()
    decoder.prefill(slot, [1, 2, 3])
    other = decoder.fork(slot)
    left = decoder.step([slot, other], [4, 5])
    assert not np.allclose(left[0], left[1])
    again = decoder.restore(decoder.export(slot))
    decoder.close(slot)
    np.testing.assert_array_equal(decoder.step([again], [6]), _step_after(name, [1, 2, 3, 4], 6))


def _step_after(name: str, ids: list[int], token: int) -> np.ndarray:
    decoder = TorchDecoder(model_of(name, 9))
    slot = decoder.open()
    decoder.prefill(slot, ids[:3])
    decoder.step([slot], [ids[3]])
    return decoder.step([slot], [token])


@pytest.mark.parametrize("name", MODELS)
def test_logits_in_company_are_those_alone_bit_for_bit(name: str) -> None:
    decoder = TorchDecoder(model_of(name, 9))
    slots = [decoder.open() for _ in range(5)]
    for number, slot in enumerate(slots):
        decoder.prefill(slot, [number, 1, 2])
    together = decoder.step(slots, [3, 4, 5, 6, 7])
    alone = TorchDecoder(model_of(name, 9))
    slot = alone.open()
    alone.prefill(slot, [3, 1, 2])
    np.testing.assert_array_equal(alone.step([slot], [6])[0], together[3])
