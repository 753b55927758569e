"""The contract of every registered model; a new model is tested here without a change."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from lm.config import Section, TrainingConfig
from lm.evaluation.perplexity import score
from lm.files import pack_arrays, read_arrays
from lm.models.base import LanguageModel, State, build_model
from lm.registry import MODELS
from lm.training.optimizers import make_optimizers
from lm.training.precision import Format, MixedPrecision

VOCAB = 11
SMALL = {
    "hidden_size": 32,
    "embedding_size": 24,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "context_length": 32,
    "member": {"type": "gru", "hidden_size": 32, "embedding_size": 24},
}
EXTRAS: dict[str, dict[str, object]] = {
    "": {},
    # Two exact tables and a hashed one.
    "tables": {"table_orders": (2, 3, 4), "table_buckets": 500},
    "tails": {"adaptive_cutoffs": (3, 7)},
    "heads": {"head_size": 12},
    "biases": {"head_size": 12, "qkv_bias": True, "qk_norm": False},
}
"""The options that "with …" after a model's name adds."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """A second thread makes models this small slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def small(name: str, *, vocab_size: int = VOCAB, seed: int = 1, **options: object) -> LanguageModel:
    """A small model of a registered name, with the options of `SMALL` that it has, and with counts if it counts."""
    name, _, extras = name.partition(" with ")
    fields = MODELS.resolve(name).Options.model_fields
    known = {field: value for field, value in {**SMALL, **EXTRAS[extras]}.items() if field in fields}
    model = build_model(Section(type=name, **{**known, **options}), vocab_size, seed=seed)
    for key, parameter in model.named_parameters():
        if "tables." in key:
            # Zeros, their initial values, would hide which row is used; the last row stays zero.
            torch.nn.init.normal_(parameter.data[:-1], std=0.1)
    if model.trained_by in ("counting", "both"):
        model.fit(np.random.default_rng(seed).integers(vocab_size, size=400))
    return model


def some_ids(rows: int, time: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCAB, (rows, time), generator=torch.Generator().manual_seed(seed))


def learn(model: LanguageModel, optimizers: list[torch.optim.Optimizer], rows: torch.Tensor) -> float:
    """One step on rows of texts; the loss before it."""
    loss = model.training_loss(rows[:, :-1], rows[:, 1:])
    loss.objective.backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return float(loss.nats)


def close(left: torch.Tensor, right: torch.Tensor) -> bool:
    return torch.allclose(left, right, atol=2e-5, rtol=1e-4)


NAMES = [*MODELS.names()]
NAMES += [f"{name} with tables" for name in NAMES if "table_orders" in MODELS.resolve(name).Options.model_fields]
NAMES += ["lstm with tails", "transformer with tails", "transformer with heads", "transformer with biases"]
TRAINED = [name for name in NAMES if MODELS.resolve(name.partition(" ")[0]).trained_by != "counting"]
by_gradient = pytest.mark.parametrize("name", TRAINED)


def with_option(option: str) -> pytest.MarkDecorator:
    """Models that are trained by gradient and have an option."""
    names = [name for name in TRAINED if option in MODELS.resolve(name.partition(" ")[0]).Options.model_fields]
    return pytest.mark.parametrize("name", names)


every_model = pytest.mark.parametrize("name", NAMES)


@every_model
def test_logits_have_the_shape_of_ids_and_vocabulary(name: str) -> None:
    logits, _ = small(name)(some_ids(3, 5))
    assert logits.shape == (3, 5, VOCAB)


@every_model
@pytest.mark.parametrize("cuts", [(1,), (19,), (3, 4, 12)])
def test_text_fed_in_chunks_gives_the_logits_of_one_pass(name: str, cuts: tuple[int, ...]) -> None:
    model, ids = small(name).eval(), some_ids(2, 20)
    whole, _ = model(ids)
    state, parts = None, []
    for chunk in torch.tensor_split(ids, cuts, dim=1):
        logits, state = model(chunk, state)
        parts.append(logits)
    assert close(torch.cat(parts, dim=1), whole)


@every_model
def test_no_position_depends_on_later_tokens(name: str) -> None:
    model, ids = small(name).eval(), some_ids(1, 12)
    before, _ = model(ids)
    changed = ids.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % VOCAB
    after, _ = model(changed)
    assert close(before[:, :7], after[:, :7])
    assert not close(before[:, 7:], after[:, 7:])


