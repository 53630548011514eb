"""What is shown of a training as it goes: the step's own numbers, on one line of the terminal."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from smolmlx import console


def step(loss: float) -> dict[str, Any]:
    return {"loss": loss, "tokens_per_second": 1197.0, "peak_bytes": 490_900_000}


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What a display writes where there is no terminal, every step of it."""
    text = io.StringIO()
    monkeypatch.setattr(console, "_make", lambda stderr: Console(file=text, width=200))
    monkeypatch.setattr(console, "_EVERY_SECONDS", 0.0)
    return text


def test_the_loss_is_of_the_step(shown: io.StringIO) -> None:
    with console.TrainingDisplay("sft", 2) as display:
        display("step", 1, step(5.5))
        display("step", 2, step(1.0663))
    first, last = shown.getvalue().splitlines()
    assert "1/2  loss 5.5000" in first and "2/2  loss 1.0663  1,197 tok/s  490.9 MB" in last


def test_best_does_not_say_that_weights_are_kept(shown: io.StringIO) -> None:
    with console.TrainingDisplay("sft", 2) as display:
        display("eval", 1, {"val_loss": 5.4537, "val_accuracy": 0.25, "best": True})
        display("eval", 2, {"val_loss": 5.9619, "val_accuracy": 0.25, "best": False})
    first, last = shown.getvalue().splitlines()
    assert first.endswith("accuracy 0.250 (best so far)") and last.endswith("0.250")


@pytest.mark.parametrize(("width", "memory"), [(70, False), (80, False), (99, False), (100, True), (120, True)])
def test_a_bar_is_one_line(monkeypatch: pytest.MonkeyPatch, width: int, memory: bool) -> None:
    text = io.StringIO()
    made = Console(file=text, force_terminal=True, width=width, soft_wrap=True)
    monkeypatch.setattr(console, "_make", lambda stderr: made)
    display = console.TrainingDisplay("sft", 1200)
    display("step", 1000, step(5.2979))
    made.print(display._counter._progress.get_renderable())
    (line,) = text.getvalue().splitlines()
    assert "1000/1200" in line and "loss 5.2979  1,197 tok/s" in line and "\u2026" not in line
    assert ("490.9 MB" in line) == memory
