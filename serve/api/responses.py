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


class _Choice(BaseModel):
    index: int
    finish_reason: Literal["stop", "length"] | None
    token_ids: list[int] | None = None


class _Generated(BaseModel):
    id: str
    created: int
    model: str
    seed: int


class Choice(_Choice):
    """One text."""

    text: str
    logprobs: Logprobs | None


class Completion(_Generated):
    """The answer of /v1/completions."""

    object: Literal["text_completion"]
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


class ChatChoice(_Choice):
    """One reply."""

    message: Reply
    logprobs: ChatLogprobs | None


class ChatCompletion(_Generated):
    """The answer of /v1/chat/completions."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage


class ModelCard(BaseModel):
    """One model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    loaded: bool
    context_length: int | None = Field(description="Tokens that the model can read. Null: no limit, or not loaded.")
    chat_template: bool | None = Field(description="Whether the model has its own chat format. Null: not loaded.")


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
    """An alternative token."""

    id: int
    token: str
    logprob: float


class ScoredToken(Alternative):
    """One token of the text."""

    offset: int = Field(description="Position of the token in the text, in characters.")
    surprise: float = Field(description="Bits: -logprob / ln 2.")
    top: list[Alternative]


class Scored(BaseModel):
    """The answer of /v1/score."""

    object: Literal["score"]
    model: str
    loss: float = Field(description="Nats per token.")
    perplexity: float | None = Field(description="exp(loss). Null if it is too large for a float.")
    bits_per_char: float | None = Field(description="Bits per character, with spelling. Null if symbols were left out.")
    bits_per_byte: float | None = Field(
        description="Bits per UTF-8 byte, with spelling: comparable between tokenizers."
    )
    token_bits_per_byte: float = Field(description="Bits per UTF-8 byte of the tokens alone, without spelling.")
    spelling_nats: float | None = Field(description="Nats to spell what the tokens leave out, such as unknown words.")
    characters: int
    bytes: int
    context: str = Field(description="The text that each prediction used.")
    tokens: list[ScoredToken]
    usage: Usage
