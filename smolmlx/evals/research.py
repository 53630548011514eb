"""The research suite: rows that `data augment` made are answered again, and answers compared with what the rows hold.

Beside every model stand the base and a control that takes the answer of another row of the same task (for retrieval, any
passage or none), so that a figure can be told from luck; and, where the train rows are given, one that takes the answer of
the train row of the same task that asks most nearly the same, so that it can be told from copying.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, cast

import numpy as np

from smolmlx.backend import Constraint, Decoding, Generator
from smolmlx.data.chat import Tokenizer
from smolmlx.data.formats import Raw, Source, to_example
from smolmlx.data.notes import Notes
from smolmlx.errors import DataError
from smolmlx.evals.bootstrap import Interval, bootstrap_difference, bootstrap_means, difference_sentence
from smolmlx.evals.controls import nearest_rows
from smolmlx.evals.headlines import label
from smolmlx.evals.metrics import rouge_l, set_f1
from smolmlx.evals.parsers import QAPair, RetrievalResult, Triplet
from smolmlx.evals.rows import Choice, read_chosen
from smolmlx.evals.suites import COPY_CONTROL, RANDOM_CONTROL, Difference, csv_text, sum_up
from smolmlx.held_out import find_lack
from smolmlx.tasks.registry import Registry
from smolmlx.tasks.replies import Rejected, read, read_freely, render
from smolmlx.tasks.schemas import ANSWERS, Text, Value, asked_style, kept_schema, plain

METRICS = ("valid", "ended", "index_accuracy", "set_f1", "rouge_l")
"""valid: the answer keeps to its schema, over rows of lists and retrieval.
ended: the text is not empty and ended by itself, over rows of texts, which have no schema to keep to.
index_accuracy: the passage chosen is the one that answers, or None where none does, over retrieval rows.
set_f1: F1 of the sets of points, pairs or triplets, compared in lower case with single spaces, over rows of lists.
rouge_l: ROUGE-L F1 of the whole answer as text, over rows of lists and texts."""

_LISTS = ("bullets", "qa", "triplets")


@dataclass(frozen=True, slots=True)
class ResearchRow:
    """One row to answer again."""

    id: str
    task: str
    style: str
    messages: tuple[Mapping[str, Any], ...]
    gold: Value
    document: str = ""
    """Where the row was made from; rows of one document are resampled together."""

    @property
    def num_passages(self) -> int:
        return sum(f"Passage {n}:\n" in str(self.messages[-1]["content"]) for n in range(1, 21))


@dataclass(frozen=True, slots=True)
class Answered:
    """What a system made of one row."""

    text: str
    value: Value
    valid: bool
    """Whether it keeps to its schema; of a text, whether it ended by itself and is not empty."""


@dataclass(frozen=True, slots=True)
class ResearchReport:
    """All systems over the same rows."""

    rows: tuple[ResearchRow, ...]
    scores: Mapping[str, Mapping[str, tuple[float | None, ...]]]
    """System -> metric -> value per row; None where the metric does not apply."""
    summary: Mapping[str, Mapping[str, Interval]]
    differences: tuple[Difference, ...]


def read_rows(path: str, source: Source, choice: Choice) -> list[ResearchRow]:
    """Read rows that `data augment` wrote.

    Raises:
        DataError: rows without task, style and gold, each named by file and line; ids that the file does not have.
    """

    def make(name: str, where: str, raw: Raw) -> ResearchRow:
        messages = to_example(raw, source.form, where, source.columns, source.system).messages
        if lack := find_lack("research", raw, messages):
            raise DataError(f"{where}: {lack}")
        task, style, gold = _task(raw, where)
        asked = tuple(message for message in messages if message["role"] != "assistant")
        return ResearchRow(name, task, style, asked, gold, str(raw.get("document", "")))

    return read_chosen(source, choice, make, f"{path}: suite research scores rows that `smolmlx data augment` wrote")


def _task(tree: Mapping[str, Any], where: str) -> tuple[str, str, Value]:
    """Return task, style and gold of a row."""
    task, style = tree["task"], tree["style"]
    if not isinstance(task, str) or task not in ANSWERS or not isinstance(style, str):
        raise DataError(f"{where}: task {task!r} in style {style!r}; known: {', '.join(ANSWERS)}")
    try:
        return task, style, to_value(task, tree["gold"])
    except (TypeError, KeyError, ValueError) as error:
        raise DataError(f"{where}: gold is not an answer of task '{task}': {str(tree['gold'])[:80]}") from error


def to_value(task: str, gold: Any) -> Value:
    """Return the answer that a row holds as data; the reverse of what `data augment` writes."""
    if task == "qa":
        return tuple(QAPair(**pair) for pair in gold)
    if task == "triplets":
        return tuple(Triplet(**triplet) for triplet in gold)
    if task == "retrieval":
        return RetrievalResult(**gold)
    if task == "notes":
        return Notes(**{**gold, "key_points": tuple(gold["key_points"])})
    if not isinstance(gold, list if task == "bullets" else str):
        raise TypeError
    return tuple(map(str, gold)) if task == "bullets" else str(gold)


@dataclass(frozen=True, slots=True)
class Asking:
    """How rows are asked."""

    tokenizer: Tokenizer
    registry: Registry
    how: Decoding
    """Its max_tokens bounds that of each task."""
    constrained: bool = True
    """Ask for lists and retrieval in JSON and keep the answer to its schema, as PaperResearcher does; without it the row's
    own style is asked for, and the answer is free."""
    template_args: Mapping[str, Any] = field(default_factory=dict)

    def request(self, row: ResearchRow) -> tuple[list[int], Decoding]:
        """Return the prompt's tokens, and how the answer is decoded."""
        schema = _schema(row) if self.constrained else None
        messages = _in_style(self.registry, row, asked_style(row.task, row.style, self.constrained))
        most = min(self.how.max_tokens, self.registry.task(row.task).max_tokens)
        prompt = self.tokenizer.encode(self.tokenizer.prompt(messages, **self.template_args))
        return prompt, replace(self.how, max_tokens=most, schema=schema)


