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
from serve.api.checks import ERRORS, Facts, TheModels, TheOptions, check_length, check_logprobs, start
from serve.api.request_bodies import BodyRoute
from serve.api.requests import ScoreRequest
from serve.api.response_formats import Piece, finite
from serve.api.responses import Scored
from serve.api.streaming import Prompt, Writing, beside
from serve.engines.models import Model
from serve.errors import RequestError
from serve.settings import ServeOptions

router = APIRouter(route_class=BodyRoute, tags=["scoring"])


@router.post("/v1/score", response_model=Scored, responses=ERRORS)
async def score(body: ScoreRequest, request: Request, models: TheModels, options: TheOptions, facts: Facts) -> Any:
    """How much each token of a text surprises a model, with what it would rather have read."""
    lease = await models.lease(body.model)
    try:
        model = lease.model
        # Of a word that it does not know, the words of the vocabulary are counted once.
        size = max(len(body.text), len(model.tokenizer.words or ()))
        read, spelled = await beside(size, lambda: _read(model, body.text, options))
        if len(read) == 1:
            raise RequestError(400, "The text has no tokens that the model knows.", param="text")
        check_logprobs(len(read) * (1 + body.top))
        sampling = SamplingOptions(max_tokens=0, logprobs=body.top)
        job = start(lease, [EngineRequest(read, sampling, score_prompt=True)], live=False)
    except BaseException:
        lease.close()
        raise
    facts["model"] = model.name
    if options.log_prompts:
        facts["prompt"] = body.text
    form = _Scoring(model, job.generations[0], body.text, spelled)
    return await Writing(lease, job, [Prompt(read[1:])], form, options, facts).whole(request)


def _read(model: Model, text: str, options: ServeOptions) -> tuple[tuple[int, ...], float | None]:
    """The start token and those of a text, and the nats of what they do not say; None where symbols were left out."""
    met: Counter[str] = Counter()
    tokenizer = model.tokenizer
    model.tokens.check_lines(text)
    ids = tokenizer.encode(text, met=met)
    # Before the spelling of its words, which takes longer than all the rest.
    check_length(len(ids), options)
    nats = spelling_nats(tokenizer, text, ids, met)
    return (tokenizer.start_id, *ids.tolist()), nats if math.isfinite(nats) else None


class _Scoring:
    """The answer."""

    def __init__(self, model: Model, generation: Generation, text: str, spelled: float | None) -> None:
        self._model, self._generation, self._text, self._spelled = model, generation, text, spelled

    def whole(self, pieces: Sequence[Piece], usage: dict[str, Any]) -> dict[str, Any]:
        """See `Scored`."""
        scores = [score for score in self._generation.prompt_scores if score is not None]
        _, offsets = self._model.tokens.offsets([score.token for score in scores])
        nats = -math.fsum(score.logprob for score in scores)
        loss = nats / len(scores)
        bits = None if self._spelled is None else (nats + self._spelled) / math.log(2)
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
            "spelling_nats": self._spelled,
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
