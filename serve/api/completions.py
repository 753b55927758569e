"""POST /v1/completions."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from lm.generation.options import SamplingOptions
from lm.generation.request import Request as EngineRequest
from serve.api.dependencies import STREAMED, LogFieldsDep, ModelsDep, OptionsDep
from serve.api.request_bodies import BodyRoute
from serve.api.requests import CompletionRequest, Sampled
from serve.api.response_formats import CompletionFormat
from serve.api.responses import Completion
from serve.api.streaming import Prompt, SessionAnswer
from serve.engines.limits import check_logprobs, check_sampling
from serve.engines.session import GenerationSession
from serve.event_loop import run_in_thread_if_large
from serve.http_errors import RequestError

router = APIRouter(route_class=BodyRoute, tags=["OpenAI"])


@router.post("/v1/completions", response_model=Completion, responses=STREAMED)
async def complete(
    body: CompletionRequest, request: Request, models: ModelsDep, options: OptionsDep, log_fields: LogFieldsDep
) -> Any:
    """Continue a text. Fields that OpenAI's API does not have, such as top_k, are fields of the same object.

    The server puts the model's start token in front of a text. It reads token ids exactly as they are.
    """
    sampling = sampling_of(body)
    check_sampling(sampling, options, len(body.prompts), stream=body.stream)
    scored = body.echo and sampling.logprobs is not None
    session = await GenerationSession.open(models, options, body.model)
    sampling = sampling.with_defaults(session.model.sampling)
    with session.closed_on_error():
        requests, shown = await run_in_thread_if_large(
            sum(map(len, body.prompts)), lambda: _prepare(session, body, sampling, scored=scored)
        )
        prompt_tokens = sum(len(prompt.ids) for prompt in shown)
        if scored:
            check_logprobs(sampling.n * prompt_tokens * (1 + (sampling.logprobs or 0)))
        session.start(requests, live=body.stream, prompt_tokens=prompt_tokens)
    log_request(log_fields, session, body, sampling, body.prompt)
    body_format = CompletionFormat(session.model, body, sampling)
    return await SessionAnswer(session, shown, body_format, log_fields).respond(request, stream=body.stream)


def sampling_of(body: Sampled, **changed: Any) -> SamplingOptions:
    """The sampling options of a request.

    Raises:
        RequestError: they cannot be streamed.
    """
    sampling = body.sampling(**changed)
    if sampling.best_of == 1:
        # The best of one can be streamed.
        sampling = sampling.model_copy(update={"best_of": None})
    for name in ("best_of", "num_beams"):
        if body.stream and getattr(sampling, name) is not None:
            raise RequestError(400, f"{name} gives its text only at the end: it cannot be streamed.", param=name)
    return sampling


def log_request(
    log_fields: dict[str, Any], session: GenerationSession, body: Sampled, sampling: SamplingOptions, prompt: Any
) -> None:
    """Add the model, the sampling and, with `log_prompts`, the prompt to the access log."""
    log_fields.update(model=session.model.name, stream=body.stream, seed=sampling.seed, max_tokens=sampling.max_tokens)
    if session.options.log_prompts:
        log_fields["prompt"] = prompt


def _prepare(
    session: GenerationSession, body: CompletionRequest, sampling: SamplingOptions, *, scored: bool
) -> tuple[list[EngineRequest], list[Prompt]]:
    """What the engine reads, and what the answer shows of it."""
    requests, shown = [], []
    for prompt in body.prompts:
        read = session.encode(prompt, body.unknown)
        request = EngineRequest(read, sampling, score_prompt=scored)
        # Computed here, in a thread: the engine reads it on the event loop.
        _ = request.bounds
        requests.append(request)
        ids = read[1:] if isinstance(prompt, str) else read
        if not body.echo:
            shown.append(Prompt(ids))
        elif isinstance(prompt, str) and not scored:
            shown.append(Prompt(ids, prompt))
        else:
            shown.append(Prompt(ids, *session.model.tokens.offsets(ids)))
    return requests, shown
