"""A run on a server, as `lm sample --server URL` uses it: it gives the same events as a run in this process."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import httpx

from lm.errors import ConfigError, ServerError
from lm.generation.options import SamplingOptions
from lm.generation.request import Event

if TYPE_CHECKING:
    from lm.tokenizers.base import UnknownPolicy

TIMEOUT_SECONDS = 600


@dataclass(frozen=True)
class RemoteRequest:
    """A request for `Remote.events`."""

    prompt: str
    options: SamplingOptions
    unknown: UnknownPolicy | None


class Remote:
    """One model of a server.

    Args:
        url: of the server, with or without /v1.
        model: its id; None is the first model of the server.
        api_key: if the server needs one.

    Raises:
        ConfigError: the URL is not an HTTP address.
        ServerError: the server cannot be reached, or does not have the model.
    """

    def __init__(self, url: str, model: str | None = None, *, api_key: str | None = None) -> None:
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"--server {url!r}: give an address such as http://127.0.0.1:8000.")
        self._base = url.rstrip("/").removesuffix("/v1")
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        with self._open("GET", "/v1/models" + (f"/{model}" if model else "")) as response:
            answer = json.loads(response.read())
            self.model = str((answer if model else answer["data"][0])["id"])
        self.name, _, checkpoint = self.model.partition("@")
        self.checkpoint = checkpoint or "best"

    @functools.cached_property
    def tokenizer(self) -> SimpleNamespace:
        """The `type` of the model's tokenizer; for words also the function `detokenize`."""
        from lm.tokenizers.word import detokenize

        with self._open("GET", f"/tokenizer_info?model={self.model}") as response:
            kind = json.loads(response.read())["tokenizer_class"]
        return SimpleNamespace(type=kind, **({"detokenize": detokenize} if kind == "word" else {}))

    def request(
        self, prompt: str, options: SamplingOptions, *, unknown: UnknownPolicy | None = None, state: None = None
    ) -> RemoteRequest:
        """A request for `events`. Snapshots are on the machine of the run: `state` must be None."""
        assert state is None
        if options.logprobs is not None:
            raise ConfigError("--logprobs does not work with --server: use the server's /v1/score, or a local run.")
        return RemoteRequest(prompt, options, unknown)

    def events(self, request: RemoteRequest) -> Iterator[Event]:
        """Events of the request, as `Run.events` gives them.

        Raises:
            ServerError: the server refuses, or the connection breaks.
        """
        options = request.options
        stream = options.best_of is None and options.num_beams is None
        body = {
            **options.model_dump(mode="json", exclude_unset=True),
            "model": self.model,
            "prompt": request.prompt.encode("utf-8", "replace").decode("utf-8"),
            "stream": stream,
            "return_token_ids": True,
            **({"unknown": request.unknown} if request.unknown else {}),
        }
        with self._open("POST", "/v1/completions", body) as response:
            for chunk in server_sent_events(response) if stream else [json.loads(response.read())]:
                for choice in chunk["choices"]:
                    ids = tuple(choice["token_ids"])
                    yield Event(choice["index"], choice["text"], ids, finish_reason=choice["finish_reason"])

    @contextlib.contextmanager
    def _open(self, method: str, path: str, body: dict[str, Any] | None = None) -> Iterator[httpx.Response]:
        """A successful response, not read yet. Errors inside the block become ServerError too."""
        try:
            with httpx.stream(
                method, self._base + path, json=body, headers=self._headers, timeout=TIMEOUT_SECONDS,
                follow_redirects=True,
            ) as response:  # fmt: skip
                if not response.is_success:
                    message = f"{response.status_code} {response.reason_phrase}"
                    with contextlib.suppress(ValueError, KeyError, TypeError):
                        message = json.loads(response.read())["error"]["message"]
                    raise ServerError(f"{self._base} answers: {message}")
                yield response
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            reason = str(error).rpartition("] ")[2] or type(error).__name__
            raise ServerError(f"{self._base} cannot be reached, or closed the connection: {reason}.") from None
        except (ValueError, KeyError, TypeError, IndexError):
            raise ServerError(f"{self._base} does not answer like an Inkling server.") from None


def server_sent_events(response: httpx.Response) -> Iterator[dict[str, Any]]:
    """The JSON of each event, without [DONE].

    Raises:
        ServerError: the stream is incomplete, or the server ends it with an error.
    """
    rest = b""
    for part in response.iter_bytes():
        # httpx.Response.iter_lines would also split at characters such as U+2028, which a text may have.
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            if line == b"data: [DONE]":
                return
            if line.startswith(b"data: "):
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    raise ServerError(f"The server answers: {chunk['error']['message']}")
                yield chunk
    raise ServerError("The stream is incomplete: the server stopped, or the connection was closed.")
