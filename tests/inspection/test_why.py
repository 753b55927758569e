"""Why: the terms of each token are exact, and the page shows where they come from."""

from __future__ import annotations

import json
import re
import sys
from html import unescape
from typing import Any

import numpy as np
import pytest

import lm
from lm.errors import CorpusError
from lm.inspection.drawing.why import colors_of, figure, page
from lm.inspection.why import Why, why
from tests.cli.conftest import make_text

pytestmark = pytest.mark.slow

room = sys.modules["lm.inspection.why"]
"""The module: its package has the function under this name."""
TEXT = make_text(300)
RUNS: dict[str, dict[str, Any]] = {
    "transformer-char": {"model.num_layers": 2, "model.num_heads": 2, "model.context_length": 32},
    "hybrid-char": {"model.embedding_size": 8, "model.order": 4},
    "lstm-char": {"model.embedding_size": 8},
    "ngram-char": {"model.order": 4},
    "transformer-word": {"model.num_layers": 2, "model.num_heads": 2, "model.context_length": 16},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, lm.Run]:
    folder = tmp_path_factory.mktemp("runs")
    path = folder / "text.txt"
    path.write_text(make_text(3000), "utf-8")
    steps = {
        "model.hidden_size": 16, "training.max_steps": 3, "training.batch_size": 4, "training.warmup_steps": 0,
    }  # fmt: skip
    trained = {}
    for preset, options in RUNS.items():
        overrides = options if preset == "ngram-char" else {**steps, **options}
        if preset == "transformer-word":
            overrides = {**overrides, "model.adaptive_cutoffs": [4, 10]}
        config = lm.compose(str(path), preset=preset, overrides=overrides)
        trained[preset] = lm.train(str(path), config, name=preset, runs_dir=folder)
    return {**trained, "shakespeare-gru": lm.load("shakespeare-gru")}


every_run = pytest.mark.parametrize("name", [*RUNS, "shakespeare-gru"])


@every_run
def test_the_terms_of_a_token_sum_to_its_log_probability(runs: dict[str, lm.Run], name: str) -> None:
    found = why(runs[name], TEXT)
    scored = -np.array([token.nats for token in runs[name].score(TEXT)])
    assert np.abs(found.log_probabilities - scored).max() < 1e-5
    assert np.abs(found.baseline + found.terms.sum(axis=1) - scored).max() < 1e-5
    assert sum(found.totals.values()) + found.baseline.mean() == pytest.approx(-found.loss, abs=1e-5)


