"""POST /v1/completions."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from lm.generation.options import SamplingOptions
from lm.generation.request import Request as EngineRequest
from serve.answers import Completion
from serve.bodies import BodyRoute
from serve.errors import RequestError
from serve.formats import CompletionFormat
from serve.models import Lease, Model
from serve.openai import CompletionRequest, Sampled
from serve.routes.common import (
    ERRORS,
    Facts,
    TheModels,
    TheOptions,
    check_length,
    check_logprobs,
    check_sampling,
    start,
)
from serve.settings import ServeOptions
from serve.writing import EventStream, Prompt, Writing, beside

router = APIRouter(route_class=BodyRoute, tags=["OpenAI"])


@router.post("/v1/completions", response_model=Completion, responses=ERRORS)
async def complete(
    body: CompletionRequest, request: Request, models: TheModels, options: TheOptions, facts: Facts
) -> Any:
    """Go on from a text. Fields that OpenAI has not, such as top_k, go beside the others.

    Text prompts are read after the model's start token, ids of tokens exactly as they are.
    """
    sampling = sampling_of(body)
    prompts = body.prompts
    check_sampling(sampling, options, len(prompts), stream=body.stream)
    lease = await models.lease(body.model)
    try:
        scored = body.echo and sampling.logprobs is not None
        size = sum(len(prompt) for prompt in prompts)
        read = await beside(
            size, lambda: [_read(lease.model, prompt, body, sampling, scored, options) for prompt in prompts]
        )
        if scored:
            scores = sampling.n * sum(len(prompt.ids) for _, prompt in read)
            check_logprobs(scores * (1 + (sampling.logprobs or 0)))
        job = start(lease, [request for request, _ in read], live=body.stream)
    except BaseException:
        lease.close()
        raise
    form = CompletionFormat(
        lease.model.tokens, lease.model.name, sampling.seed, scored=sampling.logprobs is not None,
        ids=body.return_token_ids, usage=body.include_usage,
    )  # fmt: skip
    note(facts, body, sampling, lease)
    if options.log_prompts:
        facts["prompt"] = body.prompt
    writing = Writing(lease, job, [prompt for _, prompt in read], form, options, facts)
    return EventStream(writing) if body.stream else await writing.whole(request)


def sampling_of(body: Sampled, **changed: Any) -> SamplingOptions:
    """How to draw.

    Raises:
        RequestError: what was asked for cannot be streamed.
    """
    sampling = body.sampling(**changed)
    if sampling.best_of == 1:
        # A choice among one, which can be told as it is written.
        sampling = sampling.model_copy(update={"best_of": None})
    for name in ("best_of", "num_beams"):
        if body.stream and getattr(sampling, name) is not None:
            raise RequestError(400, f"{name} is known at the end only: it cannot be streamed.", param=name)
    return sampling


def note(facts: dict[str, Any], body: Sampled, sampling: SamplingOptions, lease: Lease) -> None:
    """What the log says of the request."""
    facts.update(model=lease.model.name, stream=body.stream, seed=sampling.seed, max_tokens=sampling.max_tokens)


def _read(
    model: Model,
    prompt: str | tuple[int, ...],
    body: CompletionRequest,
    sampling: SamplingOptions,
    scored: bool,
    options: ServeOptions,
) -> tuple[EngineRequest, Prompt]:
    """What the engine reads, and what is told of it."""
    if isinstance(prompt, str):
        read = model.tokens.read_from(prompt, body.unknown, check=lambda tokens: check_length(tokens, options))
        ids = read[1:]
    else:
        read = ids = prompt
        check_length(len(ids), options)
        model.tokenizer.checked(ids)
    request = EngineRequest(read, sampling, score_prompt=scored)
    # The engine needs them on the event loop: here they take no time of others.
    _ = request.bounds
    if not body.echo:
        return request, Prompt(ids)
    if not scored and isinstance(prompt, str):
        return request, Prompt(ids, prompt)
    text, offsets = model.tokens.offsets(ids)
    return request, Prompt(ids, text, offsets)