@by_gradient
def test_every_position_depends_on_the_one_before(name: str) -> None:
    model, ids = small(name).eval(), some_ids(1, 6)
    changed = ids.clone()
    changed[:, 2] = (changed[:, 2] + 1) % VOCAB
    assert not close(model(ids)[0][:, 3], model(changed)[0][:, 3])


@by_gradient
def test_host_inputs_give_the_loss_and_gradients_of_a_step_without_them(name: str) -> None:
    model, ids = small(name).train(), some_ids(2, 25)
    first, rest, targets = ids[:, :14], ids[:, 14:-1], ids[:, 15:]
    if model.host_context is None:
        assert model.host_inputs(first.numpy(), ids[:, 1:15].numpy()) == {}
        return
    for earlier, state in ((None, None), (first.numpy(), model(first)[1].detach())):
        host_inputs = model.host_inputs(rest.numpy(), targets.numpy(), earlier)
        found = []
        for given in (None, host_inputs):
            model.zero_grad()
            loss = model.training_loss(rest, targets, state, host_inputs=given)
            loss.objective.backward()
            grads = [p.grad.to_dense() for p in model.parameters() if p.grad is not None]
            found.append([loss.nats, *loss.state.tensors.values(), *grads])
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


@every_model
def test_saved_and_loaded_weights_give_identical_logits(name: str, tmp_path: object) -> None:
    model, ids = small(name).eval(), some_ids(2, 9)
    (path := tmp_path / "model.safetensors").write_bytes(pack_arrays(model.arrays()))  # type: ignore[operator]
    other = small(name, seed=2).eval()
    assert not torch.equal(model(ids)[0], other(ids)[0])
    other.load_arrays(read_arrays(path)[0])
    assert torch.equal(model(ids)[0], other(ids)[0])


@every_model
def test_weights_of_another_shape_are_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match="in the file"):
        small(name).load_arrays(small(name, vocab_size=VOCAB + 1).arrays())


@every_model
def test_rows_of_state_can_be_selected_and_reordered(name: str) -> None:
    model, ids = small(name).eval(), some_ids(3, 8)
    _, state = model(ids[:, :5])
    picked, _ = model(ids[[2, 0, 2], 5:], state.select([2, 0, 2]))
    whole, _ = model(ids[[2, 0, 2]])
    assert close(picked, whole[:, 5:])


@every_model
def test_states_of_texts_of_different_length_can_be_joined(name: str) -> None:
    model = small(name).eval()
    long, short = some_ids(1, 15, seed=1), some_ids(1, 9, seed=2)
    _, after_long = model(long[:, :11])
    _, after_short = model(short[:, :5])
    joined = State.join([after_short, after_long])
    logits, grown = model(torch.cat([short[:, 5:7], long[:, 11:13]]), joined)
    more, _ = model(torch.cat([short[:, 7:9], long[:, 13:15]]), grown.select([0, 1]))
    both = torch.cat([logits, more], dim=1)
    assert close(both[0], model(short)[0][0, 5:])
    assert close(both[1], model(long)[0][0, 11:])


@by_gradient
def test_a_parameter_is_declared_for_muon_if_it_is_a_hidden_matrix_and_for_rows_if_its_gradient_is_sparse(
    name: str,
) -> None:
    model = small(name, vocab_size=47)
    for key, parameter in model.named_parameters():
        module = model.get_submodule(key.rpartition(".")[0])
        table = ".tables." in f".{key}"
        of_tokens = "tails" in key or len(parameter) == 47 or isinstance(module, torch.nn.Embedding)
        hidden = not table and not of_tokens
        # Vectors are never Muon's, whatever their module declares.
        if parameter.ndim == 2:
            kind = "row_adagrad" if table else "muon" if hidden else "adamw"
            assert getattr(module, "optimizer_kind", "adamw") == kind, key
        assert getattr(module, "stays_fp32", False) == table != getattr(module, "shardable", True)


@by_gradient
def test_a_detached_state_carries_values_but_no_gradient(name: str) -> None:
    model, ids = small(name), some_ids(2, 8)
    _, state = model(ids[:, :4])
    assert state.tensors
    floats = [tensor for tensor in state.tensors.values() if tensor.is_floating_point()]
    assert all(tensor.requires_grad for tensor in floats)
    cut = state.detach()
    assert not any(tensor.requires_grad for tensor in cut.tensors.values())
    assert all(torch.equal(cut.tensors[key], state.tensors[key]) for key in state.tensors)


