"""POST /tokenize, POST /detokenize, GET /tokenizer_info: what clients that count in tokens ask, lm-evaluation-harness
among them (`tokenizer_backend=remote`)."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from fastapi import APIRouter, Query
from starlette.responses import Response

from serve.answers import Detokenized, Tokenized, TokenizerInfo
from serve.bodies import BodyRoute
from serve.openai import DetokenizeRequest, TokenizeRequest
from serve.routes.common import ERRORS, Facts, TheModels
from serve.tokens import CHAT_TEMPLATE, numbers
from serve.writing import Body, beside

router = APIRouter(route_class=BodyRoute, tags=["tokens"], responses=ERRORS)


@router.post("/tokenize", response_model=Tokenized)
async def tokenize(body: TokenizeRequest, models: TheModels, facts: Facts) -> Response:
    """The ids of a text. A prompt that is just the name of the start token in /tokenizer_info is that token."""
    lease = await models.lease(body.model)
    try:
        model = lease.model
        facts["model"] = model.name

        def work() -> Body:
            if body.prompt == model.tokens.start_text:
                ids = np.array([model.tokenizer.start_id])
            else:
                ids = model.tokens.encode_array(body.prompt)
            if body.add_special_tokens:
                ids = np.concatenate(([model.tokenizer.start_id], ids))
            return Body({
                "count": len(ids),
                "max_model_len": model.decoder.context_length,
                "tokens": ids,
                "token_strs": [model.tokens.text(token) for token in numbers(ids)] if body.return_token_strs else None,
            })  # fmt: skip

        return await beside(len(body.prompt), work)
    finally:
        lease.close()


@router.post("/detokenize", response_model=Detokenized)
async def detokenize(body: DetokenizeRequest, models: TheModels, facts: Facts) -> Response:
    """The text of tokens."""
    lease = await models.lease(body.model)
    try:
        facts["model"] = lease.model.name
        tokens = lease.model.tokens
        return await beside(len(body.tokens), lambda: Body({"prompt": tokens.decode(body.tokens)}))
    finally:
        lease.close()


@router.get("/tokenizer_info", response_model=TokenizerInfo)
async def tokenizer_info(
    models: TheModels, facts: Facts, model: Annotated[str | None, Query(description="Default: the first.")] = None
) -> Response:
    """What there is to know of a model's tokenizer."""
    lease = await models.lease(model)
    try:
        facts["model"] = lease.model.name
        tokens, tokenizer = lease.model.tokens, lease.model.tokenizer
        return Body({
            "tokenizer_class": tokenizer.type,
            "vocab_size": tokenizer.vocab_size,
            "model_max_length": lease.model.decoder.context_length,
            "bos_token": tokens.start_text,
            "eos_token": tokens.start_text,
            "unk_token": tokens.unknown_text(),
            "pad_token": None,
            "chat_template": CHAT_TEMPLATE,
        })  # fmt: skip
    finally:
        lease.close()
