"""Train: a visitor gives a text, and watches a model learn from it."""

from __future__ import annotations

import asyncio
import io
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import gradio as gr
from gradio.context import Context

from lm.html_parts import escape
from lm.html_parts.line_chart import COLOURS
from serve.page.assets import read_asset
from serve.page.browser_storage import STORED_CLASS, store
from serve.page.context import Page
from serve.page.line_chart import ChartLine, LineChart, chart
from serve.page.messages import attach, page_error, without_commands
from serve.page.tabs import Tab
from serve.training_queue import Job, families, keep_text

MINUTES = {"1 minute": 1, "5 minutes": 5, "20 minutes": 20}
POLL_SECONDS = 1.0
PASTED = "pasted text"
NOT_ALLOWED = (
    "Training is switched off for visitors from other machines. The operator of this server can allow it: "
    "lm serve --allow-training"
)
LINES = {"train_loss": ("training", "#94a3b8"), "valid_loss": ("validation", COLOURS[0])}


class _Shown(NamedTuple):
    """What a visitor's page shows already."""

    job: int
    version: int
    """Of the training queue."""
    titles: list[tuple[str, int]]
    last_step: int
    """Of the chart."""
    sample_step: int
    """Of the newest sample."""


def build(page: Page) -> None:
    """Add the components and handlers."""
    jobs = page.training
    plain: dict[str, Any] = {"css_template": read_asset("train.css"), "apply_default_css": False}
    # For visitors who may not train; the handlers refuse them too.
    notice = gr.Markdown(escape(NOT_ALLOWED), visible=False, elem_classes="note", elem_id="train-notice")
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            upload = gr.File(label="A text file", height=150, elem_id="train-file")
            pasted = gr.Textbox(
                label="… or paste a text", lines=4, max_lines=10, elem_id="train-paste", elem_classes=STORED_CLASS,
                placeholder="Letters, poems, recipes, code: any text. More text is better. The model begins to write "
                "words from a few pages.",
            )  # fmt: skip
            minutes = gr.Radio(
                list(MINUTES.items()), value=1, label="Training time", elem_id="train-minutes",
                info="Longer is better, but each minute improves the model less. You can stop at any time.",
            )  # fmt: skip
            family = gr.Radio(
                list(families().items()), value=next(iter(families().values())), label="Kind of model",
                info="Default: n-gram counts and a network, of a size that suits text, time and machine.",
                elem_id="train-family",
            )  # fmt: skip
            go = gr.Button("Train", variant="primary", elem_id="train-go")
        with gr.Column(scale=3, min_width=320):
            chooser: gr.Dropdown = gr.Dropdown(
                [], label="Training", visible=False, elem_id="train-chooser", interactive=True
            )  # fmt: skip
            status = gr.HTML(_status(None, 0), elem_id="train-status", **plain)
            stop = gr.Button("Stop", size="sm", visible=False, elem_id="train-stop")
            plot = LineChart(elem_id="train-plot")
            samples = gr.HTML("", elem_id="train-samples", **plain)
    store(page, "train-paste", pasted)
    timer = gr.Timer(POLL_SECONDS, active=False)
    shown_state: gr.State = gr.State(None)

    def show(number: int | None, shown: _Shown | None) -> dict[Any, Any]:
        """What has changed since `shown`."""
        job = jobs.find(number) or _default_job(jobs.jobs)
        if job is None:
            # Also after a restart of the server under an open page.
            return {
                timer: gr.update(active=False), shown_state: None, status: _status(None, 0), plot: None, samples: "",
                chooser: gr.update(choices=[], value=None, visible=False), stop: gr.update(visible=False),
            }  # fmt: skip
        titles = [(_title(each, jobs.ahead(each)), each.number) for each in reversed(jobs.jobs)]
        last_step, sample_step = job.rows[-1]["step"] if job.rows else 0, job.samples[-1].step if job.samples else 0
        now = _Shown(job.number, jobs.version, titles, last_step, sample_step)
        if now == shown:
            return {}
        before = shown if shown is not None and shown.job == job.number else None
        update: dict[Any, Any] = {
            shown_state: now, timer: gr.update(active=jobs.busy), status: _status(job, jobs.ahead(job)),
            stop: _stop_button(job),
        }  # fmt: skip
        if before is None or before.titles != titles:
            update[chooser] = gr.update(choices=titles, value=job.number, visible=len(titles) > 1)
        if before is None or before.last_step != last_step:
            update[plot] = _plot(job)
        if before is None or before.sample_step != sample_step:
            update[samples] = _samples(job)
        return update

    async def on_open(shown: _Shown | None, request: gr.Request) -> dict[Any, Any]:
        allowed = page.may_train(request)
        update = show(shown.job if shown else None, None)
        return {notice: gr.update(visible=not allowed), go: gr.update(interactive=allowed), **update}

    async def on_choose(number: int | None) -> dict[Any, Any]:
        return show(number, None)

    async def on_tick(shown: _Shown | None) -> Any:
        return show(shown.job if shown else None, shown) or gr.skip()

    async def on_train(path: str | None, text: str, length: float, kind: str, request: gr.Request) -> dict[Any, Any]:
        if not page.may_train(request):
            raise page_error(NOT_ALLOWED)
        job = jobs.submit(*await asyncio.to_thread(_save_text, path, text, int(page.options.max_upload)), kind, length)
        # The text stays in the form: the visitor may need it after a failure, or for another model.
        return show(job.number, None)

    async def on_stop(shown: _Shown | None, request: gr.Request) -> Any:
        if not page.may_train(request):
            raise page_error(NOT_ALLOWED)
        job = jobs.find(shown.job) if shown else None
        if job is not None:
            jobs.stop(job)
        return show(shown.job if shown else None, None)

    outputs = [chooser, status, stop, plot, samples, timer, shown_state]
    tab = Context.block
    assert isinstance(tab, gr.Tab), "the caller opens a gr.Tab"
    attach(tab.select, on_open, shown_state, [notice, go, *outputs])
    attach(chooser.input, on_choose, chooser, outputs)
    attach(timer.tick, on_tick, shown_state, outputs)
    attach(go.click, on_train, [upload, pasted, minutes, family], outputs)
    attach(stop.click, on_stop, shown_state, outputs)


