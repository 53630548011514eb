"""Which systems stand beside each other: those that answered the same rows, whichever run they come from."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from smolmlx.evals.bootstrap import MIN_ROWS, bootstrap_means, difference_sentence
from smolmlx.evals.headlines import BY_KEY, Metric
from smolmlx.evals.suites import CONTROLS
from smolmlx.reports.folders import AnswerRow, RunView, ScoredSet, Tree

Kind = Literal["base", "control", "trained"]
MAX_PAIRED = 6
"""Trained systems up to which each is compared with each other one: 15 pairs. More would find differences by chance."""


@dataclass(frozen=True, slots=True)
class Entrant:
    """One system of a board."""

    label: str
    kind: Kind
    summary: Mapping[str, Tree]
    """Metric -> {mean, low, high}."""
    answers: Sequence[str]
    """One per row; empty where the answers were not kept."""
    scores: Sequence[Tree]


@dataclass(frozen=True, slots=True)
class Comparison:
    """A paired difference: system - against."""

    system: str
    against: str
    metric: str
    mean: float
    low: float
    high: float
    sentence: str
    verdict: Literal["better", "worse", "no difference shown"]


@dataclass(frozen=True, slots=True)
class Board:
    """Systems scored on the same rows."""

    name: str
    data: str
    sha256: str
    """Of that file; '' where the run does not say."""
    num_rows: int
    rows: Sequence[AnswerRow]
    entrants: Sequence[Entrant]
    comparisons: Sequence[Comparison]

    @property
    def metrics(self) -> list[Metric]:
        """The figures that decide, of those that the suite of these rows has."""
        return [metric for metric in BY_KEY.values() if any(metric.key in e.summary for e in self.entrants)]

    @property
    def crowded(self) -> bool:
        """Too many trained systems to read one after the other: a sweep's."""
        return sum(entrant.kind == "trained" for entrant in self.entrants) > MAX_PAIRED

    @property
    def slug(self) -> str:
        """The name, fit for a file."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")


def label_runs(views: Sequence[RunView]) -> dict[str, str]:
    """Return a short label for each run's path: its recipe where that tells the runs apart, else recipe and suffix."""
    short = [_short_name(view) for view in views]
    full = [f"{name} {view.name.rsplit('-', 1)[-1]}" for name, view in zip(short, views, strict=True)]
    chosen = [a if short.count(a) == 1 else b for a, b in zip(short, full, strict=True)]
    if len(set(chosen)) < len(chosen):
        chosen = [view.name if chosen.count(c) > 1 else c for c, view in zip(chosen, views, strict=True)]
    if len(set(chosen)) < len(chosen):
        chosen = [str(view.path) for view in views]
    return {str(view.path): label for view, label in zip(views, chosen, strict=True)}


def _short_name(view: RunView) -> str:
    if view.setting:
        return f"{view.setting}, seed {view.seed}"
    return view.name.rsplit("-", 3)[0] if view.name.count("-") >= 3 else view.name


def make_boards(views: Sequence[RunView]) -> list[Board]:
    """Put together the sets of all runs that hold the same rows; others stay apart, since they do not compare."""
    labels = label_runs(views)
    groups: dict[tuple[str, str], list[tuple[str, ScoredSet]]] = {}
    for view in views:
        for name, found in view.sets.items():
            groups.setdefault((name, _fingerprint(found)), []).append((labels[str(view.path)], found))
    names = [name for name, _ in groups]
    return [
        _board(name if names.count(name) == 1 else f"{name} ({', '.join(run for run, _ in members)})", members)
        for (name, _), members in groups.items()
    ]


def _fingerprint(found: ScoredSet) -> str:
    """Hash what was asked and wanted; without answers on disk, the file's name and the number of rows must do."""
    asked: Any = [(row.input, row.reference) for row in found.rows] or (found.data, found.num_rows)
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


def _board(name: str, members: Sequence[tuple[str, ScoredSet]]) -> Board:
    entrants: list[Entrant] = []
    for run, found in members:
        new = _not_yet(entrants, list(_entrants(found)))
        alone = sum(entrant.kind == "trained" for entrant in new) == 1
        for entrant in new:
            taken = len(members) > 1 and (entrant.kind == "trained" or any(e.label == entrant.label for e in entrants))
            label = run if alone and entrant.kind == "trained" else f"{run}: {entrant.label}"
            entrants.append(_named(entrant, label if taken else entrant.label))
    order = {"base": 0, "control": 1, "trained": 2}
    entrants.sort(key=lambda entrant: order[entrant.kind])
    first = members[0][1]
    compared = list(_recorded(first) if len(members) == 1 else _recomputed(entrants))
    return Board(name, first.data, first.sha256, first.num_rows, first.rows, entrants, compared)


