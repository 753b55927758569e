"""Train: a text goes in, and one watches a model learn from it."""

from __future__ import annotations

import asyncio
import io
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import gradio as gr
from gradio.context import Context

from serve.page.curves import COLOURS, CURVES_CSS, Curve, curves_html
from serve.page.keeping import KEPT, keep
from serve.page.site import QUIET, Page, for_page, refusal, safe, told
from serve.training_queue import Job, families, keep_text

MINUTES = {"1 minute": 1, "5 minutes": 5, "20 minutes": 20}
POLL_SECONDS = 1.0
PASTED = "pasted text"
HOW = (
    "Training is switched off for visitors from other machines. Whoever runs this server can switch it on: "
    "lm serve --allow-training"
)
CURVES = {"train_loss": ("training", "#94a3b8"), "valid_loss": ("text that it never saw", COLOURS[0])}


class _Seen(NamedTuple):
    """What a visitor's view shows already."""

    job: int
    version: int
    """Of all jobs."""
    titles: list[tuple[str, int]]
    curve: int
    """Its last step."""
    sample: int
    """The step of the newest."""


def build(page: Page) -> None:
    """The tab."""
    jobs = page.jobs
    # A word to those who may not; the handlers refuse them as well.
    notice = gr.Markdown(safe(HOW), visible=False, elem_classes="note", elem_id="train-notice")
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            upload = gr.File(label="A text file", height=150, elem_id="train-file")
            pasted = gr.Textbox(
                label="… or paste a text", lines=4, max_lines=10, elem_id="train-paste", elem_classes=KEPT,
                placeholder="Letters, poems, recipes, code: all that is text. The more of it, the better; "
                "from a few pages on the model begins to write words.",
            )  # fmt: skip
            minutes = gr.Radio(
                list(MINUTES.items()), value=1, label="How long", elem_id="train-minutes",
                info="Longer is better, with less and less to gain. It can be stopped at any time.",
            )  # fmt: skip
            family = gr.Radio(
                list(families().items()), value=next(iter(families().values())), label="What kind of model",
                info="A GRU is the quickest to a good model of a small text.", elem_id="train-family",
            )  # fmt: skip
            go = gr.Button("Train", variant="primary", elem_id="train-go")
        with gr.Column(scale=3, min_width=320):
            chooser: gr.Dropdown = gr.Dropdown(
                [], label="Training", visible=False, elem_id="train-chooser", interactive=True
            )  # fmt: skip
            status = gr.HTML(_status(None, 0), css_template=_CSS, apply_default_css=False, elem_id="train-status")
            stop = gr.Button("Stop", size="sm", visible=False, elem_id="train-stop")
            plot = gr.HTML("", css_template=CURVES_CSS, apply_default_css=False, elem_id="train-plot")
            samples = gr.HTML("", css_template=_CSS, apply_default_css=False, elem_id="train-samples")
    keep(page, "train-paste", pasted)
    timer = gr.Timer(POLL_SECONDS, active=False)
    seen: gr.State = gr.State(None)

    def view(number: int | None, shown: _Seen | None) -> dict[Any, Any]:
        """What has changed since `shown`."""
        job = jobs.find(number) or _of_interest(jobs.jobs)
        if job is None:
            # So it is too where the server was started anew under an open page.
            return {
                timer: gr.update(active=False), seen: None, chooser: gr.update(choices=[], value=None, visible=False),
                status: _status(None, 0), stop: gr.update(visible=False), plot: "", samples: "",
            }  # fmt: skip
        titles = [(_title(each, jobs.ahead(each)), each.number) for each in reversed(jobs.jobs)]
        curve, sample = job.rows[-1]["step"] if job.rows else 0, job.samples[-1].step if job.samples else 0
        now = _Seen(job.number, jobs.version, titles, curve, sample)
        if now == shown:
            return {}
        before = shown if shown is not None and shown.job == job.number else None
        news: dict[Any, Any] = {
            seen: now, timer: gr.update(active=jobs.busy),
            status: _status(job, jobs.ahead(job)), stop: _stop_button(job),
        }  # fmt: skip
        if before is None or before.titles != titles:
            news[chooser] = gr.update(choices=titles, value=job.number, visible=len(titles) > 1)
        if before is None or before.curve != curve:
            news[plot] = _plot(job)
        if before is None or before.sample != sample:
            news[samples] = _samples(job)
        return news

    async def on_open(shown: _Seen | None, request: gr.Request) -> dict[Any, Any]:
        allowed = page.may_change(request)
        news = view(shown.job if shown else None, None)
        return {notice: gr.update(visible=not allowed), go: gr.update(interactive=allowed), **news}

    async def on_choose(number: int | None) -> dict[Any, Any]:
        return view(number, None)

    async def on_tick(shown: _Seen | None) -> Any:
        return view(shown.job if shown else None, shown) or gr.skip()

    async def on_train(path: str | None, text: str, length: float, kind: str, request: gr.Request) -> dict[Any, Any]:
        if not page.may_change(request):
            raise refusal(HOW)
        job = jobs.submit(*await asyncio.to_thread(_keep, path, text, int(page.options.max_upload)), kind, length)
        # The text stays where it is: it may be needed again, after a failure or for another model.
        return view(job.number, None)

    async def on_stop(shown: _Seen | None, request: gr.Request) -> Any:
        if not page.may_change(request):
            raise refusal(HOW)
        job = jobs.find(shown.job) if shown else None
        if job is not None:
            jobs.stop(job)
        return view(shown.job if shown else None, None)

    outputs = [chooser, status, stop, plot, samples, timer, seen]
    tab = Context.block
    assert isinstance(tab, gr.Tab), "a tab is built inside of one"
    tab.select(told(on_open), seen, [notice, go, *outputs], **QUIET)
    chooser.input(told(on_choose), chooser, outputs, **QUIET)
    timer.tick(told(on_tick), seen, outputs, **QUIET)
    go.click(told(on_train), [upload, pasted, minutes, family], outputs, **QUIET)
    stop.click(told(on_stop), seen, outputs, **QUIET)


