"""The preset for a text that came without one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lm.config import CorpusConfig, RunConfig, compose
from lm.corpora import open_corpus
from lm.training.choosing import MOST_EPOCHS, PRESETS, choose_config, worth_from
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
    ("characters", "larger"), [(1_200_000, 1.0), (450_000, 0.405), (60_000, 0.1)], ids=["long", "short", "tiny"]
)
def test_of_a_shorter_text_larger_presets_are_worth_it_sooner(tmp_path: Path, characters: int, larger: float) -> None:
    source = write(tmp_path / "text.txt", characters)
    corpus = open_corpus(CorpusConfig(source=source))
    for smaller, preset in (("gru-char-small", "gru-char"), ("gru-char", "gru-char-large")):
        steps = int(PRESETS["char"][preset] * larger / TOKENS_A_STEP)
        for more, chosen in ((-1, smaller), (1, preset)):
            choice = choose_config(corpus, over(source, max_steps=steps + more))
            assert choice.config.preset == chosen
            assert choice.tokens == (steps + more) * TOKENS_A_STEP


def test_the_shortest_of_the_given_lengths_decides(tmp_path: Path) -> None:
    source = write(tmp_path / "text.txt", 450_000)
    corpus = open_corpus(CorpusConfig(source=source))
    assert choose_config(corpus, over(source, max_steps=10**6)).config.preset == "gru-char-large"
    assert choose_config(corpus, over(source, max_steps=10**6, epochs=10)).config.preset == "gru-char"
    assert (
        choose_config(corpus, over(source, max_steps=10**6, epochs=10, minutes=1e-3)).config.preset == "gru-char-small"
    )


def test_a_plan_by_time_reads_a_short_text_only_so_often(tmp_path: Path) -> None:
    def chosen(characters: int, **training: object) -> tuple[float | None, float | None, bool]:
        source = write(tmp_path / "text.txt", characters)
        small = {"model.table_orders": [], "model.hidden_size": 8}
        overrides = {f"training.{name}": value for name, value in training.items()} | small
        choice = choose_config(
            open_corpus(CorpusConfig(source=source)), lambda preset: compose(source, preset=preset, overrides=overrides)
        )
        length = choice.config.training
        at_most = MOST_EPOCHS * (round(characters * 0.9) + 1)
        return length.minutes, length.epochs, choice.tokens == at_most

    assert chosen(20_000) == (DEFAULT_MINUTES, MOST_EPOCHS, True)
    assert chosen(20_000, minutes=10) == (10, MOST_EPOCHS, True)
    # What is asked for in readings or steps is given, and a longer text is not as easily known by heart.
    assert chosen(20_000, minutes=10, epochs=500) == (10, 500, False)
    assert chosen(20_000, max_steps=10**6) == (None, None, False)
    assert chosen(700_000, minutes=100) == (100, None, False)


def test_too_short_for_the_larger_presets_is_no_error(tmp_path: Path) -> None:
    source = write(tmp_path / "text.txt", 4200)
    choice = choose_config(open_corpus(CorpusConfig(source=source)), over(source, max_steps=10**6))
    assert choice.config.preset == "gru-char-small" and choice.tokens is None


def test_what_presets_are_worth_is_in_proportion_to_the_text_between_the_measured_lengths() -> None:
    assert worth_from("gru-char", 10**7) == worth_from("gru-char", 10**6) == 8e6
    assert worth_from("gru-char", 400_000) == 3.2e6
    assert worth_from("gru-char", 1) == worth_from("gru-char", 10**5) == 8e5
    assert worth_from("gru-char-small", 10**6) == 0
