"""The limits of one request. Each check raises RequestError with status 400."""

from __future__ import annotations

from lm.generation.options import SamplingOptions
from serve.http_errors import RequestError
from serve.settings import ServeOptions

MAX_STOP_STRINGS, MAX_STOP_CHARACTERS = 1000, 10_000
"""Stop strings of a request and their total length: the engine prepares them while other requests wait."""
MAX_LOGPROBS = 2_000_000
"""Log-probabilities in one answer that is not streamed: about 200 MB while it is built."""


def check_sampling(sampling: SamplingOptions, options: ServeOptions, prompts: int, *, stream: bool) -> None:
    """Check the sampling options of a request with this many prompts."""
    for name, limit in (("n", options.max_n), ("best_of", options.max_n), ("num_beams", options.max_n),
                        ("max_tokens", options.max_completion_tokens)):  # fmt: skip
        value = getattr(sampling, name)
        if value is not None and value > limit:
            raise RequestError(400, f"{name} = {value}: this server allows at most {limit:,}.", param=name)
    characters = sum(map(len, sampling.stop))
    if len(sampling.stop) > MAX_STOP_STRINGS or characters > MAX_STOP_CHARACTERS:
        raise RequestError(
            400, f"The request has {len(sampling.stop):,} stop strings with {characters:,} characters. The limit is "
            f"{MAX_STOP_STRINGS:,} strings with {MAX_STOP_CHARACTERS:,} characters in total.", param="stop",
        )  # fmt: skip
    texts = prompts * max(sampling.n, sampling.best_of or 1, sampling.num_beams or 1)
    if texts > options.max_sequences:
        raise RequestError(
            400, f"The request is for {texts:,} texts: this server allows at most {options.max_sequences:,} at once.",
            param="prompt" if prompts > 1 else "n",
        )  # fmt: skip
    if sampling.logprobs is not None and not stream:
        check_logprobs(texts * sampling.max_tokens * (1 + sampling.logprobs))


def check_logprobs(logprobs: int) -> None:
    """Check the number of log-probabilities of an answer that is not streamed."""
    if logprobs > MAX_LOGPROBS:
        raise RequestError(
            400, f"The answer could hold {logprobs:,} log-probabilities: the limit is {MAX_LOGPROBS:,}. "
            "Request fewer tokens or alternatives.", param="logprobs",
        )  # fmt: skip


def check_length(tokens: int, options: ServeOptions) -> None:
    """Check the number of tokens of a prompt."""
    if tokens > options.max_prompt_tokens:
        raise RequestError(
            400, f"The prompt has {tokens:,} tokens: this server reads at most {options.max_prompt_tokens:,}.",
            code="context_length_exceeded", param="prompt",
        )  # fmt: skip
