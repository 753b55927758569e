"""The native decoding steps equal the torch models, and a text's bits do not depend on other texts in the batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from lm.config import Section
from lm.errors import CorruptRunError, DeviceError
from lm.generation.decoder import Decoder, Logits
from lm.generation.open_decoder import has_kernel, open_decoder
from lm.generation.torch_decoder import TorchDecoder
from lm.kernels.compiled import native
from lm.kernels.decoding import instruction_sets, rounded
from lm.kernels.head_decoding import TABLES
from lm.models.base import LanguageModel, build_model
from lm.registry import KERNELS, MODELS

V = 65
SHAPES: dict[str, dict[str, Any]] = {
    "gru": {"type": "gru", "hidden_size": 37, "embedding_size": 5},
    "gru, two layers": {"type": "gru", "hidden_size": 96, "embedding_size": 40, "num_layers": 2},
    "lstm, tied": {"type": "lstm", "hidden_size": 64, "embedding_size": 24, "num_layers": 2, "tie_weights": True},
    "rnn": {"type": "rnn", "hidden_size": 50},
    "rnn, relu": {"type": "rnn", "hidden_size": 48, "nonlinearity": "relu"},
    "transformer": {"type": "transformer", "hidden_size": 64, "num_heads": 4, "context_length": 32},
    "transformer, odd": {
        "type": "transformer",
        "hidden_size": 48,
        "num_heads": 4,
        "num_kv_heads": 2,
        "context_length": 51,
        "qk_norm": False,
        "tie_weights": True,
        "mlp_size": 70,
    },
    "transformer, heads of their own size, biases": {
        "type": "transformer",
        "hidden_size": 40,
        "num_heads": 8,
        "num_kv_heads": 1,
        "head_size": 14,
        "qkv_bias": True,
        "context_length": 40,
        "tie_weights": True,
    },
    "lstm, tied, adaptive": {"type": "lstm", "hidden_size": 40, "tie_weights": True, "adaptive_cutoffs": (5, 30)},
    "gru, adaptive": {"type": "gru", "hidden_size": 40, "adaptive_cutoffs": (20, 100)},
    "transformer, adaptive": {"type": "transformer", "hidden_size": 32, "num_heads": 2, "adaptive_cutoffs": (7,)},
    "gru, tables": {"type": "gru", "hidden_size": 32, "table_orders": (2, 3, 5), "table_buckets": 5000},
    "lstm, bigrams": {"type": "lstm", "hidden_size": 32, "table_orders": (2,)},
    "transformer, tables": {
        "type": "transformer",
        "hidden_size": 32,
        "num_heads": 2,
        "context_length": 9,
        "table_orders": (3, 4),
        "table_buckets": 100,
    },
    "hybrid": {"type": "hybrid", "hidden_size": 37, "embedding_size": 5, "order": 4},
    "hybrid, lstm, tables": {
        "type": "hybrid",
        "cell": "lstm",
        "hidden_size": 32,
        "num_layers": 2,
        "tie_weights": True,
        "order": 6,
        "table_orders": (2, 3),
    },
    "ngram": {"type": "ngram", "order": 5},
    "hybrid, unigrams": {"type": "hybrid", "hidden_size": 48, "order": 1},
    "ensemble": {"type": "ensemble", "size": 3, "member": {"type": "gru", "hidden_size": 37, "embedding_size": 5}},
    "ensemble of transformers": {
        "type": "ensemble",
        "member": {"type": "transformer", "hidden_size": 32, "num_heads": 2, "context_length": 9},
    },
}
LARGE = {"type": "transformer", "hidden_size": 384, "num_layers": 6, "num_heads": 6, "context_length": 256}
IDS = np.random.default_rng(0).integers(V, size=150).tolist()


def model_of(shape: dict[str, Any], vocab_size: int = V) -> LanguageModel:
    model = build_model(Section(**shape), vocab_size, seed=3).eval()
    for name, parameter in model.named_parameters():
        if "tables." in name:
            # Zeros, their initial values, would hide which row is used.
            torch.nn.init.normal_(parameter.data[:-1])
        if name == "network.gate.weight" or name.endswith("_proj.bias"):
            torch.nn.init.normal_(parameter.data)
    if model.trained_by != "gradient":
        # The text of the tests, so that long contexts are known, and another one.
        model.fit(np.concatenate([IDS[:100], np.random.default_rng(1).integers(vocab_size, size=300)]))
    return model


def decoder_of(model: LanguageModel, slots: int = 20, **settings: Any) -> Decoder:
    options, arrays = model.options.model_dump(mode="json"), model.arrays()
    if "isa" in settings:
        from lm.generation.kernel_decoder import KernelDecoder

        precision = settings.pop("precision", "fp32")
        kernel = KERNELS.resolve(options["type"])(options, arrays, slots=slots, precision=precision, **settings)
        return KernelDecoder(kernel, slots, precision)
    decoder = open_decoder(options, lambda: arrays, lambda: model, max_slots=slots, **settings)
    assert decoder.name.startswith("native")
    return decoder


def read(decoder: Decoder, ids: Sequence[int]) -> Logits:
    slot = decoder.open()
    logits = decoder.prefill(slot, ids)
    decoder.close(slot)
    return logits


def steps(decoder: Decoder, slot: int, ids: Sequence[int]) -> Logits:
    return np.concatenate([decoder.step([slot], [token]).copy() for token in ids])


def log_softmax(logits: Logits) -> Logits:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def test_this_install_has_the_kernels() -> None:
    # If the compiler fails the install has no kernels, and only the speed would show it.
    assert native() is not None
    assert native().instruction_sets()[-1] == "plain"


def test_every_kernel_belongs_to_a_model() -> None:
    assert set(KERNELS.names()) <= set(MODELS.names())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("isa", ["avx512", "avx2", "plain"])
def test_logits_equal_those_of_torch(shape: str, isa: str) -> None:
    if isa not in native().instruction_sets():
        isa = "plain"
    model = model_of(SHAPES[shape])
    np.testing.assert_allclose(read(decoder_of(model, isa=isa), IDS), read(TorchDecoder(model), IDS), atol=5e-6)


@pytest.mark.parametrize("tied", [False, True])
def test_a_vocabulary_too_large_for_a_gate_table_is_looked_up_token_by_token(tied: bool) -> None:
    shape = {"type": "lstm", "hidden_size": 256, "embedding_size": 8, "tie_weights": tied}
    model = model_of(shape, vocab_size=20_000)
    ids = [0, 19_999, 7, 12_345]
    np.testing.assert_allclose(read(decoder_of(model), ids), read(TorchDecoder(model), ids), atol=5e-6)


TRANSFORMERS = [shape for shape, options in SHAPES.items() if options["type"] == "transformer"]
WITH_PRECISION = [(shape, precision) for shape in SHAPES for precision in ("fp32", "bf16", "int8")]
WITH_PRECISION += [(shape, "int4") for shape in TRANSFORMERS]


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "precision"), WITH_PRECISION)
def test_no_bit_depends_on_other_slots_chunks_or_threads(shape: str, precision: str) -> None:
    model = model_of(SHAPES[shape])
    isas = instruction_sets(precision)
    alone = read(decoder_of(model, isa=isas[0], precision=precision, threads=1), IDS)
    for isa in isas:
        if isa == "plain" and len(isas) > 1:
            continue  # without fused multiply-add it rounds differently
        for threads in (1, 2, 3):
            decoder = decoder_of(model, isa=isa, precision=precision, threads=threads)
            slots = [decoder.open() for _ in range(17)]
            for index, slot in enumerate(slots):
                if index != 5:
                    decoder.prefill(slot, IDS[index : 2 * index + 9])
            rows = []
            for token in IDS[:60]:
                others = [token if index == 5 else token * index % V for index in range(17)]
                rows.append(decoder.step(slots, others)[5].copy())
            rows += list(decoder.prefill(slots[5], IDS[60:101]))
            rows += list(decoder.prefill(slots[5], IDS[101:]))
            np.testing.assert_array_equal(np.array(rows), alone)


@pytest.mark.slow
def test_a_transformer_of_ten_million_has_the_same_bits_alone_and_among_32() -> None:
    model = model_of(LARGE)
    ids = (IDS * 2)[:300]  # past the context of 256
    alone = read(decoder_of(model, threads=1), ids)
    decoder = decoder_of(model, slots=32, threads=2)
    slots = [decoder.open() for _ in range(32)]
    for index, slot in enumerate(slots[1:]):
        decoder.prefill(slot, ids[: 7 * index + 1])
    rows = [decoder.step(slots, [(token + index) % V for index in range(32)])[0].copy() for token in ids]
    np.testing.assert_array_equal(np.array(rows), alone)
    np.testing.assert_allclose(alone, read(TorchDecoder(model), ids), atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "shape",
    [{"type": "gru", "hidden_size": 512}, LARGE, {**SHAPES["gru, tables"], "hidden_size": 256}],
    ids=["gru", "transformer", "gru, tables"],
)
@pytest.mark.parametrize("count", [200, pytest.param(1000, marks=pytest.mark.soak)])
def test_greedy_tokens_equal_those_of_torch(shape: dict[str, Any], count: int) -> None:
    model = model_of(shape)

    def greedy(decoder: Decoder) -> list[int]:
        slot, token, chosen = decoder.open(), 1, []
        for _ in range(count):
            token = int(decoder.step([slot], [token])[0].argmax())
            chosen.append(token)
        return chosen

    assert greedy(decoder_of(model)) == greedy(TorchDecoder(model))


@pytest.mark.parametrize("shape", SHAPES)
def test_int8_stays_near(shape: str) -> None:
    model = model_of(SHAPES[shape])
    rounded = log_softmax(read(decoder_of(model, precision="int8"), IDS))
    exact = log_softmax(read(TorchDecoder(model), IDS))
    assert 0 < np.abs(rounded - exact).max() < 0.05


@pytest.mark.parametrize("isa", ["avx512_bf16", "plain"])  # those between have the bits of the first
@pytest.mark.parametrize("shape", SHAPES)
def test_bf16_has_the_nearest_weights_with_eight_bits_and_stays_near_them(shape: str, isa: str) -> None:
    model = model_of(SHAPES[shape])
    decoded = read(decoder_of(model, precision="bf16", isa=isa if isa in instruction_sets("bf16") else "plain"), IDS)
    exact = log_softmax(read(TorchDecoder(model), IDS))
    if model.trained_by == "gradient":
        arrays = model.arrays()
        model.load_arrays(
            {name: array if TABLES in name or array.ndim != 2 else upper_half(array) for name, array in arrays.items()}
        )
    expected = log_softmax(read(TorchDecoder(model), IDS))
    # Activations are rounded too, with a relative error of 2^-9.
    assert np.abs(log_softmax(decoded) - expected).max() < 0.02
    assert np.abs(log_softmax(decoded) - exact).max() < 0.03


def test_a_product_in_bf16_rounds_ties_to_even_and_sums_in_fp32() -> None:
    step = 2.0**-8  # half of what is between neighbours above 1
    model = model_of({"type": "rnn", "hidden_size": 2, "nonlinearity": "relu"}, vocab_size=2)
    arrays = {name: np.zeros_like(array) for name, array in model.arrays().items()}
    arrays["cell.bias_ih_l0"][:] = (1 + step, 1 + 3 * step)  # biases are fp32: the state of the first token
    arrays["output.weight"][0] = (1 + step, 0)  # 1, a tie
    arrays["output.weight"][1] = (1, 1 + step / 256)
    model.load_arrays(arrays)
    logits = read(decoder_of(model, precision="bf16"), [0])
    # The product sees the state as 1 and 1 + 4 * step: both are ties.
    np.testing.assert_array_equal(logits, [[1, 1 + (1 + 4 * step)]])


def in_int4(matrix: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The matrix with every 32 values of a row as the nearest of 16 levels.

    They reach from the least to the largest value, or from eight steps on one side of zero to seven on the other.
    """
    found = np.empty_like(matrix)
    for begin in range(0, matrix.shape[1], 32):
        part = matrix[:, begin : begin + 32]
        least, most = part.min(axis=1, keepdims=True), part.max(axis=1, keepdims=True)
        farthest = np.where(-least > most, least, most)
        levels = [in_levels(part, least, most), in_levels(part, farthest, -0.875 * farthest)]
        errors = [((each.astype(float) - part) ** 2).sum(axis=1, keepdims=True) for each in levels]
        exact = (np.abs(levels[1].astype(float) - part) <= np.abs(part) / 2048).all(axis=1, keepdims=True)
        found[:, begin : begin + 32] = np.where(exact | (errors[1] < errors[0]), levels[1], levels[0])
    return found


