"""What the view of a training says at its start and end."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cli.progress import TrainingView
from lm.training.callbacks import End, Start

START = Start(
    "a",
    "gru",
    100,
    "words",
    0,
    90,
    64,
    10.0,
    "cpu",
    "fp32",
    validations=3,
    validation_tokens=3413,
    valid_tokens=217_646,
)


def said(capsys: pytest.CaptureFixture[str], *events: Start | End) -> str:
    view = TrainingView(Path("checkpoints"))
    for event in events:
        view.on_start(event) if isinstance(event, Start) else view.on_end(event)
    return capsys.readouterr().err


def test_a_validation_of_a_part_is_said_in_the_first_lines(capsys: pytest.CaptureFixture[str]) -> None:
    assert "Validation: 3 times on the first 3,413 of 217,646 tokens" in said(capsys, START)


def test_a_plan_by_time_says_its_time_and_about_how_many_steps_it_has(capsys: pytest.CaptureFixture[str]) -> None:
    timed = replace(START, plan_seconds=60.0)
    err = said(capsys, timed, End("finished", 97, 97, 59.4, 1.5, 97))
    assert "Plan: 1:00, about 90 steps of 64 tokens (9.0 epochs), cpu, fp32\n" in err
    assert "Finished the plan after 0:59: 97 steps.\n" in err
    err = said(capsys, timed, End("interrupted", 69, 97, 40.0, 1.5, 60))
    assert "Interrupted, saved at step 69 of about 97 after 0:40." in err
    assert "Finish the plan with: lm train --resume a\n" in err


def test_a_followed_older_run_that_ran_out_of_time_says_how_high_the_learning_rate_was(
    capsys: pytest.CaptureFixture[str],
) -> None:
    err = said(capsys, START, End("out_of_time", 69, 90, 57.0, 1.5, 60, learning_rate_share=0.314))
    assert "Time is up at step 69 of 90 after 0:57." in err
    assert "The learning rate was still 31% of its peak; the last steps often help most.\n" in err
    assert "Finish the plan with: lm train --resume a\n" in err


def test_a_run_that_stopped_improving_names_its_best_step(capsys: pytest.CaptureFixture[str]) -> None:
    err = said(capsys, START, End("no_progress", 60, 90, 57.0, 1.5, 30))
    assert "Stopped at step 60 after 0:57: no better validation since step 30." in err
