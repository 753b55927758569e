"""docs/reference/options.md has the options that the fields declare."""

import runpy
from pathlib import Path

import pytest

from lm.config import CorpusConfig, TrainingConfig
from lm.generation.options import SamplingOptions
from lm.registry import MODELS, TOKENIZERS
from serve.settings import ServeOptions

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "reference" / "options.md").read_text("utf-8")


def test_the_page_is_what_the_fields_give():
    assert runpy.run_path(str(DOCS / "make_options.py"))["page"]() == PAGE, "out of date: make options"


@pytest.mark.parametrize("options", [
    TrainingConfig, CorpusConfig, SamplingOptions, ServeOptions,
    *(registry.resolve(name).Options for registry in (TOKENIZERS, MODELS) for name in registry.names()),
], ids=lambda options: options.__name__)  # fmt: skip
def test_every_option_is_on_the_page(options):
    assert not [name for name in options.model_fields if name != "type" and f"\n| `{name}` | " not in PAGE]


@pytest.mark.parametrize("registry", [TOKENIZERS, MODELS], ids=lambda registry: registry.kind)
def test_every_registered_name_is_on_the_page(registry):
    assert not [name for name in registry.names() if f"`{registry.kind}.type={name}`" not in PAGE]
