"""The JSON of OpenAI's two forms of answers: as one body, and as the events of a stream.

Events are built from strings, because a stream has hundreds per second. Long values are encoded in parts, because one
call of the encoder blocks all other threads.
"""

from __future__ import annotations

import itertools
import json
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from lm.generation.options import SamplingOptions
from lm.generation.request import Event, Score
from serve.api.requests import Sampled
from serve.engines.model_pool import Model

MIN_LOGPROB = -9999.0
"""Replaces minus infinity, which JSON does not have."""

encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode
MAX_NUMBERS, MAX_ENTRIES = 8192, 32
"""Numbers or texts of a list, and entries of an iterator, in one call of the encoder: about a millisecond."""
BLOCK_BYTES = 1 << 16
"""The approximate size of one message to the client."""


def encode_in_parts(value: Any) -> Iterator[str]:
    """The JSON of a value in parts that take little time.

    An iterator becomes a list of its small entries, which are never in memory together. An array (T,) becomes a list of
    numbers.
    """
    if isinstance(value, dict):
        yield "{"
        for index, (name, each) in enumerate(value.items()):
            yield f"{',' if index else ''}{encode(name)}:"
            yield from encode_in_parts(each)
        yield "}"
    elif isinstance(value, np.ndarray):
        # In slices: to free one long list blocks all threads.
        yield "["
        for begin in range(0, len(value), MAX_NUMBERS):
            yield f"{',' if begin else ''}{encode(value[begin : begin + MAX_NUMBERS].tolist())[1:-1]}"
        yield "]"
    elif isinstance(value, Iterator) or (isinstance(value, list) and len(value) > MAX_NUMBERS):
        most = MAX_NUMBERS if isinstance(value, list) else MAX_ENTRIES
        entries = iter(value)
        before = "["
        while some := list(itertools.islice(entries, most)):
            yield before + encode(some)[1:-1]
            before = ","
        yield "[]" if before == "[" else "]"
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        before = "["
        for each in value:
            yield before
            yield from encode_in_parts(each)
            before = ","
        yield "]"
    else:
        yield encode(value)


def blocks(parts: Iterable[str]) -> Iterator[bytes]:
    """UTF-8 of the parts, joined to blocks of about BLOCK_BYTES. A lone surrogate becomes "?"."""
    some, size = [], 0
    for part in parts:
        some.append(part)
        size += len(part)
        if size >= BLOCK_BYTES:
            yield "".join(some).encode("utf-8", "replace")
            some, size = [], 0
    if some:
        yield "".join(some).encode("utf-8", "replace")