def _not_yet(entrants: Sequence[Entrant], more: Sequence[Entrant]) -> list[Entrant]:
    """Leave out who stands on the board already: base, controls, and what a stage began with, which the one before left."""
    own = [entrant for entrant in more if entrant.kind == "trained"][-1:]
    return [e for e in more if e in own or not any(o.kind == e.kind and _same(o, e) for o in entrants)]


def _entrants(found: ScoredSet) -> Iterator[Entrant]:
    for system, summary in found.systems.items():
        kind: Kind = "base" if system == "base" else "control" if system in CONTROLS else "trained"
        answers = [row.answers.get(system, "") for row in found.rows]
        yield Entrant(system, kind, summary, answers, found.scores.get(system, ()))


def _named(entrant: Entrant, label: str) -> Entrant:
    return Entrant(label, entrant.kind, entrant.summary, entrant.answers, entrant.scores)


def _same(first: Entrant, second: Entrant) -> bool:
    return first.answers == second.answers and first.summary == second.summary


def _recorded(found: ScoredSet) -> Iterator[Comparison]:
    for tree in found.differences:
        metric, interval = BY_KEY.get(tree["metric"]), tree["interval"]
        if metric is not None:
            enough = (interval.get("num_groups") or interval["num_rows"]) >= MIN_ROWS
            shown = enough and (interval["low"] > 0 or interval["high"] < 0)
            yield _comparison(tree["system"], tree["control"], metric, interval, tree["sentence"], shown)


def _recomputed(entrants: Sequence[Entrant]) -> Iterator[Comparison]:
    """Compare every trained system with base and controls, and a few trained systems with each other."""
    trained = [entrant for entrant in entrants if entrant.kind == "trained"]
    pairs = [(system, other) for system in trained for other in entrants if other.kind != "trained"]
    if len(trained) <= MAX_PAIRED:
        pairs += [(later, earlier) for i, earlier in enumerate(trained) for later in trained[i + 1 :]]
    pairs = [(system, other) for system, other in pairs if len(system.scores) == len(other.scores) > 0]
    if not pairs:
        return
    # Metrics of the same rows are resampled in one call, which costs little more than one metric alone.
    alike: dict[tuple[int, ...], list[Metric]] = {}
    for metric in BY_KEY.values():
        rows = tuple(i for i, score in enumerate(pairs[0][0].scores) if score.get(metric.key) is not None)
        alike.setdefault(rows, []).append(metric)
    for rows, metrics in alike.items():
        if rows:
            yield from _resampled(pairs, metrics, rows)


def _resampled(
    pairs: Sequence[tuple[Entrant, Entrant]], metrics: Sequence[Metric], rows: Sequence[int]
) -> Iterator[Comparison]:
    """Compare pairs in metrics that apply to these rows."""
    wanted = [(system, other, metric) for system, other in pairs for metric in metrics]
    paired = [_column(system, metric, rows) - _column(other, metric, rows) for system, other, metric in wanted]
    groups = [str(pairs[0][0].scores[i].get("group", "")) for i in rows]
    intervals = bootstrap_means(np.stack(paired, axis=1), groups=groups)
    for (system, other, metric), found in zip(wanted, intervals, strict=True):
        sentence = difference_sentence(found, metric.label, system.label, other.label)
        yield _comparison(system.label, other.label, metric, asdict(found), sentence, found.shows_difference)


def _column(entrant: Entrant, metric: Metric, rows: Sequence[int]) -> NDArray[np.float64]:
    return np.array([float(entrant.scores[i][metric.key]) for i in rows])


def _comparison(system: str, against: str, metric: Metric, interval: Tree, sentence: str, shown: bool) -> Comparison:
    better = (interval["mean"] > 0) == metric.higher_is_better
    return Comparison(
        system, against, metric.key, interval["mean"], interval["low"], interval["high"], sentence,
        "no difference shown" if not shown else "better" if better else "worse",
    )  # fmt: skip
