"""Inspect: the tokens of a text, the alternatives of each token, and what the sampling options do to them.

The chart shows one position: the end of the prompt, the end of the text, or a token that the visitor picked. It stores
the logits of that position, so that a change of an option needs no model.
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
from lm.generation.distribution import softmax
from lm.generation.filters import SamplingContext
from lm.generation.options import SamplingOptions
from lm.generation.request import Score
from lm.generation.sampler import Sampler
from lm.generation.token_scores import score_rows
from lm.html_parts import escape
from lm.html_parts.token_marks import SURPRISE_SCALE, Mark, marks_html, percent, score_note, surprise_strength, visible
from lm.tokenizers.base import Tokenizer
from serve.engines.codec import TokenCodec
from serve.engines.model_pool import Model
from serve.http_errors import RequestError
from serve.page import token_marks
from serve.page.browser_storage import STORED_CLASS, store
from serve.page.context import Page
from serve.page.controls import SamplingControls, model_picker
from serve.page.messages import attach, page_error
from serve.page.tabs import Tab
from serve.page.text_generation import GeneratedText, GenerationLock, generate, next_logits, tokenize
from serve.page.token_marks import Bar

ALTERNATIVES = 5
"""Alternatives in the tooltip of a token."""
MAX_BARS = 12
_CONTEXT_CHARACTERS = 24
"""Characters before the position, in the sentence above the chart."""

_NO_TEXT = (
    '<span class="empty">Type a prompt and press Write. The generated tokens appear here: orange means surprising to '
    "the model. Pick a token to see its alternatives.</span>"
)
_NO_CHART = (
    "<p class='said'>Type a prompt and press Enter. This chart shows the most likely next tokens, and how the settings "
    "below change their probabilities.</p>"
)

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class TokenSequence:
    """A prompt and the tokens after it."""

    model: str
    prompt: str
    """As the visitor typed it."""
    prompt_ids: tuple[int, ...]
    """Start token included."""
    tokens: tuple[int, ...] = ()
    """The tokens that the model generated or the visitor picked."""
    scores: tuple[Score, ...] = ()
    """One for each of `tokens`."""
    starts: tuple[int, ...] = (0,)
    """Indices at which the model started to generate: 0, and after each token that the visitor picked."""

    @property
    def ids(self) -> tuple[int, ...]:
        """Prompt and tokens."""
        return (*self.prompt_ids, *self.tokens)

    def until(self, index: int) -> TokenSequence:
        """Only the tokens before `index`."""
        starts = tuple(start for start in self.starts if start <= index)
        return replace(self, tokens=self.tokens[:index], scores=self.scores[:index], starts=starts)


@dataclass(frozen=True, eq=False)
class Position:
    """A position in a sequence, with the logits for its token."""

    sequence: TokenSequence
    index: int
    """Number of tokens before it."""
    logits: npt.NDArray[np.float32]
    """(1, V)"""
    tokenizer: Tokenizer
    text_before: str

    @property
    def actual(self) -> int | None:
        """The token at this position; None at the end."""
        return self.sequence.tokens[self.index] if self.index < len(self.sequence.tokens) else None

    def probabilities(self, options: SamplingOptions) -> Floats:
        """(V,) probabilities after the filters."""
        start = max(start for start in self.sequence.starts if start <= self.index)
        prompt, generated = self.sequence.until(start).ids, self.sequence.tokens[start : self.index]
        context = SamplingContext.after(prompt, generated, options, self.tokenizer.vocab_size)
        row: Floats = Sampler(options, self.tokenizer).probabilities(self.logits, [context])[0]
        return row


def build(page: Page) -> None:
    """Add the components and handlers."""
    with gr.Row():
        with gr.Column(scale=3, min_width=320):
            prompt = gr.Textbox(
                label="Prompt", lines=1, max_lines=6, elem_classes=["paper", STORED_CLASS], elem_id="look-prompt",
                placeholder="The beginning of a text. Enter shows the next tokens.",
            )  # fmt: skip
            picker = model_picker(page, "look-model")
            with gr.Row(elem_classes="knobs"):
                go = gr.Button("Write", variant="primary", size="md", min_width=90, elem_id="look-write")
                stop = gr.Button("Stop", size="md", min_width=70, elem_id="look-stop")
            shown = token_marks.Marks(_NO_TEXT, elem_id="look-text")
            status = gr.HTML("", elem_classes="note", elem_id="look-status", css_template=token_marks.SCALE_CSS)
        with gr.Column(scale=2, min_width=300):
            chart = token_marks.Bars(_NO_CHART, elem_id="look-chart")
            controls = SamplingControls(
                page, first=("temperature", "top_k", "seed"), folded=("max_tokens", "top_p", "min_p", "typical_p")
            )
    store(page, "look-prompt", prompt)
    sequence_state: gr.State = gr.State(None)
    position_state: gr.State = gr.State(None)
    lock_state: gr.State = gr.State(GenerationLock())

    async def new_sequence(text: str, name: str | None) -> TokenSequence:
        model, ids = await tokenize(page, name, text)
        return TokenSequence(model.name, text, ids)

    async def position_at(sequence: TokenSequence, index: int) -> Position:
        before = sequence.until(index)
        model, logits = await next_logits(page, sequence.model, before.ids)
        stream = model.tokenizer.stream(after=sequence.prompt_ids)
        text_before = sequence.prompt + "".join(map(stream.feed, before.tokens))
        return Position(sequence, index, logits, model.tokenizer, text_before)

    def show(position: Position, values: Sequence[Any]) -> dict[Any, Any]:
        return {position_state: position, chart: chart_html(position, controls.options(values))}

    async def on_enter(text: str, name: str | None, *values: Any) -> dict[Any, Any]:
        return show(await position_at(await new_sequence(text, name), 0), values)

    async def on_blur(text: str, name: str | None, position: Position | None, *values: Any) -> Any:
        if position is None and not text:
            return gr.skip()
        if position is not None and (position.sequence.prompt, position.sequence.model) == (text, name):
            return gr.skip()
        return await on_enter(text, name, *values)

    async def on_model(lock: GenerationLock, text: str, name: str | None, *values: Any) -> Any:
        await lock.stop_and_wait()
        # The old text is from another model.
        return {sequence_state: None, shown: _NO_TEXT, status: "", **await on_enter(text, name, *values)}

    async def on_settings(text: str, name: str | None, position: Position | None, *values: Any) -> Any:
        if position is None:
            return await on_enter(text, name, *values)
        # Without the position: the visitor may have picked another one in the meantime.
        return {chart: show(position, values)[chart]}

    async def on_write(lock: GenerationLock, text: str, name: str | None, *values: Any) -> AsyncIterator[Any]:
        async for update in extend(lock, await new_sequence(text, name), values):
            yield update

    async def on_bar(
        lock: GenerationLock, position: Position | None, event: gr.EventData, *values: Any
    ) -> AsyncIterator[Any]:
        if position is None:
            return
        token = int(event.token)
        position.tokenizer.checked([token])
        before = position.sequence.until(position.index)
        score = score_rows(position.logits, [token], ALTERNATIVES)[0]
        sequence = replace(
            before, tokens=(*before.tokens, token), scores=(*before.scores, score),
            starts=(*before.starts, position.index + 1),
        )  # fmt: skip
        async for update in extend(lock, sequence, values):
            yield update

    async def extend(lock: GenerationLock, old: TokenSequence, values: Sequence[Any]) -> AsyncIterator[dict[Any, Any]]:
        options = controls.options(values, logprobs=ALTERNATIVES)
        room = token_marks.MAX_MARKS - len(old.tokens)
        if room <= 0:
            raise page_error(
                f"The text has {len(old.tokens):,} tokens. The page shows no more: press Write to restart."
            )
        options = options.model_copy(update={"max_tokens": min(options.max_tokens, room)})
        marks = None
        async with lock.acquire() as stop:
            try:
                async with contextlib.aclosing(generate(page, old.model, old.ids, options, stop=stop)) as results:
                    async for result in results:
                        marks = marks or _SequenceMarks(old, result.model)
                        tokens, scores = result.tokens[0], result.scores[0]
                        new = replace(old, tokens=(*old.tokens, *tokens), scores=(*old.scores, *scores))
                        update = {sequence_state: new, shown: marks.html(new), status: _status(result, new, options)}
                        if result.ended:
                            # With the last update: a later one could replace the chart of a token that was just picked.
                            update |= show(await position_at(new, len(new.tokens)), values)
                        yield update
            except (LMError, RequestError):
                yield {status: ""}
                raise

    async def on_stop(lock: GenerationLock) -> None:
        lock.stop()

    async def on_mark(sequence: TokenSequence | None, event: gr.EventData, *values: Any) -> Any:
        index = int(event.index)
        if sequence is None or not 0 <= index < len(sequence.tokens):
            return gr.skip()
        return show(await position_at(sequence, index), values)

    charted = [position_state, chart]
    inputs = [prompt, picker, *controls.inputs]
    with_position = [prompt, picker, position_state, *controls.inputs]
    outputs = [sequence_state, shown, status, *charted]
    left = attach(prompt.blur, on_blur, with_position, charted)
    entered = attach(prompt.submit, on_enter, inputs, charted)
    attach(picker.input, on_model, [lock_state, *inputs], outputs)
    changes = [component.change for component in controls.filters.values()]
    attach(changes, on_settings, with_position, charted, trigger_mode="always_last")
    # The chart of the prompt's next token is not needed once the prompt is continued.
    attach(go.click, on_write, [lock_state, *inputs], outputs, cancels=[left, entered])
    attach(chart.pick, on_bar, [lock_state, position_state, *controls.inputs], outputs, trigger_mode="multiple")
    attach(stop.click, on_stop, lock_state, None)
    attach(shown.pick, on_mark, [sequence_state, *controls.inputs], charted)


# -- the text -----------------------------------------------------------------------------------------


class _SequenceMarks:
    """A growing sequence as marks; each mark is made once."""

    def __init__(self, sequence: TokenSequence, model: Model) -> None:
        self._parts = [f'<span class="given">{escape(sequence.prompt)}</span>'] if sequence.prompt else []
        self._stream = model.tokenizer.stream(after=sequence.prompt_ids)
        self._text_of = model.tokens.text
        self._count = 0

    def html(self, sequence: TokenSequence) -> str:
        scores = sequence.scores[self._count :]
        marks = [
            Mark(self._stream.feed(score.token), surprise_strength(score.logprob),
                 score_note(score, self._text_of))
            for score in scores
        ]  # fmt: skip
        self._parts.append(marks_html(marks, first=self._count))
        self._count += len(scores)
        return "".join(self._parts)


def _status(result: GeneratedText, sequence: TokenSequence, options: SamplingOptions) -> str:
    parts = [f"{len(sequence.tokens):,} tokens", f"{result.tokens_per_second:,.0f} tokens/s", f"seed {options.seed}"]
    if not result.done:
        parts.append("stopped" if result.stopped else "writing …")
    return f"{' · '.join(parts)} · {SURPRISE_SCALE}"


# -- the chart ----------------------------------------------------------------------------------------


def chart_html(position: Position, options: SamplingOptions) -> str:
    """The chart of a position: a sentence and bars.

    Raises:
        ConfigError: the options are invalid.
    """
    before = softmax(position.logits.astype(np.float64))[0]
    after = position.probabilities(options)
    tokens = TokenCodec(position.tokenizer)
    order = np.argsort(-before, kind="stable").tolist()
    # The most likely tokens, the most likely one after the filters, and the one in the text. Their order is that of
    # the model: no bar moves when a setting changes.
    wanted = {*order[:MAX_BARS], int(after.argmax()), position.actual}
    ranked = [token for token in order if token in wanted]
    bars = [Bar(token, tokens.text(token), float(before[token]), float(after[token])) for token in ranked]
    others = np.ones(len(before), dtype=np.bool_)
    others[ranked] = False
    rest = token_marks.Rest(int(others.sum()), float(before[others].sum()), float(after[others].sum()))
    html = token_marks.bars_html(bars, rest, actual=position.actual, hint="Pick to continue.")
    return _sentence(position, before, after, tokens) + html


def _sentence(position: Position, before: Floats, after: Floats, tokens: TokenCodec) -> str:
    def name(token: int) -> str:
        return _bold(visible(tokens.text(token)))

    def share(shares: Floats, token: int) -> str:
        return escape(percent(float(shares[token])))

    where = f"After {_bold(_end_of(position.text_before))}" if position.text_before else "At the start of a text"
    best, kept, actual = int(before.argmax()), int(np.count_nonzero(after)), position.actual
    sentences = [f"{where}, the model gives {share(before, best)} to {name(best)}."]
    if kept == 1:
        sentences.append(f"Your settings keep only {name(int(after.argmax()))}.")
    else:
        sentences.append(f"Your settings keep {kept:,} of {len(before):,} tokens and give it {share(after, best)}.")
    if actual is not None:
        with_settings = f"{share(after, actual)} with your settings" if after[actual] else "excluded by your settings"
        sentences.append(f"The text has {name(actual)}: {share(before, actual)} in the model, {with_settings}.")
    if position.tokenizer.unknown_id in position.sequence.prompt_ids[1:]:
        sentences.append("The prompt has a symbol outside the vocabulary: the model reads it as unknown.")
    return f'<p class="said" aria-live="polite">{" ".join(sentences)}</p>'


def _end_of(text: str) -> str:
    """The end of a text, with visible line ends, tabs and final spaces."""
    end = text if len(text) <= _CONTEXT_CHARACTERS else "…" + text[-_CONTEXT_CHARACTERS:]
    words = end.rstrip(" ")
    return words.replace("\n", "↵").replace("\t", "→") + "␣" * (len(end) - len(words))


def _bold(text: str) -> str:
    return f"<b>“{escape(text)}”</b>"


TAB = Tab("Inspect", 20, build)
