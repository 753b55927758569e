"""Every model's `inspect`: the logits of `forward`, and gradients that are true."""

from __future__ import annotations

import pytest
import torch

from lm.config import Section
from lm.errors import UnsupportedPartError
from lm.models.base import LanguageModel, State, build_model
from lm.registry import MODELS

SMALL = {"hidden_size": 16, "embedding_size": 12, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "order": 3}
RECURRENT = ("rnn", "gru", "lstm")
VARIANTS: dict[str, dict[str, object]] = {
    **{name: {} for name in MODELS.names()},
    "rnn relu": {"nonlinearity": "relu"},
    "gru tied": {"tie_weights": True},
    "lstm tables": {"table_orders": (2, 3, 4), "table_buckets": 50},
    "lstm tails": {"adaptive_cutoffs": (3, 7), "tie_weights": True},
    "transformer tables": {"table_orders": (2, 3), "tie_weights": True},
    "hybrid lstm": {"cell": "lstm"},
}


def small(name: str, vocab_size: int = 11, **options: object) -> LanguageModel:
    kind = name.split()[0]
    fields = MODELS.resolve(kind).Options.model_fields
    known = {key: value for key, value in SMALL.items() if key in fields}
    model = build_model(Section(type=kind, **{**known, **VARIANTS[name], **options}), vocab_size, seed=1)
    for key, parameter in model.named_parameters():
        if "tables." in key:
            torch.nn.init.normal_(parameter.data[:-1], std=0.5)
    if model.trained_by in ("counting", "both"):
        model.fit(some_ids(1, 400)[0].numpy())
    return model.eval()


def some_ids(rows: int, time: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(11, (rows, time), generator=torch.Generator().manual_seed(seed))


every_variant = pytest.mark.parametrize("name", VARIANTS)


@every_variant
def test_inspect_gives_the_logits_and_the_state_of_forward(name: str) -> None:
    model, ids = small(name), some_ids(3, 20)
    logits, state = model(ids[:, :12])
    more, after = model(ids[:, 12:], state)
    seen = model.inspect(ids[:, :12], parts=model.inspectable())
    again = model.inspect(ids[:, 12:], seen.state, parts=model.inspectable())
    assert torch.allclose(seen.logits, logits, atol=1e-5, rtol=0)
    assert torch.allclose(again.logits, more, atol=1e-5, rtol=0)
    assert again.state.tensors.keys() == after.tensors.keys()
    for key, tensor in after.tensors.items():
        assert torch.allclose(again.state.tensors[key].double(), tensor.double(), atol=1e-5, rtol=0), key


@every_variant
def test_a_part_is_given_on_request_if_the_model_has_it(name: str) -> None:
    model, ids = small(name), some_ids(2, 5)
    for part in model.inspectable():
        seen = model.inspect(ids, parts=[part])
        given = {each for each in Parts if getattr(seen, each) is not None and len(getattr(seen, each))}
        assert given == {part}
    assert set(model.inspectable()) <= set(Parts)


Parts = (
    "inputs",
    "hidden",
    "cells",
    "gates",
    "candidates",
    "attention",
    "contributions",
    "terms",
    "mixture",
    "layer_logits",
)


@every_variant
def test_a_part_that_the_model_lacks_is_named_together_with_those_it_has(name: str) -> None:
    model = small(name)
    for part in {*Parts, "attenshun"} - set(model.inspectable()):
        with pytest.raises(UnsupportedPartError, match=f"has no {part}. It has ") as caught:
            model.inspect(some_ids(1, 3), parts=[part])
        assert all(each in str(caught.value) for each in model.inspectable())


@pytest.mark.parametrize("kind", RECURRENT)
def test_the_parts_of_a_cell_satisfy_its_equations(kind: str) -> None:
    model = small(kind)
    seen = model.inspect(some_ids(2, 9), parts=model.inspectable())
    for layer, hidden in enumerate(seen.hidden):
        before = torch.nn.functional.pad(hidden[:, :-1], (0, 0, 1, 0))
        candidates = seen.candidates[layer]
        if kind == "rnn":
            assert torch.equal(candidates, hidden)
        elif kind == "gru":
            update = seen.gates[layer]["update"]
            assert torch.allclose(hidden, update * before + (1 - update) * candidates, atol=1e-6)
        else:
            gates, cells = seen.gates[layer], seen.cells[layer]
            cells_before = torch.nn.functional.pad(cells[:, :-1], (0, 0, 1, 0))
            assert torch.allclose(cells, gates["forget"] * cells_before + gates["input"] * candidates, atol=1e-6)
            assert torch.allclose(hidden, gates["output"] * cells.tanh(), atol=1e-6)


# Tails compute in float32.
recurrent_in_float64 = pytest.mark.parametrize(
    "name", [name for name in VARIANTS if name.split()[0] in RECURRENT and "tails" not in name]
)


def log_probability(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Of the last token, given those before it."""
    return logits[0, -2].log_softmax(dim=-1)[ids[0, -1]]


@recurrent_in_float64
def test_the_gradient_of_a_hidden_state_equals_finite_differences(name: str) -> None:
    model, ids = small(name).double(), some_ids(1, 9)
    seen = model.inspect(ids, parts=["hidden"])
    *_, grads = seen.gradients(log_probability(seen.logits, ids), ["hidden"])["hidden"]
    state = model.inspect(ids[:, :4]).state

    @torch.no_grad()
    def value(unit: int, change: float) -> float:
        tensors = {key: tensor.clone() for key, tensor in state.tensors.items()}
        tensors["hidden"][0, -1, unit] += change
        return float(log_probability(model.inspect(ids[:, 4:], State(tensors)).logits, ids))

    for unit in (0, 7, 11):
        difference = (value(unit, 1e-5) - value(unit, -1e-5)) / 2e-5
        assert float(grads[0, 3, unit]) == pytest.approx(difference, rel=1e-5, abs=1e-9)


@recurrent_in_float64
def test_the_gradient_of_an_embedding_equals_finite_differences(name: str) -> None:
    model, ids = small(name).double(), some_ids(1, 9)
    seen = model.inspect(ids, parts=["inputs"])
    (grads,) = seen.gradients(log_probability(seen.logits, ids), ["inputs", "hidden"])["inputs"]

    @torch.no_grad()
    def value(unit: int, change: float) -> float:
        added = torch.zeros(1, 9, 12, dtype=torch.float64)
        added[0, 2, unit] = change
        hook = model.get_submodule("embedding").register_forward_hook(lambda module, given, output: output + added)
        with hook:
            return float(log_probability(model.inspect(ids).logits, ids))

    for unit in (0, 7, 11):
        difference = (value(unit, 1e-5) - value(unit, -1e-5)) / 2e-5
        assert float(grads[0, 2, unit]) == pytest.approx(difference, rel=1e-5, abs=1e-9)
