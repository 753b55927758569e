"""Decoding speed in tokens per second: Inkling and other tools on the same random weights.

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

import contextlib
import importlib.util
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.machine import Spread, alternate, versions
from benchmarks.suite import TRANSFORMERS, Claim, Record, Settings, Table, say, spread_rows, spreads_text
from lm.config import Section
from lm.generation.decoder import Decoder
from lm.generation.engine import Engine, Request
from lm.generation.open_decoder import open_decoder
from lm.generation.options import SamplingOptions
from lm.generation.torch_decoder import TorchDecoder
from lm.models.base import LanguageModel, build_model
from lm.tokenizers.char import CharTokenizer

LLAMA_CPP = "llama.cpp: pip install llama-cpp-python gguf"
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
        ("engine bf16", BATCH, "transformers generate", 5.0),
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


def run(settings: Settings) -> Record:
    """Let the contenders of both shapes take turns, one text at a time and many."""
    torch.set_num_threads(settings.threads)
    # Chosen before any contender starts threads.
    os.environ["OMP_NUM_THREADS"] = str(settings.threads)
    record = Record(
        options={**settings.options(), "tokens": TOKENS, "vocab_size": V},
        versions=versions("numpy", "torch", "transformers", "llama-cpp-python"),
    )
    for library, how in (("transformers", TRANSFORMERS), ("llama_cpp", LLAMA_CPP)):
        if importlib.util.find_spec(library) is None:
            record.missing.append(how)
    with tempfile.TemporaryDirectory(prefix="inkling-benchmark-") as folder:
        for shape, weights in SHAPES.items():
            model = build_model(Section(**weights), V, seed=1).eval()
            for batch in (1, BATCH):
                contenders = dict(ours(model, batch, TOKENS[shape], settings.threads))
                contenders |= dict(peers(shape, model, batch, TOKENS[shape], settings.threads, Path(folder)))
                rates = alternate(contenders, settings.rounds)
                title = f"{shape}, batch {batch}"
                record.tables.append(Table(title, spread_rows(rates), "tokens/s over the whole batch"))
                say(f"  {title}: {spreads_text(rates)}")
                record.claims += claims(shape, batch, rates)
    read = bandwidth()
    record.options["memory_bytes_per_second"] = read
    record.notes.append(f"All threads together read {read / 1e9:,.1f} GB/s from memory.")
    return record


def claims(shape: str, batch: int, rates: Mapping[str, Spread]) -> list[Claim]:
    """Medians of one run over medians of the same run."""
    return [
        Claim(
            f"{shape}, batch {batch}: {name} over {peer}",
            rates[name]["median"] / rates[peer]["median"] if peer in rates else None,
            target, "at least", "×", "" if peer in rates else f"{peer.split()[0]} is not here",
        )
        for name, each, peer, target in TARGETS[shape]
        if each == batch
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


def ours(model: LanguageModel, batch: int, tokens: int, threads: int) -> Iterator[tuple[str, Callable[[], float]]]:
    """Kernel and engine, fp32, bf16 and int8, and the engine on torch."""
    settings, arrays = model.options.model_dump(mode="json"), model.arrays()

    def native(precision: Any) -> Decoder:
        return open_decoder(
            settings, lambda: arrays, lambda: model, precision=precision, max_slots=batch, threads=threads
        )

    for precision in ("fp32", "bf16", "int8"):
        yield f"kernel {precision}", steps(native(precision), batch, tokens)
        yield f"engine {precision}", requests(native(precision), batch, tokens)
    yield "engine torch", requests(TorchDecoder(model), batch, tokens // 4)


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
            engine.submit(
                Request(
                    prompt, SamplingOptions(top_k=40, temperature=0.8, max_tokens=tokens, seed=seed, ignore_eos=True)
                )
            )
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
    shape: str, model: LanguageModel, batch: int, tokens: int, threads: int, folder: Path
) -> Iterator[tuple[str, Callable[[], float]]]:
    """What is installed of the tools one would use instead."""
    if shape.startswith("gru"):
        yield "nn.GRU loop, argmax", gru_loop(model, batch, tokens, sample=False)
        yield "nn.GRU loop, top_k 40", gru_loop(model, batch, tokens, sample=True)
        return
    if importlib.util.find_spec("transformers"):
        yield "transformers generate", hugging_face(model, batch, tokens)
    if batch == 1 and importlib.util.find_spec("llama_cpp") and importlib.util.find_spec("gguf"):
        for kind in ("f32", "q8_0"):
            yield f"llama.cpp {kind}", llama_cpp(model, kind, tokens, threads, folder / f"{kind}.gguf")


def gru_loop(model: Any, batch: int, tokens: int, *, sample: bool) -> Callable[[], float]:
    """The loop one writes by hand, with the model's own modules."""
    embedding, cell, output = model.embedding, model.cell, model.output

    @torch.inference_mode()
    def run() -> float:
        ids, state = torch.zeros(batch, 1, dtype=torch.int64, device=output.weight.device), None
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


def hugging_face(model: Any, batch: int, tokens: int) -> Callable[[], float]:
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
    device = model.lm_head.weight.device
    llama, prompt = llama.to(device), torch.arange(PROMPT, device=device).repeat(batch, 1)
    with torch.inference_mode():
        torch.testing.assert_close(llama(prompt).logits, model(prompt)[0], atol=1e-4, rtol=0)
    mask = torch.ones_like(prompt)

    @torch.inference_mode()
    def run() -> float:
        made = llama.generate(
            prompt, attention_mask=mask, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=True, top_k=40,
            temperature=0.8,
        )  # fmt: skip
        return float((made.shape[1] - PROMPT) * batch)

    return run


def llama_cpp(model: LanguageModel, kind: str, tokens: int, threads: int, path: Path) -> Callable[[], float]:
    """llama.cpp on the same weights, through its Python binding."""
    from llama_cpp import Llama

    write_gguf(model, kind, path)
    with silence():
        llama = Llama(
            str(path), n_ctx=model.options.context_length, n_threads=threads, n_threads_batch=threads,
            verbose=False, logits_all=False,
        )  # fmt: skip

    def run() -> float:
        llama.reset()
        llama.eval(list(range(PROMPT)))
        for _ in range(tokens):
            # Everything off but top_k and temperature.
            token = llama.sample(top_k=40, top_p=1.0, min_p=0.0, typical_p=1.0, temp=0.8, repeat_penalty=1.0)
            llama.eval([token])
        return tokens

    return run


def write_gguf(model: LanguageModel, kind: str, path: Path, vocabulary: Sequence[str] | None = None) -> None:
    """The model's weights as llama.cpp reads them; norms and embedding stay in fp32.

    Args:
        vocabulary: the text of each token; without one llama.cpp has ids alone.
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
        # RWKV's takes the longest token that fits, and has no token that would end a text.
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
