"""Run a suite: answer held-out rows with each system, put the controls beside them, score, and write it all down.

All systems get the same prompts, template and decoding.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from smolmlx.backend import Backend, Decoding, Generator, Loading
from smolmlx.data.batches import Batch, plan_batches
from smolmlx.data.chat import Tokenizer
from smolmlx.data.encode import Encoding
from smolmlx.data.formats import Raw, Source, open_source, to_example
from smolmlx.data.store import encode_source
from smolmlx.errors import DataError, RunError
from smolmlx.evals import research
from smolmlx.evals.bases import Bases, System, generate
from smolmlx.evals.research import ResearchReport
from smolmlx.evals.rows import Choice, choose_rows, read_chosen
from smolmlx.evals.suites import (
    COPY_CONTROL,
    RANDOM_CONTROL,
    EvalRow,
    LossDifference,
    LossSummary,
    NotesReport,
    compare_notes,
    control_outputs,
    loss_csv,
    loss_dict,
    loss_difference,
    loss_markdown,
    notes_dict,
    notes_markdown,
    notes_rows_csv,
    notes_summary_csv,
    results_csv,
    summarise_loss,
)
from smolmlx.held_out import find_lack
from smolmlx.models import check_adapter_folder, check_base
from smolmlx.rundir import write_text
from smolmlx.tasks.registry import read_registry
from smolmlx.tasks.replies import render
from smolmlx.tasks.schemas import asked_style

Messages = tuple[Mapping[str, Any], ...]
Meter = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
"""(title, total) -> context manager of a function told how many are done."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What is the same for every system."""

    data: str
    suite: str = "notes"
    train: str | None = None
    ood: str | None = None
    decoding: Decoding = Decoding()
    limit: int | None = None
    ids: tuple[str, ...] = ()
    """Rows of `data` to keep, by the names of `rows.name_rows`; all where empty."""
    template_args: Mapping[str, Any] = field(default_factory=dict)
    system_message: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    form: str = "auto"
    """Format of the rows, and how their columns are renamed; see `formats.open_source`."""
    loading: Loading = Loading()
    folders: tuple[Path, ...] = ()
    encoding: Encoding = Encoding(max_length=2048)
    """How rows become targets (suites loss and research)."""
    constrained: bool = True
    """Suite research: keep answers to their schemas, as PaperResearcher does."""
    registry: Path | None = None
    """Suite research: the task file that the rows were made with; None for the built-in one."""


@dataclass(frozen=True, slots=True)
class DataFile:
    """Which rows were scored, so that a reader can tell whether two results are of the same."""

    path: str
    sha256: str
    """Of the file's bytes; of all files' where the path is a folder."""
    rows: int
    """Rows scored, after `limit` and `ids`."""
    left_out: int = 0
    """Rows that do not fit the model's context (suite research), or that cannot be scored (suite loss)."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What a suite found: for notes and research one report per row set, for loss one summary per system."""

    settings: Settings
    notes: Mapping[str, NotesReport] = field(default_factory=dict)
    """`test` and, where given, `ood`."""
    loss: Mapping[str, LossSummary] = field(default_factory=dict)
    """System -> summary (suites loss and research)."""
    research: Mapping[str, ResearchReport] = field(default_factory=dict)
    outputs: Mapping[str, Mapping[str, Sequence[str]]] = field(default_factory=dict)
    """Row set -> system -> answers."""
    files: Mapping[str, DataFile] = field(default_factory=dict)
    """`test`, and where given `ood` and `train`: what was read for each."""
    differences: Sequence[LossDifference] = ()
    """Suite loss: each system against the first."""

    def to_json(self) -> dict[str, Any]:
        head = {
            "suite": self.settings.suite,
            "data": self.settings.data,
            "files": {name: asdict(file) for name, file in self.files.items()},
        }
        if self.research:
            return {
                **head,
                "constrained": self.settings.constrained,
                "sets": {name: research.to_dict(found) for name, found in self.research.items()},
                "systems": {name: loss_dict(found) for name, found in self.loss.items()},
            }
        if self.loss:
            return {
                **head,
                "systems": {name: loss_dict(found) for name, found in self.loss.items()},
                "differences": [asdict(difference) for difference in self.differences],
            }
        decoding = asdict(self.settings.decoding)
        return {**head, "decoding": decoding, "sets": {name: notes_dict(found) for name, found in self.notes.items()}}

    @property
    def missing_controls(self) -> str:
        """What a reader of notes scores must be told: that nothing stands beside the model; empty where controls do."""
        if not self.notes or self.settings.train:
            return ""
        return "No copy and random control beside the model: pass the rows it was trained on (--train, evaluate.train)."

    def markdown(self) -> str:
        if self.research:
            parts = [
                f"## {name}\n\n{self._named(name)}\n\n{research.markdown(found)}"
                for name, found in self.research.items()
            ]
            return "\n\n".join([*parts, loss_markdown(self.loss)])
        if self.loss:
            said = "".join(f"- {difference.sentence}\n" for difference in self.differences)
            return f"{self._named('test')}\n\n{loss_markdown(self.loss)}" + (f"\n{said}" if said else "")
        controls = f"{self.missing_controls}\n\n" if self.missing_controls else ""
        return controls + "\n\n".join(
            f"## {name}\n\n{self._named(name)}\n\n{notes_markdown(found)}" for name, found in self.notes.items()
        )

    def _named(self, name: str) -> str:
        file = self.files[name]
        why = "longer than the model's context" if self.research else "too long, or with nothing to score"
        left_out = f"; {file.left_out:,} left out, {why}" if file.left_out else ""
        return f"Rows: {file.rows:,} of `{file.path}` (sha256 {file.sha256[:16]}){left_out}"


