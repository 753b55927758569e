"""Look: what sampling does, token by token: how sure the model was, what else it might have written, what the knobs do.

The chart shows one place of a text: the end of the prompt, the end of what was written, or a mark that was picked. Its
logits are kept with it, so that it moves with the knobs without the model being asked again.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import gradio as gr
import numpy as np
import numpy.typing as npt

from lm.errors import LMError
from lm.generation.filters import softmax
from lm.generation.options import SamplingOptions
from lm.generation.request import Score
from lm.generation.sampler import Sampler, SamplingContext
from lm.generation.token_scores import score_rows
from lm.tokenizers.base import Tokenizer
from serve.engines.codec import TokenCodec
from serve.http_errors import RequestError
from serve.page.controls import Knobs, model_picker
from serve.page.drawing import Turns, Written, leased, next_logits, write
from serve.page.keeping import KEPT, keep
from serve.page.marks import (
    MOST_MARKS,
    SCALE_CSS,
    Bar,
    Bars,
    Mark,
    Marks,
    Rest,
    bars_html,
    marks_html,
    percent,
    scale_html,
    score_note,
    surprise_strength,
    visible,
)
from serve.page.site import QUIET, Page, refusal, safe, told

ALTERNATIVES = 5
"""Told of each token."""
MOST_BARS = 12
_TAIL = 24
"""Characters before a place that the sentence above the chart shows."""
_FOLDED = ("top_p", "min_p", "typical_p", "repetition_penalty", "presence_penalty", "frequency_penalty")

_NO_TEXT = (
    '<span class="empty">Type a prompt and press Write. Each token that the model writes appears here, the more orange '
    "the less it expected it. Then pick one, to see what else it might have written there.</span>"
)
_NO_CHART = (
    "<p class='said'>Type a prompt and press Enter: here you see what the model would write next, and how the knobs "
    "below change that.</p>"
)
_PICKS = "Pick one to go on."


@dataclass(frozen=True)
class Story:
    """A text that a model wrote, token by token."""

    model: str
    prompt: str
    """As it was typed."""
    ids: tuple[int, ...]
    """What was read of it, the start token included."""
    tokens: tuple[int, ...] = ()
    """What was drawn, or put there by hand."""
    scores: tuple[Score, ...] = ()
    """One a token."""
    begins: tuple[int, ...] = (0,)
    """Where the model began to write: at first, and after each token that was put there by hand."""

    def until(self, place: int) -> Story:
        """Only what stands before the token at `place`."""
        begins = tuple(begin for begin in self.begins if begin <= place)
        return replace(self, tokens=self.tokens[:place], scores=self.scores[:place], begins=begins)


@dataclass(frozen=True, eq=False)
class Spot:
    """A place of a story, with what the model says there."""

    story: Story
    place: int
    """How many tokens stand before it."""
    logits: npt.NDArray[np.float32]
    """(1, V)"""
    tokenizer: Tokenizer
    before: str
    """The text that stands before it."""

    @property
    def standing(self) -> int | None:
        """The token that stands there; None at the end."""
        return self.story.tokens[self.place] if self.place < len(self.story.tokens) else None

    def drawn_with(self, options: SamplingOptions) -> npt.NDArray[np.float64]:
        """The probability (V,) of each token once the filters have been at it."""
        begin = max(begin for begin in self.story.begins if begin <= self.place)
        before = (*self.story.ids, *self.story.tokens[:begin])
        place = SamplingContext.after(before, self.story.tokens[begin : self.place], options, self.tokenizer.vocab_size)
        row: npt.NDArray[np.float64] = Sampler(options, self.tokenizer).probabilities(self.logits, [place])[0]
        return row


def build(page: Page) -> None:
    """The tab."""
    with gr.Row():
        with gr.Column(scale=3, min_width=320):
            prompt = gr.Textbox(
                label="Prompt", lines=1, max_lines=6, elem_classes=["paper", KEPT], elem_id="look-prompt",
                placeholder="The beginning of a text. Enter shows what might come next.",
            )  # fmt: skip
            picker = model_picker(page, "look-model")
            with gr.Row(elem_classes="knobs"):
                go = gr.Button("Write", variant="primary", size="md", min_width=90, elem_id="look-write")
                stop = gr.Button("Stop", size="md", min_width=70, elem_id="look-stop")
            shown = Marks(_NO_TEXT, elem_id="look-text")
            status = gr.HTML("", elem_classes="note", elem_id="look-status", css_template=SCALE_CSS)
        with gr.Column(scale=2, min_width=300):
            chart = Bars(_NO_CHART, elem_id="look-chart")
            knobs = Knobs(page, first=("temperature", "top_k", "seed"), folded=("max_tokens", *_FOLDED))
    keep(page, "look-prompt", prompt)
    story_state: gr.State = gr.State(None)
    spot_state: gr.State = gr.State(None)
    desk: gr.State = gr.State(Turns())

    async def spot_of(story: Story, place: int) -> Spot:
        model, logits = await next_logits(page, story.model, (*story.ids, *story.tokens[:place]))
        stream = model.tokenizer.stream(after=story.ids)
        before = story.prompt + "".join(map(stream.feed, story.tokens[:place]))
        return Spot(story, place, logits, model.tokenizer, before)

    async def spot_of_prompt(text: str, name: str | None) -> Spot:
        async with leased(page, name) as lease:
            story = Story(lease.model.name, text, lease.model.tokens.read_from(text))
        return await spot_of(story, 0)

    def view(spot: Spot, values: Sequence[Any]) -> dict[Any, Any]:
        return {spot_state: spot, chart: chart_html(spot, knobs.options(values))}

    async def on_prompt(text: str, name: str | None, spot: Spot | None, *values: Any) -> Any:
        if spot is None and not text:
            return gr.skip()
        if spot is not None and (spot.story.prompt, spot.story.model) == (text, name):
            return gr.skip()
        return view(await spot_of_prompt(text, name), values)

    async def on_enter(text: str, name: str | None, *values: Any) -> Any:
        return view(await spot_of_prompt(text, name), values)

    async def on_model(turns: Turns, text: str, name: str | None, *values: Any) -> Any:
        await turns.rest()
        # What another model wrote says nothing of this one.
        return {story_state: None, shown: _NO_TEXT, status: "", **view(await spot_of_prompt(text, name), values)}

    async def on_settings(text: str, name: str | None, spot: Spot | None, *values: Any) -> Any:
        if spot is None:
            return view(await spot_of_prompt(text, name), values)
        news = view(spot, values)
        # Another place may have been picked meanwhile.
        del news[spot_state]
        return news

    async def on_write(turns: Turns, text: str, name: str | None, *values: Any) -> AsyncIterator[dict[Any, Any]]:
        async with leased(page, name) as lease:
            story = Story(lease.model.name, text, lease.model.tokens.read_from(text))
        async for news in go_on(turns, story, values):
            yield news

    async def on_bar(
        turns: Turns, spot: Spot | None, event: gr.EventData, *values: Any
    ) -> AsyncIterator[dict[Any, Any]]:
        if spot is None:
            return
        token = int(event.token)
        spot.tokenizer.checked([token])
        before = spot.story.until(spot.place)
        score = score_rows(spot.logits, [token], ALTERNATIVES)[0]
        story = replace(
            before, tokens=(*before.tokens, token), scores=(*before.scores, score),
            begins=(*before.begins, spot.place + 1),
        )  # fmt: skip
        async for news in go_on(turns, story, values):
            yield news

    async def go_on(turns: Turns, story: Story, values: Sequence[Any]) -> AsyncIterator[dict[Any, Any]]:
        options = knobs.options(values, logprobs=ALTERNATIVES)
        room = MOST_MARKS - len(story.tokens)
        if room <= 0:
            raise refusal(f"The text has {len(story.tokens):,} tokens, more than are shown: begin anew with Write.")
        options = options.model_copy(update={"max_tokens": min(options.max_tokens, room)})
        async with leased(page, story.model) as lease:
            paper = _Paper(story, lease.model.tokenizer, lease.model.tokens)
        grown = story
        async with turns.writing() as stop:
            try:
                ids = (*story.ids, *story.tokens)
                async with contextlib.aclosing(write(page, story.model, ids, options, stop=stop)) as writing:
                    async for written in writing:
                        tokens, scores = written.tokens[0], written.scores[0]
                        grown = replace(story, tokens=(*story.tokens, *tokens), scores=(*story.scores, *scores))
                        news = {story_state: grown, shown: paper.html(grown), status: _status(written, grown, options)}
                        if written.ended:
                            # Together with the last news: a token that is picked after it keeps its chart.
                            news |= view(await spot_of(grown, len(grown.tokens)), values)
                        yield news
            except (LMError, RequestError):
                yield {status: ""}
                raise

    async def on_stop(turns: Turns) -> None:
        turns.stop()

    async def on_pick(story: Story | None, event: gr.EventData, *values: Any) -> Any:
        place = int(event.index)
        if story is None or not 0 <= place < len(story.tokens):
            return gr.skip()
        return view(await spot_of(story, place), values)

    charted = [spot_state, chart]
    asked = [prompt, picker]
    written_to = [story_state, shown, status, *charted]
    left = prompt.blur(told(on_prompt), [*asked, spot_state, *knobs.inputs], charted, **QUIET)
    entered = prompt.submit(told(on_enter), [*asked, *knobs.inputs], charted, **QUIET)
    picker.input(told(on_model), [desk, *asked, *knobs.inputs], written_to, **QUIET)
    gr.on(
        [knobs.component(name).change for name in ("temperature", "top_k", *_FOLDED)],
        told(on_settings), [*asked, spot_state, *knobs.inputs], charted, trigger_mode="always_last", **QUIET,
    )  # fmt: skip
    # What the prompt would be continued with is out of date as soon as it is continued.
    go.click(told(on_write), [desk, *asked, *knobs.inputs], written_to, cancels=[left, entered], **QUIET)
    chart.pick(told(on_bar), [desk, spot_state, *knobs.inputs], written_to, trigger_mode="multiple", **QUIET)
    stop.click(told(on_stop), desk, None, **QUIET)
    shown.pick(told(on_pick), [story_state, *knobs.inputs], charted, **QUIET)


# -- the text -----------------------------------------------------------------------------------------


class _Paper:
    """A story as marks; each is made once, as the text only grows."""

    def __init__(self, story: Story, tokenizer: Tokenizer, tokens: TokenCodec) -> None:
        self._parts = [f'<span class="given">{safe(story.prompt)}</span>'] if story.prompt else []
        self._stream = tokenizer.stream(after=story.ids)
        self._tokens = tokens
        self._count = 0

    def html(self, story: Story) -> str:
        scores = story.scores[self._count :]
        marks = [
            Mark(self._stream.feed(score.token), surprise_strength(score.logprob), score_note(score, self._tokens.text))
            for score in scores
        ]
        self._parts.append(marks_html(marks, first=self._count))
        self._count += len(scores)
        return "".join(self._parts)


def _status(written: Written, story: Story, options: SamplingOptions) -> str:
    parts = [f"{len(story.tokens):,} tokens", f"{written.tokens_per_second:,.0f} tokens/s", f"seed {options.seed}"]
    if not written.done:
        parts.append("stopped" if written.stopped else "writing …")
    return f"{' · '.join(parts)} · {scale_html('expected', 'surprising (1 in 400)')}"


# -- the chart ----------------------------------------------------------------------------------------


def chart_html(spot: Spot, options: SamplingOptions) -> str:
    """What is to be seen at a place, in a sentence and as bars.

    Raises:
        ConfigError: the options cannot be drawn with.
    """
    model = softmax(spot.logits.astype(np.float64))[0]
    drawn = spot.drawn_with(options)
    tokens = TokenCodec(spot.tokenizer)
    bars = _bars(spot, model, drawn, tokens)
    barless = np.ones(len(model), dtype=np.bool_)
    barless[[bar.token for bar in bars]] = False
    rest = Rest(int(barless.sum()), float(model[barless].sum()), float(drawn[barless].sum()))
    return _sentence(spot, model, drawn, tokens) + bars_html(bars, chosen=spot.standing, picks=_PICKS, rest=rest)


def _bars(spot: Spot, model: npt.NDArray[np.float64], drawn: npt.NDArray[np.float64], tokens: TokenCodec) -> list[Bar]:
    """The likeliest tokens of the model, the one that stands there, and the likeliest to be drawn."""
    order = np.argsort(-model, kind="stable")
    wanted = set(order[:MOST_BARS].tolist()) | {int(drawn.argmax())}
    if spot.standing is not None:
        wanted.add(spot.standing)
    # In the order of the model, so that none changes its place as the knobs move.
    ranked = [token for token in order.tolist() if token in wanted]
    return [Bar(token, tokens.text(token), float(model[token]), float(drawn[token])) for token in ranked]


def _sentence(spot: Spot, model: npt.NDArray[np.float64], drawn: npt.NDArray[np.float64], tokens: TokenCodec) -> str:
    def name(token: int) -> str:
        return _shown(visible(tokens.text(token)))

    def share(shares: npt.NDArray[np.float64], token: int) -> str:
        return safe(percent(float(shares[token])))

    where = f"After {_shown(_tail(spot.before))}" if spot.before else "At the start of a text"
    best, kept, standing = int(model.argmax()), int(np.count_nonzero(drawn)), spot.standing
    sentences = [f"{where}, the model gives {share(model, best)} to {name(best)}."]
    if kept == 1:
        sentences.append(f"Your settings leave one choice: {name(int(drawn.argmax()))}.")
    else:
        sentences.append(f"Your settings keep {kept:,} of {len(model):,} tokens and give it {share(drawn, best)}.")
    if standing is not None:
        after = f"{share(drawn, standing)} with" if drawn[standing] else "ruled out by"
        sentences.append(
            f"In the text stands {name(standing)}: {share(model, standing)} under the model, {after} your settings."
        )
    if spot.tokenizer.unknown_id in spot.story.ids[1:]:
        sentences.append("It never saw a symbol of the prompt, and reads it as unknown.")
    told = " ".join(sentences)
    return f'<p class="said" aria-live="polite">{told}</p>'


def _tail(text: str) -> str:
    """The end of a text, with only those spaces made visible that one would overlook."""
    tail = text if len(text) <= _TAIL else "…" + text[-_TAIL:]
    words = tail.rstrip(" ")
    return words.replace("\n", "↵").replace("\t", "→") + "␣" * (len(tail) - len(words))


def _shown(text: str) -> str:
    return f"<b>“{safe(text)}”</b>"
