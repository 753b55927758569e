"""The models' arithmetic, against values by hand."""

from __future__ import annotations

import math

import pytest
import torch

from lm.config import Section
from lm.errors import ConfigError
from lm.models.base import build_model
from lm.models.recurrent import Recurrent
from lm.models.transformer import Attention, TransformerOptions, rotary_tables, rotate


def test_one_gru_step_by_hand() -> None:
    model = build_model(Section(type="gru", embedding_size=1, hidden_size=1), 2)
    assert isinstance(model, Recurrent)
    with torch.no_grad():
        model.embedding.weight.copy_(torch.tensor([[0.0], [1.0]]))
        # Rows are reset, update, new; in torch the update gate is the weight of the old state.
        model.cell.weight_ih_l0.copy_(torch.tensor([[0.5], [-0.5], [1.0]]))
        model.cell.weight_hh_l0.copy_(torch.tensor([[0.25], [0.75], [2.0]]))
        model.cell.bias_ih_l0.copy_(torch.tensor([0.1, 0.2, 0.3]))
        model.cell.bias_hh_l0.copy_(torch.tensor([0.0, 0.0, 0.4]))
        model.output.weight.copy_(torch.tensor([[1.0], [-1.0]]))
        model.output.bias.zero_()

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    hidden = 0.0
    for _ in range(2):
        reset = sigmoid(0.5 + 0.25 * hidden + 0.1)
        update = sigmoid(-0.5 + 0.75 * hidden + 0.2)
        new = math.tanh(1.0 + 0.3 + reset * (2.0 * hidden + 0.4))
        hidden = (1 - update) * new + update * hidden
    logits, state = model(torch.tensor([[1, 1]]))
    assert float(state.tensors["hidden"][0, 0, 0].detach()) == pytest.approx(hidden, abs=1e-6)
    assert logits[0, -1].tolist() == pytest.approx([hidden, -hidden], abs=1e-6)


def test_attention_over_two_positions_by_hand() -> None:
    # One head of two dimensions, no QK-norm, identity projections but for values, whose two entries are swapped:
    # position 1 attends to itself with the rotated product cos(0) and to position 0 with the angle of one position,
    # which is 1 radian.
    options = TransformerOptions(hidden_size=2, num_heads=1, qk_norm=False, mlp_size=4)
    attention = Attention(options)
    with torch.no_grad():
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj):
            projection.weight.copy_(torch.eye(2))
        attention.v_proj.weight.copy_(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    hidden = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])
    mixed, _ = attention(hidden, rotary_tables(torch.tensor([[0, 1]]), 2, 10_000.0), None, None, True)
    # Position 0 attends only to itself: its value is (1, 0).
    assert mixed[0, 0].tolist() == pytest.approx([1.0, 0.0], abs=1e-6)
    # query 1 = (cos 1, sin 1); key 0 = (0, 1), key 1 = (cos 1, sin 1); scores over sqrt(2).
    scores = [math.sin(1) / math.sqrt(2), 1 / math.sqrt(2)]
    weights = [math.exp(s) / sum(math.exp(t) for t in scores) for s in scores]
    # Values: (1, 0) at position 0 and (0, 1) at position 1.
    assert mixed[0, 1].tolist() == pytest.approx(weights, abs=1e-6)


def test_rotation_preserves_length_and_depends_on_distance_alone() -> None:
    torch.manual_seed(0)
    query, key = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)

    def product(at_query: int, at_key: int) -> float:
        left = rotate(query, *rotary_tables(torch.tensor([[at_query]]), 8, 10_000.0))
        right = rotate(key, *rotary_tables(torch.tensor([[at_key]]), 8, 10_000.0))
        assert float(left.norm()) == pytest.approx(float(query.norm()), rel=1e-5)
        return float((left * right).sum())

    assert product(5, 2) == pytest.approx(product(103, 100), abs=1e-4)
    assert product(5, 2) != pytest.approx(product(5, 3), abs=1e-2)


def test_transformer_weights_have_the_names_of_llama() -> None:
    model = build_model(Section(type="transformer", num_layers=1, qk_norm=False, tie_weights=False), 7)
    layer = "layers.0."
    assert set(model.arrays()) == {
        "embed_tokens.weight", "norm.weight", "lm_head.weight",
        layer + "input_layernorm.weight", layer + "post_attention_layernorm.weight",
        layer + "self_attn.q_proj.weight", layer + "self_attn.k_proj.weight",
        layer + "self_attn.v_proj.weight", layer + "self_attn.o_proj.weight",
        layer + "mlp.gate_proj.weight", layer + "mlp.up_proj.weight", layer + "mlp.down_proj.weight",
    }  # fmt: skip


def test_grouped_queries_share_their_keys_and_values() -> None:
    full = build_model(Section(type="transformer", num_heads=4), 7).arrays()
    grouped = build_model(Section(type="transformer", num_heads=4, num_kv_heads=1), 7).arrays()
    name = "layers.0.self_attn.k_proj.weight"
    assert full[name].shape == (128, 128)
    assert grouped[name].shape == (32, 128)


def test_lstm_starts_with_open_forget_gates() -> None:
    model = build_model(Section(type="lstm", hidden_size=4), 7)
    assert model.arrays()["cell.bias_hh_l0"][4:8].tolist() == [1, 1, 1, 1]


def test_rnn_with_relu_never_has_a_negative_state() -> None:
    torch.manual_seed(0)
    model = build_model(Section(type="rnn", nonlinearity="relu", hidden_size=8), 5)
    _, state = model(torch.arange(5)[None])
    assert float(state.tensors["hidden"].detach().min()) >= 0


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"hidden_size": 30, "num_heads": 4}, "even multiple"),
        ({"num_heads": 4, "num_kv_heads": 3}, "multiple of num_kv_heads"),
        ({"hiden_size": 32}, "Did you mean 'hidden_size'"),
        ({"dropout": 1.5}, "dropout"),
    ],
)
def test_options_that_do_not_fit_are_refused_with_their_names(options: dict[str, object], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        build_model(Section(type="transformer", **options), 5)


def test_each_dropout_can_be_set_separately() -> None:
    model = build_model(
        Section(type="gru", num_layers=2, dropout=0.1, input_dropout=0.2, layer_dropout=0.3, output_dropout=0.0), 5
    )
    assert isinstance(model, Recurrent)
    assert (model.input_dropout.p, model.cell.dropout, model.output_dropout.p) == (0.2, 0.3, 0.0)