def evaluate(
    backend: Backend,
    systems: Sequence[System],
    tokenizer: Tokenizer,
    settings: Settings,
    meter: Meter,
    bases: Bases | None = None,
) -> Evaluation:
    """Score systems on a suite.

    Args:
        bases: what was loaded and answered before, to go on with; left out, nothing is kept.

    Raises:
        RecipeError: an adapter that is none, or was made for another base; before anything is answered.
        DataError: rows without what the suite needs.
    """
    for system in systems:
        if system.adapter is not None:
            check_adapter_folder(system.adapter)
            check_base(system.model, system.adapter)
    bases = bases or Bases(backend)
    if settings.suite == "loss":
        return _evaluate_loss(bases, systems, tokenizer, settings)
    if settings.suite == "research":
        return _evaluate_research(bases, systems, tokenizer, settings, meter)
    sets = {"test": read_rows(settings.data, settings)}
    if settings.ood:
        sets["ood"] = read_rows(settings.ood, settings, choose=False)
    train = [row for row, _ in read_rows(settings.train, settings, limited=False)] if settings.train else []
    prompts = {
        name: encode_prompts(tokenizer, [messages for _, messages in rows], settings) for name, rows in sets.items()
    }
    answers: dict[str, dict[str, Sequence[str]]] = {name: {} for name in sets}
    for system in systems:
        for name, tokens in prompts.items():
            with meter(f"{system.name} answers {name}", len(tokens)) as on_done:
                answers[name][system.name] = bases.answer(
                    system, tokenizer, settings.loading, tokens, settings.decoding, on_done
                )
    files = {name: describe_file(settings.data if name == "test" else str(settings.ood), settings, len(rows)) for name, rows in sets.items()}  # fmt: skip
    if settings.train:
        files["train"] = describe_file(settings.train, settings, len(train))
    reports = {}
    for name, rows in sets.items():
        scored = [row for row, _ in rows]
        if train:
            answers[name] |= control_outputs(train, scored)
        reports[name] = compare_notes(scored, answers[name], also=_pairs(systems))
    return Evaluation(settings, notes=reports, outputs=answers, files=files)


def _pairs(systems: Sequence[System]) -> list[tuple[str, str]]:
    """Compare each system with the first, the base, and with every adapter before it."""
    names = [system.name for system in systems]
    return [(name, earlier) for i, name in enumerate(names) for earlier in names[:i]]


def describe_file(path: str, settings: Settings, rows: int, left_out: int = 0) -> DataFile:
    """Hash the file, or all files of the folder, that rows were read from."""
    digest = hashlib.sha256()
    for name in open_rows(path, settings).files:
        with name.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return DataFile(path, digest.hexdigest(), rows, left_out)


