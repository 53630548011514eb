"""Run a suite: answer held-out rows with each system, put the controls beside them, score, and write it all down.

All systems get the same prompts, template and decoding.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from smolmlx.backend import Backend, Decoding, Generator, Loading
from smolmlx.data.batches import plan_batches
from smolmlx.data.chat import Tokenizer
from smolmlx.data.encode import Encoding
from smolmlx.data.formats import Example, Source, open_source
from smolmlx.data.store import encode_source
from smolmlx.errors import DataError
from smolmlx.evals.suites import (
    EvalRow,
    LossSummary,
    NotesReport,
    compare_notes,
    control_outputs,
    loss_csv,
    loss_dict,
    loss_markdown,
    notes_dict,
    notes_markdown,
    notes_rows_csv,
    notes_summary_csv,
    summarise_loss,
)
from smolmlx.models import BaseModel
from smolmlx.rundir import write_text

Messages = tuple[Mapping[str, Any], ...]
Meter = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
"""(title, total) -> context manager of a function told how many are done."""


@dataclass(frozen=True, slots=True)
class System:
    """A model under test: a base with at most one adapter."""

    name: str
    model: BaseModel
    adapter: Path | None = None


@dataclass(frozen=True, slots=True)
class Settings:
    """What is the same for every system."""

    data: str
    suite: str = "notes"
    train: str | None = None
    ood: str | None = None
    decoding: Decoding = Decoding()
    limit: int | None = None
    template_args: Mapping[str, Any] = field(default_factory=dict)
    system_message: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    form: str = "auto"
    """Format of the rows, and how their columns are renamed; see `formats.open_source`."""
    loading: Loading = Loading()
    folders: tuple[Path, ...] = ()
    encoding: Encoding = Encoding(max_length=2048)
    """How rows become targets (suite loss)."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What a suite found: for notes one report per row set, for loss one summary per system."""

    settings: Settings
    notes: Mapping[str, NotesReport] = field(default_factory=dict)
    """`test` and, where given, `ood`."""
    loss: Mapping[str, LossSummary] = field(default_factory=dict)
    outputs: Mapping[str, Mapping[str, Sequence[str]]] = field(default_factory=dict)
    """Row set -> system -> answers."""

    def to_json(self) -> dict[str, Any]:
        if self.loss:
            return {
                "suite": "loss",
                "data": self.settings.data,
                "systems": {name: loss_dict(found) for name, found in self.loss.items()},
            }
        return {
            "suite": "notes",
            "data": self.settings.data,
            "sets": {name: notes_dict(found) for name, found in self.notes.items()},
        }

    def markdown(self) -> str:
        if self.loss:
            return loss_markdown(self.loss)
        return "\n\n".join(f"## {name}\n\n{notes_markdown(found)}" for name, found in self.notes.items())


def evaluate(
    backend: Backend, systems: Sequence[System], tokenizer: Tokenizer, settings: Settings, meter: Meter
) -> Evaluation:
    """Score systems on a suite.

    Raises:
        DataError: rows without what the suite needs.
    """
    if settings.suite == "loss":
        return _evaluate_loss(backend, systems, tokenizer, settings)
    sets = {"test": read_rows(settings.data, settings)}
    if settings.ood:
        sets["ood"] = read_rows(settings.ood, settings)
    answers: dict[str, dict[str, Sequence[str]]] = {name: {} for name in sets}
    for system in systems:  # one model in memory at a time
        generator = backend.generator(system.model, system.adapter, tokenizer, settings.loading)
        for name, rows in sets.items():
            with meter(f"{system.name} answers {name}", len(rows)) as on_done:
                answers[name][system.name] = answer(
                    generator, tokenizer, [messages for _, messages in rows], settings, on_done
                )
    train = [row for row, _ in read_rows(settings.train, settings, limited=False)] if settings.train else []
    reports = {}
    for name, rows in sets.items():
        scored = [row for row, _ in rows]
        if train:
            answers[name] |= control_outputs(train, scored)
        reports[name] = compare_notes(scored, answers[name], also=_pairs(systems))
    return Evaluation(settings, notes=reports, outputs=answers)


def _pairs(systems: Sequence[System]) -> list[tuple[str, str]]:
    """Compare each system with the first, the base."""
    names = [system.name for system in systems]
    return [(name, names[0]) for name in names[1:]]


