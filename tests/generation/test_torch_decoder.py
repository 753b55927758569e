"""The reference decoder, on real small models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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


SHAPES: dict[str, dict[str, Any]] = {
    "gru": {"hidden_size": 16, "embedding_size": 8, "table_orders": (2, 3), "table_buckets": 50},
    "lstm": {"hidden_size": 16, "embedding_size": 8, "num_layers": 2},
    "transformer": {
        "hidden_size": 16, "num_heads": 2, "num_kv_heads": 1, "num_layers": 2, "context_length": 21,
        "table_orders": (3,),
    },
    "ensemble": {
        "size": 2, "member": {"type": "transformer", "hidden_size": 16, "num_heads": 2, "context_length": 6}
    },
    "hybrid": {"hidden_size": 8, "order": 3},
    "ngram": {"order": 4},
}  # fmt: skip


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
def test_a_fork_continues_independently(name: str) -> None:
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


# -- all slots in one call ------------------------------------------------------------------------------


def lively_model(name: str) -> LanguageModel:
    """A model whose logits depend much on the whole text."""
    model = build_model(Section(type=name, **SHAPES[name]), 9, seed=4).eval()
    if model.trained_by in ("counting", "both"):
        model.fit(np.random.default_rng(0).integers(9, size=300))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())))
            if parameter.ndim > 1:
                parameter /= parameter.shape[-1] ** 0.5
    return model


class Both:
    """Two decoders of one model that get the same calls, and compare their logits."""

    def __init__(self, model: LanguageModel) -> None:
        self.decoders = TorchDecoder(model, joined=False), TorchDecoder(model, joined=True)
        self.slots: list[tuple[int, int]] = []

    def add(self, make: Callable[[TorchDecoder, int], int]) -> None:
        one, two = (make(decoder, number) for number, decoder in enumerate(self.decoders))
        self.slots.append((one, two))

    def compare(self, logits: Callable[[TorchDecoder, int], np.ndarray]) -> None:
        one, two = (logits(decoder, number) for number, decoder in enumerate(self.decoders))
        np.testing.assert_allclose(one, two, atol=2e-5)


@pytest.mark.parametrize("name", SHAPES)
def test_joined_slots_have_the_logits_of_separate_ones_whatever_happens_to_them(name: str) -> None:
    both, random = Both(lively_model(name)), np.random.default_rng(1)
    slots = both.slots
    for turn in range(70):
        if turn % 4 == 0:
            both.add(lambda decoder, _: decoder.open())
            # Others begin with a step.
            if turn % 8:
                ids = random.integers(9, size=random.integers(1, 30)).tolist()
                both.compare(lambda decoder, number, ids=ids: decoder.prefill(slots[-1][number], ids))
        if turn % 7 == 3:
            pair = slots[random.integers(len(slots))]
            both.add(lambda decoder, number, pair=pair: decoder.fork(pair[number]))
        if turn % 9 == 5:
            pair = slots.pop(random.integers(len(slots)))
            for decoder, slot in zip(both.decoders, pair, strict=True):
                decoder.close(slot)
        if turn % 11 == 6:
            pair = slots[random.integers(len(slots))]
            both.add(lambda decoder, number, pair=pair: decoder.restore(decoder.export(pair[number])))
        if turn % 10 == 2:
            pair, ids = slots[random.integers(len(slots))], random.integers(9, size=3).tolist()
            both.compare(lambda decoder, number, pair=pair, ids=ids: decoder.prefill(pair[number], ids))
        if not slots:
            continue
        some = random.permutation(len(slots))[: random.integers(1, len(slots) + 1)]
        ids = random.integers(9, size=len(some)).tolist()
        both.compare(lambda decoder, number, some=some, ids=ids: decoder.step([slots[i][number] for i in some], ids))


@pytest.mark.parametrize("name", MODELS)
def test_joined_slots_are_stepped_in_one_call(name: str) -> None:
    model, calls = model_of(name, 9), []
    model.register_forward_hook(lambda module, inputs, output: calls.append(tuple(inputs[0].shape)))
    decoder = TorchDecoder(model, joined=True)
    slots = [decoder.open() for _ in range(5)]
    for number, slot in enumerate(slots):
        decoder.prefill(slot, [1] * (number + 1))
    calls.clear()
    for _ in range(3):
        decoder.step(slots, [3, 4, 5, 6, 7])
    assert calls == [(5, 1)] * 3
    # Full windows are read again in one call too.
    decoder.step(slots, [3, 4, 5, 6, 7])
    assert calls[3:] == ([(1, 4), (5, 1)] if name == "transformer" else [(5, 1)])


@pytest.mark.parametrize("joined", [False, True])
def test_a_slot_given_twice_in_one_step_is_refused(joined: bool) -> None:
    decoder = TorchDecoder(model_of("gru", 9), joined=joined)
    slot, other = decoder.open(), decoder.open()
    with pytest.raises(ValueError, match="slot 0 occurs twice"):
        decoder.step([slot, other, slot], [1, 2, 3])


def test_the_cpu_is_the_reference_and_keeps_slots_apart() -> None:
    assert "joined" not in TorchDecoder(model_of("gru", 9)).name
    assert TorchDecoder(model_of("gru", 9), joined=True).name == "torch fp32, cpu, joined"


def test_fp32_on_a_gpu_is_fp32_in_recurrent_layers_too() -> None:
    # Torch's default there is tf32. The flags are in every build of torch; only the tensors need a GPU.
    model, seen = model_of("gru", 9), []
    model.register_forward_hook(lambda *_: seen.append(torch.backends.cudnn.rnn.fp32_precision))
    decoder = TorchDecoder(model)
    decoder._device = torch.device("cuda")
    decoder._forward(torch.tensor([[1, 2]]), None)
    assert seen == ["ieee"] and torch.backends.cudnn.rnn.fp32_precision == "tf32"
