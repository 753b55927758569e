"""POST /v1/chat/completions: a chat written down as plain text, and gone on from."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from lm.generation.request import Request as EngineRequest
from serve.answers import ChatCompletion
from serve.bodies import BodyRoute
from serve.formats import ChatFormat
from serve.models import Model
from serve.openai import ChatRequest
from serve.routes.common import ERRORS, Facts, TheModels, TheOptions, check_length, check_sampling, start
from serve.routes.completions import note, sampling_of
from serve.settings import ServeOptions
from serve.tokens import TURN_ENDS, chat_text
from serve.writing import EventStream, Prompt, Writing, beside

router = APIRouter(route_class=BodyRoute, tags=["OpenAI"])


@router.post("/v1/chat/completions", response_model=ChatCompletion, responses=ERRORS)
async def chat(body: ChatRequest, request: Request, models: TheModels, options: TheOptions, facts: Facts) -> Any:
    """Say the next line of a chat.

    The model reads a line `Role: content` for each message, then `Assistant:`; its reply ends before a line that begins
    with another role. The models know no roles but what such lines meant in the text that they were trained on.
    """
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    changed: dict[str, Any] = {"logprobs": logprobs, "stop": (*body.stop, *TURN_ENDS)}
    if body.max_completion_tokens is not None:
        changed["max_tokens"] = body.max_completion_tokens
    sampling = sampling_of(body, **changed)
    check_sampling(sampling, options, 1, stream=body.stream)
    lease = await models.lease(body.model)
    try:
        size = sum(len(message.text) for message in body.messages)
        text, read = await beside(size, lambda: _read(lease.model, body, options))
        job = start(lease, [EngineRequest(read, sampling)], live=body.stream)
    except BaseException:
        lease.close()
        raise
    form = ChatFormat(
        lease.model.tokens, lease.model.name, sampling.seed, scored=body.logprobs, ids=body.return_token_ids,
        usage=body.include_usage,
    )  # fmt: skip
    note(facts, body, sampling, lease)
    if options.log_prompts:
        facts["prompt"] = text
    writing = Writing(lease, job, [Prompt(read[1:])], form, options, facts)
    return EventStream(writing) if body.stream else await writing.whole(request)


def _read(model: Model, body: ChatRequest, options: ServeOptions) -> tuple[str, tuple[int, ...]]:
    """The chat as a text, and what the engine reads."""
    text = chat_text([(message.role, message.text) for message in body.messages])
    return text, model.tokens.read_from(text, body.unknown, check=lambda tokens: check_length(tokens, options))
