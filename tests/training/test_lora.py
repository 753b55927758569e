"""LoRA: adapters over frozen weights, in runs of their own, and RUN+ADAPTER."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lm
from lm import machine
from lm.config import RunConfig, TrainingConfig, compose
from lm.corpora import PreparedCorpus
from lm.errors import ConfigError, DeviceError, RunNotFoundError, VocabMismatchError
from lm.files import read_arrays
from lm.jobs.measure import refuse_too_large
from lm.jobs.resolve import TrainRequest, resolve
from lm.jobs.train import resume
from lm.jobs.verify_resume import compare
from lm.models.adapter_weights import merged
from lm.models.base import LanguageModel, build_model
from lm.models.lora import add_adapters
from lm.profiling.memory_estimate import estimate
from lm.profiling.trial import Trial
from lm.profiling.trial import make_trial as trial_of
from lm.runs.adapters import read_whole_weights
from lm.runs.run_folder import RunFolder
from tests.training.conftest import MODELS, SMALL, make_text

pytestmark = pytest.mark.slow

Options = Callable[..., RunConfig]
FAMILIES = ("gru", "lstm", "rnn", "transformer")
LENGTH = {
    "training.max_steps": 12,
    "training.evaluate_every": 6,
    "training.sample_tokens": None,
    "training.film": False,
}


def model_of(options: Options, kind: str, **changes: Any) -> tuple[LanguageModel, RunConfig]:
    config = options("gru" if kind == "rnn" else kind, **({"model.type": "rnn"} if kind == "rnn" else {}), **changes)
    return build_model(config.model, 30, seed=1), config


def train_a_little(model: LanguageModel, config: RunConfig, prepared: PreparedCorpus) -> Trial:
    trial = trial_of(config, prepared, model=model, learns=True)
    for _ in range(3):
        trial.run_step()
    return trial


@pytest.mark.parametrize("kind", FAMILIES)
def test_only_adapters_learn_and_merged_they_are_the_same_model(
    kind: str, options: Options, prepared: PreparedCorpus
) -> None:
    config = options("gru" if kind == "rnn" else kind, lora=3, learning_rate=0.05, **{"model.type": kind})
    vocab_size = prepared.tokenizer.vocab_size
    model = build_model(config.model, vocab_size, seed=1)
    base = {name: array.copy() for name, array in model.arrays().items()}
    ids = torch.arange(24).reshape(2, 12) % vocab_size
    before = model.eval()(ids)[0]
    add_adapters(model, config.training)
    # An adapter adds nothing at first.
    torch.testing.assert_close(model(ids)[0], before, rtol=0, atol=1e-6)
    trial = train_a_little(model, config, prepared)
    after = model.eval()(ids)[0]
    assert (after - before).abs().max() > 0.01
    own = model.state_dict()
    assert all(np.array_equal(own[name].numpy(), array) for name, array in base.items())
    adapters = model.arrays()
    assert adapters and not adapters.keys() & base.keys()
    states = [state for optimizer in trial.step.optimizers for state in optimizer.state]
    assert {id(each) for each in states} == {id(each) for each in model.parameters() if each.requires_grad}
    whole = build_model(config.model, vocab_size).eval()
    whole.load_arrays(merged(base, adapters, config.training.lora_scale))
    torch.testing.assert_close(whole(ids)[0], after, rtol=1e-4, atol=1e-5)


def test_gradients_of_an_adapter_are_those_of_the_merged_matrix(options: Options) -> None:
    model, config = model_of(options, "transformer", lora=2, lora_alpha=6)
    add_adapters(model, config.training)
    layer: Any = model.get_submodule("layers.0.mlp.up_proj")
    adapter = layer.adapters["weight"]
    torch.nn.init.normal_(adapter.up)
    inputs = torch.randn(70, 16)
    layer(inputs).square().sum().backward()
    found = adapter.down.grad.clone(), adapter.up.grad.clone()
    adapter.zero_grad()
    # lora_alpha / lora is 3.
    (inputs @ (layer.weight + 3 * adapter.up @ adapter.down).T).square().sum().backward()
    for own, wanted in zip(found, (adapter.down.grad, adapter.up.grad), strict=True):
        torch.testing.assert_close(own, wanted, rtol=1e-4, atol=1e-2)
    assert layer.weight.grad is None


def test_modules_are_chosen_by_name(options: Options) -> None:
    model, config = model_of(options, "transformer", lora=2, lora_modules="q_proj,mlp")
    names = {name.split(".")[3] for name in add_adapters(model, config.training).arrays()}
    assert names == {"q_proj", "gate_proj", "up_proj", "down_proj"}
    other, config = model_of(options, "transformer", lora=2, lora_modules=["q_prj"])
    with pytest.raises(ConfigError, match="has no 'q_prj'.* Did you mean 'q_proj'"):
        add_adapters(other, config.training)


# -- runs -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, which learned from a.txt, and its adapter "b" for b.txt, where the same letters make other words."""
    path = tmp_path_factory.mktemp("lora")
    text = make_text()
    (path / "a.txt").write_text(text, "utf-8")
    (path / "b.txt").write_text(text.translate(str.maketrans("aeotns", "otaesn")), "utf-8")
    config = compose(str(path / "a.txt"), preset="gru-char", overrides={**SMALL, **MODELS["transformer"], **LENGTH})
    lm.train(str(path / "a.txt"), config, name="base", runs_dir=path, overrides={"training.max_steps": 60})
    adapt(path, "b")
    return path