def _save_text(path: str | None, text: str, max_bytes: int) -> tuple[Path, str]:
    """Copy the text to the cache; returns the path of the copy, and the name to show."""
    if path and text.strip():
        raise page_error("There is a file and a pasted text. Remove one of them.")
    stream: BinaryIO
    if path:
        name = Path(path).name
        with open(path, "rb") as stream:
            return keep_text(stream, name, max_bytes), name
    if text.strip():
        stream = io.BytesIO(text.encode("utf-8", "replace"))
        return keep_text(stream, PASTED, max_bytes), PASTED
    raise page_error("There is no text yet. Drop a file or paste a text.")


def _default_job(jobs: list[Job]) -> Job | None:
    """The running job, else the next one, else the last one."""
    running = [job for job in jobs if not job.ended]
    return running[0] if running else jobs[-1] if jobs else None


# -- how it looks -------------------------------------------------------------------------------------

_STATUS_NAMES = {
    "waiting": "waiting", "reading": "preparing", "training": "training", "validating": "training",
    "done": "done", "stopped": "stopped", "failed": "failed",
}  # fmt: skip


def _name(job: Job) -> str:
    kinds = {kind: name for name, kind in families().items()}
    minutes = f"{job.minutes:g} minute{'' if job.minutes == 1 else 's'}"
    return f"{job.shown} · {kinds.get(job.family, job.family)} · {minutes}"


def _title(job: Job, ahead: int) -> str:
    position = f", {ahead} before it" if job.status == "waiting" and ahead else ""
    return f"{job.number}. {_name(job)} · {_STATUS_NAMES[job.status]}{position}"


