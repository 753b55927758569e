"""Configuration: precedence, what is refused and how it is said."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from lm.config import (
    CorpusConfig,
    RunConfig,
    TrainingConfig,
    compose,
    merge,
    parse_assignments,
    preset_names,
    validate,
)
from lm.errors import ConfigError
from lm.generation.options import SamplingOptions
from lm.registry import ALL
from serve.settings import ServeOptions

ISSUE_PRESETS = {
    "gru-char", "lstm-char", "transformer-char", "gru-word", "lstm-word", "transformer-word", "transformer-subword",
    "gru-subword",
}  # fmt: skip

# A value other than the default for every field of TrainingConfig, as it is typed after --set.
VALUES: dict[str, tuple[str, Any]] = {
    "max_steps": ("7", 7),
    "epochs": ("2.5", 2.5),
    "minutes": ("0.5", 0.5),
    "ensemble": ("3", 3),
    "student": ("true", True),
    "distill": ("four", "four"),
    "distill_weight": ("0.75", 0.75),
    "log_to": ("wandb", "wandb"),
    "lora": ("8", 8),
    "lora_alpha": ("4", 4.0),
    "lora_dropout": ("0.1", 0.1),
    "lora_modules": ("q_proj,v_proj", ("q_proj", "v_proj")),
    "patience": ("3", 3),
    "batch_size": ("9", 9),
    "bptt": ("33", 33),
    "batching": ("shuffled", "shuffled"),
    "gradient_accumulation": ("4", 4),
    "optimizer": ("muon", "muon"),
    "learning_rate": ("1e-4", 1e-4),
    "muon_learning_rate": ("0.1", 0.1),
    "betas": ("[0.8,0.9]", (0.8, 0.9)),
    "momentum": ("0.5", 0.5),
    "weight_decay": ("0", 0.0),
    "grad_clip": ("none", None),
    "label_smoothing": ("0.1", 0.1),
    "table_learning_rate": ("1.5", 1.5),
    "average_share": ("0.2", 0.2),
    "schedule": ("plateau", "plateau"),
    "warmup_steps": ("0", 0),
    "learning_rate_floor": ("0.5", 0.5),
    "decay_factor": ("0.1", 0.1),
    "decay_every": ("10", 10),
    "decay_patience": ("2", 2),
    "precision": ("bf16", "bf16"),
    "amp": ("O2", "O2"),
    "fp32_modules": ("output,cell", ("output", "cell")),
    "loss_scale": ("none", None),
    "loss_scale_init": ("1024", 1024.0),
    "loss_scale_growth": ("4", 4.0),
    "loss_scale_backoff": ("0.25", 0.25),
    "loss_scale_window": ("100", 100),
    "log_activations": ("true", True),
    "device": ("cpu", "cpu"),
    "seed": ("12", 12),
    "on_nonfinite": ("skip", "skip"),
    "evaluate_every": ("5", 5),
    "validation_tokens": ("100", 100),
    "log_every": ("2", 2),
    "sample_tokens": ("20", 20),
    "devices": ("2", 2),
    "shard": ("true", True),
    "compile": ("on", "on"),
    "film": ("false", False),
    "film_prompt": ("ROMEO:", "ROMEO:"),
    "timeout_seconds": ("60", 60.0),
    "checkpoint_every": ("3", 3),
    "checkpoint_epochs": ("[5,10]", (5, 10)),
    "keep_checkpoints": ("2", 2),
}


def make(preset: str = "gru-char", *, file: Path | None = None, **overrides: Any) -> RunConfig:
    return compose("x.txt", preset=preset, file=file, overrides=overrides)


def test_the_presets_of_the_issue_are_there_and_resolve() -> None:
    assert set(preset_names()) >= ISSUE_PRESETS
    for name in preset_names():
        config = make(name)
        assert config.preset == name


@pytest.mark.parametrize("field", TrainingConfig.model_fields)
def test_every_training_field_can_be_set(field: str) -> None:
    typed, value = VALUES[field]
    training = make(**parse_assignments([f"training.{field}={typed}"])).training
    assert getattr(training, field) == value
    assert value != TrainingConfig.model_fields[field].default


def test_precedence_is_defaults_preset_file_overrides(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("[model]\nhidden_size = 300\ndropout = 0.25\n[training]\nlearning_rate = 0.5\n", "utf-8")
    config = make(file=file, **{"model.dropout": "0.4"})
    model = config.model.model_dump()
    assert model["num_layers"] == 1  # default
    assert model["table_buckets"] == 32768  # preset
    assert (model["hidden_size"], config.training.learning_rate) == (300, 0.5)  # file over preset
    assert model["dropout"] == 0.4  # override over file


def test_another_model_type_keeps_what_means_something_to_it() -> None:
    lstm = make(**{"model.type": "lstm"}).model.model_dump()
    assert (lstm["type"], lstm["hidden_size"], lstm["embedding_size"]) == ("lstm", 256, 64)
    transformer = make(**{"model.type": "transformer"}).model.model_dump()
    assert (transformer["type"], transformer["hidden_size"]) == ("transformer", 256)
    assert "embedding_size" not in transformer


def test_an_option_of_another_model_is_still_refused_where_it_was_typed() -> None:
    with pytest.raises(ConfigError, match="Unknown option model.embedding_size"):
        make(**{"model.type": "transformer", "model.embedding_size": "8"})


def test_every_option_is_spelled_out_in_the_saved_configuration() -> None:
    config = make()
    assert config.model.model_dump()["num_layers"] == 1
    assert config.tokenizer.model_dump()["unknown"] == "replace"
    assert validate(RunConfig, json.loads(config.model_dump_json())) == config


@pytest.mark.parametrize(
    ("assignment", "sentence"),
    [
        ("model.hiden_size=3", "Unknown option model.hiden_size. Did you mean 'hidden_size'?"),
        ("training.lerning_rate=3", "Unknown option training.lerning_rate. Did you mean 'learning_rate'?"),
        ("tokenizer.unknwon=skip", "Unknown option tokenizer.unknwon. Did you mean 'unknown'?"),
        ("trainning.seed=3", "Unknown section 'trainning'. Did you mean 'training'?"),
        ("model.type=gruu", "Unknown model 'gruu'. Did you mean 'gru'?"),
        ("tokenizer.type=words", "Unknown tokenizer 'words'. Did you mean 'word'?"),
        ("training.batch_size=0", "training.batch_size = 0: give a number of at least 1."),
        ("training.batch_size=2.5", "training.batch_size = 2.5: give a whole number."),
        ("training.learning_rate=-1", "training.learning_rate = -1: give a number above 0."),
        ("training.learning_rate=nan", "training.learning_rate = 'nan': give a finite number."),
        ("training.minutes=inf", "training.minutes = 'inf': give a finite number."),
        ("training.optimizer=adam", "training.optimizer = 'adam': use 'adamw', 'sgd' or 'muon'."),
        ("training.betas=[0.9,1]", "training.betas = [0.9, 1]: both must be between 0 and 1."),
        (
            "training.checkpoint_epochs=[0]",
            "training.checkpoint_epochs.0 = 0: give a number of at least 1.",
        ),
        ("training.seed=-1", "training.seed = -1: give a number of at least 0."),
        ("model.dropout=1", "model.dropout = 1: give a number below 1."),
        ("model.hidden_size=many", "model.hidden_size = 'many': give a whole number."),
        ("model.tie_weights=perhaps", "model.tie_weights = 'perhaps': use true or false."),
        ("model.table_orders=none", "model.table_orders = none: give a list such as [2,3], or [] for none."),
        ("training.betas=0.9", "training.betas = 0.9: give a list such as [0.9,0.99]."),
        ("training.betas=[0.9]", "training.betas = [0.9]: give a value such as [0.9,0.99]."),
        ("training.betas=[0.9,0.9,0.9]", "give 2 values at most, such as [0.9,0.99]."),
        ("training.fp32_modules={}", 'training.fp32_modules: give a list such as ["a","b"], or [] for none.'),
        ("corpus.split_fractions=0.5,0.6", "corpus.split_fractions = '0.5,0.6': give two or three positive numbers"),
        ("corpus.split_fractions=1.1,-0.1", "corpus.split_fractions = '1.1,-0.1': give two or three positive numbers"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence_with_its_value(assignment: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make(**parse_assignments([assignment]))
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value) and "pydantic" not in str(caught.value)


@pytest.mark.parametrize("value", [None, "x", "nan", -1, 1.5, 10**30, True, [], [[1]], ["x"], [1, 2, 3], {"x": 1}])
def test_no_option_is_refused_in_the_words_of_python(value: Any) -> None:
    owners = [CorpusConfig, TrainingConfig, SamplingOptions, ServeOptions]
    owners += [kind.resolve(name).Options for kind in ALL.values() for name in kind.names()]
    said = []
    for owner in owners:
        needed = {name: "x" for name, field in owner.model_fields.items() if field.is_required()}
        for name in owner.model_fields:
            try:
                validate(owner, {**needed, name: value})
            except ConfigError as error:
                said.append(str(error))
    assert said
    words = re.compile(r"(?i:tuple|input should|integer|boolean|\bdict|\bstring|pydantic|cannot be used)|\bNone\b")
    assert [sentence for sentence in said if words.search(sentence)] == []


def test_options_that_do_not_fit_each_other_are_named_without_the_rest_of_their_section() -> None:
    with pytest.raises(ConfigError) as caught:
        make("transformer-char", **{"model.num_heads": "3"})
    assert str(caught.value) == "model: hidden_size 128 must be an even multiple of num_heads 3."


def test_all_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        make(**{"training.batch_size": "0", "training.seed": "-1"})
    assert "batch_size" in str(caught.value) and "seed" in str(caught.value)


@pytest.mark.parametrize(
    ("typed", "value"),
    [("none", None), ("None", None), ("null", None), ("0.1", 0.1), (" 0.1 ", 0.1)],
)
def test_values_are_read_as_typed(typed: str, value: float | None) -> None:
    assert make(**parse_assignments([f"training.grad_clip={typed}"])).training.grad_clip == value


@pytest.mark.parametrize(("typed", "value"), [("true", True), ("True", True), ("false", False), ("1", True)])
def test_switches_are_read_as_typed(typed: str, value: bool) -> None:
    assert make(**parse_assignments([f"model.tie_weights={typed}"])).model.model_dump()["tie_weights"] is value


@pytest.mark.parametrize("entry", ["hidden_size=3", "model.hidden_size", "model.=3", ".x=3", "model.a.b=3", ""])
def test_an_assignment_of_another_shape_is_refused(entry: str) -> None:
    with pytest.raises(ConfigError, match="write SECTION.FIELD=VALUE"):
        parse_assignments([entry])


def test_of_two_assignments_to_one_field_the_later_holds() -> None:
    assert parse_assignments(["training.seed=1", "training.seed=2"]) == {"training.seed": "2"}


def test_an_unknown_preset_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"Unknown preset 'gru-chr'\. Did you mean 'gru-char'\?"):
        make("gru-chr")
    with pytest.raises(
        ConfigError, match=r"Unknown preset 'lstm'\. Did you mean 'lstm-char', 'lstm-word' or 'lstm-word-gpu'\?"
    ):
        make("lstm")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"[model\n", "is not TOML"),
        (b"\xff\xfe", "is not TOML"),
        (b"model = 3\n", "model is a section"),
        (b"[modle]\ntype = 'gru'\n", "Unknown section 'modle'. Did you mean 'model'?"),
        (b"[training]\nbatchsize = 4\n", "Unknown option training.batchsize. Did you mean 'batch_size'?"),
        (b"[model]\ntype = 'gruu'\n", "Unknown model 'gruu'. Did you mean 'gru'?"),
    ],
)
def test_a_bad_file_of_options_is_refused(tmp_path: Path, content: bytes, sentence: str) -> None:
    (tmp_path / "run.toml").write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        make(file=tmp_path / "run.toml")
    assert sentence in str(caught.value)


def test_a_missing_file_of_options_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--config .*none.toml: No such file"):
        make(file=tmp_path / "none.toml")


def test_merge_changes_the_given_options_and_nothing_else() -> None:
    config = make(**{"model.dropout": "0.3", "training.seed": "5"})
    merged = merge(config, {"training.seed": 6, "training.max_steps": None})
    assert merged.training.seed == 6
    assert merged.model == config.model and merged.preset == "gru-char"


def test_configurations_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        setattr(make().training, "seed", 3)  # noqa: B010 (what a type checker refuses)


@pytest.mark.parametrize(("typed", "value"), [("0.9,0.1", (0.9, 0.1)), (" 0.8, 0.1 ,0.1", (0.8, 0.1, 0.1))])
def test_split_fractions_are_read_from_text(typed: str, value: tuple[float, ...]) -> None:
    assert CorpusConfig.model_validate({"source": "x", "split_fractions": typed}).split_fractions == value


def test_every_field_is_described() -> None:
    for owner in (CorpusConfig, TrainingConfig):
        for name, field in owner.model_fields.items():
            assert field.description and field.description.endswith("."), name


def test_composing_reads_no_text_and_reading_a_configuration_loads_no_torch() -> None:
    code = (
        "import sys; from lm.config import RunConfig, validate; "
        "own = {'corpus': {'source': 'x'}, 'tokenizer': {'type': 'char'}, 'model': {'type': 'gru'}}; "
        "c = validate(RunConfig, own); "
        "assert c.training.batch_size == 64; assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