def fitting(rows: Sequence[ResearchRow], asking: Asking, context: int | None) -> list[ResearchRow]:
    """Return the rows whose prompt and answer fit the model's context; beyond it a model was never trained.

    Raises:
        DataError: none does.
    """
    found = []
    for row in rows:
        prompt, how = asking.request(row)
        if context is None or len(prompt) + how.max_tokens <= context:
            found.append(row)
    if not found:
        raise DataError(
            f"none of {len(rows)} prompts fits the model's context of {context} tokens beside its answer. Make shorter"
            " chunks (`smolmlx data chunk --words`), or lower max_tokens."
        )
    return found


def answer(
    generator: Generator, rows: Sequence[ResearchRow], asking: Asking, on_done: Callable[[int], None]
) -> list[Answered]:
    """Answer rows, each within the tokens of its task."""
    batcher = generator.batcher(asking.how.batch_size)
    asked = [batcher.make_row(index, *asking.request(row)) for index, row in enumerate(rows)]
    found: dict[int, Answered] = {}
    for done in batcher.run(asked):
        made = done.completion()
        found[made.index] = _read(rows[made.index], made.text.strip(), made.finished)
        on_done(len(found))
    return [found[index] for index in range(len(rows))]


def _schema(row: ResearchRow) -> Constraint | None:
    if ANSWERS[row.task] is Text:
        return None
    return kept_schema(row.task, row.num_passages)


