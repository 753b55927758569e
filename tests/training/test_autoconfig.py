"""The rule for the default model: smooth, valid for every wish, and explained."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import lm
from lm.config import CorpusConfig, Section, TrainingConfig, compose
from lm.corpora import open_corpus
from lm.corpora.shards import learn_tokenizer, prepare_shard
from lm.errors import ConfigError
from lm.jobs.autoconfig import (
    CPU,
    FORGET_EPOCHS,
    GPU,
    MIN_WIDTH,
    STEPS_SHARE,
    SUBWORD_BYTES,
    WIDTH_STEP,
    Choice,
    Facts,
    Wishes,
    choose,
    max_epochs,
    on_gpu,
    read_facts,
    with_length,
    with_measured_price,
)
from lm.jobs.prepare import prepare_job
from lm.jobs.resolve import TrainRequest, resolve
from lm.jobs.speed import network_speed, reference_speed

SPEED = 100_000.0
LENGTHS = [int(5_000 * 1.3**k) for k in range(34)]
SECONDS = [6 * 1.5**k for k in range(18)]
SMALL = {"model.hidden_size": 8, "model.embedding_size": 4, "model.table_orders": []}


def facts(characters: int, seconds: float | None = 60.0, **fields: Any) -> Facts:
    speed = None if seconds is None else SPEED
    return Facts(characters, characters, 100, seconds=seconds, speed=speed, **fields)


def numbers(choice: Choice) -> dict[str, float]:
    model, training = choice.sections["model"], choice.sections["training"]
    values = {**model, **training}
    return {name: values[name] for name in ("hidden_size", "dropout", "table_dropout", "weight_decay", "learning_rate")}


def on_cpu(known: Facts) -> Facts:
    return known


def on_a_gpu(known: Facts) -> Facts:
    return on_gpu(replace(known, speed=20_000_000.0), 8 * 10**9)


@pytest.mark.parametrize("on", [on_cpu, on_a_gpu])
@pytest.mark.parametrize("family", ["gru", "transformer"])
def test_a_little_more_time_or_text_changes_little(family: Any, on: Callable[[Facts], Facts]) -> None:
    wishes = Wishes(family=family, tokens="char")
    for length, seconds in itertools.product(LENGTHS, SECONDS):
        here = numbers(choose(on(facts(length, seconds)), wishes))
        for other in (facts(int(length * 1.3), seconds), facts(length, seconds * 1.3)):
            there = numbers(choose(on(other), wishes))
            assert abs(there["hidden_size"] - here["hidden_size"]) <= max(WIDTH_STEP * 2, 0.3 * here["hidden_size"])
            for name in ("dropout", "table_dropout"):
                assert abs(there[name] - here[name]) <= 0.13
            assert 0.4 <= there["learning_rate"] / here["learning_rate"] <= 2.5


def test_more_time_never_means_a_narrower_network() -> None:
    for length in LENGTHS:
        widths = [choose(facts(length, seconds), Wishes(tokens="char")) for seconds in SECONDS]
        sizes = [choice.sections["model"]["hidden_size"] for choice in widths]
        assert sizes == sorted(sizes) and sizes[0] >= MIN_WIDTH and sizes[-1] <= CPU.max_width


def sizes(known: Facts, **wishes: Any) -> tuple[int, int]:
    """Rows of a batch, and width."""
    sections = choose(known, Wishes(**wishes)).sections
    return sections["training"]["batch_size"], sections["model"]["hidden_size"]


@pytest.mark.parametrize("family", ["gru", "transformer"])
def test_a_gpu_trains_a_wider_network_in_larger_batches_as_its_speed_allows(family: Any) -> None:
    text = replace(facts(5_000_000, 300), speed=20_000_000.0)
    there, here = sizes(facts(5_000_000, 300), family=family), sizes(on_gpu(text, None), family=family)
    assert here[0] > CPU.rows[1] and here[1] > there[1]
    assert GPU.rows[0] <= here[0] <= GPU.rows[1]
    assert here >= sizes(on_gpu(replace(text, speed=2_000_000.0), None), family=family)


def test_a_batch_fits_into_the_memory_of_a_gpu() -> None:
    text = replace(facts(5_000_000, 3600, epochs=50.0), speed=20_000_000.0)
    rows = [sizes(on_gpu(text, gigabytes * 10**9), tokens="char")[0] for gigabytes in (1, 2, 4, 8, 16, 80)]
    assert rows == sorted(rows) and rows[0] < rows[-1] == GPU.rows[1]
    # Activations of a GRU in fp32, gates and states: about ten numbers a unit.
    width = sizes(on_gpu(text, 10**9), tokens="char")[1]
    assert rows[0] * 64 * width * 10 * 4 <= 10**9


def test_no_plan_by_time_has_more_epochs_than_the_text_stands() -> None:
    for length, seconds in itertools.product(LENGTHS, SECONDS):
        choice = choose(facts(length, seconds))
        assert choice.epochs <= max_epochs(choice.tokens / choice.epochs) + 0.1
        assert choice.limited == ("epochs" in choice.sections["training"])
    assert choose(facts(5_000, 600)).limited and not choose(facts(5_000_000, 600)).limited
    # Given epochs count as they are.
    assert not choose(facts(5_000, 600, epochs=500.0)).limited


def test_subwords_are_for_long_texts_and_grow_with_them() -> None:
    assert choose(facts(SUBWORD_BYTES - 1)).sections["tokenizer"] == {"type": "char"}
    sizes = [choose(facts(length)).sections["tokenizer"]["size"] for length in (SUBWORD_BYTES, 6_000_000, 12_000_000)]
    assert sizes == sorted(set(sizes)) and sizes[0] >= 500
    # Bytes count: a text in Chinese has a third as many characters.
    assert choose(replace(facts(1_000_000), size_bytes=3_000_000, distinct=3000)).sections["tokenizer"]["size"] > 3000


@pytest.mark.parametrize("family", ["gru", "lstm", "transformer"])
@pytest.mark.parametrize("tokens", ["char", "subword", "word"])
@pytest.mark.parametrize("neural", [False, True])
def test_every_wish_gives_valid_options(family: Any, tokens: Any, neural: bool) -> None:
    for length, seconds in itertools.product((5_000, 1_000_000, 12_000_000), (6.0, 600.0)):
        sections = choose(facts(length, seconds), Wishes(family, tokens, neural)).sections
        config = compose("text.txt", preset=sections)
        assert config.tokenizer.type == tokens
        is_hybrid = not neural and tokens != "word" and family != "transformer"
        assert config.model.type == ("hybrid" if is_hybrid else family)
        if is_hybrid:
            assert config.model.model_dump()["cell"] == family


def test_an_unknown_wish_is_one_sentence() -> None:
    with pytest.raises(ConfigError, match="family='mamba': choose one of gru, lstm, transformer"):
        Wishes(family="mamba")  # type: ignore[arg-type]


def test_wishes_and_another_model_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match="--neural is for the default model, and --preset gru-char gives another"):
        resolve(TrainRequest(corpus="text.txt", preset="gru-char", neural=True))


@pytest.mark.parametrize(
    ("overrides", "model", "tokenizer"),
    [
        ({"model.type": "lstm"}, "lstm", "char"),
        ({"model.type": "transformer"}, "transformer", "char"),
        ({"model.type": "ngram"}, "ngram", "char"),
        ({"tokenizer.type": "byte"}, "hybrid", "byte"),
        ({"tokenizer.type": "word"}, "gru", "word"),
        ({"tokenizer.type": "subword", "tokenizer.size": 300}, "hybrid", "subword"),
    ],
)
def test_types_among_the_options_count_as_wishes(
    tmp_path: Path, overrides: dict[str, Any], model: str, tokenizer: str
) -> None:
    (tmp_path / "text.txt").write_text("the hens sat down in the yard. \n" * 400, "utf-8")
    request = TrainRequest(corpus=str(tmp_path / "text.txt"), overrides={"training.max_steps": 5, **overrides})
    config = prepare_job(resolve(request)).config
    assert (config.model.type, config.tokenizer.type) == (model, tokenizer)


def test_the_rule_reads_the_training_text(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("ä1" * 5000, "utf-8")
    corpus = open_corpus(CorpusConfig(source=str(path), split_fractions=(0.5, 0.5)))
    found = read_facts(corpus)
    assert (found.characters, found.size_bytes, found.distinct) == (5000, 7500, 2)


def test_only_a_plan_by_time_is_measured() -> None:
    def measure() -> float:
        raise AssertionError("measured")

    text = facts(10_000, None)
    steps = with_length(text, TrainingConfig(max_steps=10), measure)
    assert steps.steps == 10 and steps.seconds is None
    assert choose(steps).sections["model"]["hidden_size"] == MIN_WIDTH
    timed = with_length(text, TrainingConfig(minutes=0.5), lambda: 5.0)
    assert (timed.seconds, timed.speed) == (30, 5)


def test_the_reference_network_is_timed_on_this_machine() -> None:
    assert reference_speed(TrainingConfig(device="cpu"), seconds=0.05) > 100


def test_the_measured_price_of_the_network_gives_the_epochs() -> None:
    first = choose(facts(1_000_000, 600), Wishes(tokens="char"))
    expected = SPEED / first.price
    # Twice as fast as expected, the share of validation and saving included.
    twice = choose(with_measured_price(first, 2 * expected / STEPS_SHARE), Wishes(tokens="char"))
    assert twice.sections["model"]["hidden_size"] == first.sections["model"]["hidden_size"]
    assert twice.epochs == pytest.approx(2 * first.epochs, rel=0.01)
    assert numbers(twice)["dropout"] > numbers(first)["dropout"]
    assert "price" in {name for name, _, _ in twice.explain()}


def test_the_network_of_a_plan_by_time_is_timed(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("the hens sat down in the yard. \n" * 400, "utf-8")
    for overrides, timed in (({"training.minutes": 0.1}, True), ({"training.max_steps": 5}, False)):
        request = TrainRequest(corpus=str(tmp_path / "text.txt"), overrides={**overrides, **SMALL})
        choice = prepare_job(resolve(request)).choice
        assert choice is not None and (choice.facts.price_factor != 1) == timed


def test_a_network_that_a_caller_made_too_large_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text.txt").write_text("the hens sat down in the yard. \n" * 400, "utf-8")
    timed: list[Section] = []

    def record(section: Section, *args: Any) -> float:
        timed.append(section)
        return network_speed(section, *args)

    monkeypatch.setattr("lm.jobs.prepare.network_speed", record)
    overrides = {"training.minutes": 0.1, "model.hidden_size": 1_000_000}
    job = prepare_job(resolve(TrainRequest(corpus=str(tmp_path / "text.txt"), overrides=overrides)))
    assert job.config.model.model_dump()["hidden_size"] == 1_000_000
    assert [section.model_dump()["hidden_size"] <= CPU.max_width for section in timed] == [True]


def test_weight_decay_forgets_in_the_same_number_of_epochs() -> None:
    for length, seconds in ((100_000, 60.0), (1_000_000, 60.0), (1_000_000, 600.0)):
        choice = choose(facts(length, seconds), Wishes(tokens="char"))
        training = choice.sections["training"]
        steps = length / (training["batch_size"] * training["bptt"])
        epochs = 1 / (training["learning_rate"] * training["weight_decay"] * steps)
        assert epochs == pytest.approx(FORGET_EPOCHS, rel=0.02)


def test_a_recurrent_model_of_words_averages_its_weights_if_it_reads_the_text_often() -> None:
    shares = []
    for epochs in (0.5, 1.0, 2.0, 4.0, 40.0):
        training = choose(facts(1_000_000, None, epochs=epochs), Wishes(tokens="word")).sections["training"]
        assert training["batching"] == "rotated"
        shares.append(training.get("average_share"))
    assert shares == [None, None, 0.2, 0.4, 0.4]
    assert "average_share" not in choose(facts(1_000_000, None, epochs=4.0), Wishes()).sections["training"]


def test_inputs_and_outputs_of_the_rule_are_explained() -> None:
    rows = choose(facts(300_000, 30)).explain()
    assert all(len(row) == 3 for row in rows)
    named = {name: value for name, value, _ in rows}
    assert named["text"] == "300,000 characters" and named["time"] == "30 s" and named["model"] == "hybrid"
    assert {"work", "plan", "tokens", "dropout", "weight_decay", "batch_size", "learning_rate"} <= named.keys()


def test_the_device_is_explained_where_it_is_a_gpu() -> None:
    assert "device" not in {name for name, _, _ in choose(facts(300_000)).explain()}
    assert ("device", "GPU", "32 to 2,048 rows a batch, 8.0 GB free") in choose(
        on_gpu(facts(300_000), 8 * 10**9)
    ).explain()


def test_lm_train_takes_the_default_model_and_records_it(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("the hens sat down in the yard. \n" * 400, "utf-8")
    run = lm.train(path, max_steps=3, overrides=SMALL, runs_dir=tmp_path / "runs")
    assert run.name == "text-hybrid" and run.config.preset is None
    assert run.config.model.type == "hybrid"
    alone = lm.train(path, max_steps=3, family="lstm", neural=True, overrides=SMALL, runs_dir=tmp_path / "runs")
    assert alone.config.model.type == "lstm"


def test_a_text_that_was_tokenized_before_keeps_its_tokens(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    for name in "abcd":
        (tmp_path / "texts" / f"{name}.txt").write_text("the hens sat down in the yard. \n" * 6000, "utf-8")
    source = CorpusConfig(source=str(tmp_path / "texts"))
    learn_tokenizer(source, tmp_path / "shards", Section.model_validate({"type": "word"}), characters=300_000)
    for number in range(2):
        prepare_shard(source, tmp_path / "shards", number, 2, valid_every=2)
    request = TrainRequest(corpus=str(tmp_path / "shards"), overrides={"training.max_steps": 5})
    config = prepare_job(resolve(request)).config
    assert (config.model.type, config.tokenizer.type) == ("gru", "word")
