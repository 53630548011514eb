"""The suites of `smolmlx eval` that score strings and counts: `notes` for several systems side by side, and `loss`."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from smolmlx.evals.bootstrap import DRAWS, MIN_ROWS, Interval, bootstrap_means, bootstrap_ratio, difference_sentence
from smolmlx.evals.controls import nearest_copy, random_reference
from smolmlx.evals.headlines import label
from smolmlx.evals.metrics import is_formulaic, perplexity, reference_overlap, token_weighted_mean
from smolmlx.evals.notes import BOILERPLATE, compat_compliance, content, follow_up_valid, rubric, strict_compliance

COPY_CONTROL = "copy control"
RANDOM_CONTROL = "random control"
CONTROLS = ("base", COPY_CONTROL, RANDOM_CONTROL)
"""Names under which systems are taken as controls unless the caller says otherwise."""

METRICS = (
    "compliance",
    "compat",
    "compat_v1",
    "follow_up_valid",
    "content_alignment",
    "f1",
    "key_term_recall",
    "unsupported",
    "formulaic",
    "rubric",
    "lexical_diversity",
    "specificity",
    "num_words",
    "num_bullets",
    "words_per_point",
)
"""Fields of NotesScore that are averaged over rows."""


@dataclass(frozen=True, slots=True)
class EvalRow:
    """One row to score against: `reference` is the wanted output."""

    id: str
    input: str
    reference: str
    group: str = ""
    """Rows of one group (a concept, a document) are not independent: intervals resample them together."""


@dataclass(frozen=True, slots=True)
class NotesScore:
    """Every metric of one output; a bool counts as 0 or 1 in a mean."""

    id: str
    compliance: bool
    """The strict rule."""
    problems: tuple[str, ...]
    """What the strict rule found."""
    compat: bool
    compat_v1: bool
    follow_up_valid: bool
    content_alignment: float
    precision: float
    recall: float
    f1: float
    key_term_recall: float
    unsupported: float
    formulaic: bool
    rubric: int
    rubric_parts: tuple[int, int, int, int]
    """Summary, bullets, limitation, follow-up: 0 to 3 each."""
    lexical_diversity: float
    specificity: float
    num_words: int
    num_bullets: int
    words_per_point: float
    section_words: tuple[int, int, int, int]
    """Words of summary, key points, limitation, follow-up."""
    is_question: bool
    """The follow-up section ends in a question mark."""
    group: str = ""


@dataclass(frozen=True, slots=True)
class Difference:
    """A paired difference of two systems in one metric: system - control."""

    system: str
    control: str
    metric: str
    interval: Interval
    sentence: str


@dataclass(frozen=True, slots=True)
class NotesReport:
    """The notes suite's result for all systems, over the same rows."""

    ids: tuple[str, ...]
    scores: Mapping[str, tuple[NotesScore, ...]]
    summary: Mapping[str, Mapping[str, Interval]]
    """System -> metric -> mean and interval."""
    differences: tuple[Difference, ...]

    @property
    def num_rows(self) -> int:
        """The n of every mean and interval."""
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class LossSummary:
    """Token-weighted loss of a data set."""

    num_rows: int
    num_tokens: int
    """Supervised tokens."""
    loss: float
    """Mean nats per supervised token."""
    perplexity: float
    accuracy: float
    """Share of supervised tokens at the argmax."""
    low: float
    high: float
    """Bootstrap interval of the loss, over rows."""


@dataclass(frozen=True, slots=True)
class LossDifference:
    """A paired difference of two systems' loss over the same rows: system - control, nats per supervised token."""

    system: str
    control: str
    interval: Interval
    sentence: str


def control_outputs(train: Sequence[EvalRow], rows: Sequence[EvalRow], *, seed: int = 0) -> dict[str, tuple[str, ...]]:
    """Return the outputs of the two controls that need no model, under the names `compare_notes` knows them by."""
    references = [row.reference for row in train]
    copied = nearest_copy([row.input for row in train], references, [row.input for row in rows])
    drawn = random_reference(references, [row.reference for row in rows], seed=seed)
    return {COPY_CONTROL: copied, RANDOM_CONTROL: drawn}


def score_notes(
    rows: Sequence[EvalRow], outputs: Sequence[str], boilerplate: Sequence[str] = BOILERPLATE
) -> tuple[NotesScore, ...]:
    """Score one output per row."""
    if len(rows) != len(outputs):
        raise ValueError(f"score_notes: {len(rows)} rows but {len(outputs)} outputs")
    return tuple(score_note(row, output, boilerplate) for row, output in zip(rows, outputs, strict=True))


