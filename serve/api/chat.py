"""POST /v1/chat/completions: a chat as the text that the model continues."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from lm.generation.request import Request as EngineRequest
from lm.tokenizers.turns import BLANK_LINE
from serve.api.completions import log_request, sampling_of
from serve.api.dependencies import STREAMED, LogFieldsDep, ModelsDep, OptionsDep
from serve.api.request_bodies import BodyRoute
from serve.api.requests import ChatRequest
from serve.api.response_formats import ChatFormat
from serve.api.responses import ChatCompletion
from serve.api.streaming import Prompt, SessionAnswer
from serve.engines.codec import TURN_ENDS, chat_text, plain_chat_text
from serve.engines.limits import check_sampling
from serve.engines.session import GenerationSession
from serve.event_loop import run_in_thread_if_large

router = APIRouter(route_class=BodyRoute, tags=["OpenAI"])


@router.post("/v1/chat/completions", response_model=ChatCompletion, responses=STREAMED)
async def chat(
    body: ChatRequest, request: Request, models: ModelsDep, options: OptionsDep, log_fields: LogFieldsDep
) -> Any:
    """Write the next message of a chat.

    A model with a chat template reads the messages by it, and its reply ends at its end token. A model that learned
    conversations without a template reads plain turns, and its reply ends at a blank line. Any other model reads one
    line `Role: content` for each message, then `Assistant:`, and its reply ends before a line that starts with another
    role. It knows a role only if such lines were in its training text.
    """
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    changed: dict[str, Any] = {"logprobs": logprobs, "stop": (*body.stop, *TURN_ENDS)}
    if body.max_completion_tokens is not None:
        changed["max_tokens"] = body.max_completion_tokens
    sampling = sampling_of(body, **changed)
    check_sampling(sampling, options, 1, stream=body.stream)
    session = await GenerationSession.open(models, options, body.model)
    has_template = session.model.tokenizer.chat_template is not None
    sampling = sampling.with_defaults(session.model.chat_sampling)
    learned_turns = session.model.learned_turns
    if has_template or learned_turns:
        own = () if has_template else (BLANK_LINE,)
        sampling = sampling.model_copy(update={"stop": (*body.stop, *own)})

    def read_chat() -> tuple[str, tuple[int, ...]]:
        if has_template:
            return session.encode_chat([(message.role, message.text) for message in body.messages])
        write = plain_chat_text if learned_turns else chat_text
        text = write([(message.role, message.text) for message in body.messages])
        return text, session.encode(text, body.unknown)

    with session.closed_on_error():
        text, ids = await run_in_thread_if_large(sum(len(message.text) for message in body.messages), read_chat)
        # A template writes the first token itself.
        shown = ids if has_template else ids[1:]
        session.start([EngineRequest(ids, sampling)], live=body.stream, prompt_tokens=len(shown))
    log_request(log_fields, session, body, sampling, text)
    body_format = ChatFormat(session.model, body, sampling)
    return await SessionAnswer(session, [Prompt(shown)], body_format, log_fields).respond(request, stream=body.stream)