def _status(job: Job | None, ahead: int) -> str:
    """Status of a job, as HTML."""
    if job is None:
        return (
            "<div class='job empty'><p>No training yet. Give a text and press <b>Train</b>. The loss and samples of "
            "the model appear here while it learns.</p></div>"
        )
    sentence, share = _progress(job, ahead)
    facts = []
    if job.facts:
        facts += [f"{job.facts['parameters']:,} parameters", f"on {job.facts['device']}"]
    if job.run:
        facts.append(f"run {job.run}")
    value = f"value='{share:.4f}'" if share is not None else ""
    bar = "" if job.ended else f"<progress max='1' {value} aria-label='Progress'></progress>"
    return (
        f"<div class='job {job.status}'><h3>{escape(_name(job))}</h3>{bar}<p>{sentence}</p>"
        f"<p class='facts'>{escape(' · '.join(facts))}</p></div>"
    )


def _progress(job: Job, ahead: int) -> tuple[str, float | None]:
    """A sentence as HTML, and the share that is done; None if that is not known."""
    share = job.step / job.steps if job.steps else None
    if job.status == "waiting":
        return f"Waiting for {ahead} other training{'' if ahead == 1 else 's'}.", None
    if job.stopping and not job.ended:
        return "Stopping: the model is saved and evaluated …", share
    if job.status == "reading":
        return "Reading the text and measuring the speed of this machine …", job.share
    if job.reason is not None and not job.ended:
        return "Evaluating the model …", None
    if job.status in ("training", "validating"):
        left = job.seconds_left
        then = f" · about {duration(left)} left" if left is not None else ""
        loss = f" · loss {job.loss:.2f}" if job.loss is not None else ""
        return f"Step {job.step:,} of {job.steps:,}{loss}{then}", share
    if job.status == "failed":
        what = "Your text is still there: change it, or choose another kind of model, and press Train."
        return f"<b>Training failed.</b> {escape(without_commands(job.sentence or ''))} {what}", None
    if job.report is None:
        return (f"Stopped. The model is saved as run {escape(job.run)}." if job.run
                else "Stopped before the first model was saved."), None  # fmt: skip
    end = "Done." if job.status == "done" else f"Stopped at step {job.step:,}. The model is saved."
    return f"<b>{end}</b> {score_in_words(job.report)} Go to <b>Write</b>, pick the model, and let it write.", None


def score_in_words(report: dict[str, Any]) -> str:
    """A report in one sentence for a newcomer."""
    unit = "character" if report["tokens"] == report["characters"] else "token"
    sentence = f"On new text, the model predicts the next {unit} correctly {report['accuracy']:.0%} of the time"
    if report["bits_per_byte"] is None:
        return f"{sentence}."
    return f"{sentence}, and scores {report['bits_per_byte']:.2f} bits per byte (lower is better; 8 is random)."


def duration(seconds: float) -> str:
    """A rounded time: 40 s, 3 min, 1 h 5 min."""
    if seconds < 55:
        return f"{max(5, round(seconds / 5) * 5)} s"
    minutes = max(1, round(seconds / 60))
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _stop_button(job: Job) -> Any:
    label = "Cancel" if job.status == "waiting" else "Stop and save the model"
    return gr.update(value=label, visible=not job.ended, interactive=not job.stopping)


def _plot(job: Job) -> dict[str, Any] | None:
    # Bits per byte compare tokenizers; training has the loss alone.
    lines = []
    for field, (name, colour) in LINES.items():
        points = [(row["step"], row[field]) for row in job.rows if row[field] is not None]
        values = [y for _, y in points]
        best = values.index(min(values)) if field == "valid_loss" and values else None
        thin = field == "train_loss"
        lines.append(ChartLine(name, [x for x, _ in points], values, colour, thin, best=best))
    return chart(
        lines, x_title="step", y_title="loss, nats per token (lower is better)", file=job.run or "training",
        x_end=job.steps,
    )  # fmt: skip


def _samples(job: Job) -> str:
    if not job.samples:
        return ""
    parts = [
        f"<figure><figcaption>step {sample.step:,} · validation loss {sample.valid_loss:.3f}</figcaption>"
        f"<pre>{escape(sample.text)}</pre></figure>"
        for sample in reversed(job.samples)
    ]
    return f"<div class='samples'><h3>Samples of the model, the newest first</h3>{''.join(parts)}</div>"


TAB = Tab("Train", 50, build)
