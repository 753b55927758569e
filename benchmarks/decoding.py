"""Tokens a second of decoding, beside the tools one would use instead, on the same random weights.

    python -m benchmarks.decoding [--threads 2] [--rounds 5]

Two shapes over 65 symbols: a Transformer of 6 layers of 384 (10.7 million weights, context 256) and a GRU of 512. Every
contender takes its turn in each round; figures are medians over the rounds, counted over the whole batch:

    kernel       the native step alone: logits, no choice of a token
    engine       requests through `lm.generation.engine` with top_k 40 and temperature 0.8: what a user gets; text is
                 taken at every step by one reader, every 16 steps by several, as the server does
    torch        the same engine on the torch decoder

Peers, where they are installed: Hugging Face `generate` (transformers) and llama.cpp (llama-cpp-python, gguf) with
top_k 40 and the same weights; for the GRU a plain step loop over `nn.GRU`, with argmax and with top_k 40.

How far off the limit is: a token reads every weight once, so that no step is faster than memory bandwidth (measured
here by a sum over a large array) over the bytes of the weights, unless these fit into a cache.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from benchmarks.machine import alternate, save, versions
from lm.config import Section
from lm.generation.decoder import Decoder
from lm.generation.decoders import open_decoder
from lm.generation.engine import Engine, Request
from lm.generation.options import SamplingOptions
from lm.generation.torch_decoder import TorchDecoder
from lm.models.base import LanguageModel, build_model
from lm.tokenizers.char import CharTokenizer

V = 65
BATCH = 16
PROMPT = 10
TOKENS = {"transformer 6 x 384": 200, "gru 512": 2000}
"""Drawn for each text."""
SHAPES: dict[str, dict[str, Any]] = {
    "transformer 6 x 384": {
        "type": "transformer", "hidden_size": 384, "num_layers": 6, "num_heads": 6, "context_length": 256,
        "qk_norm": False,
    },
    "gru 512": {"type": "gru", "hidden_size": 512, "embedding_size": 512},
}  # fmt: skip
TARGETS = {
    "transformer 6 x 384": (
        ("engine fp32", 1, "transformers generate", 4.0),
        ("engine fp32", 1, "llama.cpp f32", 1.0),
        ("engine int8", 1, "transformers generate", 15.0),
        ("engine int8", 1, "llama.cpp q8_0", 2.5),
        ("engine fp32", BATCH, "transformers generate", 5.0),
    ),
    "gru 512": (
        ("engine fp32", 1, "nn.GRU loop, argmax", 3.0),
        ("engine fp32", BATCH, "nn.GRU loop, argmax", 4.0),
        ("engine int8", 1, "nn.GRU loop, argmax", 10.0),
        ("engine fp32", 1, "nn.GRU loop, top_k 40", 3.0),
        ("engine fp32", BATCH, "nn.GRU loop, top_k 40", 4.0),
        ("engine int8", 1, "nn.GRU loop, top_k 40", 10.0),
    ),
}


def main() -> None:
    """Measure, print tables, and write the figures under benchmarks/results/."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of every contender (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contender (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="where the JSON goes (default: benchmarks/results/)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    # Chosen before any contender starts threads of its own.
    os.environ["OMP_NUM_THREADS"] = str(options.threads)

    results = []
    with tempfile.TemporaryDirectory(prefix="inkling-benchmark-") as folder:
        for shape, settings in SHAPES.items():
            model = build_model(Section(**settings), V, seed=1).eval()
            for batch in (1, BATCH):
                options.tokens = TOKENS[shape]
                contenders = dict(ours(model, batch, options)) | dict(peers(shape, model, batch, options, Path(folder)))
                rates = alternate(contenders, options.rounds)
                results += [{"shape": shape, "batch": batch, "contender": name, **rate} for name, rate in rates.items()]
                show(shape, batch, model, rates)
    record = {
        "options": {"threads": options.threads, "rounds": options.rounds, "tokens": TOKENS, "vocab_size": V},
        "versions": versions("numpy", "torch", "transformers", "llama-cpp-python"),
        "unit": "tokens/s over the whole batch",
        "memory_bytes_per_second": bandwidth(),
        "results": results,
        "ratios": ratios(results),
    }
    print()
    for ratio in record["ratios"]:
        print(f"{ratio['shape']}, batch {ratio['batch']}: {ratio['of']} = {ratio['ratio']:.2f} x {ratio['to']}"
              f" (target {ratio['target']})")  # fmt: skip
    print(f"\n{save('decoding', record, options.out)}")


