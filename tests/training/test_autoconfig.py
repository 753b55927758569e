"""The preset for a text that came without one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lm.config import CorpusConfig, RunConfig, compose
from lm.corpora import open_corpus
from lm.jobs.autoconfig import MAX_EPOCHS, choose_config
from lm.training.plan import DEFAULT_MINUTES

STEP = 64 * 64
"""Tokens of a step of gru-char and gru-char-large."""
SUBWORD_STEP = 32 * 48


def over(source: str, **training: object) -> Callable[[str], RunConfig]:
    overrides = {f"training.{name}": value for name, value in training.items()}
    return lambda preset: compose(source, preset=preset, overrides={"model.table_orders": [], **overrides})


def write(path: Path, characters: int) -> str:
    path.write_text(("the hens sat down in the yard. " * (characters // 31 + 1))[:characters], "utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("characters", "tokens", "step", "smaller", "larger"),
    [
        (30_000, 400_000, STEP, "gru-char-small", "gru-char"),
        (450_000, 8 * 405_001, STEP, "gru-char-small", "gru-char"),
        (1_200_000, 8 * 1_080_001, STEP, "gru-char-small", "gru-char"),
        (450_000, 25_000_000, STEP, "gru-char", "gru-char-large"),
        (2_000_000, 8 * 1_800_001, STEP, "gru-subword-small", "gru-char"),
        (4_000_000, 5_000_000, SUBWORD_STEP, "gru-subword-small", "gru-subword-medium"),
        (2_000_000, 25_000_000, STEP, "gru-char", "gru-char-large"),
    ],
)
def test_a_larger_preset_is_worth_its_time_from_enough_tokens_and_readings_on(
    tmp_path: Path, characters: int, tokens: int, step: int, smaller: str, larger: str
) -> None:
    source = write(tmp_path / "text.txt", characters)
    corpus = open_corpus(CorpusConfig(source=source))
    steps = -(-tokens // step)
    assert choose_config(corpus, over(source, max_steps=steps - 1)).config.preset == smaller
    choice = choose_config(corpus, over(source, max_steps=steps))
    assert choice.config.preset == larger and choice.tokens == steps * step


def test_presets_that_do_not_take_the_options_are_passed_over(tmp_path: Path) -> None:
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


@pytest.mark.slow
def test_a_plan_by_time_reads_a_short_text_only_so_often(tmp_path: Path) -> None:
    def chosen(characters: int, **training: object) -> tuple[str | None, float | None, float | None, int | None]:
        source = write(tmp_path / "text.txt", characters)
        small = {"model.table_orders": [], "model.hidden_size": 8}
        overrides = {f"training.{name}": value for name, value in training.items()} | small
        choice = choose_config(
            open_corpus(CorpusConfig(source=source, split_at="character")),
            lambda preset: compose(source, preset=preset, overrides=overrides),
        )
        length = choice.config.training
        return choice.config.preset, length.minutes, length.epochs, choice.tokens

    # The training split, nine tenths, is one token longer than its characters.
    assert chosen(60_000) == ("gru-char", DEFAULT_MINUTES, MAX_EPOCHS, 30 * 54_001)
    assert chosen(20_000, minutes=10) == ("gru-char", 10, MAX_EPOCHS, 30 * 18_001)
    assert chosen(10_000, minutes=10) == ("gru-char-small", 10, MAX_EPOCHS, None)
    # Too short for batches of the larger ones.
    assert chosen(4200) == ("gru-char-small", DEFAULT_MINUTES, MAX_EPOCHS, None)
    # Time ends it before; readings or steps are given; and a longer text is not as easily known by heart.
    assert chosen(100_000, minutes=1e-4)[1:3] == (1e-4, None)
    assert chosen(20_000, minutes=10, epochs=500)[1:3] == (10, 500)
    assert chosen(20_000, max_steps=10**6)[1:3] == (None, None)
    assert chosen(700_000, minutes=100)[1:3] == (100, None)