def in_levels(part: np.ndarray[Any, Any], first: Any, last: Any) -> np.ndarray[Any, Any]:
    """The values as minimum + scale * code, codes 0 to 15; the scale has the least squared error."""
    minimum = first.astype(np.float16).astype(np.float32)
    codes = np.clip(np.rint((part - minimum) / ((last - first) / 15)), 0, 15)
    return fitted_scale(part - minimum, codes) * codes + minimum


def in_int8_blocks(matrix: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The matrix with every 32 values of a row as whole numbers from -127 to 127, times a scale."""
    found = np.empty_like(matrix)
    for begin in range(0, matrix.shape[1], 32):
        part = matrix[:, begin : begin + 32]
        codes = np.rint(part * (127 / np.abs(part).max(axis=1, keepdims=True)))
        found[:, begin : begin + 32] = fitted_scale(part, codes) * codes
    return found


def fitted_scale(part: np.ndarray[Any, Any], codes: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    scale = (codes * part).sum(axis=1, keepdims=True) / (codes**2).sum(axis=1, keepdims=True)
    return scale.astype(np.float16).astype(np.float32)


def upper_half(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The nearest float32 values whose lower 16 bits are zero."""
    return torch.from_numpy(values).bfloat16().float().numpy()


@pytest.mark.parametrize("isa", ["avx512", "avx2", "plain"])
@pytest.mark.parametrize("shape", TRANSFORMERS)
def test_int4_has_16_levels_for_32_weights_of_a_row_and_255_for_what_is_looked_up(shape: str, isa: str) -> None:
    model = model_of(SHAPES[shape])
    decoded = read(decoder_of(model, precision="int4", isa=isa if isa in native().instruction_sets() else "plain"), IDS)
    matrices = {"_proj.weight": in_int4, TABLES: rounded, ".weight": in_int8_blocks}
    arrays = model.arrays()
    for name, array in arrays.items():
        if array.ndim == 2:
            arrays[name] = next(rounding for part, rounding in matrices.items() if part in name)(array)
    model.load_arrays(arrays)
    # The activations are rounded too.
    expected = log_softmax(read(TorchDecoder(model), IDS))
    assert np.abs(log_softmax(decoded) - expected).max() < 0.05


@pytest.mark.parametrize("quantisation", ["Q4_0", "Q4_1"])
def test_int4_gives_back_the_weights_of_a_file_that_had_four_bits(quantisation: str) -> None:
    gguf = pytest.importorskip("gguf")
    model = model_of({**SHAPES["transformer"], "tie_weights": True})
    kinds = {"_proj": gguf.GGMLQuantizationType[quantisation], "embed": gguf.GGMLQuantizationType.Q8_0}

    def of_file(array: np.ndarray[Any, Any], name: str) -> np.ndarray[Any, Any]:
        for part, kind in kinds.items():
            if part in name:
                return gguf.quants.dequantize(gguf.quants.quantize(array, kind), kind)
        return array

    exact = {name: of_file(array, name) for name, array in model.arrays().items()}
    for name, array in exact.items():
        expected = in_int4(array) if "_proj" in name else in_int8_blocks(array) if array.ndim == 2 else array
        np.testing.assert_allclose(expected, array, rtol=1e-6, atol=1e-9)
    # A run has them rounded to fp16.
    imported = {name: array.astype(np.float16) if array.ndim == 2 else array for name, array in exact.items()}
    options = model.options.model_dump(mode="json")
    a, b = (
        KERNELS.resolve("transformer")(options, arrays, slots=1, precision="int4").read(0, IDS, only_last=False)
        for arrays in (exact, imported)
    )
    np.testing.assert_array_equal(a, b)


def test_int4_needs_a_transformer() -> None:
    model = model_of(SHAPES["gru"])
    with pytest.raises(
        DeviceError, match="gru models have no int4 weights, only transformer models have them: use int8"
    ):
        open_decoder(model.options.model_dump(), model.arrays, lambda: model, precision="int4")


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("shape", ["transformer", "transformer, odd", "transformer, adaptive", "transformer, tables"])
def test_weights_in_fp16_decode_as_their_values_in_fp32(shape: str, precision: str) -> None:
    model = model_of(SHAPES[shape])
    options = model.options.model_dump(mode="json")
    halves = {name: array.astype(np.float16) for name, array in model.arrays().items()}
    kernels = [
        KERNELS.resolve("transformer")(options, arrays, slots=1, precision=precision)
        for arrays in (halves, {name: array.astype(np.float32) for name, array in halves.items()})
    ]
    a, b = (kernel.read(0, IDS, only_last=False) for kernel in kernels)
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("shape", "precision"), WITH_PRECISION)
def test_an_exported_slot_continues_with_the_same_bits(shape: str, precision: str) -> None:
    decoder = decoder_of(model_of(SHAPES[shape]), precision=precision)
    slot = decoder.open()
    decoder.prefill(slot, IDS[:45])
    copies = [decoder.fork(slot), decoder.restore(decoder.export(slot))]
    decoder.prefill(decoder.open(), IDS[:3])
    expected = steps(decoder, slot, IDS[45:])
    for copy in copies:
        np.testing.assert_array_equal(steps(decoder, copy, IDS[45:]), expected)
    if precision == "bf16":
        arrays = decoder.export(slot).arrays
        cache = [array for name, array in arrays.items() if "keys." in name or "values." in name]
        assert bool(cache) == ("transformer" in shape)
        for array in cache:
            np.testing.assert_array_equal(array, upper_half(array))


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_a_state_can_be_taken_from_torch_to_the_kernel_and_back(shape: str) -> None:
    model = model_of(SHAPES[shape])
    ours, torchs = decoder_of(model), TorchDecoder(model)
    from_torch, from_kernel = torchs.open(), ours.open()
    expected = torchs.prefill(from_torch, IDS[:70])
    ours.prefill(from_kernel, IDS[:70])
    there, back = ours.restore(torchs.export(from_torch)), torchs.restore(ours.export(from_kernel))
    expected = steps(torchs, from_torch, IDS[70:])
    np.testing.assert_allclose(steps(ours, there, IDS[70:]), expected, atol=1e-5)
    np.testing.assert_allclose(steps(torchs, back, IDS[70:]), expected, atol=1e-5)


