"""Every option of the server, declared once; the flags of `lm serve` are made from it."""

from __future__ import annotations

import math
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, ByteSize, Field, field_validator

from lm.config import DEFAULT_RUNS_DIR, Options
from lm.errors import ConfigError


def _positive(size: ByteSize) -> ByteSize:
    if size <= 0:
        raise ValueError("must be more than 0 bytes")
    return size


Size = Annotated[ByteSize, AfterValidator(_positive)]
Seconds = Annotated[float, Field(gt=0, le=86_400)]


class ServeOptions(Options):
    """What is served, to whom, and within which limits."""

    # -- what and where ---------------------------------------------------------------------------
    runs: tuple[str, ...] = Field(
        (), description="Runs to offer: names, paths, NAME@last, NAME@step-500; none: every run in the runs folder."
    )
    runs_dir: Path = Field(DEFAULT_RUNS_DIR, description="Where the runs lie.")
    host: str = Field("127.0.0.1", description="Address to listen on; 0.0.0.0 is every address of this machine.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    device: str | None = Field(None, description="Where to compute; default: a GPU when there is one.")
    precision: Literal["fp32", "int8"] = Field(
        "fp32", description="Weights of native decoding: fp32, or int8, which is faster and a little less exact."
    )

    # -- who may ask ------------------------------------------------------------------------------
    api_key: tuple[str, ...] = Field(
        (), repr=False, description="A key that requests must bring; may be given several times. Better kept in a file."
    )
    api_key_file: Path | None = Field(None, description="A file of keys, one a line; INKLING_API_KEY holds one too.")
    cors_origin: tuple[str, ...] = Field(
        (), description="A web origin that may call from a browser, or *; may be given several times."
    )
    allowed_host: tuple[str, ...] = Field(
        (),
        description="A name, besides this machine's own, that requests without a key may be sent to, or *; "
        "may be given several times.",
    )
    trusted_proxy: tuple[str, ...] = Field(
        (),
        description="Address or network of a proxy in front of the server, whose X-Forwarded-For names the client; "
        "may be given several times.",
    )
    no_page: bool = Field(False, description="Leave the page out: only the API.")
    allow_training: bool = Field(
        False,
        description="Let the page train models and delete runs also where it is reached from beyond this machine, or "
        "through a proxy.",
    )

    # -- how much at once -------------------------------------------------------------------------
    max_batch: int = Field(32, ge=1, le=4096, description="Texts that one model writes side by side.")
    max_queue: int = Field(256, ge=0, description="Texts that may wait for a place in a model's batch; then 429.")
    max_requests: int = Field(1024, ge=1, description="Requests in work at once; then 429.")
    max_memory: Size | None = Field(
        None,
        description="Memory for models, such as 2GB: those that nobody uses make room, the longest unused first. "
        "Default: no limit.",
    )
    state_memory: Size = Field(
        ByteSize(2 << 30), description="Memory of each model for the states of the texts it writes; bounds max_batch."
    )
    prefix_cache: Size = Field(
        ByteSize(64 << 20), description="Memory of each model for the starts of prompts that were read before."
    )

    # -- how much in one request ------------------------------------------------------------------
    max_body: Size = Field(ByteSize(4 << 20), description="Size of a request's body.")
    max_upload: Size = Field(ByteSize(64 << 20), description="Size of a text dropped on the page.")
    max_prompt_tokens: int = Field(32_768, ge=1, description="Tokens of a prompt.")
    max_completion_tokens: int = Field(16_384, ge=1, description="Tokens that a request may ask for.")
    max_n: int = Field(16, ge=1, description="Samples of a prompt, candidates of best_of, or beams.")
    timeout_seconds: Seconds = Field(300.0, description="Time that a request may take, waiting included.")
    stall_seconds: Seconds = Field(
        30.0,
        description="How long a client may take to send its request, or to read what was sent, before it is cut off.",
    )

    # -- operation --------------------------------------------------------------------------------
    drain_seconds: Annotated[float, Field(ge=0, le=86_400)] = Field(
        30.0, description="How long SIGTERM waits for requests in work."
    )
    log_prompts: bool = Field(False, description="Write prompts and texts to the log.")

    @field_validator("cors_origin", "api_key", "allowed_host", "trusted_proxy")
    @classmethod
    def _not_empty(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not all(part.strip() for part in value):
            raise ValueError("must not be empty")
        return value

    @field_validator("host")
    @classmethod
    def _named(cls, value: str) -> str:
        # The system takes an empty one for every address.
        if not value.strip():
            raise ValueError("must not be empty: 0.0.0.0 is every address of this machine")
        return value

    @field_validator("trusted_proxy")
    @classmethod
    def _networks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for part in value:
            try:
                parse_network(part)
            except ValueError:
                raise ValueError("give addresses or networks, such as 127.0.0.1 or 10.0.0.0/8") from None
        return value

    @property
    def max_sequences(self) -> int:
        """Texts that one model may have running and waiting."""
        return self.max_batch + self.max_queue

    def keys(self, environment: str | None = None) -> tuple[bytes, ...]:
        """All keys that are accepted; none: requests need no key.

        Args:
            environment: the value of INKLING_API_KEY.

        Raises:
            ConfigError: the file cannot be read, or holds no key.
        """
        keys = [*self.api_key, *([environment] if environment else [])]
        if self.api_key_file is not None:
            try:
                lines = self.api_key_file.read_text("utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
                raise ConfigError(f"--api-key-file {self.api_key_file}: {reason}.") from None
            found = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
            if not found:
                raise ConfigError(f"--api-key-file {self.api_key_file} holds no key: write one a line.")
            keys += found
        return tuple(key.encode("utf-8") for key in keys)


def parse_network(text: str) -> IPv4Network | IPv6Network:
    """The network that an address, or a network such as 10.0.0.0/8, names.

    Raises:
        ValueError: it is neither.
    """
    return ip_network(text.strip(), strict=False)


def retry_after(seconds: float) -> int:
    """Whole seconds for a Retry-After header: at least 1, at most a minute."""
    return max(1, min(60, math.ceil(seconds)))
