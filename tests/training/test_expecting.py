"""What a run is expected to end at."""

from __future__ import annotations

from pathlib import Path

import pytest

from lm.config import compose
from lm.corpora import open_corpus, prepare
from lm.evaluation.floor import find_floor
from lm.training.expecting import RECORDED, expected_loss, expected_share
from lm.training.plan import Plan


def test_between_recorded_lengths_shares_go_with_the_logarithm_of_the_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RECORDED, "gru-char", ((100, 1.0, 1.2), (10_000, 0.8, 0.9)))
    assert expected_share("gru-char", 100) == (1.0, 1.2)
    assert expected_share("gru-char", 1000) == pytest.approx((0.9, 1.05))
    assert expected_share("gru-char", 20_000) == (0.8, 0.9)
    assert expected_share("gru-char", 99) is expected_share("gru-char", 20_001) is expected_share("rnn", 100) is None


def test_recorded_curves_fall() -> None:
    for curve in RECORDED.values():
        tokens, least, most = zip(*curve, strict=True)
        assert list(tokens) == sorted(tokens)
        assert list(least) == sorted(least, reverse=True) and list(most) == sorted(most, reverse=True)
        assert all(low < high for low, high in zip(least, most, strict=True))


def test_a_preset_as_it_is_expects_its_share_of_the_floor_and_a_changed_one_says_nothing(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{number} and {number * 7 % 90}. " for number in range(2000)), "utf-8")
    config = compose(str(text), preset="gru-char-small", overrides={"training.max_steps": 500, "training.seed": 3})
    corpus = prepare(open_corpus(config.corpus), config.tokenizer)
    floor = find_floor(corpus, corpus.splits["valid"])
    share = expected_share("gru-char-small", 1_500_000)
    assert floor is not None and share is not None
    plan = Plan(500, 50)
    assert expected_loss(config, corpus, plan, 1_500_000) == pytest.approx([part * floor.loss for part in share])
    assert expected_loss(config, corpus, plan, 1000) is None
    for change in ({"model.hidden_size": 64}, {"training.learning_rate": 0.5}):
        other = compose(str(text), preset="gru-char-small", overrides=change)
        assert expected_loss(other, corpus, plan, 1_500_000) is None