def _in_style(registry: Registry, row: ResearchRow, style: str) -> tuple[Mapping[str, Any], ...]:
    """Return the row's messages with the hint about its style replaced by that of another."""
    if style == row.style:
        return row.messages
    own, wanted = registry.hint(row.task, row.style), registry.hint(row.task, style)
    *before, last = row.messages
    text = str(last["content"])
    if not own:  # the style needs no hint: the one for JSON goes where hints stand, behind the instruction
        own, wanted = "\n\n", f" {wanted}\n\n"
    return (*before, {**last, "content": text.replace(own, wanted, 1)})


def _read(row: ResearchRow, text: str, finished: bool) -> Answered:
    value = read(ANSWERS[row.task], text, max(1, row.num_passages))
    valid = finished and not isinstance(value, Rejected)
    if isinstance(value, Rejected):
        # A repeated or blank item keeps to the schema, though data generation would not take it.
        valid = finished and _keeps_to_schema(row, text)
        value = read_freely(row.task, text, max(1, row.num_passages))
    return Answered(text, value, valid)


def _keeps_to_schema(row: ResearchRow, text: str) -> bool:
    if ANSWERS[row.task] is Text:
        return bool(text)
    try:
        ANSWERS[row.task].model_validate_json(text)
    except ValueError:
        return False
    return True


def random_answers(rows: Sequence[ResearchRow], seed: int = 0) -> list[Answered]:
    """Answer each row with what another row of its task holds; retrieval with any passage or none."""
    dice = np.random.default_rng(seed)
    found = []
    for index, row in enumerate(rows):
        others = [i for i, other in enumerate(rows) if other.task == row.task and i != index]
        value = rows[others[int(dice.integers(len(others)))]].gold if others else _nothing(row.gold)
        if isinstance(row.gold, RetrievalResult):
            place = int(dice.integers(row.num_passages + 1))
            value = RetrievalResult(place if place < row.num_passages else None, cast(RetrievalResult, value).reasoning)
        found.append(Answered(render(row.task, value, row.style) if value else "", value, bool(value)))
    return found


def copied_answers(train: Sequence[ResearchRow], rows: Sequence[ResearchRow]) -> list[Answered]:
    """Answer each row with what the train row of its task holds that asks most nearly the same (TF-IDF cosine)."""
    found: dict[int, Answered] = {}
    for task in {row.task for row in rows}:
        known = [row for row in train if row.task == task]
        asked = [index for index, row in enumerate(rows) if row.task == task]
        near = nearest_rows([_last(row) for row in known], [_last(rows[index]) for index in asked]) if known else ()
        values = [known[neighbour.row].gold for neighbour in near] or [_nothing(rows[index].gold) for index in asked]
        for index, value in zip(asked, values, strict=True):
            text = render(task, value, rows[index].style) if known and value else ""
            found[index] = Answered(text, value, bool(known and value))
    return [found[index] for index in range(len(rows))]


def _last(row: ResearchRow) -> str:
    return str(row.messages[-1]["content"])


def _nothing(gold: Value) -> Value:
    """Return what stands for the answer of another row where there is none."""
    return () if isinstance(gold, tuple) else "" if isinstance(gold, str) else gold


def compare(rows: Sequence[ResearchRow], answers: Mapping[str, Sequence[Answered]]) -> ResearchReport:
    """Score systems on the same rows, each compared with those before it (the first is the base) and with the controls."""
    scores = {
        system: {name: tuple(_score(name, row, one) for row, one in zip(rows, made, strict=True)) for name in METRICS}
        for system, made in answers.items()
    }
    summary = {
        system: {name: _interval(rows, column) for name, column in columns.items() if _known(column)}
        for system, columns in scores.items()
    }
    controls = [name for name in (COPY_CONTROL, RANDOM_CONTROL) if name in answers]
    systems = [name for name in answers if name not in controls]
    pairs = [(system, other) for i, system in enumerate(systems) for other in (*systems[:i], *controls)]
    differences = []
    for system, control in pairs:
        for name in summary[system]:
            first, second = (scores[one][name] for one in (system, control))
            interval = bootstrap_difference(_known(first), _known(second), groups=_groups(rows, first))
            differences.append(
                Difference(system, control, name, interval, difference_sentence(interval, label(name), system, control))
            )
    return ResearchReport(tuple(rows), scores, summary, tuple(differences))


