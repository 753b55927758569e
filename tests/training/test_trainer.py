"""Single steps and short plans: what a step computes, what is logged, kept and when a run stops."""

from __future__ import annotations

import dataclasses
import logging
import math
import signal
import textwrap
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lm.corpora.batches import Batch
from lm.errors import CorpusError, DivergedError, NonFiniteLossError
from lm.profiling.trial import Trial
from lm.runs.run_folder import RunFolder
from lm.training.callbacks import Callback, End, Row, Start, Tick, TimeLeft
from lm.training.plan import Plan
from lm.training.trainer import Trainer
from lm.training.validation import validate

Make = Callable[..., Trainer]


MakeTrial = Callable[..., Trial]


def weights(trainer: Trainer | Trial) -> dict[str, Any]:
    return trainer.step.model.arrays()


def losses(trainer: Trainer) -> list[tuple[int, float, float | None]]:
    return [(row["step"], row["train_loss"], row["valid_loss"]) for row in trainer.folder.read_metrics()]


# -- one step ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["gru", "transformer"])
def test_accumulated_batches_equal_one_batch_of_all_their_rows(make_trial: MakeTrial, model: str) -> None:
    options = {"batching": "shuffled", "optimizer": "sgd", "learning_rate": 0.5, "schedule": "constant"}
    parts, whole = make_trial(model, gradient_accumulation=3, **options), make_trial(model, **options)
    for number in range(2):
        small = list(parts.batches.of_step(number))
        inputs, targets = ([getattr(batch, name) for batch in small] for name in ("inputs", "targets"))
        large = Batch(np.concatenate(inputs), np.concatenate(targets), fresh=True)
        loss = whole.step.run([large], 1.0).loss
        assert parts.step.run(small, 1.0).loss == pytest.approx(loss, abs=1e-5)
    for name, array in weights(parts).items():
        np.testing.assert_allclose(array, weights(whole)[name], atol=1e-5, err_msg=name)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_of_a_step_is_in_true_nats_whatever_the_smoothing(make_trial: MakeTrial, smoothing: float) -> None:
    trainer = make_trial("gru", label_smoothing=smoothing)
    batch = trainer.batches.batch(0)
    with torch.no_grad():
        logits, _ = trainer.step.model(torch.from_numpy(batch.inputs))
    nats = F.cross_entropy(logits.flatten(0, 1), torch.from_numpy(batch.targets).flatten())
    assert trainer.run_step().loss == pytest.approx(float(nats), abs=1e-6)


def test_smoothing_changes_the_update(make_trial: MakeTrial) -> None:
    plain, smooth = make_trial("gru"), make_trial("gru", label_smoothing=0.3)
    assert plain.run_step().loss == smooth.run_step().loss
    assert plain.run_step().loss != smooth.run_step().loss


def test_clipping_scales_the_whole_gradient_to_the_norm(make_trial: MakeTrial) -> None:
    options = {"optimizer": "sgd", "learning_rate": 1.0, "momentum": 0.0, "weight_decay": 0.0, "schedule": "constant"}
    free, clipped = make_trial("gru", grad_clip=None, **options), make_trial("gru", grad_clip=0.01, **options)
    before = weights(free)
    free.run_step(), clipped.run_step()
    moved = {name: before[name] - array for name, array in weights(free).items()}
    norm = math.sqrt(sum(float(np.square(array, dtype=np.float64).sum()) for array in moved.values()))
    assert norm > 0.02
    for name, array in weights(clipped).items():
        np.testing.assert_allclose(before[name] - array, moved[name] * (0.01 / norm), atol=1e-6, err_msg=name)


def test_the_clip_rate_is_the_share_of_clipped_steps_since_the_last_line(make_trainer: Make) -> None:
    always, never = make_trainer("gru", grad_clip=1e-4, log_every=5), make_trainer("gru", grad_clip=1e4, log_every=5)
    for trainer in (always, never):
        trainer.train(Plan(10, 10))
    assert [row["clip_rate"] for row in always.folder.read_metrics()] == [1.0, 1.0]
    assert [row["clip_rate"] for row in never.folder.read_metrics()] == [0.0, 0.0]
    assert always.progress.clipped_steps == 10


