"""The registry: names without imports, and the nearest right name for a wrong one."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from lm.errors import ConfigError
from lm.registry import ALL, MODELS, TOKENIZERS, Registry, did_you_mean


def test_names_are_listed_sorted() -> None:
    assert {"byte", "char", "pretrained", "subword", "word"} <= set(TOKENIZERS.names())
    assert list(TOKENIZERS.names()) == sorted(TOKENIZERS.names())
    assert {"gru", "lstm", "rnn", "transformer"} <= set(MODELS.names())
    assert list(MODELS.names()) == sorted(MODELS.names())


def test_listing_names_imports_neither_torch_nor_a_model() -> None:
    code = (
        "import json, sys; from lm.registry import MODELS; MODELS.names(); "
        "print(json.dumps([name for name in sys.modules if name == 'torch' or name.startswith('lm.models')]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


@pytest.mark.parametrize("kind", ["model", "tokenizer"])
def test_every_registered_name_leads_to_a_class_whose_options_accept_it(kind: str) -> None:
    for name in ALL[kind].names():
        cls = ALL[kind].resolve(name)
        assert cls.Options(type=name).type == name


def test_an_unknown_name_is_answered_with_the_nearest_and_with_all() -> None:
    with pytest.raises(ConfigError, match=r"Unknown model 'grru'\. Did you mean 'gru'\? Known: .*lstm"):
        MODELS.resolve("grru")


def test_a_name_that_is_like_no_other_gets_no_suggestion() -> None:
    assert did_you_mean("quantum", ["gru", "lstm"]) == ""
    with pytest.raises(ConfigError) as caught:
        MODELS.resolve("qqqq")
    assert "Did you mean" not in str(caught.value)


def test_a_class_from_elsewhere_can_be_added() -> None:
    registry: Registry[object] = Registry("model", "lm.models")
    registry.add("ordered", "collections:OrderedDict")
    assert registry.resolve("ordered").__name__ == "OrderedDict"
    assert "ordered" in registry.names() and "gru" in registry.names()
