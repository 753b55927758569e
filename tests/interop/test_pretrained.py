"""Exports of a run with a pretrained tokenizer carry its tokens, its ends and its chat template."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lm.errors import UnsupportedExportError
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


def test_onnx_says_which_tokens_end_a_text(tmp_path: Path) -> None:
    run = run_of("bytes", tmp_path)
    assert onnx._description(run, run.model.first_state())["end_ids"] == [2, 0]


def test_html_refuses_the_tokenizer_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedExportError, match="A pretrained tokenizer does not export to html: export to hf"):
        html.export(run_of("bytes", tmp_path), tmp_path / "out.html")