@dataclass
class Piece:
    """New text of one choice, with its tokens."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    scores: list[Score | None] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    finish_reason: str | None = None

    def add(self, event: Event, shift: int) -> None:
        """Append an event; `shift` is the length of the prompt that the choice repeats."""
        self.text += event.text
        self.tokens += event.tokens
        self.scores += event.scores
        self.offsets += [offset + shift for offset in event.offsets]
        self.finish_reason = event.finish_reason or self.finish_reason


class Format(ABC):
    """One of the two forms, for one request."""

    prefix: ClassVar[str]
    whole_object: ClassVar[str]
    chunk_object: ClassVar[str]

    def __init__(self, model: Model, body: Sampled, sampling: SamplingOptions) -> None:
        self._tokens, self._scored = model.tokens, sampling.logprobs is not None
        self._ids, self._usage = body.return_token_ids, body.include_usage
        self.id = f"{self.prefix}-{secrets.token_hex(12)}"
        self._head = {"created": int(time.time()), "model": model.name, "seed": sampling.seed}
        head = encode({"id": self.id, "object": self.chunk_object, **self._head})
        self._before = f'data: {head[:-1]},"choices":['
        self._after = '],"usage":null}\n\n' if self._usage else "]}\n\n"

    def whole(self, pieces: Sequence[Piece], usage: dict[str, Any]) -> dict[str, Any]:
        """The body of an answer."""
        choices = [self._choice(index, piece) for index, piece in enumerate(pieces)]
        return {"id": self.id, "object": self.whole_object, **self._head, "choices": choices, "usage": usage}

    def event(self, index: int, piece: Piece) -> Iterator[str]:
        """One event of a stream, in parts."""
        yield self._before
        yield from self._chunk(index, piece)
        yield self._after

    def opening(self, index: int) -> str:
        """The event before the first one of a choice, or ""."""
        return ""

    def closing(self, usage: dict[str, Any]) -> str:
        """The last events of a stream."""
        counted = f'{self._before}],"usage":{encode(usage)}}}\n\n' if self._usage else ""
        return f"{counted}data: [DONE]\n\n"

    def _common(self, index: int, piece: Piece) -> dict[str, Any]:
        """The fields that both forms have."""
        fields: dict[str, Any] = {
            "index": index,
            "logprobs": self._logprobs(piece) if self._scored else None,
            "finish_reason": piece.finish_reason,
        }
        return {**fields, "token_ids": piece.tokens} if self._ids else fields

    @abstractmethod
    def _choice(self, index: int, piece: Piece) -> dict[str, Any]: ...

    @abstractmethod
    def _chunk(self, index: int, piece: Piece) -> Iterator[str]: ...

    @abstractmethod
    def _logprobs(self, piece: Piece) -> dict[str, Any]: ...


class CompletionFormat(Format):
    """The form of /v1/completions."""

    prefix = "cmpl"
    whole_object = chunk_object = "text_completion"

    def _choice(self, index: int, piece: Piece) -> dict[str, Any]:
        return {"text": piece.text, **self._common(index, piece)}

    def _chunk(self, index: int, piece: Piece) -> Iterator[str]:
        if self._scored or self._ids:
            yield from encode_in_parts(self._choice(index, piece))
            return
        reason = f'"{piece.finish_reason}"' if piece.finish_reason else "null"
        yield f'{{"text":{encode(piece.text)},"index":{index},"logprobs":null,"finish_reason":{reason}}}'

    def _logprobs(self, piece: Piece) -> dict[str, Any]:
        return {
            "tokens": [self._tokens.text(token) for token in piece.tokens],
            "token_logprobs": [None if score is None else finite(score.logprob) for score in piece.scores],
            "top_logprobs": (None if score is None else self._top(score) for score in piece.scores),
            "text_offset": piece.offsets,
        }

    def _top(self, score: Score) -> dict[str, float]:
        top: dict[str, float] = {}
        # The token itself comes first. If two tokens have the same text, the second one gets its id as the name.
        for token, logprob in ((score.token, score.logprob), *score.top):
            if token == score.token and top:
                continue
            text = self._tokens.text(token)
            top[text if text not in top else f"token_id:{token}"] = finite(logprob)
        return top


class ChatFormat(Format):
    """The form of /v1/chat/completions."""

    prefix = "chatcmpl"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def _choice(self, index: int, piece: Piece) -> dict[str, Any]:
        message = {"role": "assistant", "content": piece.text, "refusal": None}
        return {"message": message, **self._common(index, piece)}

    def _chunk(self, index: int, piece: Piece) -> Iterator[str]:
        delta = {"content": piece.text} if piece.text else {}
        return encode_in_parts({"delta": delta, **self._common(index, piece)})

    def opening(self, index: int) -> str:
        """The event with the role."""
        delta = '{"role":"assistant","content":""}'
        return f'{self._before}{{"index":{index},"delta":{delta},"logprobs":null,"finish_reason":null}}{self._after}'

    def _logprobs(self, piece: Piece) -> dict[str, Any]:
        return {"content": (self._scored_token(score) for score in piece.scores if score), "refusal": None}

    def _scored_token(self, score: Score) -> dict[str, Any]:
        return {
            **self._entry(score.token, score.logprob),
            "top_logprobs": [self._entry(token, logprob) for token, logprob in score.top],
        }

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._tokens.text(token)
        return {"token": text, "logprob": finite(logprob), "bytes": list(text.encode("utf-8", "replace"))}


def finite(logprob: float) -> float:
    """A number that JSON has."""
    return max(logprob, MIN_LOGPROB)
