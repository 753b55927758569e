"""A film as HTML: a slider from the first frame to the last, the text of each, and the loss with a moving dot."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from lm.html_parts import escape, read_style
from lm.html_parts.line_chart import MAX_DOTS, Line, line_chart_html
from lm.html_parts.page import whole_page
from lm.runs.film import Frame, frame_title, loss_curve, require_film
from lm.runs.run_folder import RunFolder

MAX_POINTS = 400
"""Points of the curve."""
SCRIPT = """
const film = (root) => {
  let timer = null;
  const slider = () => root.querySelector('.film input');
  const show = (number) => {
    const figures = [...root.querySelectorAll('.film figure')];
    figures.forEach((figure, index) => { figure.hidden = index !== number; });
    const dots = [...root.querySelectorAll('.film .dot[style*="--film-dot"]')];
    dots.forEach((dot, index) => dot.classList.toggle('now', index === number));
    slider().value = number;
    slider().setAttribute('aria-valuetext', figures[number].querySelector('figcaption').textContent);
  };
  const stop = () => {
    clearInterval(timer);
    timer = null;
    const button = root.querySelector('.film button');
    if (button) button.textContent = 'Play';
  };
  const play = () => {
    if (Number(slider().value) >= Number(slider().max)) show(0);
    root.querySelector('.film button').textContent = 'Pause';
    timer = setInterval(() => {
      const now = slider();
      if (!now || Number(now.value) >= Number(now.max)) { stop(); return; }
      show(Number(now.value) + 1);
    }, 450);
  };
  root.addEventListener('input', (event) => {
    if (event.target.closest('.film input')) { stop(); show(Number(slider().value)); }
  });
  root.addEventListener('click', (event) => {
    if (event.target.closest('.film button')) { if (timer) stop(); else play(); }
  });
};
"""
"""Defines film(root): the slider and the button of a film inside an element, which may get another film later."""
STYLE = read_style("line_chart") + read_style("film")
_VARIABLES = """
:root { --body-text-color: var(--ink); --body-text-color-subdued: var(--soft); --border-color-primary: var(--line);
  --primary-500: #6366f1; --film-paper: var(--band); }
body { max-width: 52rem; }
"""
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def film_page(folder: RunFolder) -> str:
    """The film of a run as a page in one file.

    Raises:
        RunError: the run has no film.
    """
    frames = require_film(folder)
    body = (
        f"<h1>How {escape(folder.name)} learned to write</h1>"
        f"<p>{len(frames)} moments of one training. The prompt and the seed are the same at each; only the weights "
        f"differ.</p>{film_html(frames, *loss_curve(folder))}<script>{SCRIPT}film(document.body);</script>"
    )
    return whole_page(f"The learning film of {folder.name}", body, _VARIABLES + STYLE)


def film_html(frames: Sequence[Frame], curve: str, points: Sequence[tuple[int, float]]) -> str:
    """The slider, the frames and the chart; they need `STYLE`, and `SCRIPT` to move.

    Args:
        frames: one or more.
        curve: name of the loss in the chart.
        points: (step, loss) of the chart.
    """
    last = frames[-1]
    figures = "".join(
        f"<figure{' hidden' if number else ''}><figcaption>{escape(frame_title(frame, last))}</figcaption>"
        f"<pre>{escape(_CONTROLS.sub(chr(0xB7), frame.text))}</pre></figure>"
        for number, frame in enumerate(frames)
    )
    return (
        '<div class="film"><div class="bar-row"><button type="button">Play</button>'
        f'<input type="range" min="0" max="{len(frames) - 1}" value="0" step="1" aria-label="Moment of the training"'
        f' aria-valuetext="{escape(frame_title(frames[0], last))}"></div>'
        f"{figures}{_chart(frames, curve, points)}</div>"
    )


def _chart(frames: Sequence[Frame], curve: str, points: Sequence[tuple[int, float]]) -> str:
    if not points:
        return ""
    thinned = [*points[:: 1 + len(points) // MAX_POINTS], points[-1]]
    steps, losses = zip(*points, strict=True)
    # A dot for each frame, on the curve; the script shows one of them.
    dots = [(frame.step, float(np.interp(frame.step, steps, losses))) for frame in frames[:MAX_DOTS]]
    lines = [Line(curve, thinned), Line("the moment shown", dots, "var(--film-dot)")]
    chart = line_chart_html(lines, x_title="step", y_title=f"{curve}, nats per token")
    return re.sub(r'class="dot"( style="stroke:var\(--film-dot\)")', r'class="dot now"\1', chart, count=1)