def test_state_is_carried_from_batch_to_batch_and_cut_at_the_epochs_end(make_trial: MakeTrial) -> None:
    trial, cut = make_trial("gru", learning_rate=1e-9), make_trial("gru", learning_rate=1e-9)
    carried = [trial.run_step().loss for _ in range(2)]
    cut.run_step()
    cut.step.carried_state = None
    assert cut.run_step().loss != pytest.approx(carried[1], abs=1e-6)
    first_of_epoch = trial.batches.of_step(round(trial.batches.steps_per_epoch))
    assert trial.step.run(first_of_epoch, 1.0).loss == pytest.approx(carried[0], abs=1e-5)


def test_a_window_of_limited_length_carries_nothing_however_it_is_batched(make_trial: MakeTrial) -> None:
    trial = make_trial("transformer", batching="streams")
    for _ in range(3):
        trial.run_step()
    assert trial.step.carried_state is None


@pytest.mark.parametrize("batching", ["streams", "rotated", "random", "shuffled"])
def test_a_corpus_shorter_than_one_batch_is_refused_with_its_numbers(make_trainer: Make, batching: str) -> None:
    with pytest.raises(CorpusError, match=r"5,402 tokens.*fewer than one batch of 400 rows of 16"):
        make_trainer("gru", batch_size=400, batching=batching)


# -- what is logged -----------------------------------------------------------------------------------


class Watcher(Callback):
    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_start(self, start: Start) -> None:
        self.seen.append(start)

    def on_step(self, tick: Tick) -> None:
        self.seen.append(tick)

    def on_log(self, row: Row) -> None:
        self.seen.append(row)

    def on_save(self, step: int) -> None:
        self.seen.append(f"saved {step}")

    def on_end(self, end: End) -> None:
        self.seen.append(end)

    def close(self) -> None:
        self.seen.append("closed")


def test_callbacks_see_the_run_in_order(make_trainer: Make) -> None:
    trainer, watcher = make_trainer("gru", log_every=2), Watcher()
    trainer.callbacks = [watcher]
    trainer.train(Plan(4, 2))
    kinds = [item if isinstance(item, str) else type(item).__name__ for item in watcher.seen]
    events = [kind for kind in kinds if not kind.startswith("saved")]
    assert events == ["Start", "Tick", "Tick", "dict", "Tick", "Tick", "dict", "End", "closed"]
    # Saving is beside training: it is told when it is known, and all of it before the end.
    assert [kind for kind in kinds if kind.startswith("saved")] == ["saved 0", "saved 2", "saved 4"]
    assert kinds[0] == "saved 0" and kinds.index("saved 2") > kinds.index("dict")
    assert kinds.index("saved 4") < kinds.index("End")
    start, end = watcher.seen[1], watcher.seen[-2]
    assert (start.step, start.plan_steps, start.tokens_per_step) == (0, 4, 64)
    assert (end.reason, end.step, end.best_step) == ("finished", 4, 4)


def test_callbacks_are_closed_when_training_fails(make_trainer: Make) -> None:
    trainer, watcher = make_trainer("gru", learning_rate=1e30, grad_clip=None), Watcher()
    trainer.callbacks = [watcher]
    with pytest.raises(NonFiniteLossError):
        trainer.train(Plan(20, 20))
    assert watcher.seen[-1] == "closed"