def adapt(path: Path, name: str, **others: Any) -> lm.Run:
    overrides = {"training.lora": 4, "training.learning_rate": 0.02, **LENGTH}
    init = lm.load("base", runs_dir=path)
    return lm.train(str(path / "b.txt"), init=init, name=name, runs_dir=path, overrides=overrides, **others)


def files_of(run: Path) -> dict[str, bytes]:
    return {str(file.relative_to(run)): file.read_bytes() for file in run.rglob("*") if file.is_file()}


def test_an_adapter_run_has_adapters_alone_learns_and_leaves_the_base_as_it_is(folder: Path) -> None:
    before = files_of(folder / "base")
    run = adapt(folder, "learns")
    assert files_of(folder / "base") == before
    names = read_arrays(folder / "learns" / "model.safetensors")[0].keys()
    assert names and all(".adapters.weight." in name for name in names)
    text = (folder / "b.txt").read_text()[-600:]
    base = lm.load("base", runs_dir=folder)
    assert run.evaluate(text=text).loss < base.evaluate(text=text).loss - 0.1
    assert run.record["base"]["run"] == "base" and run.record["parameters"] == base.record["parameters"]
    assert "It is a LoRA adapter of rank 4 over the run base (best)" in (folder / "learns" / "README.md").read_text()


def test_a_stopped_and_resumed_adapter_run_has_the_same_bits(folder: Path) -> None:
    adapt(folder, "halves", stop_after=6)
    resume("halves", runs_dir=folder)
    halves, whole = (RunFolder(folder / name).read_last()[1] for name in ("halves", "b"))
    assert "model" in whole and compare(halves, whole)[1] == []


def test_run_plus_adapter_names_both_and_a_literal_plus_comes_first(folder: Path) -> None:
    alone, pair = lm.load("b", runs_dir=folder), lm.load("base@best+b@last", runs_dir=folder)
    assert (pair.name, pair.checkpoint) == ("base+b", "last")
    assert pair.arrays.keys() == lm.load("base", runs_dir=folder).arrays.keys()
    # The native decoder has the merged matrices, the torch model is merged as well.
    sampled = [lm.load(name, runs_dir=folder).sample("the ", max_tokens=20, seed=2) for name in ("b", "base+b")]
    assert sampled[0] == sampled[1]
    scored = sum(token.nats for token in alone.score("one red hen"))
    assert scored == pytest.approx(-decoded_log_probability(alone, "one red hen"), abs=1e-3)
    with pytest.raises(RunNotFoundError, match="there is no run 'c'"):
        lm.load("base+c", runs_dir=folder)
    with pytest.raises(RunNotFoundError, match="'base' is a whole model, not an adapter"):
        lm.load("b+base", runs_dir=folder)
    shutil.copytree(folder / "base", folder / "base+b")
    try:
        assert lm.load("base+b", runs_dir=folder).folder.path == folder / "base+b"
    finally:
        shutil.rmtree(folder / "base+b")


def decoded_log_probability(run: lm.Run, text: str) -> float:
    decoder = run.decoder()
    ids = [run.tokenizer.start_id, *run.tokenizer.encode(text).tolist()]
    slot = decoder.open()
    logits = np.asarray(decoder.prefill(slot, ids[:-1]), np.float64)
    logs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return float(logs[np.arange(len(logs)), ids[1:]].sum())