def score_note(row: EvalRow, output: str, boilerplate: Sequence[str] = BOILERPLATE) -> NotesScore:
    """Score one output by every metric of the notes task."""
    strict, marks, made = strict_compliance(output), rubric(output), content(output)
    overlap = reference_overlap(output, row.reference, row.input)
    return NotesScore(
        id=row.id,
        compliance=strict.passed,
        problems=strict.problems,
        compat=compat_compliance(output).passed,
        compat_v1=compat_compliance(output, "compat_v1").passed,
        follow_up_valid=follow_up_valid(output),
        content_alignment=overlap.content_alignment,
        precision=overlap.precision,
        recall=overlap.recall,
        f1=overlap.f1,
        key_term_recall=overlap.key_term_recall,
        unsupported=overlap.unsupported,
        formulaic=is_formulaic(output, boilerplate),
        rubric=marks.total,
        rubric_parts=(marks.summary, marks.bullets, marks.limitation, marks.follow_up),
        lexical_diversity=made.lexical_diversity,
        specificity=made.specificity,
        num_words=made.num_words,
        num_bullets=made.num_bullets,
        words_per_point=made.words_per_point,
        section_words=made.section_words,
        is_question=made.is_question,
        group=row.group,
    )


def compare_notes(
    rows: Sequence[EvalRow],
    outputs: Mapping[str, Sequence[str]],
    *,
    controls: Sequence[str] = CONTROLS,
    also: Sequence[tuple[str, str]] = (),
    boilerplate: Sequence[str] = BOILERPLATE,
    draws: int = DRAWS,
    seed: int = 0,
) -> NotesReport:
    """Score several systems on the same rows and compare each with every control present, row by row.

    `outputs` maps a system's name to one output per row; `also` names further pairs to compare, such as
    ("dpo", "sft"). Raises ValueError for no rows or an unknown name in `also`.
    """
    unknown = sorted({name for pair in also for name in pair} - set(outputs))
    if not rows or unknown:
        raise ValueError(f"compare_notes: {f'no outputs for {unknown}' if unknown else 'no rows'}")
    scores = {system: score_notes(rows, made, boilerplate) for system, made in outputs.items()}
    columns = {
        system: np.array([[float(getattr(score, metric)) for metric in METRICS] for score in made])
        for system, made in scores.items()
    }
    against = [name for name in controls if name in outputs]
    pairs = dict.fromkeys([(system, name) for system in outputs if system not in against for name in against])
    pairs |= dict.fromkeys(also)
    paired = {(first, second): columns[first] - columns[second] for first, second in pairs}
    # One call for all: they are resampled alike, which costs little more than one.
    together = np.concatenate([*columns.values(), *paired.values()], axis=1)
    intervals = iter(bootstrap_means(together, groups=[row.group for row in rows], draws=draws, seed=seed))
    summary = {system: {metric: next(intervals) for metric in METRICS} for system in columns}
    differences = tuple(
        Difference(*pair, metric, interval := next(intervals), difference_sentence(interval, label(metric), *pair))
        for pair in paired
        for metric in METRICS
    )
    return NotesReport(tuple(row.id for row in rows), scores, summary, differences)


def sum_up(differences: Sequence[Difference]) -> list[str]:
    """Return the sentences of differences, one for all those of too few rows or groups to show any."""
    few = [found for found in differences if found.interval.num_units < MIN_ROWS]
    if len(few) < 2:
        return [found.sentence for found in differences]
    most = max((found.interval for found in few), key=lambda interval: interval.num_units)
    what = ", ".join(dict.fromkeys(label(found.metric) for found in few))
    units = "groups" if most.num_groups else "rows"
    one = f"{what}: no difference shown; fewer than {MIN_ROWS} {units} (here {most.num_units}) cannot show one."
    return [*(found.sentence for found in differences if found not in few), one]


def notes_dict(report: NotesReport) -> dict[str, object]:
    """Return the whole report as plain dicts, lists, numbers and strings, ready for json.dumps."""
    return {
        "suite": "notes",
        "n": report.num_rows,
        "ids": list(report.ids),
        "systems": {
            system: {metric: asdict(interval) for metric, interval in metrics.items()}
            for system, metrics in report.summary.items()
        },
        "differences": [asdict(difference) for difference in report.differences],
        "rows": {system: [_plain(asdict(score)) for score in scores] for system, scores in report.scores.items()},
    }


def notes_rows_csv(report: NotesReport) -> str:
    """Return one line per system and row, with every field of its score; bools as 0 and 1, problems joined by '; '."""
    singles = (*METRICS, "precision", "recall", "is_question")
    parts = [f"{name}_{part}" for name in ("rubric", "words") for part in ("summary", "key_points", "limitation", "follow_up")]  # fmt: skip
    lines = [
        [
            system, score.id, *(_cell(getattr(score, name)) for name in singles),
            *score.rubric_parts, *score.section_words, "; ".join(score.problems),
        ]
        for system, scores in report.scores.items()
        for score in scores
    ]  # fmt: skip
    return csv_text([["system", "id", *singles, *parts, "problems"], *lines])


