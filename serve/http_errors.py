"""Error answers in the form of OpenAI's API: a status and {"error": {message, type, param, code}}."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from lm.errors import ConfigError, LMError, TokenizerError
from lm.generation.options import SamplingOptions
from lm.registry import did_you_mean

UNSUPPORTED = {
    "suffix": "models write no text before a suffix.",
    "tools": "models do not call functions.",
    "tool_choice": "models do not call functions.",
    "functions": "models do not call functions.",
    "function_call": "models do not call functions.",
    "parallel_tool_calls": "models do not call functions.",
    "response_format": "the server does not check the format of a text.",
    "audio": "models write only text.",
    "modalities": "models write only text.",
    "moderation": "the server does not moderate texts.",
    "reasoning_effort": "models have no separate reasoning.",
    "verbosity": "use max_tokens and stop.",
    "store": "the server stores nothing.",
    "service_tier": "the server has one tier.",
    "web_search_options": "models do not search the web.",
    "use_beam_search": "use num_beams.",
    "length_penalty": "beams are compared by their total log-probability.",
    "include_obfuscation": "the server does not pad events.",
    # Of messages:
    "tool_calls": "models do not call functions.",
    "refusal": "use content.",
    "annotations": "models read only text.",
}
"""Fields of OpenAI's API, and of similar servers, with no equivalent here."""

MAX_SHOWN = 100
"""Characters of a value in an error message."""


class ErrorDetail(BaseModel):
    """One error."""

    message: str = Field(description="What is wrong, and what to do.")
    type: str = Field(description="invalid_request_error, rate_limit_error or server_error.")
    param: str | None = Field(description="The field with the error.")
    code: str | None = Field(description="For programs, such as context_length_exceeded.")


class ErrorBody(BaseModel):
    """The body of an error answer."""

    error: ErrorDetail


class RequestError(HTTPException):
    """An error answer."""

    def __init__(
        self, status: int, message: str, *, code: str | None = None, param: str | None = None, retry: int | None = None
    ) -> None:
        headers = {} if retry is None else {"Retry-After": str(retry)}
        if status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        super().__init__(status, message, headers)
        self.code, self.param = code, param

    def body(self) -> dict[str, Any]:
        """The JSON body."""
        kind = "server_error" if self.status_code >= 500 else "invalid_request_error"
        kind = "rate_limit_error" if self.status_code == 429 else kind
        return {"error": {"message": self.detail, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The HTTP response."""
        return JSONResponse(self.body(), self.status_code, self.headers)


def too_many_requests(retry: int, message: str) -> RequestError:
    """429: retry later."""
    return RequestError(429, message, code="rate_limit_exceeded", retry=retry)


def shutting_down() -> RequestError:
    """503: the server stops before the request ends."""
    return RequestError(503, "The server is shutting down and stopped the request. Retry it.", code="shutting_down")


def model_not_found(name: str, known: Mapping[str, object]) -> RequestError:
    """404: no model has this name."""
    name = name[:MAX_SHOWN]
    hint = did_you_mean(name, known)
    return RequestError(
        404,
        f"The model {name!r} does not exist.{hint} See GET /v1/models.",
        code="model_not_found",
        param="model",
    )


def no_model() -> RequestError:
    """404: the server has no model."""
    return RequestError(
        404,
        "There is no model yet: train one on the page or with lm train FILE.",
        code="model_not_found",
        param="model",
    )


def engine_died(name: str) -> RequestError:
    """500: the engine of a model has failed."""
    return RequestError(
        500,
        f"The engine of the model {name!r} died. Restart the server, or reload its models.",
        code="engine_dead",
    )


def error_response_for(error: Exception) -> RequestError:
    """The error answer for any exception."""
    match error:
        case RequestError():
            return error
        case RequestValidationError():
            return _invalid(error)
        case HTTPException():
            made = RequestError(error.status_code, _sentence(error))
            made.headers = error.headers
            return made
        case ConfigError() | TokenizerError():
            return RequestError(400, str(error))
        case LMError():
            return RequestError(500, str(error))
        case _:
            return RequestError(500, "Internal error of the server. See its log for this request id.")


def _sentence(error: HTTPException) -> str:
    match error.status_code:
        case 404:
            return "This address does not exist. See /docs."
        case 405:
            return "This address does not support the method. See /docs."
        case _:
            return str(error.detail)


def _invalid(error: RequestValidationError) -> RequestError:
    """400 with each error once. The branches of a union become alternatives."""
    messages: dict[str, list[str]] = {}
    for each in error.errors():
        location = [str(part) for part in each["loc"][1:]]
        # Deeper parts of the location are the types that pydantic tried.
        name = ".".join(location[: 3 if location[0] == "messages" else 1]) if location else ""
        if each["type"] == "json_invalid":
            return RequestError(400, "The body is not JSON.")
        if each["type"] == "extra_forbidden":
            path = ".".join(location)[:MAX_SHOWN]
            if location[-1] in UNSUPPORTED:
                return RequestError(400, f"{path} is not supported: {UNSUPPORTED[location[-1]]}", param=path)
            hint = did_you_mean(path, SamplingOptions.model_fields)
            return RequestError(400, f"Unknown field {path!r}.{hint} See /docs.", param=path)
        if not name and each["type"] != "value_error":
            return RequestError(400, "Send a JSON object, with Content-Type: application/json.")
        if each["type"] == "too_short" and each["input"]:
            # The entries have errors. pydantic also reports that none is left.
            continue
        sentence = messages.setdefault(name, [_shown(name, each["input"])])
        if (message := _plain(str(each["msg"]))) not in sentence:
            sentence.append(message)
    sentences = [f"{name}{', or '.join(alternatives[:4])}." for name, *alternatives in messages.values()]
    return RequestError(400, " ".join(sentences[:8]), param=next(iter(messages), None) or None)


def _plain(message: str) -> str:
    """A message of pydantic with the terms of JSON."""
    message = re.sub(r" or instance of \w+", "", message.removeprefix("Value error, "))
    message = message[:1].lower() + message[1:]
    return message.replace("tuple", "list").replace("dictionary", "object")


class _Short(reprlib.Repr):
    """A short form of a value, as JSON."""

    def repr_bool(self, value: bool, level: int) -> str:
        return "true" if value else "false"

    def repr_NoneType(self, value: None, level: int) -> str:  # noqa: N802
        return "null"


_short = _Short()
_short.maxstring = _short.maxother = MAX_SHOWN


def _shown(name: str, value: Any) -> str:
    """The name of a field with its value, unless the value is an object."""
    if not name or isinstance(value, dict):
        return f"{name}: " if name else ""
    return f"{name} = {_short.repr(value)}: "


def install(app: FastAPI) -> None:
    """Answer every exception with an error body."""

    async def answer(request: Request, error: Exception) -> JSONResponse:
        made = error_response_for(error)
        request.state.log_fields["code"] = made.code
        # A client that still sends would not see the answer.
        await request.state.discard()
        return made.response()

    for kind in (RequestValidationError, HTTPException, LMError):
        app.add_exception_handler(kind, answer)