@pytest.mark.slow
@by_gradient
def test_one_batch_can_be_memorised(name: str) -> None:
    # The rows begin with different tokens: what follows the same beginning cannot be told apart.
    model, ids = small(name), some_ids(2, 17, seed=1)
    optimizers = make_optimizers(model, TrainingConfig(learning_rate=1e-2), fused=False)
    # Random tokens that the model does not know have a loss of ln 11 = 2.4 nats.
    assert any(learn(model, optimizers, ids) < 0.1 for _ in range(300))


@pytest.mark.slow
@every_model
def test_a_few_seconds_of_training_beat_the_unigram(name: str) -> None:
    rng = np.random.default_rng(0)
    words = ["ab ", "cade ", "bag "]
    text = "".join(words[index] for index in rng.integers(3, size=1500))
    symbols = sorted(set(text))
    ids = np.array([0] + [symbols.index(symbol) for symbol in text])
    model = small(name, vocab_size=len(symbols))
    if model.trained_by in ("counting", "both"):
        model.fit(ids)
    if model.trained_by != "counting":
        optimizers = make_optimizers(model, TrainingConfig(learning_rate=5e-3), fused=False)
        for step in range(60):
            starts = np.random.default_rng(step).integers(len(ids) - 25, size=16)
            learn(model, optimizers, torch.from_numpy(ids[starts[:, None] + np.arange(25)]))
    shares = np.bincount(ids[1:]) / (len(ids) - 1)
    unigram = -sum(share * math.log(share) for share in shares if share)
    assert score(model, ids).loss < 0.7 * unigram


LEVELS = [Format(precision, level) for precision in ("bf16", "fp16") for level in ("O1", "O2", "O3")]


@pytest.mark.slow
@by_gradient
@pytest.mark.parametrize("level", LEVELS, ids=str)
def test_a_few_steps_at_every_level_learn_and_the_weights_come_back_bit_for_bit(name: str, level: Format) -> None:
    options = {"optimizer": "sgd", "learning_rate": 0.5, "loss_scale_init": 1024}
    config = TrainingConfig(precision=level.precision, amp=level.level, **options)
    model, ids = small(name), some_ids(4, 17)
    mixed = MixedPrecision(model, config, torch.device("cpu"))
    optimizers = make_optimizers(model, config, fused=True, masters=mixed.masters)
    losses, state = [], None
    for _ in range(6):
        with mixed.computing():
            loss = model.training_loss(ids[:, :-1], ids[:, 1:], state)
        state = loss.state.detach() if model.context_length is None else None
        mixed.backward(loss.objective)
        mixed.collect()
        assert math.isfinite(mixed.clip(1.0))
        mixed.step(optimizers)
        for optimizer in optimizers:
            optimizer.zero_grad()
        losses.append(float(loss.nats))
    assert losses[-1] < losses[0] - 0.01
    arrays = mixed.arrays()
    again = small(name, seed=2)
    copy = MixedPrecision(again, config, torch.device("cpu"))
    copy.load_arrays(arrays)
    for key, tensor in again.state_dict().items():
        assert tensor.dtype == model.state_dict()[key].dtype
        assert torch.equal(tensor, model.state_dict()[key]), key
    assert all(np.array_equal(array, arrays[key]) for key, array in copy.arrays().items())


@with_option("dropout")
def test_dropout_acts_in_training_and_not_in_evaluation(name: str) -> None:
    model, ids = small(name, dropout=0.5), some_ids(1, 8)
    assert not torch.equal(model(ids)[0], model(ids)[0])
    model.eval()
    assert torch.equal(model(ids)[0], model(ids)[0])


@with_option("tie_weights")
def test_tied_weights_are_counted_and_saved_once(name: str) -> None:
    tied, free = (small(name, vocab_size=200, tie_weights=tie) for tie in (True, False))
    assert tied.num_parameters() < free.num_parameters()
    weights = [array for name, array in tied.arrays().items() if name in tied.state_dict()]
    assert sum(array.size for array in weights) == tied.num_parameters()
    ids = some_ids(2, 5)
    assert tied(ids)[0].shape == (2, 5, 200)
