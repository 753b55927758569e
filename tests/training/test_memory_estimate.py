"""What is said of memory before training, against what training takes."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lm import host, machine
from lm.config import RunConfig
from lm.corpora import PreparedCorpus
from lm.errors import DeviceError
from lm.jobs.train import train
from lm.kernels.dispatch import release_buffers
from lm.models.base import LanguageModel
from lm.models.lora import trainable_model
from lm.models.ngram import NGram
from lm.profiling import memory_estimate
from lm.profiling.memory_estimate import estimate, refuse_what_cannot_fit
from lm.profiling.tensor_memory import TensorMemory
from lm.profiling.trial import make_trial

pytestmark = pytest.mark.slow

Options = Callable[..., RunConfig]
TOLERANCE = 0.1
"""Of an estimate from two rows, against the peak of a whole step."""

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "gru": ("gru", {"model.hidden_size": 64}),
    "lstm in bf16": ("lstm", {"model.hidden_size": 64, "precision": "bf16", "amp": "O2"}),
    "gru with tables": ("gru", {"model.hidden_size": 64, "model.table_orders": "2,3"}),
    "transformer": ("transformer", {"model.hidden_size": 64}),
    "transformer with dropout": ("transformer", {"model.hidden_size": 64, "model.dropout": 0.1}),
}


def measured_peak(config: RunConfig, corpus: PreparedCorpus) -> int:
    release_buffers()
    with TensorMemory(torch.device("cpu")) as memory:
        trial = make_trial(config, corpus)
        trial.run_step()
        # With the moments, and a batch that is not the shorter last one of an epoch.
        memory.peak = memory.now
        trial.run_step()
    return memory.peak


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_rows_give_the_memory_of_the_whole_batch(variant: str, options: Options, prepared: PreparedCorpus) -> None:
    model, changes = VARIANTS[variant]
    config = options(model, batch_size=32, bptt=64, **changes)
    fit = estimate(config, prepared, seconds=0)
    assert fit.tried_rows == 2
    assert fit.step_bytes == pytest.approx(measured_peak(config, prepared), rel=TOLERANCE)


def test_one_block_and_two_give_the_memory_of_all_blocks(
    options: Options, prepared: PreparedCorpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_estimate, "LARGE_MODEL", 0)
    for changes in ({}, {"lora": 4}):
        config = options(
            "transformer", batch_size=8, bptt=64, **{"model.hidden_size": 64, "model.num_layers": 7, **changes}
        )
        fit = estimate(config, prepared, seconds=0)
        whole = measured_peak(config, prepared)
        assert fit.step_bytes == pytest.approx(whole, rel=TOLERANCE)
        assert fit.parameters == trainable_model(config, prepared.tokenizer.vocab_size).num_parameters()
        monkeypatch.setattr(memory_estimate, "LARGE_MODEL", 1e12)
        direct = estimate(config, prepared, seconds=0)
        monkeypatch.setattr(memory_estimate, "LARGE_MODEL", 0)
        for field in ("saving_bytes", "evaluation_bytes", "state_bytes", "row_bytes"):
            assert getattr(fit, field) == pytest.approx(getattr(direct, field), rel=TOLERANCE), field


@pytest.mark.parametrize(
    "changes",
    [{"precision": "bf16", "amp": "O2", "fp32_modules": "layers.2"}, {"lora": 4, "lora_modules": ["2"]}],
)
def test_a_model_with_a_block_that_is_named_is_measured_whole(
    changes: dict[str, Any], options: Options, prepared: PreparedCorpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = options("transformer", **{"model.num_layers": 3, **changes})
    direct = estimate(config, prepared, seconds=0)
    monkeypatch.setattr(memory_estimate, "LARGE_MODEL", 0)
    assert estimate(config, prepared, seconds=0).step_bytes == pytest.approx(direct.step_bytes, rel=TOLERANCE)


def test_the_model_of_one_block_is_freed_before_that_of_two(
    options: Options, prepared: PreparedCorpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_estimate, "LARGE_MODEL", 0)
    made: list[weakref.ref[torch.nn.Module]] = []

    def make(*given: Any) -> LanguageModel:
        assert [each() for each in made] == [None] * len(made)
        model = trainable_model(*given)
        made.append(weakref.ref(model.get_submodule("embed_tokens")))
        return model

    monkeypatch.setattr(memory_estimate, "trainable_model", make)
    # At O2 the embedding is a cycle of references.
    config = options("transformer", **{"precision": "bf16", "amp": "O2", "model.num_layers": 3})
    gc.disable()
    try:
        estimate(config, prepared, seconds=0)
    finally:
        gc.enable()
    assert len(made) == 2


def test_with_time_the_whole_batch_is_tried_and_the_figure_is_exact(options: Options, prepared: PreparedCorpus) -> None:
    config = options("gru", batch_size=12)
    fit = estimate(config, prepared, seconds=60)
    assert fit.tried_rows == 12
    assert fit.step_bytes == pytest.approx(measured_peak(config, prepared), rel=0.01)
    assert fit.fits and fit.largest_batch is not None and fit.largest_batch > 1000


def test_a_model_that_is_far_too_large_is_refused_at_once_without_being_made(
    options: Options, prepared: PreparedCorpus
) -> None:
    host.reset_peak_resident()
    before, begun = host.peak_resident_bytes(), time.process_time()
    with pytest.raises(DeviceError, match=r"need about [\d,.]+ GB on cpu, where .* free: .*Lower model.hidden_size"):
        refuse_what_cannot_fit(options("gru", **{"model.hidden_size": 200_000}), prepared)
    assert time.process_time() - begun < 5
    after = host.peak_resident_bytes()
    assert before is None or after is None or after - before < 100e6


def test_a_batch_that_does_not_fit_is_refused_with_one_that_does(
    options: Options, prepared: PreparedCorpus, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    config = options("gru", batch_size=80, **{"model.hidden_size": 64})
    # Validation on few tokens at once, so that it is the step that takes most.
    monkeypatch.setattr(memory_estimate, "tokens_at_once", lambda vocab_size, device: 512)
    needed = estimate(config, prepared, seconds=60).needed_bytes
    # A machine that has two thirds of what is needed.
    monkeypatch.setattr(machine, "available_bytes", lambda device: int(needed * 2 / 3 / memory_estimate.USABLE_SHARE))
    with pytest.raises(
        DeviceError, match=r"lower training\.batch_size to 40 and raise .*accumulation 2-fold"
    ) as refused:
        train(prepared.source, config, name="a", runs_dir=tmp_path / "runs")
    assert "80 rows of 16 tokens" in str(refused.value)
    assert not (tmp_path / "runs" / "a").exists()
    smaller = estimate(options("gru", batch_size=40, **{"model.hidden_size": 64}), prepared, seconds=60)
    assert smaller.fits


def test_counts_of_the_text_are_part_of_the_need_without_being_made(
    options: Options, prepared: PreparedCorpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = options("gru", batch_size=4)
    hybrid = options("gru", batch_size=4, **{"model.type": "hybrid"})
    alone = estimate(config, prepared, seconds=0)
    monkeypatch.setattr(NGram, "fit", None)
    fit = estimate(hybrid, prepared, seconds=0)
    assert fit.counting_bytes > 50 * prepared.splits["train"].counts.tokens
    assert alone.counting_bytes == 0
    assert alone.needed_bytes < fit.needed_bytes - fit.counting_bytes < 3 * alone.needed_bytes
    monkeypatch.setattr(machine, "available_bytes", lambda device: fit.counting_bytes)
    assert "Lower model.max_tokens" in estimate(hybrid, prepared, seconds=0).advice()


def test_estimating_leaves_nothing_behind(options: Options, prepared: PreparedCorpus) -> None:
    torch.manual_seed(3)
    with TensorMemory(torch.device("cpu")) as memory:
        estimate(options("gru"), prepared, seconds=0)
    assert memory.now == 0