@every_run
def test_a_long_text_in_chunks_has_the_same_terms(
    runs: dict[str, lm.Run], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = why(runs[name], TEXT)
    monkeypatch.setattr(room, "TOKENS_AT_ONCE", 17)
    assert np.allclose(why(runs[name], TEXT).terms, whole.terms, atol=1e-4)


def test_sources_are_named_after_what_the_model_has(runs: dict[str, lm.Run]) -> None:
    tables = tuple(f"table {order}" for order in range(2, 7))
    counts = tuple(f"counts {order}" for order in range(1, 5))
    assert why(runs["transformer-char"], TEXT).sources == ("network", *tables)
    assert why(runs["hybrid-char"], TEXT).sources == ("network", "bias", *tables, *counts, "mixing")
    assert why(runs["ngram-char"], TEXT).sources == (*counts, "mixing")
    assert why(runs["lstm-char"], TEXT).sources == ("network", "bias")


def test_the_last_layer_has_the_models_log_probability(runs: dict[str, lm.Run]) -> None:
    found = why(runs["transformer-char"], TEXT)
    assert found.layers.shape == (300, 2)
    assert np.allclose(found.layers[:, -1], found.log_probabilities, atol=1e-5)
    assert np.allclose(found.baseline + found.layer_gains.sum(axis=1), found.log_probabilities, atol=1e-5)
    assert why(runs["lstm-char"], TEXT).layers.shape == (300, 0)


def test_a_mixture_gives_weight_probability_and_share_of_each_part(runs: dict[str, lm.Run]) -> None:
    found = why(runs["hybrid-char"], TEXT)
    assert found.parts == ("network", "counts")
    assert np.allclose(found.weights.sum(axis=1), 1) and np.allclose(found.shares.sum(axis=1), 1)
    given = found.weights * np.exp(found.part_log_probabilities)
    assert np.allclose(given.sum(axis=1), np.exp(found.log_probabilities), atol=1e-6)
    assert np.allclose(given / given.sum(axis=1, keepdims=True), found.shares, atol=1e-6)
    assert why(runs["lstm-char"], TEXT).parts == ()


def test_counts_explain_a_text_that_they_have_counted(runs: dict[str, lm.Run]) -> None:
    found = why(runs["ngram-char"], make_text(3000)[100:400])
    assert found.parts == ("uniform", "counts 1", "counts 2", "counts 3", "counts 4")
    assert found.shares.mean(axis=0).argmax() == 4
    assert max(found.totals, key=lambda name: found.totals[name]) == "counts 4"


def test_a_text_without_tokens_is_refused(runs: dict[str, lm.Run]) -> None:
    with pytest.raises(CorpusError, match="empty"):
        why(runs["lstm-char"], "")


def test_a_very_long_text_is_cut_and_noted(runs: dict[str, lm.Run], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "MAX_TOKENS", 50)
    found = why(runs["lstm-char"], TEXT)
    assert len(found.pieces) == 50 and found.notes == ("only the first 50 of 300 tokens are used",)


@every_run
def test_the_json_is_plain_and_complete(runs: dict[str, lm.Run], name: str) -> None:
    found = why(runs[name], TEXT)
    content = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert len(content["tokens"]) == len(found.pieces)
    token = content["tokens"][5]
    assert token["baseline"] + sum(token["terms"].values()) == pytest.approx(token["log_probability"], abs=1e-4)
    assert ("layers" in token) == (found.layers.shape[1] > 0)


# -- drawing ----------------------------------------------------------------------------------------------


@every_run
def test_the_page_has_the_text_and_loads_nothing(runs: dict[str, lm.Run], name: str) -> None:
    html = page(why(runs[name], TEXT))
    shown = re.search(r'<div class="tokens">(.*?)</div>', html, re.DOTALL)
    assert shown is not None
    text = unescape(re.sub(r"<[^>]*>", "", shown[1])).replace("↵", "")
    if name != "transformer-word":
        assert text == TEXT
    assert not re.search(r"(src|href)=|url\(|<script", html)


def test_a_token_has_the_colour_of_the_source_that_added_most() -> None:
    none = np.zeros((3, 0))
    terms = np.array([[2.8, 0.1], [0.3, 2.5], [-0.2, 0.2]])
    found = Why(
        run="r", text="t", pieces=("a", "<", "c"), log_probabilities=np.array([-0.1, -0.2, -3.0]),
        baseline=np.full(3, -3.0), sources=("network", "table 2"), terms=terms,
        layers=none, parts=(), weights=none, shares=none, part_log_probabilities=none,
    )  # fmt: skip
    html = page(found)
    spans = re.findall(r'<span( class="[^"]*")? title="([^"]*)">(.*?)</span>', html)
    assert [(look, piece) for look, _, piece in spans] == [
        (' class="c0-3"', "a"),
        (' class="c1-3"', "&lt;"),
        (' class="c1-0"', "c"),
    ]
    assert "table 2 +2.50" in spans[1][1] and "p = 0.8187" in spans[1][1]


def test_kinds_of_sources_have_colours_from_light_to_dark() -> None:
    colors = colors_of(["network", "table 2", "table 3", "table 4", "counts 1", "other"])
    assert len(set(colors)) == 6 and all(re.fullmatch("#[0-9a-f]{6}", color) for color in colors)
    brightness = [sum(int(color[at : at + 2], 16) for at in (1, 3, 5)) for color in colors[1:4]]
    assert brightness == sorted(brightness, reverse=True)


@pytest.mark.parametrize("name", ["transformer-char", "hybrid-char"])
def test_the_picture_has_a_bar_for_sources_and_for_layers(runs: dict[str, lm.Run], name: str) -> None:
    drawn = figure(why(runs[name], TEXT))
    titles = [axes.get_title(loc="left") for axes in drawn.axes]
    assert titles == (["by source", "by layer"] if name == "transformer-char" else ["by source"])