def test_a_slot_used_again_starts_empty() -> None:
    for shape in ("lstm, tied", "transformer"):
        decoder = decoder_of(model_of(SHAPES[shape]), slots=1)
        first = read(decoder, IDS)
        np.testing.assert_array_equal(read(decoder, IDS), first)


def test_only_last_is_the_last_row() -> None:
    for shape in SHAPES:
        decoder = decoder_of(model_of(SHAPES[shape]))
        whole = read(decoder, IDS)
        slot = decoder.open()
        np.testing.assert_array_equal(decoder.prefill(slot, IDS, only_last=True), whole[-1:])


def test_wrong_slots_and_tokens_are_refused_before_anything_is_computed() -> None:
    decoder = decoder_of(model_of(SHAPES["gru"]), slots=2)
    slot = decoder.open()
    for slots, ids in (([2], [1]), ([-1], [1]), ([slot], [V]), ([slot], [-1]), ([0, 1, 0], [1, 1, 1])):
        with pytest.raises((IndexError, ValueError)):
            decoder.step(slots, ids)


@pytest.mark.parametrize("shape", ["gru", "transformer", "ngram", "ensemble"])
def test_a_slot_given_twice_in_one_step_is_refused_before_anything_is_computed(shape: str) -> None:
    # In a full window, the second token would be written beyond the end of the cache.
    model = model_of(SHAPES[shape])
    decoder, alone = decoder_of(model), decoder_of(model)
    slot, other = decoder.open(), decoder.open()
    own = alone.open()
    for each, of in ((slot, decoder), (own, alone)):
        of.prefill(each, IDS[:8])
    with pytest.raises(ValueError, match=f"slot {slot} occurs twice"):
        decoder.step([slot, other, slot], IDS[8:11])
    np.testing.assert_array_equal(decoder.step([slot], IDS[8:9]), alone.step([own], IDS[8:9]))


