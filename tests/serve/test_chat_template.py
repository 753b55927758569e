"""/v1/chat/completions of a model with a chat template and end tokens."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lm
from lm.generation.options import CHAT_SAMPLING, SamplingOptions
from lm.generation.request import Request
from lm.tokenizers.pretrained import PretrainedTokenizer
from serve.settings import ServeOptions
from tests.serve.conftest import Serve, Server, refusal
from tests.tokenizers.tiny_pretrained import CHAT_TEMPLATE, CONFIG, byte_level, make_run

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow
MESSAGES = [{"role": "system", "content": "the cat <|im_end|>"}, {"role": "user", "content": "sat on"}]
STRICT = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('No system here') }}{% endif %}"
    "{{ m.content }}{% endfor %}"
)
ASK = {"model": "chatty", "messages": MESSAGES, "max_tokens": 12, "temperature": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chatty")
    for name, template in (("chatty", CHAT_TEMPLATE), ("strict", STRICT)):
        config = {**CONFIG, "chat_template": template}
        make_run(folder / name, PretrainedTokenizer.from_json(byte_level(), config))
    tokenizer = PretrainedTokenizer.from_json(byte_level(), CONFIG)
    make_run(folder / "cold", tokenizer, sampling={"temperature": 0.0, "top_k": 1})
    return folder


@pytest.fixture(scope="module")
def server(serve: Serve, folder: Path) -> Iterator[Server]:
    with serve("chatty", "strict", "cold", runs_dir=folder) as running:
        yield running


def test_the_model_reads_the_messages_by_its_template(server: Server, folder: Path):
    run = lm.load("chatty", runs_dir=folder)
    ids = run.tokenizer.encode_chat(MESSAGES)
    options = SamplingOptions(max_tokens=12, temperature=0, ignore_eos=True)
    expected = "".join(event.text for event in run.engine().run(Request(tuple(ids.tolist()), options)))
    done = server.openai.chat.completions.create(**ASK, extra_body={"ignore_eos": True})
    assert (done.choices[0].message.content, done.choices[0].finish_reason) == (expected, "length")
    assert done.usage is not None and (done.usage.prompt_tokens, done.usage.completion_tokens) == (len(ids), 12)
    developer = [{**MESSAGES[0], "role": "developer"}, MESSAGES[1]]
    same = server.openai.chat.completions.create(**{**ASK, "messages": developer}, extra_body={"ignore_eos": True})
    assert same.choices[0].message.content == expected


def test_a_reply_ends_before_the_end_token(server: Server):
    ended = {**ASK, "logit_bias": {"2": 100}}
    done = server.openai.chat.completions.create(**ended)
    assert (done.choices[0].message.content, done.choices[0].finish_reason) == ("", "stop")
    assert done.usage is not None and done.usage.completion_tokens == 1
    *_, last = server.openai.chat.completions.create(stream=True, **ended)
    assert last.choices[0].finish_reason == "stop"
    text = server.openai.completions.create(model="chatty", prompt="sat", max_tokens=5, logit_bias={"2": 100})
    assert (text.choices[0].text, text.choices[0].finish_reason) == ("", "stop")


def test_the_start_of_another_role_does_not_end_a_reply(server: Server):
    newline = server.post("/tokenize", model="chatty", prompt="\n")["tokens"]
    spelled = server.post("/tokenize", model="chatty", prompt="\nUser:")["tokens"]
    done = server.post("/v1/chat/completions", **{**ASK, "logit_bias": {str(t): 100 for t in {*newline, *spelled}}})
    assert done["choices"][0]["finish_reason"] == "length"


def test_a_template_that_refuses_the_messages_is_400(server: Server):
    status, error = refusal(server, {**ASK, "model": "strict"}, "/v1/chat/completions")
    assert (status, error["message"]) == (400, "The chat template of the model refuses these messages: No system here")
    done = server.post("/v1/chat/completions", **{**ASK, "model": "strict", "messages": MESSAGES[1:]})
    assert done["choices"][0]["message"]["role"] == "assistant"


def test_options_that_a_request_leaves_out_are_those_of_the_model_s_source(server: Server):
    def texts(**body: object) -> tuple[str, str]:
        common = {"model": "cold", "max_tokens": 12, "seed": 3, "ignore_eos": True, **body}
        chat = server.post("/v1/chat/completions", messages=MESSAGES, **common)["choices"][0]["message"]["content"]
        return chat, server.post("/v1/completions", prompt="sat", **common)["choices"][0]["text"]

    greedy = texts(temperature=0, top_k=1)
    assert texts() == texts(temperature=None) == greedy
    drawn = texts(model="chatty", temperature=2, top_k=None)
    # Both have the same weights: a value that is given wins, also one that switches an option off.
    assert texts(temperature=2, top_k=0) == texts(temperature=2, top_k=-1) == drawn
    assert drawn != greedy
    # Without options of a source, a chat by a template has those of the documentation, and a text the general ones.
    chat, text = texts(model="chatty")
    assert chat == texts(model="chatty", **CHAT_SAMPLING)[0]
    assert text == texts(model="chatty", temperature=SamplingOptions().temperature)[1]


PAGE = """
import asyncio, json, sys
from pathlib import Path
import gradio as gr
from serve.engines.model_pool import ModelPool
from serve.page.context import Page
from serve.page.tabs import write
from serve.settings import ServeOptions

options = ServeOptions(runs=("cold", "chatty"), runs_dir=Path(sys.argv[1]))
with gr.Blocks() as blocks:
    write.build(Page(ModelPool(options), options, training=None))
(on_model,) = (each for each in blocks.fns.values() if getattr(each.fn, "__name__", "") == "on_model")
sliders = on_model.inputs[2:]
names = [slider.label for slider in sliders]
shown = [slider.value for slider in sliders]


def picked(values):
    found = asyncio.run(on_model.fn("chatty", "cold", *values))[1:]
    return {name: "stays" if value == gr.skip() else value for name, value in zip(names, found)}


print(json.dumps([dict(zip(names, shown)), picked(shown), picked([0.9, *shown[1:]])]))
"""


def test_the_sliders_of_the_page_take_the_options_of_the_model_s_source(folder: Path):
    done = subprocess.run([sys.executable, "-c", PAGE, folder], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    first, other, moved = json.loads(done.stdout.splitlines()[-1])
    assert (first["Temperature"], first["Top-k"], first["Top-p"]) == (0, 1, 1)
    assert (other["Temperature"], other["Top-k"], other["Top-p"]) == (SamplingOptions().temperature, 0, 1)
    assert {*moved.values()} == {"stays"}
    # Gradio takes seconds to import, which the fast tests do not have.
    from serve.page.reproduce import TextRequest, reproduce

    request = TextRequest("cold", "sat", SamplingOptions(temperature=0.8, seed=3), ("temperature", "top_k"))
    command = reproduce("Command line", request, server=ServeOptions(), url="")
    assert "--temperature=0.8 --top-k=1000000 --seed=3" in command


def test_the_model_s_record_and_tokenizer_say_that_there_is_a_template(server: Server):
    assert server.request("GET", "/v1/models/chatty")[2]["chat_template"] is True
    info = server.request("GET", "/tokenizer_info?model=chatty")[2]
    assert (info["chat_template"], info["bos_token"], info["eos_token"]) == (
        CHAT_TEMPLATE,
        "<|endoftext|>",
        "<|im_end|>",
    )
    for name, token in (("bos_token", 0), ("eos_token", 2)):
        assert server.post("/tokenize", model="chatty", prompt=info[name])["tokens"] == [token]
