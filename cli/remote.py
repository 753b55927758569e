"""A run behind `lm serve`, as `lm sample --server URL` sees it: what it says is what a run in this process would."""

from __future__ import annotations

import contextlib
import functools
import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lm.errors import ConfigError, ServerError
from lm.generation.options import SamplingOptions
from lm.generation.request import Event

if TYPE_CHECKING:
    from lm.tokenizers.base import UnknownPolicy

TIMEOUT_SECONDS = 600


@dataclass(frozen=True)
class RemoteRequest:
    """What `Remote.events` is asked for."""

    prompt: str
    options: SamplingOptions
    unknown: UnknownPolicy | None


@dataclass(frozen=True)
class RemoteTokenizer:
    """A tokenizer that is elsewhere."""

    type: str


class RemoteWordTokenizer(RemoteTokenizer):
    """One of words, whose texts can be given the spacing of print here."""

    def detokenize(self, text: str) -> str:
        """See `lm.tokenizers.word.detokenize`."""
        from lm.tokenizers.word import detokenize

        return detokenize(text)


class Remote:
    """One model of a server.

    Args:
        url: of the server, with or without /v1.
        model: its id; None takes the server's first.
        api_key: where the server wants one.

    Raises:
        ConfigError: the address is none.
        ServerError: the server cannot be reached, or has no such model.
    """

    def __init__(self, url: str, model: str | None = None, *, api_key: str | None = None) -> None:
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"--server {url!r}: give an address such as http://127.0.0.1:8000.")
        self._base = url.rstrip("/").removesuffix("/v1")
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self.model = str(self._ask("/v1/models" + (f"/{model}" if model else ""), first=model is None)["id"])
        self.name, _, state = self.model.partition("@")
        self.state = state or "best"

    @functools.cached_property
    def tokenizer(self) -> RemoteTokenizer:
        """What is known here of the model's tokenizer."""
        kind = self._ask(f"/tokenizer_info?model={self.model}")["tokenizer_class"]
        return RemoteWordTokenizer(kind) if kind == "word" else RemoteTokenizer(kind)

    def request(
        self, prompt: str, options: SamplingOptions, *, unknown: UnknownPolicy | None = None, state: None = None
    ) -> RemoteRequest:
        """What `events` takes; a named state lies where the run lies."""
        assert state is None
        if options.logprobs is not None:
            raise ConfigError("--logprobs is not told by --server: ask its /v1/score, or a run on this machine.")
        return RemoteRequest(prompt, options, unknown)

    def events(self, request: RemoteRequest) -> Iterator[Event]:
        """Events of the request, as `Run.events` gives them.

        Raises:
            ServerError: the server refuses, or the connection breaks.
        """
        options = request.options
        whole = options.best_of is not None or options.num_beams is not None
        body = {
            **options.model_dump(mode="json", exclude_unset=True),
            "model": self.model,
            "prompt": request.prompt.encode("utf-8", "replace").decode("utf-8"),
            "stream": not whole,
            "return_token_ids": True,
            **({"unknown": request.unknown} if request.unknown else {}),
        }
        with self._open("/v1/completions", body) as answer:
            for chunk in [json.load(answer)] if whole else _events(answer):
                for choice in chunk["choices"]:
                    ids = tuple(choice["token_ids"])
                    yield Event(choice["index"], choice["text"], ids, finish_reason=choice["finish_reason"])

    def _ask(self, path: str, *, first: bool = False) -> dict[str, Any]:
        with self._open(path) as answer:
            told = json.load(answer)
        found: dict[str, Any] = told["data"][0] if first else told
        return found

    @contextlib.contextmanager
    def _open(self, path: str, body: dict[str, Any] | None = None) -> Iterator[Any]:
        data = None if body is None else json.dumps(body).encode("ascii")
        try:
            request = urllib.request.Request(self._base + path, data, self._headers)
            with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as answer:
                yield answer
        except urllib.error.HTTPError as error:
            with error:
                raise ServerError(f"{self._base} says: {_sentence(error)}") from None
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            reason = getattr(reason, "strerror", None) or reason
            raise ServerError(f"{self._base} cannot be reached, or went away: {reason}.") from None
        except (ValueError, KeyError, TypeError, IndexError):
            raise ServerError(f"{self._base} does not answer as an Inkling server does.") from None


def _events(answer: Any) -> Iterator[dict[str, Any]]:
    """The JSON of each event, up to the last.

    Raises:
        ServerError: the stream broke off, or the server says why it ends it.
    """
    for line in answer:
        if line.startswith(b"data: "):
            if line.strip() == b"data: [DONE]":
                return
            chunk = json.loads(line[6:])
            if "error" in chunk:
                raise ServerError(f"The server says: {chunk['error']['message']}")
            yield chunk
    raise ServerError("The stream broke off before its end: the server stopped, or the connection was cut.")


def _sentence(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.load(error)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"{error.code} {error.reason}"
