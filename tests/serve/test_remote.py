"""lm sample --server: what a run behind a server says is what it says here."""

from __future__ import annotations

import json
import re
from pathlib import Path

import httpx
import pytest

import lm
from cli.remote import Remote, server_sent_events
from lm.errors import ConfigError, ServerError
from lm.generation.options import SamplingOptions
from tests.cli import conftest as command_line
from tests.serve.conftest import Serve, Server

pytestmark = pytest.mark.slow
program = command_line.lm
"""A fixture: the program in this process."""


def texts(remote: Remote, prompt: str, **options) -> list[str]:
    found = [""] * options.get("n", 1)
    for event in remote.events(remote.request(prompt, SamplingOptions(**options))):
        found[event.index] += event.text
    return found


@pytest.mark.parametrize("options", [{}, {"n": 3}, {"best_of": 3}, {"num_beams": 2}, {"stop": ("a",), "top_k": 4}])
def test_events_are_those_of_the_engine(server: Server, runs, options):
    options = {"max_tokens": 40, "seed": 3, **options}
    remote = Remote(server.url, "gru")
    assert (remote.name, remote.checkpoint) == ("gru", "best")
    run = lm.load("gru", runs_dir=runs)
    request = run.request("the", SamplingOptions(**options))
    expected = [""] * options.get("n", 1)
    tokens = [0] * options.get("n", 1)
    for event in run.engine(max_batch=4).run(request):
        expected[event.index] += event.text
        tokens[event.index] += len(event.tokens)
    assert texts(remote, "the", **options) == expected
    counted = [0] * options.get("n", 1)
    for event in remote.events(remote.request("the", SamplingOptions(**options))):
        counted[event.index] += len(event.tokens)
    assert counted == tokens


def test_without_a_name_it_is_the_servers_first(server: Server):
    assert Remote(f"{server.url}/v1/").model == "gru"
    assert Remote(server.url, "words").tokenizer.type == "word"


def test_each_error_is_one_sentence(serve: Serve, server: Server):
    for url in ("localhost:80", "file:///etc/passwd"):
        with pytest.raises(ConfigError, match="give an address such as"):
            Remote(url)
    with pytest.raises(ServerError, match="cannot be reached, or closed the connection: Connection refused"):
        Remote("http://127.0.0.1:9")
    with pytest.raises(ServerError, match=r"The model 'grue' does not exist\. Did you mean 'gru'\?"):
        Remote(server.url, "grue")
    remote = Remote(server.url, "gru")
    with pytest.raises(ServerError, match="at most 16,384"):
        texts(remote, "the", max_tokens=1_000_000)
    with pytest.raises(ConfigError, match="--logprobs does not work"):
        remote.request("the", SamplingOptions(logprobs=1))
    with serve("gru", key="k") as locked:
        with pytest.raises(ServerError, match=re.escape("You didn't provide an API key.")):
            Remote(locked.url)
        assert texts(Remote(locked.url, api_key="k"), "the", max_tokens=3, seed=1)
        remote = Remote(locked.url, api_key="k")
        events = remote.events(remote.request("the", SamplingOptions(max_tokens=16_384)))
        next(events)
        locked.process.kill()
        locked.process.wait(10)
        with pytest.raises(ServerError):
            list(events)


def test_an_event_ends_at_a_newline_alone() -> None:
    texts = ["a\u2028b", "\x85", "\x0c\x1d"]
    content = "".join(f"data: {json.dumps({'text': text}, ensure_ascii=False)}\n\n" for text in texts)
    parts = [bytes([byte]) for byte in f"{content}data: [DONE]\n\n".encode()]
    assert [event["text"] for event in server_sent_events(httpx.Response(200, content=iter(parts)))] == texts
    with pytest.raises(ServerError, match="incomplete"):
        list(server_sent_events(httpx.Response(200, content=iter(parts[:-3]))))


@pytest.mark.parametrize(
    "flags",
    [
        ("gru", "--prompt", "the cat", "--top-k", "5"),
        ("gru", "-n", "3", "--json"),
        ("words", "--prompt", "the cat", "--detokenize"),
        ("gru", "--prompt", "☃ the", "--unknown", "skip", "--no-echo", "--stop", "."),
        ("transformer", "--best-of", "2", "--temperature", "0.5,1.2"),
    ],
)
def test_the_program_prints_what_it_prints_without_a_server(
    program: command_line.Lm, server: Server, runs: Path, flags: tuple[str, ...]
) -> None:
    asked = ("sample", *flags, "--seed", "7", "--max-tokens", "60")
    here = program(*asked, "--runs-dir", str(runs))
    there = program(*asked, "--server", server.url)
    assert (there.code, there.out) == (0, here.out)
    said = [re.sub(r"[\d,]+ tokens/s", "", done.err.splitlines()[-1]) for done in (here, there)]
    assert said[0] == said[1]


def test_an_option_for_local_runs_is_one_sentence(program: command_line.Lm, server: Server) -> None:
    for flags, sentence in (
        (("--out", "a.txt"), "--out is for local runs"),
        (("--state", "a"), "--state is for local runs"),
        (("--logprobs", "1"), "--logprobs does not work with --server"),
    ):
        done = program("sample", "gru", "--server", server.url, *flags)
        assert (done.code, done.out) == (1, "") and sentence in done.err
        assert len(done.err.splitlines()) == 1
