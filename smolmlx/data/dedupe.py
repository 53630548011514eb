"""Remove rows that say again what an earlier row, or a held-out row, says."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from smolmlx.data.clean import json_line, read_pairs, replacing, text_hash
from smolmlx.data.formats import Example, Raw, Source
from smolmlx.data.near import THRESHOLD, Rows, check_threshold, find_keepers, find_matches, sketch
from smolmlx.errors import DataError

Part = Literal["row", "input", "answer"]
OnRows = Callable[[int], None]

_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Twin:
    """A dropped row and the row it repeats."""

    where: str
    of: str
    similarity: float


@dataclass(slots=True)
class Deduped:
    """What was dropped, and why; `rows` is `kept` plus the four counts."""

    rows: int = 0
    kept: int = 0
    exact: int = 0
    near: int = 0
    held_out_exact: int = 0
    held_out_near: int = 0
    twins: list[Twin] = field(default_factory=list)
    """The first few near duplicates, to judge the threshold by."""


@dataclass(frozen=True, slots=True)
class Texts:
    """One part of every row of a source: where it stands, its hash, and the text of each new hash."""

    where: Sequence[str]
    first: Rows
    """Row -> the first row of the same text."""
    hashes: Sequence[bytes]
    unique: Rows
    """Rows whose text is new."""
    sketches: Any
    """Sketches of the unique rows; None where only exact equality is asked for."""


def split_parts(raw: Raw, example: Example, source: Source) -> tuple[str, str]:
    """Return what a row asks and what it answers; a text is all input.

    Of an alpaca row with an `input`, that passage is the input: instructions that all rows share would make them alike.
    """
    if example.text is not None:
        return example.text, ""
    turns = [*example.messages, *example.chosen]
    answer = str(turns.pop().get("content") or "") if turns and turns[-1]["role"] == "assistant" else ""
    if passage := source.passage(raw):
        return passage, answer
    return "\n".join(str(turn.get("content") or "") for turn in turns if turn["role"] != "system"), answer


def read_part(source: Source, part: Part, near: bool, on_rows: OnRows | None = None) -> Texts:
    """Read one part of every row; texts are sketched as they pass and not kept.

    Raises:
        DataError: rows that cannot be read, up to 20 of them named.
    """
    where: list[str] = []
    hashes: list[bytes] = []
    first: list[int] = []
    unique: list[int] = []
    seen: dict[bytes, int] = {}

    def new_texts() -> Iterator[str]:
        for example_where, text in _texts(source, part):
            digest = text_hash(text)
            row = len(where)
            where.append(example_where)
            hashes.append(digest)
            first.append(seen.setdefault(digest, row))
            if on_rows is not None and row % 1024 == 0:
                on_rows(row)
            if first[-1] == row:
                unique.append(row)
                yield text

    if near:
        sketches = sketch(new_texts())
    else:
        sketches = None
        for _ in new_texts():
            pass
    return Texts(where, np.asarray(first, np.int64), hashes, np.asarray(unique, np.int64), sketches)


def _texts(source: Source, part: Part) -> Iterator[tuple[str, str]]:
    problems: list[str] = []
    for raw, example in read_pairs(source, problems):
        asked, answered = split_parts(raw, example, source)
        yield example.where, {"row": f"{asked}\n{answered}", "input": asked, "answer": answered}[part]
    if problems:
        raise DataError(", ".join(map(str, source.files)), problems)


def dedupe(
    source: Source,
    target: Path,
    *,
    part: Part = "row",
    threshold: float = THRESHOLD,
    against: Sequence[Source] = (),
    on_rows: OnRows | None = None,
) -> Deduped:
    """Write the rows that are new, as they stand, in their order; of rows that are alike the first is kept.

    Args:
        part: what is compared.
        threshold: similarity from which two texts are near duplicates; 1 for exact equality only.
        against: held-out rows; what repeats one of them is dropped as well.
        on_rows: called now and then with the number of rows read.

    Raises:
        RecipeError: an impossible threshold.
        DataError: rows that cannot be read, or none that is left.
        BackendError: the MinHash library is not installed.
    """
    check_threshold(threshold)
    near = threshold < 1
    texts = read_part(source, part, near, on_rows)
    found = Deduped(rows=len(texts.where), exact=len(texts.where) - len(texts.unique))
    keep = np.zeros(len(texts.where), bool)
    keep[texts.unique] = True
    for held_out in against:
        _drop_held_out(texts, read_part(held_out, part, near), threshold, keep, found)
    if near:
        _drop_near(texts, threshold, keep, found)
    found.kept = int(keep.sum())
    if not found.kept:
        raise DataError(f"{source.files[0]}: no row is left of {found.rows}; all repeat held-out rows.")
    with replacing(target) as file:
        for row, (raw, example) in enumerate(read_pairs(source, [])):
            if row < len(keep) and keep[row]:
                file.write(json_line(raw, example.where))
    return found


def _drop_held_out(texts: Texts, other: Texts, threshold: float, keep: Any, found: Deduped) -> None:
    known = set(other.hashes)
    for row in texts.unique:
        if keep[row] and texts.hashes[row] in known:
            keep[row] = False
            found.held_out_exact += 1
    if texts.sketches is not None and len(other.unique):
        matches = find_matches(other.sketches, texts.sketches, threshold)
        for at in np.flatnonzero(matches.best >= 0):
            row = texts.unique[at]
            if keep[row]:
                keep[row] = False
                found.held_out_near += 1
                _show(found, texts.where[row], other.where[other.unique[matches.best[at]]], matches.similarity[at])


def _drop_near(texts: Texts, threshold: float, keep: Any, found: Deduped) -> None:
    # Of what is left: a row that is gone must not take others with it.
    left = keep[texts.unique]
    rows = texts.unique[left]
    keeper, similarity = find_keepers(texts.sketches[left], threshold)
    for at in np.flatnonzero(keeper != np.arange(len(keeper))):
        keep[rows[at]] = False
        found.near += 1
        _show(found, texts.where[rows[at]], texts.where[rows[keeper[at]]], similarity[at])


def _show(found: Deduped, where: str, of: str, similarity: float) -> None:
    if len(found.twins) < _SHOWN:
        found.twins.append(Twin(where, of, round(float(similarity), 3)))
