"""What every tab gets: the models, the server's options, the training queue, and the registered components."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

import gradio as gr

from lm.errors import LMError
from lm.runs.run import Run
from serve.engines.model_pool import ModelPool
from serve.security.hosts import host_name, is_loopback
from serve.settings import ServeOptions

if TYPE_CHECKING:
    from serve.training_queue import TrainingQueue


class ModelPicker(NamedTuple):
    """A dropdown of models."""

    component: gr.Dropdown
    rank: int
    """Rank, from 0, of the model that it shows before a visitor picks one."""


class ModelChoices(NamedTuple):
    """The models that the server offers."""

    choices: list[tuple[str, str]]
    """(label, name) of each model, in the order of the offers."""
    ranked: list[str]
    """Their names, the best first."""

    def default(self, rank: int) -> str | None:
        """The model of this rank, or the last one."""
        return self.ranked[min(rank, len(self.ranked) - 1)] if self.ranked else None


class TabLink(TypedDict, total=False):
    """What a link to a tab restores: the storage name of each part."""

    model: str
    seed: str
    prompt: str


@dataclass(frozen=True)
class Page:
    """What a tab is built from."""

    models: ModelPool
    options: ServeOptions
    training: TrainingQueue
    model_pickers: dict[str, ModelPicker] = field(default_factory=dict)
    """The pickers of all tabs, by the name of their choice in the browser's storage."""
    stored: dict[str, Any] = field(default_factory=dict)
    """Components whose values the browser stores, by name."""
    links: dict[str, TabLink] = field(default_factory=dict)
    """What a link to each tab restores, by the tab's id."""
    comparing: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held by the running comparison (`serve.page.comparisons`)."""

    def may_train(self, request: gr.Request) -> bool:
        """Whether a visitor may train and delete: if the server allows it, or on this machine alone."""
        if self.options.allow_training:
            return True
        if not request.state.is_local:
            return False
        return is_loopback(self.options.host) and is_loopback(host_name(request.headers.get("host", "")))

    def model_choices(self) -> ModelChoices:
        """The models with their scores. Reads files: do not call it on the event loop.

        Runs that were named when the server started keep their order. Otherwise the best run has the fewest bits per
        byte on its own validation split. Shipped runs come after these, runs without a report last.
        """
        choices, sort_keys = [], {}
        for offer in self.models.available_runs.values():
            known = Run(offer.folder, offer.checkpoint).summary()
            score = known.get("bits_per_byte")
            facts = [part for part in (known.get("model_name"), f"{score:.2f} bits/byte" if score else None) if part]
            choices.append((f"{offer.name} ({', '.join(facts)})" if facts else offer.name, offer.name))
            sort_keys[offer.name] = (score is None, bool(known.get("shipped")), score or 0.0)
        ranked = list(sort_keys) if self.options.runs else sorted(sort_keys, key=lambda name: sort_keys[name])
        return ModelChoices(choices, ranked)

    def sampling_of(self, name: str | None) -> Mapping[str, Any]:
        """The sampling options of a model's source. Reads a file: do not call it on the event loop."""
        offer = self.models.available_runs.get(name or "")
        with contextlib.suppress(LMError):
            return {} if offer is None else Run(offer.folder, offer.checkpoint).sampling_defaults()
        return {}

    async def refresh_models(self) -> list[Any]:
        """The offered names with the default of each picker, then an update for each picker."""
        await self.models.refresh()
        found = await asyncio.to_thread(self.model_choices)
        defaults = [found.default(picker.rank) for picker in self.model_pickers.values()]
        offered = {"names": [name for _, name in found.choices], "defaults": defaults}
        return [offered, *(gr.update(choices=found.choices) for _ in defaults)]
