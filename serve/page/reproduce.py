"""The command line, curl request or Python program that generates the same text again."""

from __future__ import annotations

import json
import os
import shlex
from dataclasses import dataclass, replace
from typing import Any

from lm.generation.options import NEUTRAL, SamplingOptions
from serve.settings import ServeOptions

FORMS = ("Command line", "curl", "Python")
_FLAGS = {"n": "-n"}
_OPENAI = ("max_tokens", "temperature", "top_p", "n", "stop", "seed", "presence_penalty", "frequency_penalty")


@dataclass(frozen=True)
class TextRequest:
    """A request that generated a text."""

    model: str
    """Its name on the server, which is the name of the run."""
    prompt: str
    options: SamplingOptions
    own: tuple[str, ...] = ()
    """Options of which the model has own defaults."""

    def with_max_tokens(self, tokens: int) -> TextRequest:
        """The same request, limited to this number of tokens."""
        return replace(self, options=self.options.model_copy(update={"max_tokens": tokens}))


def reproduce(form: str, request: TextRequest, *, server: ServeOptions, url: str) -> str:
    """How to generate the same text.

    Args:
        form: one of FORMS.
        request: the request that generated it.
        server: the options of this server.
        url: the address of this server.
    """
    model, prompt = request.model, request.prompt
    has_key = bool(server.keys(os.environ.get("INKLING_API_KEY")))
    given, defaults = request.options.model_dump(mode="json"), SamplingOptions().model_dump(mode="json")
    del given["logprobs"]
    # Without them the model's own options would count.
    given |= {name: NEUTRAL[name] for name in request.own if given[name] is None and name in NEUTRAL}
    always = {"seed", *request.own}
    options = {name: value for name, value in given.items() if value != defaults[name] or name in always}
    if form == "Command line":
        flags = " ".join([*(_flag(name, value) for name, value in options.items()), *_server_flags(server)])
        # One word with its flag: a prompt may begin with a dash.
        return f"lm sample {shlex.quote(model)} {shlex.quote(f'--prompt={prompt}')} {flags}"
    if form == "curl":
        body = json.dumps({"model": model, "prompt": prompt, **options}, ensure_ascii=False)
        bearer = " \\\n  -H 'Authorization: Bearer KEY'" if has_key else ""
        return (
            f"curl {url}/v1/completions{bearer} \\\n  -H 'Content-Type: application/json' \\\n  -d {shlex.quote(body)}"
        )
    other = {name: value for name, value in options.items() if name not in _OPENAI}
    arguments = {"model": model, "prompt": prompt, **{name: options[name] for name in options if name in _OPENAI}}
    if other:
        arguments["extra_body"] = other
    return "\n".join([
        "from openai import OpenAI", "",
        f'client = OpenAI(base_url="{url}/v1", api_key="{"KEY" if has_key else "none"}")',
        "answer = client.completions.create(",
        *(f"    {name}={value!r}," for name, value in arguments.items()), ")",
        "for choice in answer.choices:", "    print(choice.text)",
    ])  # fmt: skip


def _server_flags(server: ServeOptions) -> list[str]:
    """The flags with which the command line finds the run, and computes as this server does."""
    defaults = ServeOptions()
    given = {name: getattr(server, name) for name in ("runs_dir", "device", "precision")}
    return [_flag(name, str(value)) for name, value in given.items() if value != getattr(defaults, name)]


def _flag(name: str, value: Any) -> str:
    flag = _FLAGS.get(name, f"--{name.replace('_', '-')}")
    if flag == "-n":
        return f"-n {value}"
    values = value if isinstance(value, list) and name == "stop" else [value]
    return " ".join(shlex.quote(f"{flag}={each}") for each in values)
