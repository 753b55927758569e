"""Exports of a run with a pretrained tokenizer carry its tokens, its ends and its chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import lm
from lm.errors import RunError, UnsupportedExportError
from lm.generation.options import SamplingOptions
from lm.generation.request import Request
from lm.interop import html, huggingface, onnx
from lm.runs.run import Run
from lm.tokenizers.pretrained import PretrainedTokenizer
from tests.tokenizers.test_pretrained import MESSAGES
from tests.tokenizers.tiny_pretrained import CONFIG, byte_level, make_run, qwen_like, sentencepiece_like

pytestmark = pytest.mark.slow
FORMS = {"bytes": byte_level(), "qwen": qwen_like(), "pieces": sentencepiece_like()}
TEXT = "The café – ☕ 🙂 12\n\n  sat ."


def run_of(form: str, folder: Path) -> Run:
    config = CONFIG if form != "pieces" else {**CONFIG, "bos_token": "<s>", "eos_token": "</s>"}
    return make_run(folder / "tiny", PretrainedTokenizer.from_json(FORMS[form], config))


def without_merges() -> str:
    content = json.loads(byte_level())
    return json.dumps({**content, "model": {**content["model"], "merges": []}})


@pytest.mark.parametrize("form", FORMS)
def test_transformers_has_the_same_ids_prompts_and_end_tokens(form: str, tmp_path: Path) -> None:
    import transformers

    run = run_of(form, tmp_path)
    done = huggingface.export(run, tmp_path / "out")
    assert done.loss_there == pytest.approx(done.loss_here, abs=1e-3)
    ours, theirs = run.tokenizer, transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs.encode(TEXT, add_special_tokens=False) == ours.encode(TEXT).tolist()
    prompt = theirs.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=False)
    assert theirs.encode(prompt, add_special_tokens=False) == ours.encode_chat(MESSAGES).tolist()
    assert theirs.eos_token_id == ours.end_id
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.generation_config.eos_token_id == model.config.eos_token_id == list(ours.end_ids)
    saved = json.loads((tmp_path / "out" / "tokenizer.json").read_text("utf-8"))
    assert (
        PretrainedTokenizer.from_json(
            json.dumps(saved), {**json.loads((tmp_path / "out" / "tokenizer_config.json").read_text("utf-8"))}
        ).sha256
        == ours.sha256
    )


@pytest.mark.parametrize("program", [huggingface, onnx], ids=["hf", "onnx"])
def test_a_tokenizer_that_gives_another_number_of_ids_there_is_refused_in_a_sentence(
    program: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, other = run_of("bytes", tmp_path), PretrainedTokenizer.from_json(without_merges(), CONFIG)
    monkeypatch.setattr(run.tokenizer, "to_huggingface", other.to_huggingface)
    with pytest.raises(RunError, match=r"does not read a text as run 'tiny' does: .* tokens in .* here\. It was not"):
        program.export(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_onnx_says_which_tokens_end_a_text(tmp_path: Path) -> None:
    run = run_of("bytes", tmp_path)
    assert onnx._description(run, run.model.first_state())["end_ids"] == [2, 0]


@pytest.mark.parametrize("form", FORMS)
def test_html_continues_and_answers_with_the_text_of_the_run(form: str, tmp_path: Path) -> None:
    run, found = run_of(form, tmp_path), html.program()
    assert found is not None
    done = html.export(run, tmp_path / "out.html")
    assert done.loss_there == pytest.approx(done.loss_here, abs=1e-5)
    content, block = html.page_content(run)
    options = {"temperature": 0.7, "seed": "3", "maxTokens": 40}
    samples = [{"prompt": TEXT, "chat": chat, **options} for chat in (False, True)]
    texts = html.prove(found, content, html.packed(block), {"text": "a", "samples": samples})["texts"]
    there = lm.load("tiny", runs_dir=tmp_path, precision="int8")
    sampling = SamplingOptions(temperature=0.7, seed=3, max_tokens=40)
    assert texts[0] == there.sample(TEXT, **sampling.model_dump(exclude_defaults=True))
    ids = run.tokenizer.encode_chat([{"role": "user", "content": TEXT}])
    answer = there.events(Request(tuple(ids.tolist()), sampling))
    assert texts[1] == "".join(event.text for event in answer)


def test_html_refuses_a_step_of_a_tokenizer_in_a_sentence(tmp_path: Path) -> None:
    content = json.loads(byte_level())
    content["pre_tokenizer"]["pretokenizers"].insert(0, {"type": "Punctuation", "behavior": "Isolated"})
    run = make_run(tmp_path / "tiny", PretrainedTokenizer.from_json(json.dumps(content), CONFIG))
    with pytest.raises(UnsupportedExportError, match="has the words of Punctuation, which no html page has: export to"):
        html.export(run, tmp_path / "out.html")
