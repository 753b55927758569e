"""What the routes share: the models of the app, and the way from a request to a job."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import Depends, Request

from lm.generation.options import SamplingOptions
from lm.generation.request import Request as EngineRequest
from serve.engines.models import Lease, Models
from serve.engines.worker import EngineDeadError, Job, QueueFullError
from serve.errors import ErrorBody, RequestError, dead_engine, too_busy
from serve.settings import ServeOptions, retry_after

_WHY: dict[int | str, str] = {
    400: "The request is wrong.",
    401: "The key is missing or wrong.",
    404: "There is no such model.",
    408: "The body did not arrive in time.",
    413: "The body is too long.",
    429: "Too much at once; Retry-After says when to come back.",
    500: "The server failed.",
    503: "There is no room for the model, or the server shuts down.",
    504: "The request took too long.",
    # FastAPI would put its own 422 here, which is never given.
    "default": "Any other error.",
}
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": text} for status, text in _WHY.items()
}


async def _models(request: Request) -> Models:
    models: Models = request.app.state.models
    return models


async def _options(request: Request) -> ServeOptions:
    options: ServeOptions = request.app.state.options
    return options


async def _facts(request: Request) -> dict[str, Any]:
    facts: dict[str, Any] = request.state.facts
    return facts


TheModels = Annotated[Models, Depends(_models)]
TheOptions = Annotated[ServeOptions, Depends(_options)]
Facts = Annotated[dict[str, Any], Depends(_facts)]
"""What the log says of this request."""


MOST_STOPS, MOST_STOP_CHARACTERS = 1000, 10_000
"""Stop texts of a request, and what they have together: the engine makes ready for them while others wait."""
MOST_TOLD = 2_000_000
"""Log-probabilities that one answer, held whole, may come to have: about 200 MB while it is made."""


def check_sampling(sampling: SamplingOptions, options: ServeOptions, prompts: int, *, stream: bool) -> None:
    """Hold a request against the server's limits.

    Raises:
        RequestError: 400.
    """
    for name, limit in (("n", options.max_n), ("best_of", options.max_n), ("num_beams", options.max_n),
                        ("max_tokens", options.max_completion_tokens)):  # fmt: skip
        value = getattr(sampling, name)
        if value is not None and value > limit:
            raise RequestError(400, f"{name} = {value}: this server allows at most {limit:,}.", param=name)
    characters = sum(map(len, sampling.stop))
    if len(sampling.stop) > MOST_STOPS or characters > MOST_STOP_CHARACTERS:
        raise RequestError(
            400, f"The request has {len(sampling.stop):,} stop texts with {characters:,} characters: at most "
            f"{MOST_STOPS:,} with {MOST_STOP_CHARACTERS:,} together are taken. Give fewer or shorter ones.",
            param="stop",
        )  # fmt: skip
    texts = prompts * max(sampling.n, sampling.best_of or 1, sampling.num_beams or 1)
    if texts > options.max_sequences:
        raise RequestError(
            400, f"The request asks for {texts:,} texts: this server takes at most {options.max_sequences:,} at once.",
            param="prompt" if prompts > 1 else "n",
        )  # fmt: skip
    if sampling.logprobs is not None and not stream:
        check_logprobs(texts * sampling.max_tokens * (1 + sampling.logprobs))


def check_logprobs(logprobs: int) -> None:
    """Hold the log-probabilities of an answer against what is made at once.

    Raises:
        RequestError: 400.
    """
    if logprobs > MOST_TOLD:
        raise RequestError(
            400, f"The answer could hold {logprobs:,} log-probabilities: {MOST_TOLD:,} is the most. Ask for less.",
            param="logprobs",
        )  # fmt: skip


def check_length(tokens: int, options: ServeOptions) -> None:
    """Hold a prompt against the server's limit.

    Raises:
        RequestError: 400.
    """
    if tokens > options.max_prompt_tokens:
        raise RequestError(
            400, f"The prompt has {tokens:,} tokens: this server reads at most {options.max_prompt_tokens:,}.",
            code="context_length_exceeded", param="prompt",
        )  # fmt: skip


def start(lease: Lease, requests: Sequence[EngineRequest], *, live: bool) -> Job:
    """Hand requests to the engine.

    Raises:
        RequestError: 429 the queue is full, 500 the engine is dead.
        ConfigError: a request cannot be done.
    """
    try:
        return lease.model.worker.start(requests, live=live)
    except QueueFullError:
        raise too_busy(
            retry_after(lease.model.request_seconds), "The queue is full. Come back when Retry-After says."
        ) from None
    except EngineDeadError:
        raise dead_engine(lease.model.name) from None