def read_rows(
    path: str, settings: Settings, *, limited: bool = True, choose: bool = True
) -> list[tuple[EvalRow, Messages]]:
    """Read rows as (what is scored, what the model is asked).

    The input that is scored against is an alpaca row's own `input` where it has one, else the last user message.

    Args:
        limited: keep to `settings.limit` and `settings.ids`.
        choose: `settings.ids` are of this file.

    Raises:
        DataError: rows without question or answer, or an id that the file does not have.
    """
    source = open_rows(path, settings)

    def make(name: str, where: str, raw: Raw) -> tuple[EvalRow, Messages]:
        messages = to_example(raw, source.form, where, source.columns, source.system).messages
        if lack := find_lack("notes", raw, messages):
            raise DataError(f"{where}: {lack}")
        *asked, last = messages
        group = str(raw.get("concept") or raw.get("document") or "")
        scored = source.passage(raw) or str(asked[-1]["content"])
        return EvalRow(name, scored, last["content"], group), tuple(asked)

    choice = Choice(settings.ids if choose else (), settings.limit) if limited else Choice()
    return read_chosen(source, choice, make, f"{path}: an evaluation row needs a question and an assistant answer")


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


def encode_prompts(tokenizer: Tokenizer, prompts: Sequence[Messages], settings: Settings) -> list[list[int]]:
    """Return the tokens of conversations, through the chat template: the same for every system."""
    return [list(tokenizer.encode(tokenizer.prompt(messages, **settings.template_args))) for messages in prompts]


def answer(generator: Generator, tokenizer: Tokenizer, prompts: Sequence[Messages], settings: Settings) -> list[str]:
    """Answer conversations with the chat template; answers come back in order."""
    return generate(generator, tokenizer, encode_prompts(tokenizer, prompts, settings), settings.decoding)


def _evaluate_loss(bases: Bases, systems: Sequence[System], tokenizer: Tokenizer, settings: Settings) -> Evaluation:
    batches, lost = _batches(tokenizer, settings)
    rows = {
        system.name: _row_losses(system.name, bases.generator(system, tokenizer, settings.loading), batches)
        for system in systems
    }
    found = {name: summarise_loss(values) for name, values in rows.items()}
    differences = [loss_difference(name, rows[name], earlier, rows[earlier]) for name, earlier in _pairs(systems)]
    files = {"test": describe_file(settings.data, settings, next(iter(found.values())).num_rows, lost)}
    return Evaluation(settings, loss=found, files=files, differences=differences)


def _batches(tokenizer: Tokenizer, settings: Settings) -> tuple[list[Batch], int]:
    """Return the rows whose loss is computed, and how many cannot be scored."""
    source = open_rows(settings.data, settings)
    if settings.ids:
        chosen = choose_rows(source, Choice(settings.ids, settings.limit))
        places = " ".join(map(str, chosen))
        store = encode_source(
            source, tokenizer, settings.encoding, keep=chosen.__contains__, keep_name=f"rows {places}"
        )
    else:
        store = encode_source(source, tokenizer, settings.encoding, limit=settings.limit)
    if not len(store):
        raise DataError(f"{settings.data}: no row has a supervised token within {settings.encoding.max_length} tokens.")
    size = min(8, settings.decoding.batch_size)
    batches = plan_batches(store, batch_size=size, shuffle=False, pad_id=tokenizer.pad_id).evaluation()
    return list(batches), store.account.lost


def _row_losses(name: str, generator: Generator, batches: Sequence[Batch]) -> list[tuple[float, int, int]]:
    """Return (sum of nats, supervised tokens, correct tokens) of each row that has any.

    Raises:
        RunError: a loss that is no number.
    """
    found = []
    for batch, score in zip(batches, generator.score(batches), strict=True):
        size, width = batch.ids.shape
        row = batch.index // width
        nats = np.bincount(row, -score.log_probs.astype(np.float64) * batch.weights, size)
        counts = np.bincount(row, batch.weights, size)
        correct = np.bincount(row, score.correct * batch.weights, size)
        if not np.isfinite(nats).all():
            raise RunError(
                f"{name}: the loss of a row is not a number. Its weights or its adapter hold NaN or infinity; train it again."
            )
        values = zip(nats.tolist(), counts.tolist(), correct.tolist(), strict=True)
        found += [(total, round(count), round(right)) for total, count, right in values if count]
    return found


