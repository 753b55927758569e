"""Units are named for what they track, and only for that."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lm.corpora import encode_text
from lm.errors import ConfigError, CorpusError
from lm.inspection.drawing.neurons import color, figure, page
from lm.inspection.features import FEATURES
from lm.inspection.neurons import MIN_TOKENS, feature_values, hidden_values, neurons, score_units
from lm.models.base import Inspection, LanguageModel, State
from lm.tokenizers.char import CharOptions, CharTokenizer
from tests.cli.conftest import make_text

BY_NAME = {feature.name: feature for feature in FEATURES}


def values(feature: str, text: str) -> str:
    return "".join(str(int(value)) for value in BY_NAME[feature].values(text))


def test_features_are_computed_from_the_text_alone() -> None:
    assert values("position in line", "ab\n\nc") == "12001"
    assert values("inside quotes", 'a "b" c') == "0011000"
    assert values("inside brackets", "f(a[1])x") == "01111100"
    assert values("word length", "I don't") == "1012345"
    assert values("upper case", "To ÄöI") == "100101"
    assert values("speaker name", "ROMEO:\nO: no: x") == "111111011000000"


def test_a_mark_without_its_partner_changes_no_feature() -> None:
    # An opening bracket that is never closed, a smiley, and a quotation mark that the paragraph's end cuts off.
    assert values("inside brackets", "a (b :) c) d") == "001111000000"
    assert values("inside brackets", "a ) b ( c") == "000000000"
    assert values("inside quotes", 'a "b\n\nc "d" e') == "0000000011000"
    assert values("inside quotes", "x “a” «b» „c“") == "0011001100110"


def test_a_token_has_the_features_of_its_last_character_that_is_no_space() -> None:
    pieces = ["The ", " cat", " ", "\n", "", "X"]
    assert feature_values(pieces, [BY_NAME["word length"]]).tolist() == [[3, 3, 0, 0, 0, 1]]
    assert feature_values(pieces, [BY_NAME["upper case"]]).tolist() == [[1, 0, 0, 0, 0, 1]]
    assert feature_values(["The", "ory"], [BY_NAME["word length"]]).tolist() == [[3, 6]]


def test_auc_and_correlation_are_those_of_the_second_half() -> None:
    mark = np.tile(np.repeat([0.0, 1.0], 50), 20).astype(np.float32)[None]
    first, second = np.zeros((1000, 3), np.float32), np.zeros((1000, 3), np.float32)
    # Unit 0 is the mark, unit 1 its opposite, unit 2 agrees with it in the first half and not in the second.
    for half in (first, second):
        half[:, 0], half[:, 1], half[:, 2] = mark[0, :1000], -mark[0, :1000], mark[0, :1000]
    second[:, 2] *= -1
    units = np.concatenate([first, second])
    for binary, best, worst in ((True, 1.0, 0.0), (False, 1.0, -1.0)):
        scores = score_units(units, mark, [binary])
        assert scores.held_out[0].tolist() == pytest.approx([best, best, worst], abs=1e-4)
        assert np.sign(scores.fitted[0]).tolist() == [1, -1, 1]


def test_equal_values_share_their_rank() -> None:
    # Positives 1, 1, 0 and negatives 0, 0, 1: of 9 pairs, 4 are right and 4 are equal. AUC = (4 + 4 / 2) / 9.
    mark = np.tile([1, 1, 1, 0, 0, 0], 40).astype(np.float32)[None]
    unit = np.tile([1, 1, 0, 0, 0, 1], 40).astype(np.float32)[:, None]
    assert score_units(unit, mark, [True]).held_out[0, 0] == pytest.approx(6 / 9)


def test_a_dead_unit_and_a_rare_feature_give_no_score() -> None:
    marks = np.zeros((2, 1000), np.float32)
    marks[0, ::7], marks[1, :19] = 1, 1
    scores = score_units(np.full((1000, 1), 0.1, np.float32), marks, [True, True])
    assert scores.held_out[0, 0] == 0.5 and scores.skipped[0] is None
    assert scores.skipped[1] == "19 tokens of the first half have it (20 needed)"


def test_slow_noise_is_above_chance_only_by_chance() -> None:
    # Both change slowly, so that a test of independent tokens would find many of these units.
    generator, alarms = np.random.default_rng(3), 0
    for _ in range(20):
        noise = generator.standard_normal((2000, 17)).astype(np.float32)
        for row in range(1, len(noise)):
            noise[row] += 0.98 * noise[row - 1]
        scores = score_units(noise[:, :16], noise[None, :, 16], [False])
        alarms += int(scores.held_out[0].max() > scores.baselines[0])
    assert alarms <= 2


# -- a model whose units are known ------------------------------------------------------------------------

LINES = "ROMEO:\nO, she (my love) doth teach the torches to burn bright.\nJULIET:\nAy me! What is it now?\n"


class KnownUnits(LanguageModel):
    """Layer 0: noise. Layer 1: unit 2 falls with the position in the line; the others are noise."""

    def __init__(self, newline: int, vocab_size: int) -> None:
        super().__init__(SimpleNamespace(type="known"), vocab_size)
        self.newline = newline

    def forward(self, ids: torch.Tensor, state: State | None = None) -> tuple[torch.Tensor, State]:
        position = torch.zeros(len(ids)) if state is None else state.tensors["position"]
        for step in range(ids.shape[1]):
            position = (position + 1) * (ids[:, step] != self.newline)
        return torch.zeros(*ids.shape, self.vocab_size), State({"position": position})

    def inspectable(self) -> tuple[str, ...]:
        return ("hidden",)

    def _inspect(self, ids: torch.Tensor, state: State | None, parts: Any) -> Inspection:
        generator = torch.Generator().manual_seed(int(ids.sum()))
        layers = [torch.randn(*ids.shape, width, generator=generator) for width in (4, 3)]
        positions, after = [], state
        for step in range(ids.shape[1]):
            _, after = self(ids[:, step : step + 1], after)
            positions.append(after.tensors["position"])
        layers[1][..., 2] -= torch.stack(positions, dim=1) / 4
        assert after is not None
        return Inspection(torch.zeros(*ids.shape, self.vocab_size), after, hidden=tuple(layers))


def known_run(text: str) -> Any:
    tokenizer = CharTokenizer.train([text], CharOptions())
    return SimpleNamespace(
        name="known", tokenizer=tokenizer, model=KnownUnits(tokenizer.start_id, tokenizer.vocab_size).eval()
    )


@pytest.fixture(scope="module")
def play() -> str:
    words = iter(make_text(20_000).split())
    lines = (f"{name}:\n{' '.join(next(words) for _ in range(9 + 3 * (turn % 3)))}\n"
             for turn, name in enumerate(["ROMEO", "First Citizen", "JULIET"] * 20))  # fmt: skip
    return "\n".join(lines)


def test_the_unit_that_tracks_the_line_is_named_and_no_other(play: str) -> None:
    view = neurons(known_run(play), play, name="a play")
    named = {(r.feature, score.layer, score.unit) for r in view.rankings for score in r.units if score.named}
    assert ("position in line", 1, 2) in named
    assert all((layer, unit) == (1, 2) for _, layer, unit in named)
    line = view.rankings[0]
    assert line.units[0].direction == -1 and line.units[0].score > 0.9 > 0.4 > line.units[1].score
    assert line.baseline is not None and line.baseline < 0.8
    assert [(unit.layer, unit.unit) for unit in view.shown] == [(1, 2)] and not view.chosen
    assert "".join(view.pieces) == play and view.layer_sizes == (4, 3)


def test_no_unit_is_named_for_the_features_of_another_text(play: str) -> None:
    run = known_run(play)
    values = hidden_values(run.model, encode_text("play", play, run.tokenizer).ids, 7)
    # The lines in another order: the same features, at other places.
    lines = play.split("\n\n")
    shuffled = "\n\n".join(lines[index] for index in np.random.default_rng(0).permutation(len(lines)))
    marks = feature_values(list(shuffled), FEATURES)
    scores = score_units(values, marks[:, : len(values)], [feature.binary for feature in FEATURES])
    searched = [index for index, reason in enumerate(scores.skipped) if reason is None]
    assert len(searched) == 4
    assert all(scores.held_out[index].max() < scores.baselines[index] for index in searched)


def test_a_feature_that_the_text_lacks_is_not_searched(play: str) -> None:
    view = neurons(known_run(play), play)
    quotes = view.rankings[1]
    assert quotes.units == () and quotes.skipped == "0 tokens of the first half have it (20 needed)"


def test_values_are_those_of_the_model_after_each_token(play: str) -> None:
    view = neurons(known_run(play), play, unit="1.2")
    assert view.chosen and view.shown[0].name == "1.2" and len(view.shown[0].values) == len(play)
    expected = -BY_NAME["position in line"].values(play) / 4
    assert np.corrcoef(view.shown[0].values, expected)[0, 1] > 0.95
    levels = view.shown[0].levels()
    assert levels.min() >= -1 and levels.max() <= 1 and abs(float(np.median(levels))) < 1e-6


@pytest.mark.parametrize(("unit", "sentence"), [
    ("7", "unit '7': give LAYER.UNIT, counted from 0, such as 0.17."),
    ("2.0", "unit 2.0: known has 2 layers, 0 to 1."),
    ("1.3", "unit 1.3: layer 1 of known has units 0 to 2."),
])  # fmt: skip
def test_a_unit_that_is_not_there_is_a_sentence(play: str, unit: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as raised:
        neurons(known_run(play), play, unit=unit)
    assert str(raised.value) == sentence


def test_a_text_that_is_too_short_is_a_sentence() -> None:
    with pytest.raises(CorpusError, match=f"has 94 tokens, too few .* at least {MIN_TOKENS} tokens"):
        neurons(known_run(LINES), LINES[:97])


def test_a_long_text_is_cut_with_a_note(play: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["lm.inspection.neurons"], "MAX_TOKENS", 700)
    view = neurons(known_run(play), play)
    assert view.tokens == 700 and view.notes[0] == f"only the first 700 of {len(play):,} tokens are used"


# -- drawing ----------------------------------------------------------------------------------------------


def test_the_page_has_the_whole_text_and_nothing_from_elsewhere(play: str) -> None:
    content = page(neurons(known_run(play), play, unit="1.2", name="<b>"))
    assert content.count('<span class="l') == len(play)
    assert "&lt;b&gt;" in content and "<b>" not in content
    assert not any(mark in content for mark in ("http:", "https:", "src=", "url("))
    assert "Unit 1.2: tracks position in line" in content


def test_black_text_is_readable_on_every_color() -> None:
    def luminance(rgb: tuple[int, int, int]) -> float:
        parts = [part / 255 for part in rgb]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    contrasts = [(luminance(color(level / 10)) + 0.05) / 0.05 for level in range(-10, 11)]
    assert min(contrasts) > 7


def test_the_picture_has_a_bar_for_each_ranked_unit(play: str, tmp_path: Path) -> None:
    view = neurons(known_run(play), play)
    drawn = figure(view)
    assert sum(len(axes.patches) for axes in drawn.axes) == sum(len(ranking.units) for ranking in view.rankings)
    drawn.savefig(tmp_path / "units.png", dpi=80)
    assert figure(neurons(known_run(play), play, unit="0.1")).get_suptitle() == "known: features that unit 0.1 tracks"
