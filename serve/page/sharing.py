"""What somebody else types to get exactly the same text."""

from __future__ import annotations

import json
import os
import shlex
from dataclasses import dataclass, replace
from typing import Any

from lm.generation.options import SamplingOptions
from serve.settings import ServeOptions

DEFAULTS = SamplingOptions()
WAYS = ("Command line", "curl", "Python")
_FLAGS = {"n": "-n"}


def chosen(options: SamplingOptions) -> dict[str, Any]:
    """The options that are not what they would be anyway; the seed in any case."""
    given = options.model_dump(mode="json")
    usual = DEFAULTS.model_dump(mode="json")
    return {name: value for name, value in given.items() if value != usual[name] or name == "seed"}


@dataclass(frozen=True)
class Recipe:
    """What a text was made of."""

    model: str
    """Its name on the server, which is the name of the run."""
    prompt: str
    """All that stands before."""
    options: SamplingOptions

    def cut(self, tokens: int) -> Recipe:
        """Of a text that ended early, after so many tokens."""
        return replace(self, options=self.options.model_copy(update={"max_tokens": tokens}))


def tell(way: str, recipe: Recipe, *, server: ServeOptions, url: str) -> str:
    """How to make the same text in one of WAYS.

    Args:
        way: of WAYS.
        recipe: what it was made of.
        server: how this server was started.
        url: where it is reached.
    """
    model, prompt, options = recipe.model, recipe.prompt, recipe.options
    key = bool(server.keys(os.environ.get("INKLING_API_KEY")))
    known = {name: value for name, value in chosen(options).items() if name != "logprobs"}
    if way == "Command line":
        flags = " ".join([*(_flag(name, value) for name, value in known.items()), *_place(server)])
        # In one word with its flag: a prompt may begin with a dash.
        return f"lm sample {shlex.quote(model)} {shlex.quote(f'--prompt={prompt}')} {flags}"
    if way == "curl":
        body = json.dumps({"model": model, "prompt": prompt, **known}, ensure_ascii=False)
        bearer = " \\\n  -H 'Authorization: Bearer KEY'" if key else ""
        return (
            f"curl {url}/v1/completions{bearer} \\\n  -H 'Content-Type: application/json' \\\n  -d {shlex.quote(body)}"
        )
    return _python(model, prompt, known, url, key)


def _place(server: ServeOptions) -> list[str]:
    """What the command line has to be told to find the run and to compute as this server does."""
    usual = ServeOptions()
    given = {name: getattr(server, name) for name in ("runs_dir", "device", "precision")}
    return [_flag(name, str(value)) for name, value in given.items() if value != getattr(usual, name)]


def _flag(name: str, value: Any) -> str:
    flag = _FLAGS.get(name, f"--{name.replace('_', '-')}")
    values = value if isinstance(value, list) and name == "stop" else [value]
    if flag == "-n":
        return f"-n {value}"
    return " ".join(shlex.quote(f"{flag}={each}") for each in values)


_OPENAI = ("max_tokens", "temperature", "top_p", "n", "stop", "seed", "presence_penalty", "frequency_penalty")


def _python(model: str, prompt: str, known: dict[str, Any], url: str, key: bool) -> str:
    own = {name: value for name, value in known.items() if name not in _OPENAI}
    lines = [f"    model={model!r},", f"    prompt={prompt!r},"]
    lines += [f"    {name}={value!r}," for name, value in known.items() if name in _OPENAI]
    if own:
        lines.append(f"    extra_body={own!r},")
    secret = "KEY" if key else "none"
    return "\n".join([
        "from openai import OpenAI", "", f'client = OpenAI(base_url="{url}/v1", api_key="{secret}")',
        "answer = client.completions.create(", *lines, ")", "for choice in answer.choices:", "    print(choice.text)",
    ])  # fmt: skip
