"""POST /v1/score: how much each token of a text surprises a model."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request

from lm.generation.options import SamplingOptions
from lm.generation.request import Generation
from lm.generation.request import Request as EngineRequest
from lm.spelling import spelling_nats
from serve.api.dependencies import ERRORS, LogFieldsDep, ModelsDep, OptionsDep
from serve.api.request_bodies import BodyRoute
from serve.api.requests import ScoreRequest
from serve.api.response_formats import Piece, finite
from serve.api.responses import Scored
from serve.api.streaming import Prompt, SessionAnswer
from serve.engines.limits import check_length, check_logprobs
from serve.engines.model_pool import Model
from serve.engines.session import GenerationSession
from serve.event_loop import run_in_thread_if_large
from serve.http_errors import RequestError
from serve.settings import ServeOptions

router = APIRouter(route_class=BodyRoute, tags=["scoring"])


@router.post("/v1/score", response_model=Scored, responses=ERRORS)
async def score(
    body: ScoreRequest, request: Request, models: ModelsDep, options: OptionsDep, log_fields: LogFieldsDep
) -> Any:
    """The log-probability of each token of a text, with the most probable alternatives."""
    session = await GenerationSession.open(models, options, body.model)
    model = session.model
    with session.closed_on_error():
        # For unknown words, the tokenizer counts the characters of its whole vocabulary once.
        size = max(len(body.text), len(model.tokenizer.words or ()))
        ids, spelling = await run_in_thread_if_large(size, lambda: _tokenize(model, body.text, options))
        if len(ids) == 1:
            raise RequestError(400, "The text has no tokens that the model knows.", param="text")
        check_logprobs(len(ids) * (1 + body.top))
        sampling = SamplingOptions(max_tokens=0, logprobs=body.top)
        requests = [EngineRequest(ids, sampling, score_prompt=True)]
        session.start(requests, live=False, prompt_tokens=len(ids) - 1)
    log_fields["model"] = model.name
    if options.log_prompts:
        log_fields["prompt"] = body.text
    body_format = _ScoreFormat(model, session.generations[0], body.text, spelling)
    return await SessionAnswer(session, [Prompt(ids[1:])], body_format, log_fields).respond(request, stream=False)


def _tokenize(model: Model, text: str, options: ServeOptions) -> tuple[tuple[int, ...], float | None]:
    """The start token and the tokens of a text; and the nats to spell its unknown words, None if symbols are lost."""
    tokenizer, unknown_counts = model.tokenizer, Counter[str]()
    model.tokens.check_lines(text)
    ids = tokenizer.encode(text, unknown_counts=unknown_counts)
    # First the length: the spelling takes longer than everything else.
    check_length(len(ids), options)
    nats = spelling_nats(tokenizer, text, ids, unknown_counts)
    return (tokenizer.start_id, *ids.tolist()), nats if math.isfinite(nats) else None


class _ScoreFormat:
    """The body of the answer."""

    def __init__(self, model: Model, generation: Generation, text: str, spelling: float | None) -> None:
        self._model, self._generation, self._text, self._spelling = model, generation, text, spelling

    def whole(self, pieces: Sequence[Piece], usage: dict[str, Any]) -> dict[str, Any]:
        """See `Scored`."""
        scores = [score for score in self._generation.prompt_scores if score is not None]
        _, offsets = self._model.tokens.offsets([score.token for score in scores])
        nats = -math.fsum(score.logprob for score in scores)
        loss = nats / len(scores)
        bits = None if self._spelling is None else (nats + self._spelling) / math.log(2)
        size = len(self._text.encode("utf-8", "replace"))
        context = self._model.decoder.context_length
        return {
            "object": "score",
            "model": self._model.name,
            "loss": loss,
            "perplexity": math.exp(loss) if loss < 709 else None,
            "bits_per_char": None if bits is None else bits / len(self._text),
            "bits_per_byte": None if bits is None else bits / size,
            "token_bits_per_byte": nats / math.log(2) / size,
            "spelling_nats": self._spelling,
            "characters": len(self._text),
            "bytes": size,
            "context": "state carried over the whole text" if context is None else
            f"at most {context} tokens; when they are full the older half is forgotten",
            "tokens": (
                {**self._entry(score.token, score.logprob), "offset": offset, "surprise": -score.logprob / math.log(2),
                 "top": [self._entry(*alternative) for alternative in score.top]}
                for score, offset in zip(scores, offsets, strict=True)
            ),
            "usage": usage,
        }  # fmt: skip

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        return {"id": token, "token": self._model.tokens.text(token), "logprob": finite(logprob)}