def _evaluate_research(
    bases: Bases, systems: Sequence[System], tokenizer: Tokenizer, settings: Settings, meter: Meter
) -> Evaluation:
    registry = read_registry(settings.registry)
    paths = {"test": settings.data, **({"ood": settings.ood} if settings.ood else {})}
    choices = {"test": Choice(settings.ids, settings.limit), "ood": Choice(limit=settings.limit)}
    read = {name: research.read_rows(path, open_rows(path, settings), choices[name]) for name, path in paths.items()}
    asking = research.Asking(tokenizer, registry, settings.decoding, settings.constrained, settings.template_args)
    sets = {name: research.fitting(rows, asking, systems[0].model.context) for name, rows in read.items()}
    train = research.read_rows(settings.train, open_rows(settings.train, settings), Choice()) if settings.train else []
    batches, _ = _batches(tokenizer, settings)
    answers: dict[str, dict[str, list[research.Answered]]] = {name: {} for name in sets}
    loss = {}
    for system in systems:
        generator = bases.generator(system, tokenizer, settings.loading)
        for name, rows in sets.items():
            with meter(f"{system.name} answers {name}", len(rows)) as on_done:
                answers[name][system.name] = research.answer(generator, rows, asking, on_done)
        loss[system.name] = summarise_loss(_row_losses(system.name, generator, batches))
    for name, rows in sets.items():
        if train:
            answers[name][COPY_CONTROL] = research.copied_answers(train, rows)
        answers[name][RANDOM_CONTROL] = research.random_answers(rows)
    reports = {name: research.compare(rows, answers[name]) for name, rows in sets.items()}
    outputs = {name: {s: [one.text for one in made] for s, made in found.items()} for name, found in answers.items()}
    files = {
        name: describe_file(path, settings, len(sets[name]), len(read[name]) - len(sets[name]))
        for name, path in paths.items()
    }
    if settings.train:
        files["train"] = describe_file(settings.train, settings, len(train))
    return Evaluation(settings, loss=loss, research=reports, outputs=outputs, files=files)


def write(evaluation: Evaluation, folder: Path) -> None:
    """Write results.json, results.md, results.csv, and for notes and research a csv per row set and every answer.

    Files of an earlier evaluation in this folder go: answers beside another suite's figures would be taken for theirs.
    """
    if (folder / "results.json").is_file():
        for name, end in itertools.product(("test", "ood"), (".csv", "-rows.csv", "-answers.jsonl")):
            (folder / f"{name}{end}").unlink(missing_ok=True)
    write_text(folder / "results.json", json.dumps(evaluation.to_json(), indent=2) + "\n")
    write_text(folder / "results.md", evaluation.markdown() + "\n")
    reports: dict[str, NotesReport | ResearchReport] = {**evaluation.notes, **evaluation.research}
    if reports:
        named = {name: (file.path, file.sha256) for name, file in evaluation.files.items()}
        summaries = {name: report.summary for name, report in reports.items()}
        write_text(folder / "results.csv", results_csv(summaries, named, evaluation.loss))
    elif evaluation.loss:
        file = evaluation.files["test"]
        write_text(folder / "results.csv", loss_csv(evaluation.loss, file.path, file.sha256))
    for name, found in evaluation.research.items():
        write_text(folder / f"{name}.csv", research.csv(found))
        lines = [
            {
                "id": row.id,
                "task": row.task,
                "group": row.document,
                "input": str(row.messages[-1]["content"]),
                "reference": render(
                    row.task, row.gold, asked_style(row.task, row.style, evaluation.settings.constrained)
                ),
                "answers": {s: made[i] for s, made in evaluation.outputs[name].items()},
            }
            for i, row in enumerate(found.rows)
        ]
        _write_lines(folder / f"{name}-answers.jsonl", lines)
    for name, report in evaluation.notes.items():
        file = evaluation.files[name]
        write_text(folder / f"{name}.csv", notes_summary_csv(report, file.path, file.sha256))
        write_text(folder / f"{name}-rows.csv", notes_rows_csv(report))
        rows = read_rows(evaluation.files[name].path, evaluation.settings, choose=name == "test")
        lines = [
            {
                "id": row.id,
                "group": row.group,
                "input": row.input,
                "reference": row.reference,
                "answers": {system: found[i] for system, found in evaluation.outputs[name].items()},
            }
            for i, (row, _) in enumerate(rows)
        ]
        _write_lines(folder / f"{name}-answers.jsonl", lines)


def _write_lines(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def mean(report: NotesReport, system: str, metric: str) -> tuple[float, float, float]:
    """Return (mean, low, high) of a metric."""
    interval = report.summary[system][metric]
    assert np.isfinite(interval.mean)
    return interval.mean, interval.low, interval.high
