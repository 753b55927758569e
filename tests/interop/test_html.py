"""The page of a run generates, in a browser without a network, the text of `lm sample --precision int8`."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import Browser, Page, sync_playwright

import lm
from lm.config import Section
from lm.errors import RunError, UnsupportedExportError
from lm.generation.distribution import uniforms
from lm.generation.filters import SamplingContext
from lm.generation.options import SamplingOptions
from lm.generation.sampler import Sampler
from lm.interop import html
from lm.models.base import LanguageModel
from lm.tokenizers import Tokenizer
from lm.tokenizers.gguf_vocabulary import WORDS
from lm.tokenizers.javascript_pattern import javascript_pattern
from lm.tokenizers.pretrained import PretrainedOptions, PretrainedTokenizer
from tests.contracts.test_tokenizers import subwords, trained
from tests.kernels.test_decoding import IDS, SHAPES, decoder_of, model_of, read
from tests.tokenizers.test_pretrained import FORMS as PRETRAINED
from tests.tokenizers.test_pretrained import TEXTS as PRETRAINED_TEXTS
from tests.tokenizers.test_pretrained import made
from tests.tokenizers.tiny_pretrained import CONFIG, byte_level, make_run

SHIPPED = "shakespeare-gru"
NODE = html.program()
MIN_RATE = 1000
"""Characters per second of the shipped page in Chromium, at least; a machine at rest has several times as many."""


def test_node_is_here() -> None:
    assert NODE is not None and NODE[0].startswith("Node.js "), "The page is tested in Node.js: apt-get install nodejs"


# -- the page ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """The page of the shipped run, and what its export measured."""
    path = tmp_path_factory.mktemp("page") / "shakespeare.html"
    return path, html.export(lm.load(SHIPPED), path)


@pytest.mark.slow
def test_an_export_proves_the_page_and_is_small(page_file: tuple[Path, Any]) -> None:
    path, done = page_file
    assert done.program == NODE[0] and done.tokens == 2000
    assert done.loss_there == pytest.approx(done.loss_here, abs=1e-6)
    assert done.bits_per_byte_there == pytest.approx(done.bits_per_byte_here, abs=1e-6)
    assert done.size_bytes == path.stat().st_size < 1.5 * lm.load(SHIPPED).record["parameters"]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert path is not None, "The page is tested in Chromium: apt-get install chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


def generated(page: Page, tokens: int) -> str:
    """The text after a click on Generate, without the prompt."""
    page.locator("#go:enabled").wait_for()
    page.click("#go")
    page.get_by_text(re.compile(f"{tokens:,} tokens, .* characters/s")).wait_for()
    page.get_by_role("button", name="Generate").wait_for()
    prompt, text = (page.locator(which).text_content() or "" for which in ("#text b", "#text"))
    return text.removeprefix(prompt)


@pytest.mark.slow
def test_the_page_gives_the_text_of_lm_sample_without_a_network(page_file: tuple[Path, Any], chromium: Browser) -> None:
    run = lm.load(SHIPPED, precision="int8")
    page = chromium.new_context(offline=True, viewport={"width": 390, "height": 844}).new_page()
    requests: list[str] = []
    errors: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(page_file[0].as_uri())
    for prompt, seed, temperature, top_k in (("ROMEO:", 7, 0.8, 0), ("", 2**60 + 1, 1, 20)):
        page.fill("#prompt", prompt)
        page.fill("#seed", str(seed))
        page.fill("#temperature", str(temperature))
        page.fill("#top_k", str(top_k))
        options = {"seed": seed, "temperature": temperature, "top_k": top_k or None, "max_tokens": 300}
        assert generated(page, 300) == run.sample(prompt, **options)
        assert page.locator("#bars li").count() == 8
        assert f"--seed {seed}" in (page.locator("#command").text_content() or "")
    page.fill("#length", "3000")
    generated(page, 3000)
    rate = re.search(r"([\d,]+) characters/s", page.locator("#status").text_content() or "")
    assert rate is not None and int(rate[1].replace(",", "")) >= MIN_RATE
    # It fits the width of a phone.
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert not errors
    assert all(url.startswith(("file:", "blob:", "data:")) for url in requests)


@pytest.mark.slow
def test_the_command_of_the_page_gives_its_text(chromium: Browser, tmp_path: Path) -> None:
    tokenizer = PretrainedTokenizer.from_json(byte_level(), CONFIG)
    make_run(tmp_path / "own", tokenizer, sampling={"temperature": 0.6, "top_k": 20, "repetition_penalty": 1.3})
    make_run(tmp_path / "plain", tokenizer)
    for name, chat, knobs, flags in (
        ("own", True, {}, "--repetition-penalty 1"),
        ("own", False, {"top_k": 0, "min_p": 0.1}, "--top-k 1000000 --min-p 0.1 --repetition-penalty 1"),
        ("plain", True, {}, ""),
        ("plain", False, {"temperature": 0.7}, "--temperature 0.7"),
    ):
        path = tmp_path / f"{name}.html"
        if not path.exists():
            html.export(lm.load(name, runs_dir=tmp_path), path)
        page = chromium.new_page()
        page.goto(path.as_uri())
        page.fill("#length", "20")
        page.fill("#prompt", "The cat")
        page.set_checked("#chat", chat)
        for knob, value in knobs.items():
            page.fill(f"#{knob}", str(value))
        text, command = generated(page, 20), page.locator("#command").text_content() or ""
        assert command.partition("--max-tokens 20")[2].partition("--prompt")[0].strip() == flags
        program = f"{shlex.quote(sys.executable)} -m cli.main"
        here = re.sub(r"\blm (chat|sample)\b", rf"{program} \1 --runs-dir {shlex.quote(str(tmp_path))}", command)
        done = subprocess.run(here, shell=True, capture_output=True, encoding="utf-8", check=True)
        assert text and done.stdout.rstrip("\n").endswith(text.rstrip("\n")), command


@pytest.mark.slow
def test_chromium_proves_a_page_where_node_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(html, "PROGRAMS", html.PROGRAMS[1:])
    found = html.program()
    assert found is not None and found[0].startswith("Chromium ")
    expression = "['<é>\\n', uniform('1', 0), exp(0.3)]"
    assert html.run_script(found, expression) == html.run_script(NODE, expression)


@pytest.mark.slow
def test_an_export_without_a_program_says_that_the_page_was_not_proved(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    done = html.export(lm.load(SHIPPED), tmp_path / "page.html")
    assert done.loss_there is None and done.loss_here > 1
    assert "was not proved: neither node nor Chromium" in done.notes[0]


# -- kernels, sampler, tokenizers -------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_are_those_of_the_native_int8_kernel(shape: str, javascript_logits: dict[str, Any]) -> None:
    decoder = decoder_of(model_of(SHAPES[shape]), precision="int8")
    np.testing.assert_allclose(javascript_logits[shape], read(decoder, IDS[:60]), atol=3e-6)


@pytest.fixture(scope="module")
def javascript_logits() -> dict[str, Any]:
    """The logits of all shapes, from one program."""
    return dict(zip(SHAPES, logits_there(model_of(shape) for shape in SHAPES.values()), strict=True))


def logits_there(models: Iterable[LanguageModel], before: str = "") -> Any:
    """The logits of the first IDS in JavaScript; `before`: a statement before the models are made."""
    made = []
    for model in models:
        block = html.ArrayBlock()
        content = block.placed(html.model_parts(model.options.model_dump(mode="json"), model.arrays()))
        made.append([content, block.memory, html.packed(bytes(block.content))])
    script = f"""(async () => {{
      {before}
      const results = [];
      for (const [content, sizes, parts] of {html._json(made)}) {{
        const memory = new Memory(sizes);
        await inflate(parts, memory.buffer);
        const model = new Model(withArrays(content, memory));
        results.push({IDS[:60]}.map((id) => [...model.step(id)]));
      }}
      return results;
    }})()"""
    return html.run_script(NODE, script)


def test_without_webassembly_the_logits_are_the_same(javascript_logits: dict[str, Any]) -> None:
    shapes = "gru, two layers", "transformer, odd"
    plain = logits_there((model_of(SHAPES[shape]) for shape in shapes), "delete globalThis.WebAssembly;")
    assert plain == [javascript_logits[shape] for shape in shapes]


def test_random_numbers_and_filters_are_those_of_the_sampler() -> None:
    seeds = (0, 1, 2**32, 2**63 - 1)
    drawn = html.run_script(
        NODE, f"{[str(seed) for seed in seeds]}.map((seed) => [0, 1, 999].map((at) => uniform(seed, at)))"
    )
    assert drawn == [[uniforms(seed, 0, at, 1)[0] for at in (0, 1, 999)] for seed in seeds]

    tokenizer = trained("char")
    source = np.random.default_rng(0)
    logits = source.normal(size=(2, tokenizer.vocab_size)).round(1).astype(np.float32)  # with equals
    choices = [
        {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
        for temperature in (0.0, 0.7, 1.0) for top_k in (None, 1, 6) for top_p in (None, 0.5) for min_p in (None, 0.1)
    ]  # fmt: skip
    names = {"temperature": "temperature", "top_k": "topK", "top_p": "topP", "min_p": "minP"}
    there = [{names[name]: value for name, value in choice.items()} for choice in choices]
    script = f"""{json.dumps(logits.tolist())}.map((row) => {json.dumps(there)}.map((options) => {{
      const kept = filtered(Float32Array.from(row), options, {tokenizer.unknown_id});
      return [...kept].map((logit) => (logit === -Infinity ? 0 : Math.exp(logit)));
    }}))"""
    for row, results in zip(logits, html.run_script(NODE, script), strict=True):
        for choice, weights in zip(choices, results, strict=True):
            ours = Sampler(SamplingOptions(**choice), tokenizer).probabilities(row[None], [SamplingContext(0)])[0]
            np.testing.assert_allclose(np.array(weights) / sum(weights), ours, atol=1e-12, err_msg=str(choice))


def test_tokenizers_give_the_same_ids_and_texts() -> None:
    kinds: list[Tokenizer] = [
        trained(name, unknown) for name in ("byte", "char", "word", "subword") for unknown in ("replace", "skip")
    ]
    kinds += [subwords(algorithm)[0] for algorithm in ("bpe", "unigram")]
    kinds += [PretrainedTokenizer.from_json(form, CONFIG) for form in PRETRAINED.values()]
    kinds += [words_of(name) for name in ("llama3", "tekken", "gpt-4o", "default")]
    skips = PretrainedOptions(unknown="skip")
    kinds += [PretrainedTokenizer.from_payload(skips, made(form).payload()) for form in ("qwen", "pieces")]
    texts = [
        *PRETRAINED_TEXTS, "a\ud800b", "\ufeffThe", "The  cat   sat on\n\n the mat , <unk> " * 3,
        "cafe\u0301 \u2581a <|im_end|>", " <think>I'LL we'\u017f don'T x\x85 \x1d y\ufeff 12345 ²½\u0660",
        "\u1100\u1161 ſK HTMLParser/x\r\n\r\n  z", "The " * 40 + "cat" * 30,
    ]  # fmt: skip
    block = html.ArrayBlock()
    described = block.placed([html.tokenizer_content(each) for each in kinds])
    # ASCII alone, so that lone surrogates arrive.
    script = f"""(async () => {{
      const memory = new Memory({json.dumps(block.memory)});
      await inflate({json.dumps(html.packed(bytes(block.content)))}, memory.buffer);
      return {json.dumps(described)}.map((each) => {{
        const tokenizer = new TOKENIZERS[each.type](withArrays(each, memory));
        return {json.dumps(texts)}.map((text) => {{
          const ids = tokenizer.encode(text), stream = tokenizer.stream();
          return [ids, ids.map((id) => stream.feed(id)).join("") + stream.end()];
        }});
      }});
    }})()"""
    for tokenizer, results in zip(kinds, html.run_script(NODE, script), strict=True):
        for text, (ids, decoded) in zip(texts, results, strict=True):
            ours = tokenizer.encode(text)
            assert ids == ours.tolist(), (tokenizer.type, text)
            assert decoded == tokenizer.decode(ours), (tokenizer.type, text)


def words_of(name: str) -> PretrainedTokenizer:
    """Byte-level BPE whose words are those of GGUF with this name."""
    content = json.loads(byte_level())
    splits = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in WORDS[name].patterns
    ]
    byte_level_step = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [*splits, byte_level_step]}
    content["model"]["ignore_merges"] = WORDS[name].whole_words
    return PretrainedTokenizer.from_json(json.dumps(content), CONFIG)


@pytest.mark.parametrize(
    "pattern", [r"(?i:[^'])k|\x{1F600}|[^\]\S-]+\d{,2}?|.{2,}", r"[\s\--/]\.(?=\p{^Lu}(a|b))", "[k-]"]
)
def test_a_pattern_matches_the_same_in_javascript(pattern: str) -> None:
    import tokenizers

    text = "Hello-World.Ab k'K\u212a9\ufeff \u0660\x85\U0001f600x] - /\n\n--.a 12ſs"
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    there = html.run_script(
        NODE, f"isolated({json.dumps(text)}, new RegExp({json.dumps(javascript_pattern(pattern))}, 'gu'))"
    )
    assert there == [part for part, _ in split.pre_tokenize_str(text)]


@pytest.mark.parametrize(
    "pattern", [r"\p{L}++", r"\bx", "a|^b", "(?>a)", "[a[b]]", r"\p{Foo}", "[a-z&&x]", "(?i:[a-z])", "a{x"]
)
def test_a_pattern_that_a_page_does_not_have_is_refused(pattern: str) -> None:
    with pytest.raises(UnsupportedExportError, match="by a pattern that no html page has .* export to hf or onnx"):
        javascript_pattern(pattern)


# -- refusals ---------------------------------------------------------------------------------------------


def test_an_existing_file_stays_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text("mine")
    with pytest.raises(RunError, match="exists already: give another --out"):
        html.export(lm.load(SHIPPED), path)
    assert path.read_text() == "mine"


def test_a_model_that_the_native_kernels_lack_is_refused_with_what_to_train() -> None:
    options = Section(type="gru", adaptive_cutoffs=[5], table_orders=[2]).resolve("model").model_dump()
    with pytest.raises(UnsupportedExportError, match="does not have context tables under .*: train with a preset"):
        html.check_model(options)
    with pytest.raises(UnsupportedExportError, match="does not have a kernel for mamba models: train with a preset"):
        html.check_model({"type": "mamba"})


def test_a_tokenizer_without_a_counterpart_is_refused() -> None:
    with pytest.raises(UnsupportedExportError, match="char tokenizers do not export to html"):
        Tokenizer.to_page(trained("char"))


def test_a_failing_script_is_one_sentence() -> None:
    with pytest.raises(RunError, match="cannot run the page's JavaScript"):
        html.run_script(NODE, "missing()")