def ratios(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The claims: medians of one run over medians of the same run."""
    rates = {(row["shape"], row["batch"], row["contender"]): row["median"] for row in results}
    return [
        {"shape": shape, "batch": batch, "of": name, "to": peer, "target": target,
         "ratio": rates[shape, batch, name] / rates[shape, batch, peer]}
        for shape, targets in TARGETS.items()
        for name, batch, peer, target in targets
        if (shape, batch, peer) in rates
    ]  # fmt: skip


def bandwidth(size: int = 256 << 20) -> float:
    """Bytes a second that all threads read from memory."""
    array = torch.ones(size // 4)
    best = 0.0
    for _ in range(5):
        begun = time.perf_counter()
        array.sum()
        best = max(best, size / (time.perf_counter() - begun))
    return best


# -- ours --------------------------------------------------------------------------------------------


def ours(model: LanguageModel, batch: int, options: argparse.Namespace) -> Iterator[tuple[str, Callable[[], float]]]:
    """Kernel and engine, fp32 and int8, and the engine on torch."""
    settings, arrays = model.options.model_dump(mode="json"), model.arrays()

    def native(precision: Any) -> Decoder:
        return open_decoder(
            settings, lambda: arrays, lambda: model, precision=precision, max_slots=batch, threads=options.threads
        )

    for precision in ("fp32", "int8"):
        yield f"kernel {precision}", steps(native(precision), batch, options.tokens)
        yield f"engine {precision}", requests(native(precision), batch, options.tokens)
    yield "engine torch", requests(TorchDecoder(model), batch, options.tokens // 4)


def steps(decoder: Decoder, batch: int, tokens: int) -> Callable[[], float]:
    """Bare steps of `batch` slots."""

    def run() -> float:
        slots = [decoder.open() for _ in range(batch)]
        for slot in slots:
            decoder.prefill(slot, range(PROMPT), only_last=True)
        for token in range(tokens):
            decoder.step(slots, [token % V] * batch)
        for slot in slots:
            decoder.close(slot)
        return tokens * batch

    return run


def requests(decoder: Decoder, batch: int, tokens: int) -> Callable[[], float]:
    """`batch` requests at once through one engine."""
    tokenizer = CharTokenizer.train(["".join(map(chr, range(48, 48 + V - 2)))], CharTokenizer.Options())
    assert tokenizer.vocab_size == V
    engine = Engine(decoder, tokenizer, max_batch=batch, prefix_cache_bytes=0)
    # Enough texts one after the other that their beginnings do not count much.
    prompt = tuple(range(PROMPT))

    def run() -> float:
        generations = [
            engine.submit(Request(prompt, SamplingOptions(top_k=40, temperature=0.8, max_tokens=tokens, seed=seed)))
            for seed in range(batch)
        ]
        every = 1 if batch == 1 else 16
        while not all(generation.done for generation in generations):
            for _ in range(every):
                engine.step()
            for generation in generations:
                generation.take()
        return tokens * batch

    return run


# -- peers -------------------------------------------------------------------------------------------


def peers(
    shape: str, model: LanguageModel, batch: int, options: argparse.Namespace, folder: Path
) -> Iterator[tuple[str, Callable[[], float]]]:
    """What is installed of the tools one would use instead."""
    if shape.startswith("gru"):
        yield "nn.GRU loop, argmax", gru_loop(model, batch, options.tokens, sample=False)
        yield "nn.GRU loop, top_k 40", gru_loop(model, batch, options.tokens, sample=True)
        return
    if importlib.util.find_spec("transformers"):
        yield "transformers generate", hugging_face(model, batch, options.tokens)
    if batch == 1 and importlib.util.find_spec("llama_cpp") and importlib.util.find_spec("gguf"):
        for kind in ("f32", "q8_0"):
            yield f"llama.cpp {kind}", llama_cpp(model, kind, options, folder / f"{kind}.gguf")


def gru_loop(model: LanguageModel, batch: int, tokens: int, *, sample: bool) -> Callable[[], float]:
    """The loop one writes by hand, with the model's own modules."""
    embedding, cell, output = model.embedding, model.cell, model.output

    @torch.inference_mode()
    def run() -> float:
        ids, state = torch.zeros(batch, 1, dtype=torch.int64), None
        for _ in range(tokens):
            hidden, state = cell(embedding(ids), state)
            logits = output(hidden[:, -1])
            if sample:
                best, which = (logits / 0.8).topk(40)
                ids = which.gather(1, torch.multinomial(F.softmax(best, dim=-1), 1))
            else:
                ids = logits.argmax(-1, keepdim=True)
        return tokens * batch

    return run


def hugging_face(model: LanguageModel, batch: int, tokens: int) -> Callable[[], float]:
    """`LlamaForCausalLM.generate` on the same weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    options = model.options
    config = LlamaConfig(
        vocab_size=V, hidden_size=options.hidden_size, num_hidden_layers=options.num_layers,
        num_attention_heads=options.num_heads, intermediate_size=model.layers[0].mlp.gate_proj.out_features,
        max_position_embeddings=options.context_length, rms_norm_eps=options.norm_epsilon,
        rope_theta=options.rope_theta, tie_word_embeddings=False, pad_token_id=0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    llama = LlamaForCausalLM(config).eval()
    own = {name if name.startswith("lm_head") else f"model.{name}": value for name, value in model.state_dict().items()}
    llama.load_state_dict(own)
    prompt = torch.arange(PROMPT).repeat(batch, 1)
    with torch.inference_mode():
        torch.testing.assert_close(llama(prompt).logits, model(prompt)[0], atol=1e-4, rtol=0)
    mask = torch.ones_like(prompt)

    @torch.inference_mode()
    def run() -> float:
        made = llama.generate(
            prompt, attention_mask=mask, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=True, top_k=40,
            temperature=0.8,
        )  # fmt: skip
        return (made.shape[1] - PROMPT) * batch

    return run


def llama_cpp(model: LanguageModel, kind: str, options: argparse.Namespace, path: Path) -> Callable[[], float]:
    """llama.cpp on the same weights, through its Python binding."""
    from llama_cpp import Llama

    write_gguf(model, kind, path)
    with silence():
        llama = Llama(
            str(path), n_ctx=model.options.context_length, n_threads=options.threads, n_threads_batch=options.threads,
            verbose=False, logits_all=False,
        )  # fmt: skip

    def run() -> float:
        llama.reset()
        llama.eval(list(range(PROMPT)))
        for _ in range(options.tokens):
            # Everything off but top_k and temperature.
            token = llama.sample(top_k=40, top_p=1.0, min_p=0.0, typical_p=1.0, temp=0.8, repeat_penalty=1.0)
            llama.eval([token])
        return options.tokens

    return run


def write_gguf(model: LanguageModel, kind: str, path: Path, vocabulary: Sequence[str] | None = None) -> None:
    """The model's weights as llama.cpp reads them; norms and embedding stay in fp32.

    Args:
        vocabulary: the text of each token; without one llama.cpp knows ids alone.
    """
    from gguf import GGMLQuantizationType, GGUFWriter, quants

    options, arrays = model.options, model.arrays()
    kinds = {"f32": GGMLQuantizationType.F32, "q8_0": GGMLQuantizationType.Q8_0}
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(options.context_length)
    writer.add_embedding_length(options.hidden_size)
    writer.add_block_count(options.num_layers)
    writer.add_feed_forward_length(arrays["layers.0.mlp.gate_proj.weight"].shape[0])
    writer.add_head_count(options.num_heads)
    writer.add_head_count_kv(options.num_heads)
    writer.add_layer_norm_rms_eps(options.norm_epsilon)
    writer.add_rope_freq_base(options.rope_theta)
    writer.add_rope_dimension_count(options.hidden_size // options.num_heads)
    if vocabulary is None:
        writer.add_vocab_size(V)
        writer.add_tokenizer_model("no_vocab")
    else:
        # RWKV's takes the longest token that fits, and knows no token that would end a text.
        writer.add_tokenizer_model("rwkv")
        writer.add_token_list(list(vocabulary))
    names = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    for name, array in arrays.items():
        if name.startswith("layers."):
            _, layer, rest = name.split(".", 2)
            target = f"blk.{layer}.{names[rest.removesuffix('.weight')]}.weight"
        else:
            target = {"embed_tokens.weight": "token_embd", "norm.weight": "output_norm", "lm_head.weight": "output"}[
                name
            ] + ".weight"
        if "q_proj" in name or "k_proj" in name:
            # llama.cpp turns neighbours, where the Llama weights pair i with i + D/2.
            heads = array.reshape(options.num_heads, 2, -1, array.shape[1])
            array = np.ascontiguousarray(heads.swapaxes(1, 2).reshape(array.shape))
        if array.ndim == 2 and kind != "f32" and name != "embed_tokens.weight":
            writer.add_tensor(target, quants.quantize(array, kinds[kind]), raw_dtype=kinds[kind])
        else:
            writer.add_tensor(target, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Without what a C library says on stderr."""
    kept = os.dup(2)
    with open(os.devnull, "wb") as nothing:
        os.dup2(nothing.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def show(shape: str, batch: int, model: LanguageModel, rates: dict[str, dict[str, float]]) -> None:
    """One table."""
    table = Table(title=f"{shape}, batch {batch}: tokens/s", box=None, title_justify="left")
    table.add_column("contender")
    for name in ("median", "least", "most"):
        table.add_column(name, justify="right")
    for name, rate in rates.items():
        table.add_row(name, *(f"{rate[column]:,.0f}" for column in ("median", "least", "most")))
    Console().print(table)


if __name__ == "__main__":
    main()
