"""Real small models, their decoders, and engines over them."""

from __future__ import annotations

from typing import Any

from lm.config import Section
from lm.generation.decoder import Decoder
from lm.generation.engine import Engine, Event, Generation, Request
from lm.generation.open_decoder import open_decoder
from lm.generation.options import SamplingOptions
from lm.generation.torch_decoder import TorchDecoder
from lm.models.base import build_model
from lm.tokenizers.base import Tokenizer
from lm.tokenizers.char import CharTokenizer

TEXT = "the quick brown fox jumps over the lazy dog\n"
MODELS: dict[str, dict[str, int]] = {
    "gru": {"hidden_size": 16, "embedding_size": 8},
    "transformer": {"hidden_size": 16, "num_heads": 2, "num_layers": 2, "context_length": 8},
}


class House:
    """One small model with its tokenizer: makes decoders and engines, and asks them."""

    def __init__(self, name: str = "gru", tokenizer: Tokenizer | None = None, *, usual: bool = False) -> None:
        """Make the model; `usual` takes the decoder that runs have, native where it can be, and not the reference."""
        self.usual = usual
        self.tokenizer = tokenizer or CharTokenizer.train([TEXT], CharTokenizer.Options())
        self.model = build_model(Section(type=name, **MODELS[name]), self.tokenizer.vocab_size, seed=4)

    def decoder(self, max_slots: int = 32) -> Decoder:
        if not self.usual:
            return TorchDecoder(self.model)
        return open_decoder(
            self.model.options.model_dump(), self.model.arrays, lambda: self.model, device="cpu", max_slots=max_slots
        )

    def engine(self, *, max_batch: int = 32, **settings: Any) -> Engine:
        return Engine(self.decoder(max_batch), self.tokenizer, max_batch=max_batch, **settings)

    def request(self, prompt: str = "the ", *, more: dict[str, Any] | None = None, **options: Any) -> Request:
        ids = (self.tokenizer.start_id, *self.tokenizer.encode(prompt).tolist())
        settings = SamplingOptions.model_validate({"max_tokens": 40, "temperature": 1.0, **options})
        return Request(ids, settings, **(more or {}))

    def ask(self, prompt: str = "the ", **options: Any) -> list[Sample]:
        """The samples of a request that is alone."""
        request = self.request(prompt, **options)
        return gather(self.engine().run(request), request.options.n)

    def text(self, prompt: str = "the ", **options: Any) -> str:
        return self.ask(prompt, **options)[0].text


class Sample:
    """All the news of one sample, joined."""

    def __init__(self) -> None:
        self.text = ""
        self.tokens: list[int] = []
        self.scores: list[Any] = []
        self.offsets: list[int] = []
        self.reasons: list[str] = []

    @property
    def facts(self) -> tuple[Any, ...]:
        return self.text, self.tokens, self.scores, self.offsets, self.reasons


def gather(events: Any, count: int = 1) -> list[Sample]:
    samples = [Sample() for _ in range(count)]
    for event in events:
        assert isinstance(event, Event)
        sample = samples[event.index]
        assert not sample.reasons, "nothing comes after the end"
        sample.text += event.text
        sample.tokens += event.tokens
        sample.scores += event.scores
        sample.offsets += event.offsets
        if event.finish_reason is not None:
            sample.reasons.append(event.finish_reason)
    return samples


def finish(engine: Engine, *generations: Generation) -> list[list[Sample]]:
    """Step until nothing is left to do; the samples of each generation."""
    while engine.step():
        pass
    assert all(generation.done for generation in generations)
    return [gather(generation.take(), generation.request.options.n) for generation in generations]
