"""The options of the server, declared once. `lm serve` has a flag for each."""

from __future__ import annotations

import math
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, ByteSize, Field, field_validator

from lm.config import DEFAULT_RUNS_DIR, Options
from lm.errors import ConfigError
from lm.generation.options import JoinedDecoding


def _positive(size: ByteSize) -> ByteSize:
    if size <= 0:
        raise ValueError("must be more than 0 bytes")
    return size


Size = Annotated[ByteSize, AfterValidator(_positive)]
Seconds = Annotated[float, Field(gt=0, le=86_400)]


class ServeOptions(Options):
    """Options of `lm serve`."""

    runs: tuple[str, ...] = Field(
        (), description="Runs to serve: names, paths, NAME@last, NAME@step-500. Default: all runs in the runs folder."
    )
    runs_dir: Path = Field(DEFAULT_RUNS_DIR, description="The runs folder.")
    host: str = Field("127.0.0.1", description="Address to listen on; 0.0.0.0 is all addresses of this machine.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 is any free port.")
    device: str | None = Field(None, description="Device for the models. Default: a GPU if there is one.")
    precision: Literal["fp32", "bf16", "int8", "int4"] = Field(
        "fp32",
        description="Weights of native decoding: fp32, bf16 (half the bytes), int8 (faster, less exact), or int4 "
        "(Transformers; fewer bytes; the quality depends on the model).",
    )
    joined_decoding: JoinedDecoding = Field(
        "auto",
        description="Compute the texts of a model without native decoding in one call: many times as fast, but the "
        "last bits of a text may depend on the other texts. auto: on a GPU.",
    )
    api_key: tuple[str, ...] = Field(
        (), repr=False, description="An API key that requests need; repeatable. A file of keys is safer."
    )
    api_key_file: Path | None = Field(
        None, description="A file with one API key per line. INKLING_API_KEY may have one more key."
    )
    cors_origin: tuple[str, ...] = Field(
        (), description="A web origin whose pages may use the API from a browser, or *; repeatable."
    )
    allowed_host: tuple[str, ...] = Field(
        (), description="Another host name of the server for requests without a key, or *; repeatable."
    )
    trusted_proxy: tuple[str, ...] = Field(
        (), description="Address or network of a proxy whose X-Forwarded-For the server believes; repeatable."
    )
    no_page: bool = Field(False, description="Serve the API without the page.")
    allow_training: bool = Field(
        False, description="Allow training and deleting runs on the page for users on other machines or behind a proxy."
    )
    max_batch: int = Field(32, ge=1, le=4096, description="Texts that one model generates at the same time.")
    max_queue: int = Field(256, ge=0, description="Texts that may wait for a slot of a model. Above that: 429.")
    max_requests: int = Field(1024, ge=1, description="Open requests. Above that: 429.")
    max_memory: Size | None = Field(
        None,
        description="Memory for models, such as 2GB. The server evicts idle models, the least recently used first. "
        "Default: no limit.",
    )
    state_memory: Size = Field(ByteSize(2 << 30), description="Memory for the states of each model; limits max_batch.")
    prefix_cache: Size = Field(ByteSize(64 << 20), description="Memory for the prefix cache of each model.")
    max_body: Size = Field(ByteSize(4 << 20), description="Size of a request body.")
    max_upload: Size = Field(ByteSize(64 << 20), description="Size of a text that is uploaded on the page.")
    max_prompt_tokens: int = Field(32_768, ge=1, description="Tokens in a prompt.")
    max_completion_tokens: int = Field(16_384, ge=1, description="Value of max_tokens in a request.")
    max_n: int = Field(16, ge=1, description="Value of n, best_of or num_beams in a request.")
    timeout_seconds: Seconds = Field(300.0, description="Time limit of a request, with its time in the queue.")
    stall_seconds: Seconds = Field(
        30.0,
        description="Time for a client to send its request or to read a part of the answer. Then it is disconnected.",
    )
    drain_seconds: Annotated[float, Field(ge=0, le=86_400)] = Field(
        30.0, description="How long SIGTERM waits for open requests."
    )
    log_prompts: bool = Field(False, description="Write prompts to the log.")

    @field_validator("cors_origin", "api_key", "allowed_host", "trusted_proxy")
    @classmethod
    def _not_empty(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not all(part.strip() for part in value):
            raise ValueError("must not be empty")
        return value

    @field_validator("host")
    @classmethod
    def _named(cls, value: str) -> str:
        # The system would listen on all addresses.
        if not value.strip():
            raise ValueError("must not be empty: 0.0.0.0 is all addresses of this machine")
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
        """Texts of one model, running and waiting."""
        return self.max_batch + self.max_queue

    def keys(self, environment: str | None = None) -> tuple[bytes, ...]:
        """All API keys; without any, requests need no key.

        Args:
            environment: the value of INKLING_API_KEY.

        Raises:
            ConfigError: the file cannot be read, or has no key.
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
                raise ConfigError(f"--api-key-file {self.api_key_file} has no key: write one key per line.")
            keys += found
        return tuple(key.encode("utf-8") for key in keys)


def parse_network(text: str) -> IPv4Network | IPv6Network:
    """The network of a text: an address, or a network such as 10.0.0.0/8.

    Raises:
        ValueError: it is neither.
    """
    return ip_network(text.strip(), strict=False)


def retry_after(seconds: float) -> int:
    """Whole seconds for a Retry-After header, 1 to 60."""
    return max(1, min(60, math.ceil(seconds)))
