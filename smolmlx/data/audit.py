"""What one split knows of another: the same or nearly the same inputs, answers, closing questions, and groups."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np

from smolmlx.data.clean import read_pairs, text_hash
from smolmlx.data.dedupe import Part, Texts, Twin, read_part, split_parts
from smolmlx.data.formats import Source
from smolmlx.data.near import THRESHOLD, check_threshold, find_matches
from smolmlx.errors import RecipeError, nearest

_SHOWN = 3
_NOTHING = text_hash("")


@dataclass(slots=True)
class Finding:
    """How many rows of a later split repeat an earlier one in one respect."""

    kind: str
    count: int
    first: list[Twin] = field(default_factory=list)


@dataclass(slots=True)
class PairAudit:
    """One pair of splits; shares are of the rows of `later`."""

    earlier: str
    later: str
    rows: int
    findings: list[Finding]
    leaked: int
    """Rows of `later` that anything at all was found for."""

    @property
    def share(self) -> float:
        return self.leaked / self.rows if self.rows else 0.0


@dataclass(frozen=True, slots=True)
class _Split:
    """What is held of a split: hashes and sketches, not texts."""

    inputs: Texts
    answers: Texts
    questions: Sequence[bytes | None]
    """Hash of the answer's last line where that is a question."""
    groups: Sequence[str | None]


def audit(
    splits: Mapping[str, Source],
    *,
    group: str | None = None,
    threshold: float = THRESHOLD,
    on_rows: Callable[[int], None] | None = None,
) -> list[PairAudit]:
    """Compare every split with those before it, train first; cost and memory are linear in rows.

    Args:
        group: a column, such as a document or a concept, whose values must not be in two splits.
        threshold: similarity from which texts are near duplicates; 1 for exact equality only.

    Raises:
        RecipeError: fewer than two splits, a bad threshold, or no such column.
        DataError: rows that cannot be read.
        BackendError: the MinHash library is not installed.
    """
    check_threshold(threshold)
    if len(splits) < 2:
        raise RecipeError("data audit: give at least two splits, train first, then what is held out.")
    read = {name: _read(source, group, threshold < 1, on_rows) for name, source in splits.items()}
    return [_pair(a, b, read[a], read[b], threshold) for a, b in combinations(read, 2)]


def _read(source: Source, group: str | None, near: bool, on_rows: Callable[[int], None] | None) -> _Split:
    questions: list[bytes | None] = []
    groups: list[str | None] = []
    columns: set[str] = set()
    for raw, example in read_pairs(source, []):
        last = split_parts(raw, example, source)[1].rstrip().rpartition("\n")[2].strip()
        questions.append(text_hash(last) if last.endswith("?") else None)
        value = raw.get(group) if group else None
        groups.append(None if value is None else value if isinstance(value, str) else json.dumps(value, default=str))
        columns.update(raw)
    if group and group not in columns:
        listed = ", ".join(sorted(columns))
        raise RecipeError(f"{source.files[0]}: no column '{group}'.{nearest(group, columns)} Columns: {listed}.")
    parts: list[Part] = ["input", "answer"]
    inputs, answers = (read_part(source, part, near, on_rows) for part in parts)
    return _Split(inputs, answers, questions, groups)


def _pair(earlier: str, later: str, first: _Split, second: _Split, threshold: float) -> PairAudit:
    leaked: set[int] = set()
    findings = []
    for name, a, b in (("input", first.inputs, second.inputs), ("answer", first.answers, second.answers)):
        exact = _equal(f"same {name}", a.hashes, b.hashes, a.where, b.where, leaked)
        near = _alike(f"nearly the same {name}", a, b, threshold, leaked) if threshold < 1 else None
        findings += [exact, *([near] if near is not None else [])]
    where = (first.inputs.where, second.inputs.where)
    findings.append(_equal("same closing question", first.questions, second.questions, *where, leaked))
    if any(value is not None for value in second.groups):
        findings.append(_equal("same group", first.groups, second.groups, *where, leaked))
    rows = len(second.inputs.where)
    return PairAudit(earlier, later, rows, findings, len(leaked))


def _equal(
    kind: str,
    known: Iterable[object],
    asked: Iterable[object],
    where_known: Sequence[str],
    where_asked: Sequence[str],
    leaked: set[int],
) -> Finding:
    """Count rows whose value stands in the earlier split; none, and no text, do not count."""
    places: dict[object, int] = {}
    for row, value in enumerate(known):
        places.setdefault(value, row)
    found = Finding(kind, 0)
    for row, value in enumerate(asked):
        if value is not None and value != _NOTHING and value in places:
            _note(found, Twin(where_asked[row], where_known[places[value]], 1.0), row, leaked)
    return found


def _alike(kind: str, known: Texts, asked: Texts, threshold: float, leaked: set[int]) -> Finding:
    """Count rows that are near duplicates and not equal; every repetition of a text counts."""
    found = Finding(kind, 0)
    matches = find_matches(known.sketches, asked.sketches, threshold)
    exact = {*known.hashes, _NOTHING}
    at = np.full(len(asked.where), -1)
    at[asked.unique] = np.arange(len(asked.unique))
    for row, digest in enumerate(asked.hashes):
        unique = at[asked.first[row]]
        if matches.best[unique] >= 0 and digest not in exact:
            twin = known.where[known.unique[matches.best[unique]]]
            _note(found, Twin(asked.where[row], twin, round(float(matches.similarity[unique]), 3)), row, leaked)
    return found


def _note(found: Finding, twin: Twin, row: int, leaked: set[int]) -> None:
    found.count += 1
    leaked.add(row)
    if len(found.first) < _SHOWN:
        found.first.append(twin)