def _keep(path: str | None, text: str, most_bytes: int) -> tuple[Path, str]:
    """The text that was given, copied to where it stays, and what to call it."""
    if path and text.strip():
        raise refusal("There is a file and a pasted text: take one of them away, so that it is clear which is meant.")
    stream: BinaryIO
    if path:
        shown = Path(path).name
        with open(path, "rb") as stream:
            return keep_text(stream, shown, most_bytes), shown
    if text.strip():
        stream = io.BytesIO(text.encode("utf-8", "replace"))
        return keep_text(stream, PASTED, most_bytes), PASTED
    raise refusal("There is no text yet: drop a file, or paste one.")


def _of_interest(jobs: list[Job]) -> Job | None:
    """The one that runs, else the next, else the last."""
    running = [job for job in jobs if not job.ended]
    return running[0] if running else jobs[-1] if jobs else None


# -- how it looks -------------------------------------------------------------------------------------

_STATES = {
    "waiting": "in line", "reading": "getting ready", "training": "training", "validating": "training",
    "done": "done", "stopped": "stopped", "failed": "failed",
}  # fmt: skip
_STAGES = {"reading": "Reading the text"}


def _name(job: Job) -> str:
    kinds = {kind: name for name, kind in families().items()}
    minutes = f"{job.minutes:g} minute{'' if job.minutes == 1 else 's'}"
    return f"{job.shown} · {kinds.get(job.family, job.family)} · {minutes}"


def _title(job: Job, ahead: int) -> str:
    place = f", {ahead} before it" if job.status == "waiting" and ahead else ""
    return f"{job.number}. {_name(job)} · {_STATES[job.status]}{place}"


def _status(job: Job | None, ahead: int) -> str:
    """Where a training stands, as HTML."""
    if job is None:
        return (
            "<div class='job empty'><p>Nothing is being trained. Give a text, press <b>Train</b>, and watch here how a "
            "model learns to write like it: a curve that falls, and samples that get better.</p></div>"
        )
    now, share = _progress(job, ahead)
    facts = []
    if job.facts:
        facts += [f"{job.facts['parameters']:,} weights", f"on {job.facts['device']}"]
    if job.run:
        facts.append(f"run {job.run}")
    value = f"value='{share:.4f}'" if share is not None else ""
    bar = "" if job.ended else f"<progress max='1' {value} aria-label='Progress'></progress>"
    return (
        f"<div class='job {job.status}'><h3>{safe(_name(job))}</h3>{bar}<p>{now}</p>"
        f"<p class='facts'>{safe(' · '.join(facts))}</p></div>"
    )


