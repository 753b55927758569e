"""A filter that is added to the table is everywhere: in the sampler, the batch key, flags, API, docs and page."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lm.generation.filters import FILTERS, TEMPERATURE, FilterOptions
from lm.generation.options import FILTER_FIELDS, SamplingOptions
from lm.generation.sampler import Sampler
from tests.generation.test_filters import TOKENIZER

# A process with the page.
pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]

# The options are made when they are imported, so the filter is added in a process of its own, before that.
ADDED = """
import json, runpy, types

import numpy as np
from pydantic import Field

from lm.config import Options
from lm.generation.distribution import softmax
from lm.generation.filters import FILTERS, Filter, SamplingContext, Slider


class TopAOptions(Options):
    top_a: float | None = Field(None, ge=0, le=1, description="Share of the square of the highest probability.")


def keep_top_a(logits, top_a):
    probabilities = softmax(logits)
    return np.where(probabilities >= top_a * probabilities.max(axis=-1, keepdims=True) ** 2, logits, -np.inf)


FILTERS.append(Filter({"top_a": Slider(0, 0.9, 0.1, "Top-a", off=0)}, keep_top_a, fields=TopAOptions))

import gradio as gr
import typer
from typer.testing import CliRunner

import lm
from cli.commands import sample
from cli.options import with_sampling
from lm.generation.sampler import Sampler
from lm.tokenizers.char import CharTokenizer
from serve.api.requests import CompletionRequest
from serve.page.controls import SamplingControls

seen = {}
tokenizer = CharTokenizer.train(["ab"], CharTokenizer.Options())
logits = np.log(np.array([[0.5, 0.3, 0.1, 0.1]], dtype=np.float32))


def probabilities(**options):
    options = lm.SamplingOptions(temperature=1.0, allow_unknown=True, **options)
    return Sampler(options, tokenizer).probabilities(logits, [SamplingContext(0)])[0].round(6).tolist()


seen["probabilities"] = [probabilities(), probabilities(top_a=0.0), probabilities(top_a=1.0)]
keys = [Sampler(lm.SamplingOptions(top_a=value), tokenizer).key for value in (None, 0.5, 0.5, 0.6)]
seen["keys"] = [key == keys[1] for key in keys]


@with_sampling()
def command(other: bool = False, sampling: dict | None = None):
    print(json.dumps(sampling))


def called(command, *arguments):
    app = typer.Typer()
    app.command()(command)
    return CliRunner().invoke(app, arguments, env={"COLUMNS": "200"}).output


seen["flags"] = json.loads(called(command, "--top-a", "0.5", "--banned-token", "3"))
seen["help"] = called(sample.command, "--help")

seen["schema"] = CompletionRequest.model_json_schema()["properties"]["top_a"]
seen["request"] = CompletionRequest(prompt="a", top_a=0.25).sampling().top_a
seen["docs"] = runpy.run_path("docs/make_options.py")["page"]()

limits = types.SimpleNamespace(max_completion_tokens=100, max_n=4)
with gr.Blocks():
    page = types.SimpleNamespace(options=limits)
    controls = SamplingControls(page, first=("temperature",), folded=("max_tokens",))
slider = controls.components["top_a"]
seen["slider"] = [slider.minimum, slider.maximum, slider.step, slider.label, slider.value, slider.info]
values = [component.value for component in controls.inputs]
place = list(controls.components).index("top_a")
seen["page"] = [controls.options([*values[:place], value, *values[place + 1 :]]).top_a for value in (0, 0.3)]
print(json.dumps(seen))
"""


@pytest.fixture(scope="module")
def seen() -> Any:
    done = subprocess.run([sys.executable, "-c", ADDED], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_sampler_applies_a_filter_that_was_added(seen: Any) -> None:
    plain, off, on = seen["probabilities"]
    assert plain == off == pytest.approx([0.5, 0.3, 0.1, 0.1])
    # The square of 0.5 is 0.25: only 0.5 and 0.3 stay.
    assert on == pytest.approx([0.625, 0.375, 0, 0])


def test_an_added_filter_is_part_of_the_batch_key(seen: Any) -> None:
    assert seen["keys"] == [False, True, True, False]


def test_an_added_filter_has_a_flag(seen: Any) -> None:
    assert seen["flags"] == {"top_a": 0.5, "banned_tokens": [3]}
    assert "--top-a" in seen["help"] and "Share of the square" in seen["help"]


def test_the_api_takes_an_added_filter(seen: Any) -> None:
    number, nothing = seen["schema"]["anyOf"]
    assert (number["minimum"], number["maximum"], nothing) == (0, 1, {"type": "null"})
    assert seen["request"] == 0.25


def test_an_added_filter_is_in_the_docs(seen: Any) -> None:
    row = "| `top_a` | none | number or none, ≥ 0, ≤ 1 | Share of the square of the highest probability. |"
    assert row in seen["docs"].splitlines()


def test_an_added_filter_has_a_slider_on_the_page(seen: Any) -> None:
    assert seen["slider"] == [0, 0.9, 0.1, "Top-a", 0, "Share of the square of the highest probability."]
    assert seen["page"] == [None, 0.3]


# -- the filters there are ------------------------------------------------------------------------------

VALUES: dict[str, Any] = {
    "temperature": 0.5, "top_k": 3, "top_p": 0.5, "min_p": 0.5, "typical_p": 0.5, "repetition_penalty": 2.0,
    "presence_penalty": 0.5, "frequency_penalty": 0.5, "penalty_window": 3, "logit_bias": {3: 1.0},
    "banned_tokens": [3], "allow_unknown": True,
}  # fmt: skip


@pytest.mark.parametrize("name", FILTER_FIELDS)
def test_every_option_of_a_filter_is_in_the_batch_key(name: str) -> None:
    changed = SamplingOptions.model_validate({name: VALUES[name]})
    assert Sampler(changed, TOKENIZER).key != Sampler(SamplingOptions(), TOKENIZER).key


def test_every_option_of_a_filter_has_a_row_in_the_table() -> None:
    # The window belongs to the penalties and switches nothing on.
    assert {name for each in FILTERS for name in each.controls} == {*FILTER_FIELDS} - {"penalty_window"}
    assert tuple(FilterOptions.model_fields) == FILTER_FIELDS


@pytest.mark.parametrize("each", FILTERS, ids=lambda each: next(iter(each.controls)))
def test_a_filter_is_off_by_default_and_where_its_slider_says_so(each: Any) -> None:
    assert each.is_on(SamplingOptions()) == (each is TEMPERATURE)
    for name, slider in each.controls.items():
        assert each.is_on(SamplingOptions.model_validate({name: VALUES[name]}))
        if slider is not None and slider.off:
            assert not each.is_on(SamplingOptions.model_validate({name: slider.off}))
