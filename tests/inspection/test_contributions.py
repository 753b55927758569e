"""Contributions are exact: they sum to the logits, and the terms to the log-probabilities, in every family."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from lm.config import Section
from lm.models.base import LanguageModel, MixturePart, build_model
from lm.models.contributions import log_terms, mixture_terms, path_weights, total
from lm.models.counts_by_order import distributions_by_order
from lm.models.kneser_ney import count_text, histories_of
from lm.registry import MODELS

VOCAB = 11
SMALL = {
    "hidden_size": 16, "embedding_size": 12, "num_layers": 2, "num_heads": 4, "context_length": 32, "order": 4,
}  # fmt: skip
TABLES = {"table_orders": (2, 3, 4), "table_buckets": 50}
VARIANTS: dict[str, dict[str, object]] = {
    "rnn": {},
    "gru": {},
    "gru tied, tables": {"tie_weights": True, **TABLES},
    "lstm tables": TABLES,
    "lstm tails": {"adaptive_cutoffs": (3, 7)},
    "gru tails, tables": {"adaptive_cutoffs": (3, 7), "tie_weights": True, **TABLES},
    "transformer": {},
    "transformer tied": {"tie_weights": True},
    "transformer tables": TABLES,
    "transformer grouped": {"num_kv_heads": 2, "qk_norm": False},
    "transformer tails": {"adaptive_cutoffs": (3, 7)},
    "hybrid": {},
    "hybrid tables": {"cell": "lstm", **TABLES},
    "ngram": {},
    "ensemble": {"size": 3, "member": {"type": "gru", "hidden_size": 16, "embedding_size": 12, **TABLES}},
}
variants = pytest.mark.parametrize("name", VARIANTS)


def small(name: str) -> LanguageModel:
    """A model whose logits are as large as those of a trained one."""
    kind = name.split()[0]
    fields = MODELS.resolve(kind).Options.model_fields
    known = {key: value for key, value in SMALL.items() if key in fields}
    model = build_model(Section(type=kind, **{**known, **VARIANTS[name]}), VOCAB, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "tables." in key:
                parameter[:-1] = torch.randn(parameter[:-1].shape, generator=generator)
            elif "norm" not in key:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    if model.trained_by in ("counting", "both"):
        model.fit(np.random.default_rng(1).integers(VOCAB, size=400))
    return model.eval()


def some_ids(rows: int, time: int) -> Tensor:
    return torch.randint(VOCAB, (rows, time), generator=torch.Generator().manual_seed(0))


@variants
def test_contributions_sum_to_the_logits_and_terms_to_the_log_probabilities(name: str) -> None:
    model, ids = small(name), some_ids(2, 20)
    with torch.no_grad():
        logits, _ = model(ids)
        seen = model.inspect(ids, parts=["contributions", "terms"])
    assert logits.std() > 0.2
    assert (total(seen.contributions) - logits).abs().max() < 1e-5
    assert (total(seen.terms) - logits.log_softmax(dim=-1)).abs().max() < 1e-5


@variants
def test_a_text_in_chunks_has_the_terms_of_one_pass(name: str) -> None:
    model, ids = small(name), some_ids(2, 20)
    with torch.no_grad():
        whole = model.inspect(ids, parts=["terms"])
        first = model.inspect(ids[:, :7], parts=["terms"])
        second = model.inspect(ids[:, 7:], first.state, parts=["terms"])
    for key, terms in whole.terms.items():
        assert torch.allclose(torch.cat([first.terms[key], second.terms[key]], dim=1), terms, atol=1e-4), key


@variants
def test_terms_have_gradients(name: str) -> None:
    model = small(name)
    if model.trained_by == "counting":
        return
    seen = model.inspect(some_ids(1, 9), parts=["terms"])
    total(seen.terms)[..., 3].sum().backward()
    grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert grads and all(grad.to_dense().isfinite().all() for grad in grads)


def test_tables_and_bias_contribute_their_own_rows() -> None:
    model, ids = small("lstm tables"), some_ids(1, 6)
    parts = model.inspect(ids, parts=["contributions"]).contributions
    assert list(parts) == ["network", "bias", "table 2", "table 3", "table 4"]
    assert torch.equal(parts["table 2"], model.tables["2"](ids))
    # The first token has no two tokens before it.
    assert not parts["table 3"][0, 0].any() and parts["table 3"][0, 1].any()
    assert torch.equal(parts["bias"][0, 0], model.output.bias)


# -- how a logit becomes a term ---------------------------------------------------------------------------


def test_sources_that_agree_share_the_gain_in_proportion() -> None:
    terms = log_terms({"a": torch.tensor([[[2.0, 0.0]]]), "b": torch.tensor([[[1.0, 0.0]]])})
    gain = math.log(1 / (1 + math.exp(-3))) - math.log(1 / 2)
    assert terms["a"][0, 0, 0].item() == pytest.approx(gain * 2 / 3, abs=1e-6)
    assert terms["b"][0, 0, 0].item() == pytest.approx(gain / 3, abs=1e-6)
    assert terms["uniform"][0, 0, 0].item() == pytest.approx(math.log(1 / 2))


def test_a_source_that_adds_the_same_to_all_tokens_has_no_term() -> None:
    terms = log_terms({"a": torch.randn(1, 1, 7), "b": torch.full((1, 1, 7), 5.0)})
    assert terms["b"].abs().max() < 1e-5


def test_without_any_logit_all_tokens_have_the_uniform_distribution() -> None:
    terms = log_terms({"a": torch.zeros(1, 2, 5)})
    assert not terms["a"].any() and torch.allclose(terms["uniform"], torch.tensor(-math.log(5)))


def test_path_weights_are_the_mean_of_all_distributions_on_the_way() -> None:
    logits = torch.randn(6, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 4
    steps = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    mean = (steps[:, None, None] * logits).softmax(dim=-1).mean(dim=0)
    weights = path_weights(logits)
    assert torch.allclose(weights, mean, atol=1e-6)
    assert torch.allclose((weights * logits).sum(-1), logits.logsumexp(-1) - math.log(40), atol=1e-12)


# -- mixtures ---------------------------------------------------------------------------------------------


def test_the_parts_of_a_mixture_count_by_their_share_of_the_probability() -> None:
    # p = 1/2 · (1/2, 1/2) + 1/2 · (1, 0) = (3/4, 1/4): the second part gave two thirds of token 0, nothing of token 1.
    half = torch.full((1, 1), 0.5)
    parts = {
        "even": MixturePart(half, torch.tensor([[[0.5, 0.5]]]).log()),
        "sure": MixturePart(half, torch.tensor([[[1.0, 0.0]]]).log()),
    }
    terms = mixture_terms(parts, {name: {name: part.log_probabilities} for name, part in parts.items()})
    even, sure, mixing = (terms[name][0, 0].tolist() for name in ("even", "sure", "mixing"))
    assert even == pytest.approx([math.log(1 / 2) / 3, math.log(1 / 2)])
    assert sure == pytest.approx([0.0, 0.0])
    assert mixing == pytest.approx([-(math.log(2 / 3) / 3 + math.log(4 / 3) * 2 / 3), math.log(1 / 2)])
    sums = [sum(each) for each in zip(even, sure, mixing, strict=True)]
    assert sums == pytest.approx([math.log(0.75), math.log(0.25)])


@pytest.mark.parametrize("name", ["hybrid", "hybrid tables", "ngram", "ensemble"])
def test_weights_and_probabilities_of_the_parts_give_the_models_distribution(name: str) -> None:
    model, ids = small(name), some_ids(2, 12)
    with torch.no_grad():
        seen = model.inspect(ids, parts=["mixture"])
    parts = seen.mixture.values()
    mixed = sum(part.weight[..., None] * part.log_probabilities.exp() for part in parts)
    assert torch.allclose(mixed, seen.logits.exp(), atol=1e-6)
    assert torch.allclose(sum(part.weight for part in parts), torch.ones(2, 12), atol=1e-6)
    for part in parts:
        sums = part.log_probabilities.exp().sum(dim=-1)
        assert torch.allclose(sums[part.weight > 0], torch.tensor(1.0), atol=1e-5)


def test_the_parts_of_a_hybrid_are_its_network_and_its_counts() -> None:
    model, ids = small("hybrid tables"), some_ids(1, 9)
    with torch.no_grad():
        parts = model.inspect(ids, parts=["mixture"]).mixture
        counts, _ = model.network.ngram(ids)
    assert list(parts) == ["network", "counts"]
    assert torch.equal(parts["counts"].log_probabilities, counts)
    assert torch.allclose(parts["network"].log_probabilities.logsumexp(dim=-1), torch.zeros(1, 9), atol=1e-5)


def test_counts_of_each_order_are_weighted_by_what_longer_contexts_leave() -> None:
    # In "0 1 0 1 0 2" two of three tokens after 0 are 1; discounts of short texts are 0.5 for 1 and 1 for 2.
    counts = count_text(np.array([0, 1, 0, 1, 0, 2]), order=2, vocab_size=3)
    (weight, tokens) = distributions_by_order(counts, histories_of(np.array([[0]]), 1)[0])[2]
    assert weight[0] == pytest.approx(((2 - 1) + (1 - 0.5)) / 3)
    assert tokens[0].tolist() == pytest.approx([0, 2 / 3, 1 / 3])


def test_an_unknown_context_has_no_weight() -> None:
    counts = count_text(np.array([0, 1, 0, 1, 0, 1]), order=3, vocab_size=4)
    parts = distributions_by_order(counts, histories_of(np.array([[3, 3]]), 2)[0])
    assert parts[3][0][1] == parts[2][0][1] == 0
    assert sum(weight[1] for weight, _ in parts.values()) == pytest.approx(1)


# -- by layer ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in VARIANTS if name.startswith("transformer")])
def test_the_last_layers_logits_are_the_models(name: str) -> None:
    model, ids = small(name), some_ids(2, 12)
    with torch.no_grad():
        seen = model.inspect(ids, parts=["layer_logits"])
    assert len(seen.layer_logits) == 2
    assert torch.allclose(seen.layer_logits[-1], seen.logits, atol=1e-5)
    assert not torch.allclose(seen.layer_logits[0], seen.logits, atol=0.1)