@pytest.mark.parametrize("shape", ["gru", "transformer"])
def test_options_written_before_there_were_tables_still_load(shape: str) -> None:
    model = model_of(SHAPES[shape])
    options = {name: value for name, value in model.options.model_dump().items() if not name.startswith("table_")}
    kernel = KERNELS.resolve(options["type"])(options, model.arrays(), slots=1)
    np.testing.assert_array_equal(kernel.read(0, IDS, only_last=False), read(decoder_of(model), IDS))


def test_a_table_of_too_few_rows_for_its_order_is_refused() -> None:
    model = model_of(SHAPES["transformer, tables"])
    options, arrays = model.options.model_dump(), model.arrays()
    with pytest.raises(CorruptRunError, match="a context table"):
        KERNELS.resolve("transformer")({**options, "table_buckets": 101}, arrays, slots=1)


def test_weights_that_do_not_fit_the_options_are_refused_in_a_sentence() -> None:
    model = model_of(SHAPES["gru"])
    options, arrays = model.options.model_dump(), model.arrays()
    del arrays["output.bias"]
    with pytest.raises(CorruptRunError, match=r"output\.bias"):
        KERNELS.resolve("gru")(options, arrays, slots=1)


@pytest.mark.parametrize("shape", ["gru", "lstm, tied", "transformer", "transformer, odd", "gru, tables"])
def test_a_matrix_of_another_shape_is_refused_whichever_it_is(shape: str) -> None:
    model = model_of(SHAPES[shape])
    options, arrays = model.options.model_dump(), model.arrays()
    for name, array in arrays.items():
        wrongs = [array[..., :-1]]
        if name != "embed_tokens.weight":  # a tied model with a smaller vocabulary is valid
            wrongs.append(array[:-1])
        for wrong in wrongs:
            with pytest.raises(CorruptRunError):
                KERNELS.resolve(options["type"])(options, {**arrays, name: wrong}, slots=1)


