"""The preset for a text that came without one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lm.config import CorpusConfig, RunConfig, compose
from lm.corpora import open_corpus
from lm.training.choosing import MOST_EPOCHS, choose_config
from lm.training.plan import DEFAULT_MINUTES

TOKENS_A_STEP = 64 * 64
"""Of gru-char and gru-char-large."""


def over(source: str, **training: object) -> Callable[[str], RunConfig]:
    overrides = {f"training.{name}": value for name, value in training.items()}
    return lambda preset: compose(source, preset=preset, overrides={"model.table_orders": [], **overrides})


def write(path: Path, characters: int) -> str:
    path.write_text(("the hens sat down in the yard. " * (characters // 31 + 1))[:characters], "utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("characters", "presets", "least"),
    [
        (1_200_000, ["gru-char-small", "gru-char", "gru-char-large"], [8 * 1_080_001, 25_000_000]),
        (450_000, ["gru-char-small", "gru-char", "gru-char-large"], [8 * 405_001, 25_000_000]),
        (30_000, ["gru-char-small", "gru-char"], [400_000]),
        (4_000_000, ["gru-subword-small", "gru-char", "gru-char-large"], [8 * 3_600_001, 8 * 3_600_001]),
    ],
)
def test_a_larger_preset_is_worth_its_time_from_enough_tokens_and_eight_readings_on(
    tmp_path: Path, characters: int, presets: list[str], least: list[int]
) -> None:
    source = write(tmp_path / "text.txt", characters)
    corpus = open_corpus(CorpusConfig(source=source))
    for smaller, preset, tokens in zip(presets, presets[1:], least, strict=False):
        steps = -(-tokens // TOKENS_A_STEP)
        before = choose_config(corpus, over(source, max_steps=steps - 1))
        assert before.config.preset == (presets[0] if least.count(tokens) > 1 else smaller)
        assert before.tokens == (None if before.config.preset == presets[0] else (steps - 1) * TOKENS_A_STEP)
        at = choose_config(corpus, over(source, max_steps=steps))
        assert at.config.preset == (presets[-1] if least.count(tokens) > 1 else preset)
        assert at.tokens == steps * TOKENS_A_STEP


def test_options_of_the_smallest_preset_alone_leave_it_chosen(tmp_path: Path) -> None:
    source = write(tmp_path / "text.txt", 2_000_000)
    corpus = open_corpus(CorpusConfig(source=source))
    options = {"training.max_steps": 10**6, "tokenizer.size": 500}
    choice = choose_config(corpus, lambda preset: compose(source, preset=preset, overrides=options))
    assert choice.config.preset == "gru-subword-small"


def test_the_shortest_of_the_given_lengths_decides(tmp_path: Path) -> None:
    source = write(tmp_path / "text.txt", 450_000)
    corpus = open_corpus(CorpusConfig(source=source))
    assert choose_config(corpus, over(source, max_steps=10**6)).config.preset == "gru-char-large"
    assert choose_config(corpus, over(source, max_steps=10**6, epochs=10)).config.preset == "gru-char"
    assert (
        choose_config(corpus, over(source, max_steps=10**6, epochs=10, minutes=1e-3)).config.preset == "gru-char-small"
    )


def test_a_plan_by_time_reads_a_short_text_only_so_often(tmp_path: Path) -> None:
    def chosen(characters: int, **training: object) -> tuple[str | None, float | None, float | None, int | None]:
        source = write(tmp_path / "text.txt", characters)
        small = {"model.table_orders": [], "model.hidden_size": 8}
        overrides = {f"training.{name}": value for name, value in training.items()} | small
        choice = choose_config(
            open_corpus(CorpusConfig(source=source)), lambda preset: compose(source, preset=preset, overrides=overrides)
        )
        length = choice.config.training
        return choice.config.preset, length.minutes, length.epochs, choice.tokens

    # The training split, nine tenths, is one token longer than its characters.
    assert chosen(60_000) == ("gru-char", DEFAULT_MINUTES, MOST_EPOCHS, 30 * 54_001)
    assert chosen(20_000, minutes=10) == ("gru-char", 10, MOST_EPOCHS, 30 * 18_001)
    assert chosen(10_000, minutes=10) == ("gru-char-small", 10, MOST_EPOCHS, None)
    # Too short for batches of the larger ones.
    assert chosen(4200) == ("gru-char-small", DEFAULT_MINUTES, MOST_EPOCHS, None)
    # Time ends it before; readings or steps are given; and a longer text is not as easily known by heart.
    assert chosen(100_000, minutes=1e-4)[1:3] == (1e-4, None)
    assert chosen(20_000, minutes=10, epochs=500)[1:3] == (10, 500)
    assert chosen(20_000, max_steps=10**6)[1:3] == (None, None)
    assert chosen(700_000, minutes=100)[1:3] == (100, None)