def _interval(rows: Sequence[ResearchRow], column: Sequence[float | None]) -> Interval:
    return bootstrap_means(np.array(_known(column))[:, None], groups=_groups(rows, column))[0]


def _groups(rows: Sequence[ResearchRow], column: Sequence[float | None]) -> list[str]:
    """Return the document of each row that a metric applies to."""
    return [row.document for row, value in zip(rows, column, strict=True) if value is not None]


def _known(column: Sequence[float | None]) -> list[float]:
    return [value for value in column if value is not None]


def _score(name: str, row: ResearchRow, made: Answered) -> float | None:
    if name in ("valid", "ended"):
        return float(made.valid) if (name == "ended") == (ANSWERS[row.task] is Text) else None
    if name == "index_accuracy":
        if not isinstance(row.gold, RetrievalResult):
            return None
        return float(isinstance(made.value, RetrievalResult) and made.value.index == row.gold.index)
    if name == "set_f1":
        return set_f1(_items(made.value), _items(row.gold)) if row.task in _LISTS else None
    return None if row.task == "retrieval" else rouge_l(_text(made.value), _text(row.gold))


def _items(value: Value) -> list[tuple[str, ...]]:
    """Return the items of a list, comparable: lower case, single spaces."""
    items = value.lines if isinstance(value, Notes) else value if isinstance(value, tuple) else (value,)
    parts = ((item,) if isinstance(item, str) else tuple(asdict(item).values()) for item in items)
    return [tuple(plain(str(part)).lower() for part in one) for one in parts]


def _text(value: Value) -> str:
    return " ".join(" ".join(item) for item in _items(value))


def to_dict(report: ResearchReport) -> dict[str, Any]:
    """Return the whole report ready for json.dumps."""
    return {
        "n": len(report.rows),
        "tasks": dict(Counter(row.task for row in report.rows)),
        "systems": {
            system: {name: asdict(interval) for name, interval in metrics.items()}
            for system, metrics in report.summary.items()
        },
        "differences": [asdict(difference) for difference in report.differences],
        "rows": {system: _row_scores(report, columns) for system, columns in report.scores.items()},
    }


def _row_scores(report: ResearchReport, columns: Mapping[str, Sequence[float | None]]) -> list[dict[str, Any]]:
    """Return one record per row, as the notes suite writes them; a metric that does not apply is None."""
    scores = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    named = zip(report.rows, scores, strict=True)
    return [{"id": row.id, "task": row.task, "group": row.document, **found} for row, found in named]


def table(report: ResearchReport) -> list[list[str]]:
    """Return lines of (metric, n, each system's mean and interval), the first the head."""
    systems = list(report.summary)
    lines = [["metric", "n", *systems]]
    for name in METRICS:
        found = [report.summary[system].get(name) for system in systems]
        if found[0] is not None:
            cells = [str(one) for one in found if one is not None]
            lines.append([label(name), str(found[0].num_rows), *cells])
    return lines


def markdown(report: ResearchReport) -> str:
    """Return the table and the differences as sentences."""
    head, *body = ([cell.replace("|", "\\|") for cell in line] for line in table(report))
    lines = [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *body)]
    return "\n".join([*lines, "", *(f"- {sentence}" for sentence in sum_up(report.differences))]) + "\n"


def csv(report: ResearchReport) -> str:
    """Return one line per system and metric."""
    lines = [
        [system, name, i.num_rows, i.mean, i.low, i.high]
        for system, metrics in report.summary.items()
        for name, i in metrics.items()
    ]
    return csv_text([["system", "metric", "n", "mean", "low", "high"], *lines])