def _progress(job: Job, ahead: int) -> tuple[str, float | None]:
    """A sentence, as HTML, and how far it is; None where nobody knows."""
    share = job.step / job.steps if job.steps else None
    if job.status == "waiting":
        return f"In line: {ahead} training{'' if ahead == 1 else 's'} before this one.", None
    if job.stopping and not job.ended:
        return "Stopping; what was learned is being saved and measured …", share
    if job.status == "reading":
        return "Reading the text and finding out how fast this machine is …", job.share
    if job.reason is not None and not job.ended:
        return "Measuring what it has learned …", None
    if job.status in ("training", "validating"):
        left = job.seconds_left
        then = f" · about {duration(left)} left" if left is not None else ""
        loss = f" · loss {job.loss:.2f}" if job.loss is not None else ""
        return f"Step {job.step:,} of {job.steps:,}{loss}{then}", share
    if job.status == "failed":
        what = "Your text is still there: change it, or choose another kind of model, and press Train."
        return f"<b>It failed.</b> {safe(for_page(job.sentence or ''))} {what}", None
    if job.report is None:
        return (f"Stopped. What it had learned is kept in run {safe(job.run)}." if job.run
                else "Stopped before it had learned anything."), None  # fmt: skip
    how = "Done." if job.status == "done" else f"Stopped at step {job.step:,}; what it had learned is kept."
    then = "It is in the model picker now: go to <b>Write</b> and let it write."
    return f"<b>{how}</b> {score_in_words(job.report)} {then}", None


def score_in_words(report: dict[str, Any]) -> str:
    """What a report says, for who has never seen one."""
    piece = "character" if report["tokens"] == report["characters"] else "piece of text"
    guesses = f"On text that it never saw, it guesses the next {piece} right {report['accuracy']:.0%} of the time"
    if report["bits_per_byte"] is None:
        return f"{guesses}."
    return f"{guesses}, and needs {report['bits_per_byte']:.2f} bits per byte (8 is to know nothing; less is better)."


def duration(seconds: float) -> str:
    """A time as one says it: 40 s, 3 min, 1 h 5 min."""
    if seconds < 55:
        return f"{max(5, round(seconds / 5) * 5)} s"
    minutes = max(1, round(seconds / 60))
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _stop_button(job: Job) -> Any:
    label = "Leave the line" if job.status == "waiting" else "Stop, and keep what it has learned"
    return gr.update(value=label, visible=not job.ended, interactive=not job.stopping)


def _plot(job: Job) -> str:
    curves = [
        Curve(name, [(row["step"], row[field]) for row in job.rows if row[field] is not None], colour)
        for field, (name, colour) in CURVES.items()
    ]
    return curves_html(curves, x_title="step", y_title="loss: how badly it predicts, lower is better", x_most=job.steps)


def _samples(job: Job) -> str:
    if not job.samples:
        return ""
    parts = [
        f"<figure><figcaption>step {sample.step:,} · validation loss {sample.valid_loss:.3f}</figcaption>"
        f"<pre>{safe(sample.text)}</pre></figure>"
        for sample in reversed(job.samples)
    ]
    return f"<div class='samples'><h3>What it writes, the newest first</h3>{''.join(parts)}</div>"


_CSS = """
.job h3, .samples h3 { margin: 0 0 .4rem; font-size: 1rem; font-weight: 600; color: var(--body-text-color);
  overflow-wrap: anywhere; }
.job p { margin: .35rem 0 0; color: var(--body-text-color); overflow-wrap: anywhere; }
.job .facts, .job.empty p, figcaption { color: var(--body-text-color-subdued); font-size: .88rem; }
.job.failed p b { color: var(--error-text-color, #dc2626); }
progress { appearance: none; width: 100%; height: .6rem; border: 0; border-radius: .3rem; overflow: hidden;
  background: var(--border-color-primary); }
progress::-webkit-progress-bar { background: var(--border-color-primary); }
progress::-webkit-progress-value { background: var(--primary-500); transition: width .6s; }
progress::-moz-progress-bar { background: var(--primary-500); }
progress:indeterminate { opacity: .5; }
figure { margin: 0 0 .7rem; }
.samples pre { margin: .15rem 0 0; padding: .5rem .7rem; white-space: pre-wrap; overflow-wrap: anywhere;
  font-family: Georgia, "Times New Roman", serif; font-size: .98rem; line-height: 1.5; max-height: 14rem;
  overflow-y: auto; color: var(--body-text-color); background: var(--background-fill-secondary);
  border-left: 3px solid var(--border-color-primary); border-radius: 3px; }
.samples figure:first-of-type pre { border-left-color: var(--primary-500); }
"""
