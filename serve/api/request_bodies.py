"""Reads and validates the bodies of requests without blocking the event loop.

    router = APIRouter(route_class=BodyRoute)

A C function such as `json.loads` blocks all other threads until it returns: a third of a second for four megabytes of
small lists. So a long body is read in a thread, and there in parts.
"""

from __future__ import annotations

import codecs
import json
import json.decoder
import json.scanner
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.requests import Request
from starlette.responses import Response

from serve.event_loop import run_in_thread_if_large
from serve.http_errors import RequestError, error_response_for

SHORT_BYTES = 16_384
"""Shorter bodies are read on the event loop: this takes less than two milliseconds."""
PART = 65_536
"""Bytes to decode, and characters of a list of numbers to read, in one call."""
MAX_LISTS = 20_000
"""Lists and objects in one body: the garbage collector blocks all threads for longer the more there are."""
MAX_FIELDS = 10_000
"""Fields of one object: one call of a C function creates it."""


class BodyRoute(APIRoute):
    """A route whose body is a pydantic model."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """See FastAPI, "Custom Request and APIRoute class"."""
        handle = super().get_route_handler()
        if self.body_field is None:
            return handle
        model: type[BaseModel] = self.body_field.field_info.annotation  # type: ignore[assignment]

        async def handle_body(request: Request) -> Response:
            return await handle(_Request(request, model))

        return handle_body


class _Request(Request):
    """A request whose `json` is the validated model. FastAPI accepts it as it is."""

    def __init__(self, request: Request, model: type[BaseModel]) -> None:
        super().__init__(request.scope, request.receive, request._send)
        self._model = model

    async def json(self) -> Any:
        """The validated body.

        Raises:
            RequestError: it is not JSON, or not valid.
        """
        body = await self.body()
        return await run_in_thread_if_large(len(body), lambda: read_body(body, self._model), limit=SHORT_BYTES)


def read_body(body: bytes, model: type[BaseModel]) -> BaseModel:
    """The validated body.

    Raises:
        RequestError: it is not JSON, or not valid.
    """
    try:
        text = _decode(body)
        value = json.loads(text) if len(body) <= SHORT_BYTES else _Reader().decode(text)
    except (ValueError, RecursionError):
        raise RequestError(400, "The body is not JSON.") from None
    try:
        return model.model_validate(value)
    except ValidationError as error:
        found = [{**each, "loc": ("body", *each["loc"])} for each in error.errors(include_url=False)]
        raise error_response_for(RequestValidationError(found)) from None


def _decode(body: bytes) -> str:
    """The text of a body, decoded as json.loads does: lone surrogates pass, but take long."""
    decoder = codecs.getincrementaldecoder(json.detect_encoding(body))("surrogatepass")
    parts = [decoder.decode(body[begin : begin + PART]) for begin in range(0, len(body), PART)]
    return "".join([*parts, decoder.decode(b"", final=True)])


class _Reader(json.JSONDecoder):
    """Decodes JSON like json.loads, in Python, but texts and lists of numbers in C."""

    def __init__(self) -> None:
        super().__init__()
        self._lists = 0
        self.parse_array, self.parse_object = self._array, self._object
        self.scan_once = json.scanner.py_make_scanner(self)  # type: ignore[attr-defined]

    def _count(self) -> None:
        self._lists += 1
        if self._lists > MAX_LISTS:
            raise RequestError(400, f"The body has more than {MAX_LISTS:,} lists and objects: send less at a time.")

    def _object(self, position: tuple[str, int], strict: bool, scan_once: Any, *arguments: Any) -> Any:
        self._count()
        fields = 0

        def scan_value(text: str, begin: int) -> Any:
            nonlocal fields
            fields += 1
            if fields > MAX_FIELDS:
                raise RequestError(400, f"An object of the body has more than {MAX_FIELDS:,} fields: send less.")
            return scan_once(text, begin)

        return json.decoder.JSONObject(position, strict, scan_value, *arguments)  # type: ignore[attr-defined]

    def _array(self, position: tuple[str, int], scan_once: Any) -> tuple[list[Any], int]:
        self._count()
        text, begin = position
        end = text.find("]", begin)
        if end < 0 or any(text.find(sign, begin, end) >= 0 for sign in '"[{'):
            array: tuple[list[Any], int] = json.decoder.JSONArray(position, scan_once)  # type: ignore[attr-defined]
            return array
        values: list[Any] = []
        while end - begin > PART and (cut := text.rfind(",", begin, begin + PART)) >= 0:
            values += json.loads(f"[{text[begin:cut]}]")
            begin = cut + 1
        rest = json.loads(f"[{text[begin:end]}]")
        if values and not rest:
            raise json.JSONDecodeError("Expecting value", text, end)
        return values + rest, end + 1