def test_a_missing_base_and_other_weights_are_refused_and_a_moved_base_can_be_named(
    folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder / "b", tmp_path / "b")
    shutil.copytree(folder / "base", tmp_path / "moved")
    # At the recorded path.
    assert lm.load("b", runs_dir=tmp_path).arrays
    hidden = folder / "base-hidden"
    (folder / "base").rename(hidden)
    try:
        with pytest.raises(RunNotFoundError, match=r"adapter of the run 'base', which is neither .* name it: BASE\+b"):
            lm.load("b", runs_dir=tmp_path)
        assert lm.load("moved+b", runs_dir=tmp_path).arrays
        adapters, _ = RunFolder(tmp_path / "b").read_weights()
        moved = RunFolder(tmp_path / "moved")
        arrays, facts = moved.read_weights()
        moved.write_best({name: array + 1 for name, array in arrays.items()}, **facts)
        with pytest.raises(VocabMismatchError, match=r"other weights than those of .*moved: they have another hash"):
            lm.load("moved+b", runs_dir=tmp_path)
        assert adapters
    finally:
        hidden.rename(folder / "base")


def test_training_all_weights_from_an_adapter_starts_from_both_together(folder: Path) -> None:
    base, overrides = lm.load("base+b", runs_dir=folder), {**LENGTH, "training.max_steps": 1}
    run = lm.train(str(folder / "b.txt"), init=base, name="whole", runs_dir=folder, overrides=overrides)
    assert run.config.training.lora is None and "base" not in run.record
    start, _ = read_whole_weights(RunFolder(folder / "b"))
    assert run.arrays.keys() == start.keys()
    assert max(float(np.abs(run.arrays[name] - start[name]).max()) for name in start) < 0.05


def test_what_no_adapter_can_do_is_refused_before_the_text_is_read(folder: Path, options: Options) -> None:
    def refusal(init: str | None, **training: Any) -> str:
        overrides = {f"training.{name}": value for name, value in training.items()}
        run = None if init is None else lm.load(init, runs_dir=folder)
        with pytest.raises(ConfigError) as error:
            resolve(TrainRequest(corpus="no such file.txt", init=run, overrides=overrides))
        return str(error.value)

    assert "name that run with --init RUN" in refusal(None, lora=4)
    assert "'b' is an adapter itself. Start from its base: --init base" in refusal("b", lora=4)
    assert "leave --ensemble out" in refusal("base", lora=4, ensemble=2)
    assert "leave --shard out" in refusal("base", lora=4, shard=True)
    assert "training.lora_alpha is for adapters" in refusal("base", lora_alpha=8)
    assert "the adapters of a gru have no dropout" in refusal("shakespeare-gru", lora=4, lora_dropout=0.1)
    assert "--lora 100,000: no matrix that gets an adapter has a rank above 16" in refusal("base", lora=100_000)
    counted = build_model(compose("x", preset="ngram-char").model, 30)
    with pytest.raises(ConfigError, match="of type ngram gets no adapters"):
        add_adapters(counted, TrainingConfig(lora=4))


# -- memory ---------------------------------------------------------------------------------------------


def test_adapters_need_less_memory_than_all_weights(options: Options, prepared: PreparedCorpus) -> None:
    wide = {"model.hidden_size": 128, "model.num_layers": 2}
    whole = estimate(options("transformer", **wide), prepared, seconds=0)
    adapters = estimate(options("transformer", lora=2, **wide), prepared, seconds=0)
    # No gradients and no moments of the frozen weights, and no copies of them to save.
    weights = 4 * whole.parameters
    assert whole.state_bytes - adapters.state_bytes > 1.8 * weights
    assert adapters.saving_bytes is not None and adapters.saving_bytes < weights < (whole.saving_bytes or 0)


def test_a_run_that_is_too_large_is_refused_with_the_figure_before_anything_is_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = lm.load("base", runs_dir=folder)
    size = 4 * base.record["parameters"]
    monkeypatch.setattr(machine, "available_bytes", lambda device: int(3.5 * size))
    request = TrainRequest(corpus="no such file.txt", init=base)
    with pytest.raises(DeviceError, match=r"parameters. Its weights, gradients and moments alone need .* --lora 8"):
        refuse_too_large(resolve(request))
    refuse_too_large(resolve(TrainRequest(corpus="no such file.txt", init=base, overrides={"training.lora": 1})))
    monkeypatch.setattr(machine, "available_bytes", lambda device: size)
    with pytest.raises(DeviceError, match="Its frozen weights and the adapters alone need"):
        lm.train("no such file.txt", init=base, overrides={"training.lora": 1})
