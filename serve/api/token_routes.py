"""POST /tokenize, POST /detokenize, GET /tokenizer_info: for clients that count tokens, such as lm-evaluation-harness
with `tokenizer_backend=remote`."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from fastapi import APIRouter, Query
from starlette.responses import Response

from serve.api.dependencies import ERRORS, LogFieldsDep, ModelsDep
from serve.api.request_bodies import BodyRoute
from serve.api.requests import DetokenizeRequest, TokenizeRequest
from serve.api.responses import Detokenized, Tokenized, TokenizerInfo
from serve.api.streaming import Body
from serve.engines.codec import CHAT_TEMPLATE, PLAIN_TEMPLATE, numbers
from serve.event_loop import run_in_thread_if_large

router = APIRouter(route_class=BodyRoute, tags=["tokens"], responses=ERRORS)


@router.post("/tokenize", response_model=Tokenized)
async def tokenize(body: TokenizeRequest, models: ModelsDep, log_fields: LogFieldsDep) -> Response:
    """The token ids of a text. A text that is only the start or end token of /tokenizer_info is that one token."""
    with await models.lease(body.model) as model:
        log_fields["model"] = model.name

        def work() -> Body:
            if (named := model.tokens.named.get(body.prompt)) is not None:
                ids = np.array([named])
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

        return await run_in_thread_if_large(len(body.prompt), work)


@router.post("/detokenize", response_model=Detokenized)
async def detokenize(body: DetokenizeRequest, models: ModelsDep, log_fields: LogFieldsDep) -> Response:
    """The text of token ids."""
    with await models.lease(body.model) as model:
        log_fields["model"] = model.name
        ids = body.tokens
        return await run_in_thread_if_large(len(ids), lambda: Body({"prompt": model.tokens.decode(ids)}))


@router.get("/tokenizer_info", response_model=TokenizerInfo)
async def tokenizer_info(
    models: ModelsDep,
    log_fields: LogFieldsDep,
    name: Annotated[str | None, Query(alias="model", description="Default: the first model.")] = None,
) -> Response:
    """The tokenizer of a model."""
    with await models.lease(name) as model:
        log_fields["model"] = model.name
        return Body({
            "tokenizer_class": model.tokenizer.type,
            "vocab_size": model.tokenizer.vocab_size,
            "model_max_length": model.decoder.context_length,
            "bos_token": model.tokens.start_text,
            "eos_token": model.tokens.end_text,
            "unk_token": model.tokens.unknown_text(),
            "pad_token": None,
            "chat_template": model.tokenizer.chat_template
            or (PLAIN_TEMPLATE if model.learned_turns else CHAT_TEMPLATE),
        })  # fmt: skip
