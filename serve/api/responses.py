"""Bodies of answers, for /docs and /openapi.json. `serve.api.response_formats` builds what is sent."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field


class Usage(BaseModel):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[str, int]


class Logprobs(BaseModel):
    """One entry for each token of a text. The first token of a repeated prompt has no log-probability."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


FinishReason = Literal["stop", "length"]


class Choice(BaseModel):
    """One text."""

    text: str
    index: int
    logprobs: Logprobs | None
    finish_reason: FinishReason | None
    token_ids: list[int] | None = None


class Completion(BaseModel):
    """The answer of /v1/completions."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    seed: int
    choices: list[Choice]
    usage: Usage | None = None


class TopLogprob(BaseModel):
    """An alternative."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChatLogprob(TopLogprob):
    """A token and its alternatives."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """One entry for each token of a reply."""

    content: list[ChatLogprob]
    refusal: None = None


class Reply(BaseModel):
    """A message of the model."""

    role: Literal["assistant"]
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    """One reply."""

    index: int
    message: Reply
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    token_ids: list[int] | None = None


class ChatCompletion(BaseModel):
    """The answer of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    seed: int
    choices: list[ChatChoice]
    usage: Usage


class ModelCard(BaseModel):
    """One model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    loaded: bool
    context_length: int | None = Field(description="Of a loaded model. Null: no limit, or not loaded.")


class SkippedModel(BaseModel):
    """A run that cannot be loaded."""

    id: str
    reason: str = Field(description="Why it cannot be loaded.")


class ModelList(BaseModel):
    """The answer of /v1/models."""

    object: Literal["list"]
    data: list[ModelCard]
    skipped: list[SkippedModel] = Field(description="Runs that cannot be loaded.")


class Tokenized(BaseModel):
    """The answer of /tokenize."""

    count: int
    max_model_len: int | None
    tokens: list[int]
    token_strs: list[str] | None


class Detokenized(BaseModel):
    """The answer of /detokenize."""

    prompt: str


class TokenizerInfo(BaseModel):
    """The answer of /tokenizer_info."""

    tokenizer_class: str
    vocab_size: int
    model_max_length: int | None
    bos_token: str
    eos_token: str
    unk_token: str | None
    pad_token: None
    chat_template: str


class Alternative(BaseModel):
    """A token that could have stood there."""

    id: int
    token: str
    logprob: float


class ScoredToken(Alternative):
    """One token of the text."""

    offset: int = Field(description="Where its text begins, in characters.")
    surprise: float = Field(description="Bits: -logprob / ln 2.")
    top: list[Alternative]


class Scored(BaseModel):
    """The answer of /v1/score."""

    object: Literal["score"]
    model: str
    loss: float = Field(description="Nats per token.")
    perplexity: float | None = Field(description="exp(loss); null beyond the range of a float.")
    bits_per_char: float | None = Field(description="Spelling included; null where symbols were left out.")
    bits_per_byte: float | None = Field(description="The same per UTF-8 byte: comparable across tokenizers.")
    token_bits_per_byte: float = Field(description="Of the tokens alone, as is customary: spelling costs nothing.")
    spelling_nats: float | None = Field(description="Nats of what the tokens do not say: unknown words, white space.")
    characters: int
    bytes: int
    context: str = Field(description="What a prediction could look back on.")
    tokens: list[ScoredToken]
    usage: Usage
