"""`--compile`: the same training, whether it pays, and what happens where it fails.

Torch's compiler runs with the backend `aot_eager`, which traces the whole step and takes seconds; one test uses
inductor. CUDA graphs need a GPU: here the function that records them is replaced, and the rest is real.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from lm.profiling.trial import Trial
from lm.training import compiling
from lm.training.compiling import obstacle, pays
from lm.training.plan import Plan
from lm.training.trainer import Trainer

Make = Callable[..., Trainer]
MakeTrial = Callable[..., Trial]
CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def aot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager")


def losses(trainer: Trainer) -> list[float]:
    return [row["train_loss"] for row in trainer.folder.read_metrics()]


@pytest.mark.slow
def test_a_compiled_transformer_makes_the_same_steps_and_its_files_name_the_same_weights(
    make_trainer: Make, aot: None, caplog: pytest.LogCaptureFixture
) -> None:
    # A compiled step gives context tables dense gradients; they are not clipped either.
    options = {"model.table_orders": (2,), "model.table_dropout": 0}
    plain, compiled = make_trainer("transformer", **options), make_trainer("transformer", compile="on", **options)
    with caplog.at_level(logging.INFO, logger="lm"):
        for trainer in (plain, compiled):
            trainer.train(Plan(6, 3))
    assert compiled.step.compiled == "inductor" and "The training step is compiled (inductor" in caplog.text
    # The native kernels round otherwise than torch's.
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-3)
    accuracies = [row["train_accuracy"] for row in compiled.folder.read_metrics()]
    assert all(0 <= accuracy <= 1 for accuracy in accuracies)
    (best, _), (other, _) = (trainer.folder.read_weights("best") for trainer in (plain, compiled))
    assert best.keys() == other.keys() and not any("_orig_mod" in name for name in other)
    make_trainer("transformer", **options).step.model.load_arrays(other)
    assert compiled.folder.read_last()[0]["environment"]["compile"] == "inductor"


@pytest.mark.slow
def test_a_compiled_run_resumes_bit_for_bit_and_one_that_is_not_compiled_any_more_says_so(
    make_trainer: Make, aot: None, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"model.dropout": 0.1, "compile": "on"}
    straight, broken = make_trainer("transformer", **options), make_trainer("transformer", **options)
    torch.manual_seed(1)
    straight.train(Plan(6, 3))
    torch.manual_seed(1)
    broken.train(Plan(6, 3), stop_after=3)
    again = make_trainer("transformer", run=broken.folder, **options)
    again.load()
    again.train(Plan(6, 3))
    one, two = (trainer.step.mixed.arrays() for trainer in (straight, again))
    assert all(np.array_equal(array, two[name]) for name, array in one.items())
    with caplog.at_level(logging.WARNING, logger="lm"):
        make_trainer("transformer", run=broken.folder, compile="off").load()
    assert "(compile 'inductor' then, 'off' now)" in caplog.text


@pytest.mark.soak
def test_inductor_compiles_the_step_on_this_machine(make_trial: MakeTrial) -> None:
    plain, compiled = make_trial("transformer"), make_trial("transformer")
    assert compiled.step.compile(compiled.batches)
    for _ in range(2):
        assert compiled.run_step().loss == pytest.approx(plain.run_step().loss, rel=1e-3)


def test_where_compiling_fails_one_sentence_says_so_and_the_run_continues(
    make_trainer: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(graph: Any, examples: Any) -> Any:
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(compiling, "BACKEND", broken)
    failing, plain = make_trainer("transformer", compile="on"), make_trainer("transformer")
    with caplog.at_level(logging.WARNING, logger="lm"):
        for trainer in (failing, plain):
            torch.manual_seed(1)
            trainer.train(Plan(3, 3))
    (message,) = caplog.messages
    assert message.startswith("The training step runs uncompiled (") and "no C++ compiler" in message
    assert losses(failing) == losses(plain)
    assert failing.folder.read_last()[0]["environment"]["compile"] == "off"


def test_on_a_cpu_nothing_is_compiled_by_default(make_trainer: Make) -> None:
    trainer = make_trainer("transformer")
    trainer.train(Plan(2, 2))
    assert (trainer.config.compile, trainer.step.compiled) == ("auto", "off")


def test_a_recurrent_model_is_not_compiled_on_a_cpu_and_says_why(
    make_trainer: Make, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="lm"):
        make_trainer("gru", compile="on").train(Plan(2, 2))
    assert caplog.messages == [
        "The training step runs uncompiled (a recurrent model is compiled to CUDA graphs, and the device is cpu)."
    ]


def test_a_long_plan_is_compiled_and_a_short_one_is_not() -> None:
    assert [pays("inductor", seconds)[0] for seconds in (30, 239, 240, 3600)] == [False, False, True, True]
    assert [pays("cuda graphs", seconds)[0] for seconds in (5, 8, 30)] == [False, True, True]
    assert pays("inductor", 30)[1] == (
        "The training step is not compiled: compilation pays for plans of 240 s or more, and this one takes 30 s "
        "(--compile on forces it)."
    )


def test_graphs_are_for_one_process_with_whole_steps() -> None:
    assert obstacle("cuda graphs", GPU, processes=1, parts=1) is None
    assert obstacle("inductor", CPU, processes=1, parts=4) is None
    for processes, parts in ((2, 1), (1, 2)):
        assert obstacle("cuda graphs", GPU, processes=processes, parts=parts)


@pytest.mark.parametrize("settings", [{}, {"log_every": 2, "model.table_orders": (2, 3), "model.table_dropout": 0.5}])
def test_a_recorded_step_gives_the_state_and_loss_of_the_model(
    make_trial: MakeTrial, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    recorded = []

    def record(module: Any, samples: tuple[torch.Tensor, ...], **_: Any) -> Any:
        assert all(isinstance(each, torch.Tensor) for each in samples)
        module(*samples)
        recorded.append([tuple(each.shape) for each in samples])
        return module

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", record)
    monkeypatch.setattr("lm.training.train_step.obstacle", lambda *_, **__: None)
    plain, graphed = make_trial("lstm", **settings), make_trial("lstm", **settings)
    torch.manual_seed(1)
    assert graphed.step.compile(graphed.batches) and graphed.step.compiled == "cuda graphs"
    # One graph, for batches that continue others: those have a state.
    assert len(recorded) == 1 and len(recorded[0]) >= 4
    results = []
    for trial in (plain, graphed):
        torch.manual_seed(1)
        results.append([trial.run_step(with_metrics=True) for _ in range(4)])
    for one, two in zip(*results, strict=True):
        assert (one.loss, one.accuracy, one.grad_norm) == (two.loss, two.accuracy, two.grad_norm)