def read_rows(path: str, settings: Settings, *, limited: bool = True) -> list[tuple[EvalRow, Messages]]:
    """Read rows as (what is scored, what the model is asked).

    The input that is scored against is the row's own `input` field where it has one, else the last user message.
    """
    found = []
    for number, (raw_input, example) in enumerate(_with_input(path, settings), 1):
        messages = list(example.messages)
        reference = messages.pop()["content"] if messages and messages[-1]["role"] == "assistant" else None
        if reference is None or not messages:
            raise DataError(
                f"{example.where}: an evaluation row needs a question and an assistant answer to compare with."
            )
        found.append(
            (EvalRow(f"row-{number:04d}", raw_input or str(messages[-1]["content"]), reference), tuple(messages))
        )
        if limited and settings.limit and len(found) >= settings.limit:
            break
    return found


def open_rows(path: str, settings: Settings) -> Source:
    """Open rows the way the recipe reads its own."""
    return open_source(
        path,
        form=settings.form,
        columns=settings.columns,
        system=settings.system_message,
        split="test",
        folders=settings.folders,
    )


def _with_input(path: str, settings: Settings) -> Iterator[tuple[str | None, Example]]:
    source = open_rows(path, settings)
    for example in source:
        user = example.messages[-2]["content"] if len(example.messages) >= 2 else None
        # alpaca joins instruction and input by a blank line; the passage alone is what supports an answer
        passage = user.split("\n\n", 1)[1] if source.form.name == "alpaca" and user and "\n\n" in user else None
        yield passage, example


def answer(
    generator: Generator,
    tokenizer: Tokenizer,
    prompts: Sequence[Messages],
    settings: Settings,
    on_done: Callable[[int], None] = lambda done: None,
) -> list[str]:
    """Answer conversations with the chat template; answers come back in order."""
    tokens = [tokenizer.encode(tokenizer.prompt(messages, **settings.template_args)) for messages in prompts]
    answers = [""] * len(prompts)
    for done, completion in enumerate(generator.generate(tokens, settings.decoding), 1):
        answers[completion.index] = tokenizer.decode(completion.ids).strip()
        on_done(done)
    return answers


def _evaluate_loss(backend: Backend, systems: Sequence[System], tokenizer: Tokenizer, settings: Settings) -> Evaluation:
    source = open_rows(settings.data, settings)
    store = encode_source(source, tokenizer, settings.encoding, limit=settings.limit)
    if not len(store):
        raise DataError(f"{settings.data}: no row has a supervised token within {settings.encoding.max_length} tokens.")
    plan = plan_batches(store, batch_size=min(8, settings.decoding.batch_size), shuffle=False, pad_id=tokenizer.pad_id)
    found = {}
    for system in systems:
        generator = backend.generator(system.model, system.adapter, tokenizer, settings.loading)
        batches = list(plan.evaluation())
        found[system.name] = summarise_loss(
            (
                float(-(score.log_probs * batch.weights).sum()),
                batch.num_supervised,
                int((score.correct & (batch.weights > 0)).sum()),
            )
            for batch, score in zip(batches, generator.score(batches), strict=True)
        )
    return Evaluation(settings, loss=found)


def write(evaluation: Evaluation, folder: Path) -> None:
    """Write results.json, results.md, results.csv, and for notes every row's score and answer."""
    write_text(folder / "results.json", json.dumps(evaluation.to_json(), indent=2) + "\n")
    write_text(folder / "results.md", evaluation.markdown() + "\n")
    if evaluation.loss:
        write_text(folder / "results.csv", loss_csv(evaluation.loss))
    for name, report in evaluation.notes.items():
        write_text(folder / f"{name}.csv", notes_summary_csv(report))
        write_text(folder / f"{name}-rows.csv", notes_rows_csv(report))
        rows = read_rows(
            evaluation.settings.data if name == "test" else str(evaluation.settings.ood), evaluation.settings
        )
        lines = [
            {
                "id": row.id,
                "input": row.input,
                "reference": row.reference,
                "answers": {system: found[i] for system, found in evaluation.outputs[name].items()},
            }
            for i, (row, _) in enumerate(rows)
        ]
        write_text(
            folder / f"{name}-answers.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        )


def mean(report: NotesReport, system: str, metric: str) -> tuple[float, float, float]:
    """Return (mean, low, high) of a metric."""
    interval = report.summary[system][metric]
    assert np.isfinite(interval.mean)
    return interval.mean, interval.low, interval.high
