"""What a run is expected to end at."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lm.config import RunConfig, compose
from lm.corpora import PreparedCorpus, open_corpus, prepare
from lm.evaluation.floor import find_floor
from lm.jobs import expected_loss as expecting
from lm.jobs.expected_loss import RECORDED, RECORDED_MIDDLE, expected_loss, expected_share, read_first
from lm.models.kneser_ney import count_text
from lm.training.plan import Plan


def test_between_recorded_lengths_shares_go_with_the_logarithm_of_the_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RECORDED, "gru-char", ((100, 1.0, 1.2), (10_000, 0.8, 0.9)))
    assert expected_share("gru-char", 100) == (1.0, 1.2)
    assert expected_share("gru-char", 1000) == pytest.approx((0.9, 1.05))
    assert expected_share("gru-char", 20_000) == (0.8, 0.9)
    assert expected_share("gru-char", 99) is expected_share("gru-char", 20_001) is expected_share("rnn", 100) is None


def test_recorded_curves_fall() -> None:
    for curve in [*RECORDED.values(), *RECORDED_MIDDLE.values()]:
        tokens, least, most = zip(*curve, strict=True)
        assert list(tokens) == sorted(tokens)
        assert list(least) == sorted(least, reverse=True) and list(most) == sorted(most, reverse=True)
        assert all(low < high for low, high in zip(least, most, strict=True))


def prepared(tmp_path: Path, preset: str, **overrides: object) -> tuple[RunConfig, PreparedCorpus]:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{number} and {number * 7 % 90}. " for number in range(2000)), "utf-8")
    config = compose(str(text), preset=preset, overrides=overrides)
    return config, prepare(open_corpus(config.corpus), config.tokenizer)


def test_a_preset_as_it_is_expects_its_share_of_the_floor_and_a_changed_one_says_nothing(tmp_path: Path) -> None:
    config, corpus = prepared(tmp_path, "gru-char-small", **{"training.max_steps": 500, "training.seed": 3})
    floor = find_floor(corpus, corpus.splits["valid"])
    share = expected_share("gru-char-small", 1_500_000)
    assert floor is not None and share is not None
    plan = Plan(500, 50)
    # Of the text's last tokens, fewer than a batch has rows are never read.
    assert expected_loss(config, corpus, plan, 1_500_000) == pytest.approx([part * floor.loss for part in share], 2e-2)
    assert expected_loss(config, corpus, plan, 1000) is None
    for change in ({"model.hidden_size": 64}, {"training.learning_rate": 0.5}):
        other = compose(config.corpus.source, preset="gru-char-small", overrides=change)
        assert expected_loss(other, corpus, plan, 1_500_000) is None


@pytest.mark.parametrize("preset", RECORDED)
def test_of_a_long_text_the_part_that_is_read_is_counted_and_the_part_that_is_validated_scored(
    preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RECORDED, preset, ((1000, 1.0, 1.1), (100_000, 0.9, 1.0)))
    config, corpus = prepared(tmp_path, preset)
    read = read_first(corpus.splits["train"].ids, config.training.batch_size, 2000)
    counts = count_text(read, order=7 if "char" in preset else 3, vocab_size=corpus.tokenizer.vocab_size)
    least, most = expected_share(preset, 2000) or (0, 0)
    for part in (None, 50):
        valid = corpus.splits["valid"].ids[: None if part is None else part + 1]
        loss = -float(np.mean(counts.log_probabilities_of(valid)))
        found = expected_loss(config, corpus, Plan(10, 1, part), 2000)
        assert found == pytest.approx((least * loss, most * loss))


def test_longer_texts_by_characters_have_curves_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, corpus = prepared(tmp_path, "gru-char")
    least, most = expected_loss(config, corpus, Plan(500, 50), 20_000_000) or (0, 0)
    monkeypatch.setattr(expecting, "MIDDLE_CHARACTERS", 1000)
    monkeypatch.setitem(RECORDED_MIDDLE, "gru-char", ((19_000_000, 0.5, 0.6),))  # type: ignore[index]
    share = expected_share("gru-char", 20_000_000) or (0, 0)
    long = expected_loss(config, corpus, Plan(500, 50), 20_000_000)
    assert long == pytest.approx((0.5 * least / share[0], 0.6 * most / share[1]))
    small, _ = prepared(tmp_path, "gru-char-small")
    assert expected_loss(small, corpus, Plan(500, 50), 1_500_000) is None
    monkeypatch.setattr(expecting, "LONG_CHARACTERS", 1000)
    assert expected_loss(config, corpus, Plan(500, 50), 20_000_000) is None


def test_what_training_reads_first_is_the_beginning_of_each_row() -> None:
    ids = np.arange(22, dtype=np.uint16)
    assert read_first(ids, 4, 8).tolist() == [0, 1, 2, 6, 7, 11, 12, 16, 17]
    assert read_first(ids, 4, 1000).tolist() == [*range(21)]