def test_a_line_of_metrics_holds_the_promised_fields(make_trainer: Make) -> None:
    trainer = make_trainer("gru", log_every=3)
    trainer.train(Plan(6, 6))
    first, last = trainer.folder.read_metrics()
    promised = {
        "step", "epoch", "train_loss", "train_accuracy", "valid_loss", "valid_accuracy", "learning_rate", "grad_norm",
        "clip_rate", "skipped_steps", "tokens_per_second", "seconds", "tokens", "memory_bytes", "train_bits_per_byte",
    }  # fmt: skip
    assert promised <= first.keys() and promised <= last.keys()
    assert "validation_seconds" not in first and last["validation_seconds"] > 0
    assert (first["step"], first["valid_loss"]) == (3, None)
    assert last["step"] == 6 and 0 < last["valid_loss"] < 5 and 0 <= last["valid_accuracy"] <= 1
    assert (first["tokens"], last["tokens"]) == (3 * 64, 6 * 64)
    # A token of this text is a character of one byte.
    assert last["valid_bits_per_byte"] == pytest.approx(last["valid_loss"] / math.log(2))
    assert last["train_bits_per_byte"] == pytest.approx(last["train_loss"] / math.log(2))
    assert 10 << 20 < last["memory_bytes"] < 100 << 30
    assert "sample" not in first and len(last["sample"]) == 80
    assert 0 <= first["train_accuracy"] <= 1 and first["grad_norm"] > 0 and first["tokens_per_second"] > 0


def test_train_loss_is_the_mean_of_the_steps_since_the_last_line(make_trainer: Make) -> None:
    straight, logged = make_trainer("gru"), make_trainer("gru", log_every=4)
    for trainer in (straight, logged):
        trainer.train(Plan(8, 8))
    each = [loss for _, loss, _ in losses(straight)]
    assert [loss for _, loss, _ in losses(logged)] == pytest.approx([np.mean(each[:4]), np.mean(each[4:])])


def test_validation_may_be_limited_to_a_fixed_part_of_the_split(make_trainer: Make) -> None:
    full, part = make_trainer("gru"), make_trainer("gru", validation_tokens=80)
    full.train(Plan(1, 1)), part.train(Plan(1, 1, validation_tokens=80))
    (_, _, whole), (_, _, limited) = *losses(full), *losses(part)
    assert whole != limited
    scores = validate(part.step, part.corpus.splits["valid"].ids[:81])
    assert limited == pytest.approx(scores.loss) and scores.tokens == 80


def test_tensorboard_has_every_number_and_forgets_what_a_resume_repeats(make_trainer: Make, tmp_path: Any) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from lm.training.tensorboard import TensorBoard

    trainer = make_trainer("gru", log_every=1)
    trainer.callbacks = [TensorBoard(tmp_path / "events")]
    trainer.train(Plan(4, 2), stop_after=2)
    again = make_trainer("gru", log_every=1, run=trainer.folder)
    again.load()
    again.callbacks = [TensorBoard(tmp_path / "events")]
    again.train(Plan(4, 2))
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4]
    assert [event.step for event in events.Scalars("valid/loss")] == [2, 4]
    rows = trainer.folder.read_metrics()
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx([row["train_loss"] for row in rows])
    scalars = set(events.Tags()["scalars"])
    assert {
        f"training/{name}" for name in ("learning_rate", "grad_norm", "tokens_per_second", "memory_bytes")
    } <= scalars
    for split in ("train", "valid"):
        assert {f"{split}/{name}" for name in ("perplexity", "bits_per_byte", "accuracy")} <= scalars
    perplexities = [event.value for event in events.Scalars("valid/perplexity")]
    assert perplexities == pytest.approx([math.exp(row["valid_loss"]) for row in rows if row["valid_loss"] is not None])
    (_, last) = events.Tensors("sample/text_summary")
    assert textwrap.dedent(last.tensor_proto.string_val[0].decode()).strip("\n") == rows[-1]["sample"].strip("\n")


