"""Shapes: true for every model, and the numbers of a step that can be worked out by hand."""

from __future__ import annotations

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import lm
from lm.config import Section
from lm.errors import ConfigError
from lm.inspection.drawing import shapes as drawing
from lm.inspection.shapes import Shapes, StageShapes, shapes
from lm.models.base import LanguageModel, build_model
from lm.models.layout import value_of
from lm.registry import MODELS

# All widths differ, so that no symbol stands for another.
SMALL = {"hidden_size": 24, "embedding_size": 10, "num_layers": 2, "num_heads": 6, "num_kv_heads": 3, "order": 3}
VARIANTS: dict[str, dict[str, object]] = {
    **{name: {} for name in MODELS.names()},
    "rnn relu": {"nonlinearity": "relu"},
    "gru tied": {"tie_weights": True},
    "lstm tables": {"table_orders": (2, 3, 4), "table_buckets": 50},
    "lstm tails": {"adaptive_cutoffs": (3, 7), "tie_weights": True},
    "transformer tables": {"table_orders": (2, 3), "tie_weights": True},
    "transformer without norm": {"qk_norm": False, "adaptive_cutoffs": (5,)},
    "hybrid lstm": {"cell": "lstm"},
}
BATCH, LENGTH, VOCAB = 3, 7, 11

every_variant = pytest.mark.parametrize("name", VARIANTS)


def small(name: str) -> LanguageModel:
    kind = name.split()[0]
    fields = MODELS.resolve(kind).Options.model_fields
    known = {key: value for key, value in SMALL.items() if key in fields}
    model = build_model(Section(type=kind, **{**known, **VARIANTS[name]}), VOCAB, seed=1)
    if model.trained_by in ("counting", "both"):
        model.fit(some_ids(1, 300)[0].numpy())
    return model


def some_ids(rows: int, time: int) -> torch.Tensor:
    return torch.randint(VOCAB, (rows, time), generator=torch.Generator().manual_seed(0))


def found_of(name: str) -> tuple[LanguageModel, Shapes]:
    model = small(name)
    return model, shapes(model, batch=BATCH, length=LENGTH)


@every_variant
def test_each_parameter_is_there_once_with_its_real_shape(name: str) -> None:
    model, found = found_of(name)
    tensors = [tensor for stage in found.stages for tensor in stage.parameters]
    assert found.parameters == model.num_parameters()
    real = {key: tuple(parameter.shape) for key, parameter in model.named_parameters()}
    if real:
        assert {tensor.name: tensor.sizes for tensor in tensors} == real
        assert len(tensors) == len(real)
        assert found.parameter_bytes == 4 * model.num_parameters()


@every_variant
def test_flops_of_forward_and_backward_are_those_that_torch_counts(name: str) -> None:
    model, found = found_of(name)
    model.train()
    ids = some_ids(BATCH, LENGTH)
    with FlopCounterMode(display=False) as counter:
        # Torch counts the products of attention if the maps are made.
        logits = model.inspect(ids, parts=[part for part in model.inspectable() if part == "attention"]).logits
    assert counter.get_total_flops() == found.forward_flops
    if not logits.requires_grad:
        return
    with FlopCounterMode(display=False) as counter:
        logits.sum().backward()
    # The first step needs no gradient of the state before it, which is zero.
    spared = sum(2 * BATCH * tensor.sizes[1] * tensor.sizes[0] for tensor in recurrent_weights(found))
    assert counter.get_total_flops() == found.backward_flops - spared


def recurrent_weights(found: Shapes) -> list[object]:
    return [tensor for stage in found.stages for tensor in stage.parameters if "weight_hh" in tensor.name]


@every_variant
def test_the_state_has_the_bytes_of_the_real_one(name: str) -> None:
    model, found = found_of(name)
    _, state = model(some_ids(BATCH, LENGTH))
    floats = [tensor for tensor in state.tensors.values() if tensor.is_floating_point()]
    if floats:
        assert found.state_bytes == sum(tensor.nbytes for tensor in floats)


@every_variant
def test_activations_that_can_be_inspected_have_their_shapes(name: str) -> None:
    model, found = found_of(name)
    seen = model.inspect(
        some_ids(BATCH, LENGTH), parts=[part for part in ("hidden", "attention") if part in model.inspectable()]
    )
    assert last(found.stages[-1]).sizes == tuple(seen.logits.shape)
    layers = [
        stage for stage in found.stages if stage.name.startswith(("layer ", "block ")) and "attention" not in stage.name
    ]
    assert [last(stage).sizes for stage in layers] == [tuple(hidden.shape) for hidden in seen.hidden]
    maps = [tensor.sizes for stage in found.stages for tensor in stage.activations if tensor.name == "weights"]
    assert maps == [tuple(layer.weights.shape) for layer in seen.attention]


def last(stage: StageShapes) -> object:
    return stage.activations[-1]


def test_a_gru_by_hand() -> None:
    model = build_model(Section(type="gru", embedding_size=4, hidden_size=5), 7)
    found = shapes(model, batch=2, length=3)
    layer = found.stages[1]
    assert [(tensor.symbols, tensor.sizes) for tensor in layer.parameters] == [
        (("3·H", "E"), (15, 4)), (("3·H", "H"), (15, 5)), (("3·H",), (15,)), (("3·H",), (15,))
    ]  # fmt: skip
    # 7·4 + 15·4 + 15·5 + 15 + 15 + 7·5 + 7
    assert found.parameters == 235
    # 6 tokens: 2 · 6 · (4·15 + 5·15 + 5·7)
    assert found.forward_flops == 2040
    assert found.backward_flops == 4080
    # x; r, z, n and h; logits
    assert found.activation_bytes == 4 * 6 * (4 + 4 * 5 + 7)
    assert found.state_bytes == 4 * 2 * 5
    assert {letter: symbol.value for letter, symbol in found.legend.items()} == {"B": 2, "T": 3, "V": 7, "E": 4, "H": 5}


def test_totals_are_in_the_json_of_a_run() -> None:
    run = lm.load("shakespeare-gru")
    plain = json.loads(json.dumps(lm.inspect.shapes(run.model, batch=8, length=32).to_json()))
    assert plain["totals"]["parameters"] == run.record["parameters"]
    assert plain["stages"][0]["parameters"][0]["symbols"] == ["V", "E"]


def test_page_and_picture_show_every_stage() -> None:
    model = small("transformer tables")
    view = shapes(model, batch=2, length=5)
    written = drawing.page(view)
    assert "<script" not in written
    assert "(H·D, E)" in written
    assert f"{model.num_parameters():,}" in written
    for tensor in (tensor for stage in view.stages for tensor in stage.parameters):
        assert tensor.name in written
    (first, *_), *_ = [drawing.figure(view).axes]
    assert [label.get_text() for label in first.get_yticklabels()] == [stage.name for stage in view.stages]
    assert sum(bar.get_width() for bar in first.patches) == view.parameter_bytes


def test_a_dimension_is_a_sum_of_products() -> None:
    assert value_of("3·H + 2·E·E + 1", {"H": 4, "E": 5}) == 63


def test_bad_sizes_are_refused_in_a_sentence() -> None:
    model = small("transformer")
    with pytest.raises(ConfigError, match="batch 0: give a number from 1"):
        shapes(model, batch=0)
    with pytest.raises(ConfigError, match="length 129: this model depends on 128 tokens"):
        shapes(model, length=129)
