"""All that is printed: results on stdout, progress and notes on stderr. The only file that knows rich.

No colour and no live display when stderr is not a terminal; then one plain line every few seconds.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column, Table
from rich.text import Text

_EVERY_SECONDS = 5.0
_WIDE = 100
"""Columns from which a training bar has room for memory; below, the bar alone would be left too short."""


def _make(stderr: bool) -> Console:
    return Console(stderr=stderr, highlight=False, soft_wrap=True)


def note(text: str, style: str = "dim") -> None:
    """Say something beside the result, on stderr."""
    _make(stderr=True).print(escape(text), style=style)


def result(text: str = "") -> None:
    """Print a line of the result on stdout."""
    _make(stderr=False).print(escape(text))


def print_json(tree: Any) -> None:
    """Print one JSON object on stdout, unwrapped and uncoloured."""
    print(json.dumps(tree, indent=2, default=str, ensure_ascii=False))


def table(rows: Sequence[Sequence[str]], headers: Sequence[str] = (), title: str | None = None) -> None:
    """Print a table on stdout; numbers (and columns that look like them) to the right."""
    made = Table(
        title=title, title_justify="left", title_style="bold", show_header=bool(headers), box=None, padding=(0, 2, 0, 0)
    )
    columns = list(zip(*rows, strict=True)) if rows else [()] * len(headers)
    for index, column in enumerate(columns):
        numeric = all(_numeric(cell) for cell in column) and index > 0
        made.add_column(headers[index] if headers else "", justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        made.add_row(*(escape(cell) for cell in row))
    Console(highlight=False).print(made)


def _numeric(cell: str) -> bool:
    return bool(cell) and cell[0] in "+-0123456789(" and any(c.isdigit() for c in cell)


def tokens(pieces: Sequence[tuple[str, bool]]) -> None:
    """Print a row of text with its trained pieces coloured; between guillemets where there is no colour."""
    console = Console(highlight=False, soft_wrap=True)
    line = Text()
    for text, trained in pieces:
        if console.is_terminal:
            line.append(text, style="bold green" if trained else "dim")
        else:
            line.append(f"«{text}»" if trained else text)
    console.print(line)


@contextlib.contextmanager
def status(text: str) -> Iterator[Callable[[str], None]]:
    """Show that something is going on; yields a function that changes the text."""
    console = _make(stderr=True)
    if not console.is_terminal:
        last = [time.monotonic()]

        def line(now: str) -> None:
            if time.monotonic() - last[0] >= _EVERY_SECONDS:
                last[0] = time.monotonic()
                console.print(escape(now))

        yield line
        return
    with console.status(escape(text)) as spinner:
        yield lambda now: spinner.update(escape(now))


class _Figures(ProgressColumn):
    """Loss, speed and memory of a training bar."""

    def render(self, task: Task) -> Text:
        return Text(str(task.fields.get("figures", "")), style="cyan")


class Counter:
    """A bar over things to do (answers, rows, steps) on a terminal; a plain line every few seconds elsewhere."""

    def __init__(self, title: str, total: int) -> None:
        self.title, self.total = title, total
        self.console = _make(stderr=True)
        self._began = self._last = time.monotonic()
        self._first: int | None = None
        self._progress = Progress(  # where the terminal is narrow, rich shortens what may wrap: the bar alone
            SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=40), TextColumn("{task.completed}/{task.total}"),
            _Figures(Column(no_wrap=True)), TimeElapsedColumn(Column(no_wrap=True)), TextColumn("eta"),
            TimeRemainingColumn(table_column=Column(no_wrap=True)), console=self.console, transient=True,
        )  # fmt: skip
        self._task = self._progress.add_task(escape(title), total=total)

    def __enter__(self) -> Counter:
        if self.console.is_terminal:
            self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.console.is_terminal:
            self._progress.stop()

    def __call__(self, done: int, figures: str = "") -> None:
        """Show how many are done; the first call may count what was done before."""
        if self._first is None:
            self._first = done if done > 1 else 0
        if self.console.is_terminal:
            self._progress.update(self._task, completed=done, figures=figures)
        elif time.monotonic() - self._last >= _EVERY_SECONDS or done == self.total:
            self._last = time.monotonic()
            left = (time.monotonic() - self._began) / max(1, done - self._first) * (self.total - done)
            shown = f"  {figures}" if figures else ""
            self.console.print(escape(f"{self.title}  {done}/{self.total}{shown}  eta {format_seconds(left)}"))


class TrainingDisplay:
    """A session's events: a bar over the steps, a line for each evaluation and note."""

    def __init__(self, title: str, steps: int) -> None:
        self._counter = Counter(f"{title}  step", steps)

    def __enter__(self) -> TrainingDisplay:
        self._counter.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._counter.__exit__(*exception)

    def __call__(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Show one event."""
        if kind == "step":
            console = self._counter.console
            room = not console.is_terminal or console.width >= _WIDE
            memory = f"  {format_bytes(values['peak_bytes'])}" if values.get("peak_bytes") and room else ""
            self._counter(step, f"loss {values['loss']:.4f}  {values['tokens_per_second']:,.0f} tok/s{memory}")
        elif kind == "eval":
            best = " (best so far)" if values["best"] else ""
            middle = {"perplexity": "val_perplexity", "margin": "val_margin"}
            shown = [f"{word} {values[name]:.2f}" for word, name in middle.items() if name in values]
            parts = [f"validation loss {values['val_loss']:.4f}", *shown, f"accuracy {values['val_accuracy']:.3f}"]
            self._print(f"  step {step}: {', '.join(parts)}{best}")
        elif kind == "note":
            self._print(f"  {values['text']}", style="yellow")

    def _print(self, text: str, style: str | None = None) -> None:
        self._counter.console.print(escape(text), style=style)


def format_bytes(count: float) -> str:
    """Return e.g. '3.4 GB' (powers of 1000)."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit in ("B", "kB") else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def format_seconds(seconds: float) -> str:
    """Return e.g. '1:02:03' or '2:03'."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
