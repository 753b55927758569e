"""Attention: the maps are those of the model, and the statistics are those of the maps."""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import lm
from lm.config import Section
from lm.errors import ConfigError, CorpusError, UnsupportedPartError
from lm.inspection.attention import START, Attention, attention, softmax_statistics
from lm.inspection.drawing.attention import figure
from lm.models.attention_maps import attend
from lm.models.base import LanguageModel, State, build_model
from tests.cli.conftest import make_text

room = sys.modules["lm.inspection.attention"]
"""The module: its package has the function under this name."""
TEXT = make_text(400)
OPTIONS: dict[str, dict[str, object]] = {
    "plain": {"qk_norm": False},
    "normed": {},
    "grouped": {"num_kv_heads": 1},
    "tables": {"table_orders": (2, 3), "tie_weights": True},
}
every_kind = pytest.mark.parametrize("kind", OPTIONS)


def small(kind: str, **options: object) -> LanguageModel:
    section = Section(type="transformer", hidden_size=16, num_layers=2, num_heads=4, **{**OPTIONS[kind], **options})
    model = build_model(section, 11, seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)), alpha=0.3)
    return model.eval()


def some_ids(rows: int, time: int) -> torch.Tensor:
    return torch.randint(11, (rows, time), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> lm.Run:
    folder = tmp_path_factory.mktemp("runs")
    overrides: dict[str, Any] = {
        "model.hidden_size": 16, "model.num_layers": 2, "model.num_heads": 2, "model.context_length": 32,
        "model.table_orders": [], "training.max_steps": 2, "training.batch_size": 4, "training.warmup_steps": 0,
    }  # fmt: skip
    path = folder / "text.txt"
    path.write_text(make_text(3000), "utf-8")
    config = lm.compose(str(path), preset="transformer-char", overrides=overrides)
    return lm.train(str(path), config, name="tiny", runs_dir=folder)


# -- the maps ---------------------------------------------------------------------------------------------


def test_attention_by_hand() -> None:
    rows = [[1.0, 0.0], [1.0, 1.0]], [[0.0, 1.0], [2.0, 0.0]], [[1.0], [3.0]]
    queries, keys, values = (torch.tensor(each)[None, :, None, :] for each in rows)
    scores, weights, outputs = attend(queries, keys, values)
    second = 1 / (1 + math.exp((1 - 2) / math.sqrt(2)))
    assert scores[0, 0].tolist() == [[0, -math.inf], [1, 2]]
    assert weights[0, 0, 1].tolist() == pytest.approx([1 - second, second])
    assert outputs[0, 1, 0].tolist() == pytest.approx([1 - second + 3 * second])


@pytest.mark.parametrize(("heads", "shared", "length"), [(4, 4, 7), (4, 2, 7), (4, 1, 9)])
def test_attend_equals_torchs_attention(heads: int, shared: int, length: int) -> None:
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(2, 7, heads, 6, generator=generator)
    keys, values = (torch.randn(2, length, shared, 6, generator=generator) for _ in range(2))
    mask = torch.ones(7, length, dtype=torch.bool).tril(length - 7)
    expected = F.scaled_dot_product_attention(
        *(each.transpose(1, 2) for each in (queries, keys, values)), attn_mask=mask, enable_gqa=True
    )
    assert torch.allclose(attend(queries, keys, values)[2], expected.transpose(1, 2), atol=1e-6)


@every_kind
def test_rows_sum_to_one_and_no_later_token_has_weight(kind: str) -> None:
    seen = small(kind).inspect(some_ids(2, 9), parts=["attention"])
    for maps in seen.attention:
        assert maps.weights.shape == (2, 4, 9, 9)
        assert torch.allclose(maps.weights.sum(dim=-1), torch.tensor(1.0))
        assert not maps.weights.triu(1).any()
        assert torch.allclose((maps.scores / maps.head_size**0.5).softmax(dim=-1), maps.weights)


@every_kind
def test_the_outputs_of_all_layers_reproduce_the_models_logits(kind: str) -> None:
    model, ids = small(kind), some_ids(2, 9)
    with torch.no_grad():
        logits, _ = model(ids)
        seen = model.inspect(ids, parts=model.inspectable())
    hidden = seen.inputs
    assert hidden is not None
    for layer, maps, after in zip(model.layers, seen.attention, seen.hidden, strict=True):
        hidden = hidden + maps.outputs
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        assert torch.allclose(hidden, after, atol=1e-5)
    matrix = model.embed_tokens if model.lm_head is None else model.lm_head
    again = model.norm(hidden) @ matrix.weight.T
    again = again + sum(part for name, part in seen.contributions.items() if name.startswith("table"))
    assert (again - logits).abs().max() < 1e-5


@every_kind
def test_with_a_state_the_maps_have_the_keys_of_earlier_tokens(kind: str) -> None:
    model, ids = small(kind), some_ids(2, 9)
    whole = model.inspect(ids, parts=["attention"]).attention
    state = model.inspect(ids[:, :6]).state
    rest = model.inspect(ids[:, 6:], state, parts=["attention"]).attention
    for one, other in zip(whole, rest, strict=True):
        assert other.weights.shape == (2, 4, 3, 9)
        assert torch.allclose(other.weights, one.weights[:, :, 6:], atol=1e-6)


def test_rows_of_different_length_give_no_weight_to_padding() -> None:
    model, ids = small("normed"), some_ids(2, 6)
    joined = State.join([model.inspect(ids[:1]).state, model.inspect(ids[1:, :2]).state])
    for maps in model.inspect(ids[:, :2], joined, parts=["attention"]).attention:
        assert torch.allclose(maps.weights.sum(dim=-1), torch.tensor(1.0))
        assert not maps.weights[1, :, :, :4].any() and maps.weights[1, :, :, 4:].any()


# -- the view ---------------------------------------------------------------------------------------------


def test_statistics_are_means_over_all_windows_of_the_text(run: lm.Run) -> None:
    found = attention(run, TEXT)
    ids = torch.tensor([run.tokenizer.start_id, *run.tokenizer.encode(TEXT).tolist()])
    assert (found.window, found.tokens, found.head_size) == (32, 400, 8)
    entropies, distances, firsts = [], [], []
    for begin in range(0, len(ids), 32):
        weights = run.model.inspect(ids[None, begin : begin + 32], parts=["attention"]).attention[1].weights[0, 1]
        for query, row in enumerate(weights[1:].tolist(), start=1):
            entropies.append(-sum(weight * math.log(weight) for weight in row if weight > 0))
            distances.append(sum(weight * (query - key) for key, weight in enumerate(row)))
            firsts.append(row[0])
    head = found.heads[3]
    assert (head.layer, head.head) == (1, 1)
    assert head.entropy == pytest.approx(np.mean(entropies), abs=1e-4)
    assert head.distance == pytest.approx(np.mean(distances), abs=1e-3)
    assert head.first == pytest.approx(np.mean(firsts), abs=1e-5)


def test_a_head_with_equal_scores_attends_to_all_tokens_alike(run: lm.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = run.model.layers[0].self_attn.q_proj.weight
    monkeypatch.setattr(weight, "data", torch.zeros_like(weight))
    found = attention(run, TEXT, layer=0)
    for head in found.heads:
        assert head.entropy == pytest.approx(found.even_entropy, abs=1e-5)
        assert head.distance == pytest.approx(found.even_distance, abs=1e-4)
        assert head.unscaled_entropy == pytest.approx(head.entropy, abs=1e-5)


def test_fewer_windows_at_once_give_the_same_statistics(run: lm.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    at_once = attention(run, TEXT)
    # One window of all 4 heads at a time.
    monkeypatch.setattr(room, "MAX_WEIGHTS", 4 * 32**2)
    one_by_one = attention(run, TEXT)
    assert one_by_one.window == 32
    for left, right in zip(at_once.heads, one_by_one.heads, strict=True):
        assert left.entropy == pytest.approx(right.entropy, abs=1e-5)


def test_a_window_that_memory_limits_is_noted(run: lm.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "MAX_WEIGHTS", 4 * 8**2)
    found = attention(run, TEXT)
    assert found.window == 8 and "the context length is 32" in found.notes[0]


def test_the_maps_are_of_the_start_of_the_text_or_of_a_span(run: lm.Run) -> None:
    found = attention(run, TEXT)
    assert found.pieces[0] == START and found.first_token == -1
    assert "".join(found.pieces[1:]).replace("▁", " ").replace("\\n", "\n") == TEXT[: len(found.pieces) - 1]
    assert np.allclose(found.maps.sum(axis=-1), 1, atol=1e-6)
    span = attention(run, TEXT, layer=1, span=(100, 110))
    assert "".join(span.pieces).replace("▁", " ") == TEXT[100:110]
    assert span.maps.shape == (1, 2, 10, 10) and span.layers == (1,)
    ids = torch.from_numpy(run.tokenizer.encode(TEXT).astype(np.int64))[None, 100:110]
    maps = run.model.inspect(ids, parts=["attention"]).attention[1]
    assert np.allclose(span.maps[0], maps.weights[0].detach().numpy(), atol=1e-6)


def test_the_gradient_is_the_norm_of_the_jacobian() -> None:
    scores = torch.randn(5, generator=torch.Generator().manual_seed(0)) * 2
    weights, entropy, gradient = softmax_statistics(scores)
    jacobian = torch.autograd.functional.jacobian(lambda values: values.softmax(dim=-1), scores)
    assert gradient.item() == pytest.approx(jacobian.norm().item(), abs=1e-6)
    assert entropy.item() == pytest.approx(-(weights * weights.log()).sum().item(), abs=1e-6)
    assert softmax_statistics(torch.tensor([0.0, -math.inf]))[1:] == (0, 0)


def test_without_the_division_random_scores_choose_one_token() -> None:
    generator = torch.Generator().manual_seed(0)
    queries, keys = torch.randn(100, 1024, generator=generator), torch.randn(16, 1024, generator=generator)
    divided = softmax_statistics(queries @ keys.T / 32)
    raw = softmax_statistics(queries @ keys.T)
    assert divided[1].mean() > 2 and raw[1].mean() < 0.2
    assert divided[2].mean() > 4 * raw[2].mean()


# -- requests that cannot be met --------------------------------------------------------------------------


def test_attention_of_a_gru_is_refused_with_what_it_has() -> None:
    with pytest.raises(UnsupportedPartError, match="gru has no attention. It has inputs, hidden, gates"):
        attention(lm.load("shakespeare-gru"), TEXT)


@pytest.mark.parametrize("layer", [2, -1])
def test_a_layer_that_is_not_there_is_refused_with_those_that_are(run: lm.Run, layer: int) -> None:
    with pytest.raises(ConfigError, match=f"layer {layer}: tiny has 2 layers, 0 to 1"):
        attention(run, TEXT, layer=layer)


@pytest.mark.parametrize(
    ("span", "sentence"), [((390, 401), "an end between 0 and 400"), ((5, 5), "an end"), ((0, 33), "at most 32 tokens")]
)
def test_a_span_that_cannot_be_shown_is_refused(run: lm.Run, span: tuple[int, int], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        attention(run, TEXT, span=span)


def test_a_text_that_is_too_short_is_refused(run: lm.Run) -> None:
    with pytest.raises(CorpusError, match="text has 1 token, too few for attention"):
        attention(run, "a")


# -- drawing ----------------------------------------------------------------------------------------------


def test_the_picture_names_heads_and_tokens(run: lm.Run, tmp_path: Path) -> None:
    found: Attention = attention(run, TEXT)
    figure(found).savefig(tmp_path / "a.svg", format="svg")
    drawn = (tmp_path / "a.svg").read_text("utf-8")
    comments = re.findall(r"<!-- (.*?) -->", drawn)
    assert {"layer 0, head 0", "layer 1, head 1"} <= {line for line in comments if line.startswith("layer")}
    assert "the same scores, not divided" in comments
    assert any("start" in line for line in comments)


def test_the_json_has_the_weights_of_all_heads(run: lm.Run) -> None:
    content = attention(run, TEXT, span=(0, 4)).to_json()
    assert np.array(content["maps"]).shape == (2, 2, 4, 4)
    assert content["heads"][0].keys() >= {"entropy", "distance", "first", "gradient", "unscaled_entropy"}
