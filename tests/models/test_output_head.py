"""The output head: full, tied and adaptive, at once and in chunks, give one distribution and one loss."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lm.config import Section
from lm.errors import ConfigError
from lm.kernels.dispatch import only_torch
from lm.models import output_head
from lm.models.base import LanguageModel, State, TrainingLoss, build_model
from lm.models.output_head import OutputHead, Tails, tail_positions
from lm.models.target_scores import scores_of, tokens_before

VOCAB = 50
CUTS = [10, 30]


def model_of(name: str, **options: object) -> LanguageModel:
    size: dict[str, object] = {"embedding_size": 12} if name == "lstm" else {"num_heads": 2}
    return build_model(Section(type=name, hidden_size=16, num_layers=2, **{**size, **options}), VOCAB, seed=1)


def some_batch(rows: int = 3, time: int = 9) -> tuple[Tensor, Tensor]:
    ids = torch.randint(VOCAB, (rows, time + 1), generator=torch.Generator().manual_seed(5))
    return ids[:, :-1], ids[:, 1:]


def gradients(model: LanguageModel, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_two_tails_by_hand() -> None:
    # Five tokens of width 1, cut at 1 and 3: token 0 and the entries of {1, 2} and of {3, 4}.
    tails = Tails((1, 3), 1)
    with torch.no_grad():
        tails.weight.copy_(torch.tensor([[1.0], [0.0]]))
        tails.bias.copy_(torch.tensor([0.0, 0.5]))
    weight, bias = torch.tensor([[2.0], [1.0], [-1.0], [0.0], [3.0]]), torch.tensor([0.0, 0.5, 0.0, 0.0, -1.0])
    head = OutputHead(weight, bias, tails)
    found = head.logits(torch.tensor([[1.0]]))[0].exp().detach()
    # Logits: 2 | 1.5, -1 | 0, 2; entries 1 and 0.5.
    total = math.exp(2) + math.exp(1) + math.exp(0.5)
    first, second = math.exp(1.5) + math.exp(-1), math.exp(0) + math.exp(2)
    expected = [
        math.exp(2) / total,
        math.exp(1) / total * math.exp(1.5) / first,
        math.exp(1) / total * math.exp(-1) / first,
        math.exp(0.5) / total * math.exp(0) / second,
        math.exp(0.5) / total * math.exp(2) / second,
    ]
    assert found.tolist() == pytest.approx(expected, abs=1e-6)
    assert sum(expected) == pytest.approx(1)
    hidden, targets = torch.tensor([[[1.0], [1.0]]]), torch.tensor([[0, 4]])
    loss = head.loss(hidden, targets, State({}), added=None, label_smoothing=0.0, dtype=torch.float32)
    assert float(loss.nats) == pytest.approx(-(math.log(expected[0]) + math.log(expected[4])) / 2, abs=1e-6)


@pytest.mark.parametrize("tie_weights", [False, True])
@pytest.mark.parametrize("name", ["lstm", "transformer"])
def test_probabilities_of_an_adaptive_softmax_sum_to_one(name: str, tie_weights: bool) -> None:
    logits, _ = model_of(name, adaptive_cutoffs=CUTS, tie_weights=tie_weights)(some_batch()[0])
    assert torch.allclose(logits.exp().sum(dim=-1), torch.ones(3, 9), atol=1e-5)


@pytest.mark.parametrize("max_logits", [7, 300, 1 << 20])
@pytest.mark.parametrize("tie_weights", [False, True])
@pytest.mark.parametrize("cuts", [[], [10], CUTS])
@pytest.mark.parametrize("name", ["lstm", "transformer"])
def test_the_training_loss_and_its_gradients_are_those_of_all_logits(
    name: str, cuts: list[int], tie_weights: bool, max_logits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output_head, "MAX_LOGITS", max_logits)
    model, (ids, targets) = model_of(name, adaptive_cutoffs=cuts, tie_weights=tie_weights), some_batch()
    logits, _ = model(ids)
    whole = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    found = model.training_loss(ids, targets)
    assert (found.logits is None) == (bool(cuts) or max_logits < ids.numel() * VOCAB)
    assert float(found.nats) == pytest.approx(float(whole.detach()), abs=1e-5)
    expected, own = gradients(model, whole), gradients(model, found.objective)
    assert own.keys() == expected.keys()
    for parameter, gradient in expected.items():
        assert not own[parameter].is_sparse
        assert torch.allclose(own[parameter], gradient, atol=1e-6, rtol=1e-4), parameter


def test_a_scaled_objective_has_scaled_gradients() -> None:
    model, (ids, targets) = model_of("lstm", adaptive_cutoffs=CUTS, tie_weights=True), some_batch()
    one = gradients(model, model.training_loss(ids, targets).objective)
    half = gradients(model, model.training_loss(ids, targets).objective / 2)
    for name, gradient in one.items():
        assert torch.allclose(half[name] * 2, gradient, atol=1e-7), name


def test_tails_without_a_target_get_no_gradient() -> None:
    model = model_of("lstm", adaptive_cutoffs=CUTS)
    ids = torch.randint(10, (2, 6), generator=torch.Generator().manual_seed(1))
    own = gradients(model, model.training_loss(ids, ids).objective)["output.weight"]
    assert not own[10:].any()
    assert own[:10].any()


def test_label_smoothing_uses_the_whole_distribution() -> None:
    model, (ids, targets) = model_of("lstm", adaptive_cutoffs=CUTS), some_batch()
    logits, _ = model(ids)
    found: TrainingLoss = model.training_loss(ids, targets, label_smoothing=0.1)
    smoothed = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), label_smoothing=0.1)
    assert float(found.objective.detach()) == pytest.approx(float(smoothed.detach()), abs=1e-6)
    assert float(found.nats) < float(found.objective.detach())


def test_bf16_products_stay_close_to_fp32() -> None:
    model, (ids, targets) = model_of("lstm", adaptive_cutoffs=CUTS, tie_weights=True), some_batch()
    exact = gradients(model, model.training_loss(ids, targets).objective)
    with torch.autocast("cpu", torch.bfloat16):
        found = model.training_loss(ids, targets)
    assert found.objective.dtype == torch.float32
    for name, gradient in gradients(model, found.objective).items():
        assert gradient.dtype == torch.float32
        assert torch.allclose(gradient, exact[name], atol=0.03 * float(exact[name].abs().max())), name


@pytest.mark.parametrize("cuts", [[10, 10], [0, 10], [30, 10]])
def test_cuts_that_do_not_rise_are_refused(cuts: list[int]) -> None:
    with pytest.raises(ConfigError, match="rising numbers of tokens"):
        model_of("lstm", adaptive_cutoffs=cuts)


@pytest.mark.parametrize(("cuts", "tails"), [([10, 30], 2), ([10, VOCAB], 1), ([VOCAB], 0)])
def test_cuts_beyond_the_vocabulary_are_ignored(cuts: list[int], tails: int) -> None:
    weights = model_of("lstm", adaptive_cutoffs=cuts).arrays()
    assert len(weights["tails.weight"]) == tails if tails else "tails.weight" not in weights


def test_an_untrained_adaptive_softmax_follows_zipfs_law() -> None:
    model = model_of("lstm", adaptive_cutoffs=CUTS)
    with torch.no_grad():
        for name in ("output.weight", "tails.weight"):
            model.get_parameter(name).zero_()
    shares = [1 / (rank + 2.7) for rank in range(VOCAB)]
    found = model(some_batch()[0])[0][0, 0].exp()
    assert found.tolist() == pytest.approx([share / sum(shares) for share in shares], rel=1e-4)


def test_cuts_may_be_written_as_text_or_as_one_number() -> None:
    assert model_of("lstm", adaptive_cutoffs="10, 30").options.adaptive_cutoffs == (10, 30)
    assert model_of("lstm", adaptive_cutoffs=10).options.adaptive_cutoffs == (10,)


def test_the_positions_of_each_tail_are_padded_to_a_few_sizes() -> None:
    # 64 targets: lists grow by 64 / 32 = 2. Tails are 10 … 29 and 30 … 49.
    targets = np.zeros((4, 16), dtype=np.int64)
    targets[0, 3], targets[1, 0], targets[3, 15] = 10, 29, 12
    tails = model_of("lstm", adaptive_cutoffs=CUTS).tails
    found = tail_positions(targets, tails, VOCAB)
    assert {name: positions.tolist() for name, positions in found.items()} == {
        "tail 1": [3, 16, 63, -1],
        "tail 2": [-1, -1],
    }
    assert tail_positions(targets, None, VOCAB) == {}


@pytest.mark.parametrize("largest", [9, VOCAB - 1])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_listed_positions_give_the_loss_and_gradients_of_found_ones(precision: str, largest: int) -> None:
    model = model_of("lstm", adaptive_cutoffs=CUTS, tie_weights=True)
    ids, targets = (part.clamp(max=largest) for part in some_batch())
    listed = model.host_inputs(ids.numpy(), targets.numpy())
    found = []
    for host_inputs in (None, listed):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"), only_torch():
            loss = model.training_loss(ids, targets, host_inputs=host_inputs)
        found.append((float(loss.nats), gradients(model, loss.objective)))
    (own, expected), (nats, grads) = found
    assert nats == pytest.approx(own, abs=1e-6)
    for name, gradient in expected.items():
        torch.testing.assert_close(grads[name], gradient, atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize("options", [{}, {"adaptive_cutoffs": CUTS}, {"adaptive_cutoffs": CUTS, "table_orders": [2]}])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["lstm", "transformer"])
@torch.inference_mode()
def test_scores_of_targets_are_those_of_all_logits(name: str, precision: str, options: dict[str, object]) -> None:
    model, (ids, targets) = model_of(name, **options).eval(), some_batch(rows=20)
    last = targets[:15, 4:]
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        for _ in range(2):
            logits, state = model(ids)
            expected = scores_of(logits[:15, 4:].flatten(0, 1), last.flatten())
            found, after = model.target_scores(ids, last)
            # In bf16 the last bit of a product may depend on the rows beside it.
            error, wrong = (1e-5, 0) if precision == "fp32" else (2e-2, 2)
            torch.testing.assert_close(found.nats, expected.nats, atol=error, rtol=0)
            assert int((found.ranks != expected.ranks).sum()) <= wrong
            assert torch.equal(after.tensors[next(iter(state.tensors))], next(iter(state.tensors.values())))
            # Now with tails that are probable: the target's rank needs the others.
            if options and name == "lstm":
                model.tails.bias.add_(3)


@torch.inference_mode()
def test_a_tail_is_computed_only_where_it_can_change_a_score(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (ids, targets) = model_of("lstm", adaptive_cutoffs=CUTS, tie_weights=True).eval(), some_batch(rows=20)
    model.tails.bias.fill_(-20)
    computed: list[tuple[int, int]] = []
    plain = OutputHead._logits_between

    def watched(head: OutputHead, vectors: Tensor, begin: int, end: int) -> Tensor:
        computed.append((begin, len(vectors)))
        return plain(head, vectors, begin, end)

    monkeypatch.setattr(OutputHead, "_logits_between", watched)
    model.target_scores(ids, targets)
    first = int(((targets >= CUTS[0]) & (targets < CUTS[1])).sum())
    assert computed == [(0, targets.numel()), (CUTS[0], first), (CUTS[1], int((targets >= CUTS[1]).sum()))]


@pytest.mark.parametrize(
    ("logits", "target", "before"),
    [
        ([3.0, 1.0, 3.0, 2.0, 0.0, 0.0, 0.0], 2, 1),
        ([3.0, 1.0, 3.0, 2.0, 0.0, 0.0, 0.0], 0, 0),
        ([0.0] * 7, 3, 3),
        ([0.0] * 7, 6, 5),
        ([0.0, 1.0], 1, 0),
    ],
)
def test_the_tokens_before_a_target_are_greater_or_equal_with_a_lower_id(
    logits: list[float], target: int, before: int
) -> None:
    row = torch.tensor([logits])
    assert tokens_before(row, row[:, [target]], torch.tensor([target])).tolist() == [before]
    # Of a target outside the columns, with this logit.
    assert tokens_before(row, torch.tensor([[0.0]]), torch.tensor([-1])).tolist() == [
        min(5, sum(x > 0 for x in logits))
    ]
    assert tokens_before(row, torch.tensor([[0.0]]), torch.tensor([9])).tolist() == [
        min(5, sum(x >= 0 for x in logits))
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"table_orders": [2, 3]},
        pytest.param({"adaptive_cutoffs": CUTS}, marks=pytest.mark.soak),
        pytest.param({}, marks=pytest.mark.soak),
    ],
)
def test_a_step_of_a_transformer_compiles_to_one_graph(options: dict[str, object]) -> None:
    model, (ids, targets) = model_of("transformer", **options), some_batch()
    host_inputs = model.host_inputs(ids.numpy(), targets.numpy()) or None

    def step() -> tuple[Tensor, Tensor]:
        loss = model.training_loss(ids, targets, host_inputs=host_inputs)
        return loss.objective, loss.nats

    with warnings.catch_warnings():
        # Of torch's compiler itself.
        warnings.filterwarnings("ignore", ".*should not be instantiated", DeprecationWarning)
        objective, nats = torch.compile(step, fullgraph=True, backend="aot_eager")()
    assert float(nats) == pytest.approx(float(step()[1]), abs=1e-5)
    compiled, own = gradients(model, objective), gradients(model, step()[0])
    for name, gradient in own.items():
        torch.testing.assert_close(compiled[name].to_dense(), gradient.to_dense(), atol=1e-5, rtol=1e-4, msg=name)