def notes_summary_csv(report: NotesReport, data: str = "", sha256: str = "") -> str:
    """Return one line per system and metric: n, mean, interval, and the file of the rows with its hash."""
    lines = [
        [system, metric, interval.num_rows, interval.mean, interval.low, interval.high, data, sha256]
        for system, metrics in report.summary.items()
        for metric, interval in metrics.items()
    ]
    return csv_text([["system", "metric", "n", "mean", "low", "high", "data", "sha256"], *lines])


def results_csv(
    sets: Mapping[str, Mapping[str, Mapping[str, Interval]]],
    files: Mapping[str, tuple[str, str]],
    loss: Mapping[str, LossSummary],
) -> str:
    """Return one line per row set, system and metric of a suite that scores answers, and per system's loss on `test`.

    Args:
        sets: row set -> system -> metric -> mean and interval.
        files: row set -> (file, its sha256).
    """
    lines: list[list[object]] = [
        [name, system, metric, found.num_rows, found.mean, found.low, found.high, *files[name]]
        for name, systems in sets.items()
        for system, metrics in systems.items()
        for metric, found in metrics.items()
    ]
    lines += [["test", s, "loss", made.num_rows, made.loss, made.low, made.high, *files["test"]] for s, made in loss.items()]  # fmt: skip
    return csv_text([["set", "system", "metric", "n", "mean", "low", "high", "data", "sha256"], *lines])


def notes_markdown(report: NotesReport) -> str:
    """Return a table of metrics by systems with intervals, and the differences as sentences."""
    systems = list(report.summary)
    head = [f"metric (n={report.num_rows})", *(system.replace("|", "\\|") for system in systems)]
    body = [[label(metric), *(str(report.summary[system][metric]) for system in systems)] for metric in METRICS]
    table = [_table_line(head), _table_line(["---"] * len(head)), *map(_table_line, body)]
    sentences = [f"- {sentence}" for sentence in sum_up(report.differences)]
    return "\n".join([*table, *([""] if sentences else []), *sentences]) + "\n"


def summarise_loss(scores: Iterable[tuple[float, int, int]]) -> LossSummary:
    """Summarise (sum of nats, supervised tokens, correct tokens) per row; raises ValueError where no token counts."""
    rows = list(scores)
    num_tokens = sum(count for _, count, _ in rows)
    loss = token_weighted_mean((nats, count) for nats, count, _ in rows)
    accuracy = sum(correct for _, _, correct in rows) / num_tokens
    found = bootstrap_ratio([nats for nats, n, _ in rows if n], [n for _, n, _ in rows if n])
    return LossSummary(len(rows), num_tokens, loss, perplexity(loss), accuracy, found.low, found.high)


def loss_difference(
    system: str, mine: Sequence[tuple[float, int, int]], control: str, other: Sequence[tuple[float, int, int]]
) -> LossDifference:
    """Compare two systems' rows, as of `summarise_loss`; raises ValueError where they are not the same rows."""
    counts = [count for _, count, _ in mine]
    if counts != [count for _, count, _ in other]:
        raise ValueError(f"loss_difference: {system} and {control} were scored on different rows")
    gaps = [nats - base for (nats, _, _), (base, _, _) in zip(mine, other, strict=True)]
    interval = bootstrap_ratio(gaps, counts)
    return LossDifference(system, control, interval, difference_sentence(interval, "loss", system, control))


def loss_dict(summary: LossSummary) -> dict[str, object]:
    """Return the summary ready for json.dumps; a number JSON cannot hold (an infinite perplexity) is None."""
    values = {name: value if math.isfinite(value) else None for name, value in asdict(summary).items()}
    return {"suite": "loss", **values}


def loss_csv(summaries: Mapping[str, LossSummary], data: str = "", sha256: str = "") -> str:
    """Return one line per system, with the file of the rows and its hash."""
    return csv_text(
        [
            ["system", *LossSummary.__dataclass_fields__, "data", "sha256"],
            *([system, *asdict(made).values(), data, sha256] for system, made in summaries.items()),
        ]
    )


def loss_markdown(summaries: Mapping[str, LossSummary]) -> str:
    """Return one table line per system."""
    lines = [[system.replace("|", "\\|"), *_loss_cells(made)] for system, made in summaries.items()]
    head = ["system", "loss", "perplexity", "accuracy", "tokens", "rows"]
    return "\n".join(map(_table_line, [head, ["---"] * len(head), *lines])) + "\n"


def _loss_cells(made: LossSummary) -> list[str]:
    loss = f"{made.loss:.4f} [{made.low:.4f}, {made.high:.4f}]"
    return [loss, f"{made.perplexity:.6g}", f"{made.accuracy:.6g}", str(made.num_tokens), str(made.num_rows)]


def _plain(values: Mapping[str, object]) -> dict[str, object]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _cell(value: bool | int | float) -> int | float:
    return int(value) if isinstance(value, bool) else value


def csv_text(lines: Iterable[Sequence[object]]) -> str:
    """Return lines of cells as CSV."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()


def _table_line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