@pytest.mark.parametrize("model", ["gru", "transformer"])
def test_a_preview_of_the_text_changes_no_bit_of_training(make_trainer: Make, model: str) -> None:
    trainers = []
    for tokens in (30, None):
        trainers.append(make_trainer(model, **{"model.dropout": 0.3}, sample_tokens=tokens))
        trainers[-1].train(Plan(6, 2))
    looked, blind = trainers
    texts = [row["sample"] for row in looked.folder.read_metrics() if row["valid_loss"] is not None]
    assert [len(text) for text in texts] == [30, 30, 30] and len(set(texts)) > 1
    assert {row.get("sample") for row in blind.folder.read_metrics()} == {None}
    for name, array in weights(looked).items():
        np.testing.assert_array_equal(array, weights(blind)[name])


# -- best, last, kept ---------------------------------------------------------------------------------


def test_the_best_weights_are_kept_apart_from_the_last(make_trainer: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer("gru", schedule="constant")
    script_validation(trainer, monkeypatch, [3.0, 2.0, 2.5, 2.5])
    after: dict[int, dict[str, Any]] = {}
    grab = Watcher()
    grab.on_step = lambda tick: after.__setitem__(tick.step, weights(trainer))  # type: ignore[method-assign]
    trainer.callbacks = [grab]
    end = trainer.train(Plan(8, 2))
    assert (end.best_loss, end.best_step) == (2.0, 4)
    best, facts = trainer.folder.read_weights("best")
    last, _ = trainer.folder.read_weights("last")
    assert facts["step"] == 4 and facts["valid_loss"] == 2.0
    assert all(np.array_equal(best[name], after[4][name]) for name in best)
    assert all(np.array_equal(last[name], after[8][name]) for name in last)


def script_validation(trainer: Trainer, monkeypatch: pytest.MonkeyPatch, values: list[float]) -> None:
    """Let validation find these losses, one after another."""
    scores, given = validate(trainer.step, trainer.corpus.splits["valid"].ids[:50]), iter(values)
    monkeypatch.setattr(
        "lm.training.trainer.validate",
        lambda step, ids, marks, progress: dataclasses.replace(scores, nats=next(given) * scores.tokens),
    )


def test_a_plan_by_time_stops_where_more_steps_do_harm(make_trainer: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer("gru")
    # 2.004 is no harm yet, and 2.1 after it is the first of three in a row.
    script_validation(trainer, monkeypatch, [3.0, 2.0, 2.1, 2.004, 2.1, 2.2, 2.3, 1.0])
    end = trainer.train(Plan(8, 1, patience=3))
    assert (end.reason, end.step, end.best_step) == ("no_progress", 7, 2)


def test_a_loss_far_above_that_of_no_training_is_an_error_and_keeps_what_was_there(make_trainer: Make) -> None:
    trainer = make_trainer("gru", learning_rate=30.0)
    before = weights(trainer)
    with pytest.raises(DivergedError, match=r"Step 20: .* far above the 3\.0\d+ of an untrained model.* \(now 30\)"):
        trainer.train(Plan(40, 20))
    best, facts = trainer.folder.read_weights("best")
    assert facts["step"] == 0
    for name, array in best.items():
        np.testing.assert_array_equal(array, before[name])


def test_plateau_divides_when_validation_stalls(make_trainer: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(
        "gru", schedule="plateau", decay_factor=0.5, decay_patience=2, learning_rate=0.01, optimizer="sgd"
    )
    # Stalls at 3 and 4 (decay), a better one at 5, stalls at 6 and 7 (decay).
    script_validation(trainer, monkeypatch, [3.0, 2.0, 2.0, 2.1, 1.9, 2.0, 1.95, 1.8])
    trainer.train(Plan(8, 1))
    rates = [row["learning_rate"] for row in trainer.folder.read_metrics()]
    assert rates == pytest.approx([0.01, 0.01, 0.01, 0.01, 0.005, 0.005, 0.005, 0.0025])


def test_patience_stops_after_so_many_validations_without_a_better_loss(
    make_trainer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer("gru", patience=2)
    script_validation(trainer, monkeypatch, [3.0, 3.1, 2.9, 3.0, 3.0, 1.0])
    end = trainer.train(Plan(60, 10))
    assert (end.reason, end.step, end.best_step) == ("no_progress", 50, 30)


def test_checkpoints_are_kept_at_intervals_up_to_the_limit_and_epochs_beyond_it(make_trainer: Make) -> None:
    trainer = make_trainer("gru", checkpoint_every=3, keep_checkpoints=2, checkpoint_epochs=[1], batch_size=48)
    assert trainer.steps_per_epoch == 7
    trainer.train(Plan(14, 14))
    assert trainer.folder.kept_checkpoints() == ["step-7", "step-9", "step-12"]
    _, facts = trainer.folder.read_weights("step-7")
    assert facts == {"step": 7, "epoch": 1}


def test_a_folder_of_the_users_own_under_steps_is_left_alone(make_trainer: Make) -> None:
    trainer = make_trainer("gru", checkpoint_every=1, keep_checkpoints=1)
    trainer.folder.write_step("my-favourite", trainer.model.arrays(), step=0)
    trainer.train(Plan(3, 3))
    assert trainer.folder.kept_checkpoints() == ["my-favourite", "step-3"]


def test_a_run_stopped_before_its_first_validation_can_be_used(make_trainer: Make) -> None:
    trainer = make_trainer("gru")
    end = trainer.train(Plan(10, 10), stop_after=3)
    assert (end.reason, end.best_loss) == ("stop_after", None)
    best, facts = trainer.folder.read_weights("best")
    assert facts["step"] == 3
    assert np.array_equal(best["embedding.weight"], weights(trainer)["embedding.weight"])


def test_the_state_is_saved_before_the_first_step(make_trainer: Make) -> None:
    trainer = make_trainer("gru")
    fresh = weights(trainer)

    def fail(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    trainer.step.start = fail  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        trainer.train(Plan(5, 5))
    state, tensors = trainer.folder.read_last()
    assert state["train_state"]["step"] == 0
    assert all(np.array_equal(tensors["model"][name], fresh[name]) for name in fresh)
    assert np.array_equal(trainer.folder.read_weights("best")[0]["embedding.weight"], fresh["embedding.weight"])


# -- minutes ------------------------------------------------------------------------------------------


def test_the_time_left_counts_steps_and_validations_and_ends_with_the_minutes() -> None:
    start = Start("a", "gru", 1, "c", 0, 100, 64, 10.0, "cpu", "fp32", validations=4, valid_tokens=640)
    left = TimeLeft(start)
    # 10 steps of 2 s; a validation of 640 tokens is expected to take as long as 640 / 3 training tokens: 6.67 s.
    assert left.seconds(10, 20.0) == pytest.approx(90 * 2 + 4 * 640 / 3 / 64 * 2)
    left.add({"valid_loss": 3.0, "validation_seconds": 10.0})
    # 25 steps took 50 s, the first validation 10 s; 75 steps and three validations are left.
    assert left.seconds(25, 60.0) == pytest.approx(75 * 2 + 3 * 10)
    assert TimeLeft(dataclasses.replace(start, plan_seconds=30.0)).seconds(10, 20.0) == pytest.approx(10.0)


# -- signals -------------------------------------------------------------------------------------------


def test_a_signal_that_comes_while_processes_agree_is_not_forgotten(
    make_trainer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(max_steps=8)

    asked: list[int] = []

    def sync_clock(world: Any, seconds: float, sent: int | None = None) -> tuple[float, int | None]:
        asked.append(trainer.progress.step)
        if asked[-1] == 3 and asked.count(3) == 1:
            # Too late for this step: `sent` is read already.
            signal.raise_signal(signal.SIGTERM)
            for _ in range(100):
                """Python calls its handlers between rounds of a loop."""
        return seconds, sent

    monkeypatch.setattr(type(trainer.world), "sync_clock", sync_clock)
    end = trainer.train(Plan(8, 8))
    assert (end.reason, end.step, end.signal) == ("interrupted", 4, signal.SIGTERM)


# -- numbers that are not finite ------------------------------------------------------------------------


def test_a_diverging_run_stops_naming_step_and_place_and_leaves_last_intact(make_trainer: Make) -> None:
    trainer = make_trainer("gru", learning_rate=1e38, grad_clip=None, schedule="constant")
    with pytest.raises(NonFiniteLossError, match=r"Step \d+: the (loss|gradient norm) is (nan|inf).*first in the"):
        trainer.train(Plan(50, 1))
    state, _ = trainer.folder.read_last()
    again = make_trainer("gru", learning_rate=1e38, grad_clip=None, schedule="constant", run=trainer.folder)
    again.load()
    assert again.progress.step == state["train_state"]["step"] < 50


def test_an_infinite_weight_is_named(make_trial: MakeTrial) -> None:
    trainer = make_trial("gru")
    with torch.no_grad():
        trainer.step.model.get_parameter("cell.weight_hh_l0")[0, 0] = math.inf
    with pytest.raises(NonFiniteLossError, match=r"Step 1: the loss is nan \(first in the weight cell.weight_hh_l0\)"):
        trainer.run_step()


def test_a_module_whose_output_overflows_is_named(make_trial: MakeTrial) -> None:
    trainer = make_trial("transformer")
    with torch.no_grad():
        for name in ("gate_proj", "up_proj"):
            trainer.step.model.get_parameter(f"layers.0.mlp.{name}.weight").fill_(1e25)
    with pytest.raises(NonFiniteLossError, match=r"first in the output of layers.0.mlp"):
        trainer.run_step()


def test_a_skipped_step_is_reported_takes_its_batch_and_changes_nothing(
    make_trainer: Make, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer("gru", on_nonfinite="skip", schedule="linear", learning_rate=0.01)
    bias = trainer.model.get_parameter("output.bias")
    kept = bias.detach().clone()
    before: dict[str, Any] = {}

    class Break(Callback):
        """The bias is NaN in the second step alone."""

        def on_step(self, tick: Tick) -> None:
            with torch.no_grad():
                if tick.step == 1:
                    kept.copy_(bias)
                    bias[0] = math.nan
                    before.update(weights(trainer))
                elif tick.step == 2:
                    assert math.isnan(tick.loss)
                    after = weights(trainer)
                    assert all(np.array_equal(before[name], after[name], equal_nan=True) for name in before)
                    bias.copy_(kept)
                else:
                    assert math.isfinite(tick.loss)

    trainer.callbacks = [Break()]
    with caplog.at_level(logging.WARNING, logger="lm"):
        trainer.train(Plan(10, 10), stop_after=3)
    assert "Step 2: the loss is nan (first in the weight output.bias); the step was skipped." in caplog.text
    # The second update of ten, with the third batch.
    assert trainer.step.learning_rate == pytest.approx(0.01 * (0.02 + 0.98 * 8 / 9))
    progress = trainer.progress
    assert (progress.step, progress.skipped_steps, progress.updates) == (3, 1, 2)


def test_a_validation_loss_that_is_not_finite_is_reported_and_never_the_best(
    make_trainer: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer("gru")
    script_validation(trainer, monkeypatch, [3.0, math.nan])
    with caplog.at_level(logging.WARNING, logger="lm"):
        end = trainer.train(Plan(2, 1))
    assert "Step 2: the validation loss is nan" in caplog.text
    assert (end.best_loss, end.best_step) == (3.0, 1)
    assert [row["valid_loss"] for row in trainer.folder.read_metrics()] == [3.0, None]
    assert "NaN" not in (trainer.folder.path / "metrics.jsonl").read_text()


def test_the_folder_of_a_trainer_is_a_run(make_trainer: Make) -> None:
    trainer = make_trainer("lstm")
    trainer.train(Plan(2, 1))
    assert RunFolder(trainer.folder.path).read_record()["config"]["model"]["type"] == "lstm"
