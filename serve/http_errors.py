"""What goes wrong, as OpenAI's clients expect it: a status, and {"error": {message, type, param, code}}."""

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
    "suffix": "models write forwards only.",
    "tools": "models call no functions.",
    "tool_choice": "models call no functions.",
    "functions": "models call no functions.",
    "function_call": "models call no functions.",
    "parallel_tool_calls": "models call no functions.",
    "response_format": "text is not held to a format.",
    "audio": "models write text only.",
    "modalities": "models write text only.",
    "moderation": "texts are not examined.",
    "reasoning_effort": "models do not reason apart from what they write.",
    "verbosity": "use max_tokens and stop.",
    "store": "nothing is stored.",
    "service_tier": "there is one tier.",
    "web_search_options": "models search nothing.",
    "use_beam_search": "use num_beams.",
    "length_penalty": "hypotheses are compared by their whole likelihood.",
    "include_obfuscation": "events are not padded.",
    # Of messages:
    "tool_calls": "models call no functions.",
    "refusal": "put what was said into content.",
    "annotations": "models read text only.",
}
"""Fields of OpenAI's API, and of servers like it, that mean something which this server does not do."""

MAX_SHOWN = 100
"""Characters of a bad value that an error repeats."""


class ErrorDetail(BaseModel):
    """What was wrong."""

    message: str = Field(description="One or two plain sentences.")
    type: str = Field(description="invalid_request_error, rate_limit_error or server_error.")
    param: str | None = Field(description="The field that is wrong.")
    code: str | None = Field(description="A word for programs, such as context_length_exceeded.")


class ErrorBody(BaseModel):
    """The body of every error."""

    error: ErrorDetail


class RequestError(HTTPException):
    """An answer other than 200."""

    def __init__(
        self, status: int, message: str, *, code: str | None = None, param: str | None = None, retry: int | None = None
    ) -> None:
        headers = {} if retry is None else {"Retry-After": str(retry)}
        if status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        super().__init__(status, message, headers)
        self.code, self.param = code, param

    def body(self) -> dict[str, Any]:
        """The JSON of the answer."""
        kind = "server_error" if self.status_code >= 500 else "invalid_request_error"
        kind = "rate_limit_error" if self.status_code == 429 else kind
        return {"error": {"message": self.detail, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The answer."""
        return JSONResponse(self.body(), self.status_code, self.headers)


def too_many_requests(retry: int, message: str) -> RequestError:
    """429: come back later."""
    return RequestError(429, message, code="rate_limit_exceeded", retry=retry)


def shutting_down() -> RequestError:
    """503: the server ends before the request does."""
    return RequestError(503, "The server shuts down, and the request was given up. Ask again.", code="shutting_down")


def model_not_found(name: str, known: Mapping[str, object]) -> RequestError:
    """404: no such model among those that are offered."""
    name = name[:MAX_SHOWN]
    hint = did_you_mean(name, known)
    return RequestError(
        404,
        f"The model {name!r} does not exist.{hint} See GET /v1/models.",
        code="model_not_found",
        param="model",
    )


def no_model() -> RequestError:
    """404: there is none at all."""
    return RequestError(
        404,
        "There is no model yet: train one, on the page or with lm train FILE.",
        code="model_not_found",
        param="model",
    )


def engine_died(name: str) -> RequestError:
    """500: nothing can be asked of this model any more."""
    return RequestError(
        500,
        f"The engine of the model {name!r} died. The server has to be restarted, or told to reload.",
        code="engine_dead",
    )


def error_response_for(error: Exception) -> RequestError:
    """The answer to any exception that a request met."""
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
            return RequestError(500, "The server met an error of its own; its log says more under this request's id.")


def _sentence(error: HTTPException) -> str:
    match error.status_code:
        case 404:
            return "There is nothing at this address. See /docs."
        case 405:
            return "This address does not take that method. See /docs."
        case _:
            return str(error.detail)


def _invalid(error: RequestValidationError) -> RequestError:
    """400 with each finding once; the branches of a union are told as alternatives."""
    findings: dict[str, list[str]] = {}
    for finding in error.errors():
        place = [str(part) for part in finding["loc"][1:]]
        # Deeper, pydantic names what it tried.
        name = ".".join(place[: 3 if place[0] == "messages" else 1]) if place else ""
        if finding["type"] == "json_invalid":
            return RequestError(400, "The body is not JSON.")
        if finding["type"] == "extra_forbidden":
            path = ".".join(place)[:MAX_SHOWN]
            if place[-1] in UNSUPPORTED:
                return RequestError(400, f"{path} is not supported: {UNSUPPORTED[place[-1]]}", param=path)
            hint = did_you_mean(path, SamplingOptions.model_fields)
            return RequestError(400, f"Unknown field {path!r}.{hint} See /docs.", param=path)
        if not name and finding["type"] != "value_error":
            return RequestError(400, "Send a JSON object, with Content-Type: application/json.")
        if finding["type"] == "too_short" and finding["input"]:
            # Of a list whose entries are wrong, pydantic finds as well that none of them is left.
            continue
        message = _plain(str(finding["msg"]))
        said = findings.setdefault(name, [_shown(name, finding["input"])])
        if message not in said:
            said.append(message)
    sentences = [f"{said[0]}{', or '.join(said[1:5])}." for said in findings.values()]
    return RequestError(400, " ".join(sentences[:8]), param=next(iter(findings), None) or None)


def _plain(message: str) -> str:
    """A finding of pydantic's in the words of JSON."""
    message = re.sub(r" or instance of \w+", "", message.removeprefix("Value error, "))
    message = message[:1].lower() + message[1:]
    return message.replace("tuple", "list").replace("dictionary", "object")


class _Short(reprlib.Repr):
    """A value in short, in the words of JSON."""

    def repr_bool(self, value: bool, level: int) -> str:
        return "true" if value else "false"

    def repr_NoneType(self, value: None, level: int) -> str:  # noqa: N802
        return "null"


_short = _Short()
_short.maxstring = _short.maxother = MAX_SHOWN


def _shown(name: str, value: Any) -> str:
    """A field and its value, where the value is short enough to say."""
    if not name or isinstance(value, dict):
        return f"{name}: " if name else ""
    return f"{name} = {_short.repr(value)}: "


def install(app: FastAPI) -> None:
    """Answer every exception in this form."""

    async def answer(request: Request, error: Exception) -> JSONResponse:
        made = error_response_for(error)
        request.state.log_fields["code"] = made.code
        # A client that still writes would miss the answer.
        await request.state.discard()
        return made.response()

    for kind in (RequestValidationError, HTTPException, LMError):
        app.add_exception_handler(kind, answer)