def test_the_memory_set_aside_bounds_the_slots() -> None:
    model = model_of(SHAPES["transformer"])
    options, arrays = model.options.model_dump(), model.arrays()
    one = KERNELS.resolve("transformer").slot_bytes(options)
    assert one == 2 * 4 * 32 * 64 * 4  # keys and values, layers, positions, width, bytes

    def slots(state_bytes: int) -> int | None:
        return open_decoder(options, lambda: arrays, lambda: model, max_slots=9, state_bytes=state_bytes).max_slots

    assert (slots(one * 5), slots(one * 100)) == (5, 9)
    with pytest.raises(DeviceError, match="reserve more with"):
        slots(one - 1)


def test_tables_under_an_adaptive_softmax_decode_on_torch_and_not_in_int8() -> None:
    model = model_of({"type": "gru", "hidden_size": 16, "adaptive_cutoffs": (5, 12), "table_orders": (2,)})
    decoder = open_decoder(model.options.model_dump(), model.arrays, lambda: model)
    assert isinstance(decoder, TorchDecoder)
    with pytest.raises(DeviceError, match="do not have context tables under an adaptive softmax"):
        open_decoder(model.options.model_dump(), model.arrays, lambda: model, precision="int8")


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_low_weights_without_a_kernel_are_refused_with_the_reason(precision: Any) -> None:
    assert not has_kernel("gru", "cuda")
    model = model_of(SHAPES["gru"])
    with pytest.raises(DeviceError, match="run on the CPU, not on cuda"):
        open_decoder(model.options.model_dump(), dict, lambda: model, device="cuda", precision=precision)
