"""What one split knows of another: the same or nearly the same inputs, answers, closing questions, and groups."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np

from smolmlx.data.clean import read_pairs, text_hash
from smolmlx.data.dedupe import Texts, Twin, read_part, split_parts
from smolmlx.data.formats import Example, Raw, Source
from smolmlx.data.near import THRESHOLD, check_threshold, find_matches
from smolmlx.data.phrases import Key, Phrases, hash_words, phrase_keys
from smolmlx.errors import RecipeError, nearest

_SHOWN = 3
_MAX_WORDS = 1 << 18
"""Words searched at once; bounds memory."""
_NOTHING = text_hash("")
_MIN_INPUT_WORDS = 12
"""Of the end of a message, taken for its input: shorter ones are often an instruction."""
_MAX_ALIKE = 10
"""An end that more held-out rows than this share is an instruction however long, not an input."""
_BLANK_LINE = re.compile(r"\n[ \t\r]*\n")


@dataclass(slots=True)
class Finding:
    """How much of a later split repeats an earlier one in one respect."""

    kind: str
    count: int
    of: int
    """What was counted: the rows of the later split, or its distinct groups."""
    first: list[Twin] = field(default_factory=list)

    @property
    def share(self) -> float:
        return self.count / self.of if self.of else 0.0


@dataclass(slots=True)
class PairAudit:
    """One pair of splits."""

    earlier: str
    later: str
    rows: int
    findings: list[Finding]
    leaked: int
    """Rows of `later` that anything at all was found for."""

    @property
    def share(self) -> float:
        return self.leaked / self.rows if self.rows else 0.0


@dataclass(slots=True)
class _Wanted:
    """What to look for inside an earlier split: the inputs, answers and closing questions of those after it."""

    phrases: Phrases = field(default_factory=Phrases)
    questions: set[bytes] = field(default_factory=set)


@dataclass(slots=True)
class _Split:
    """What is held of a split: hashes and sketches, not texts."""

    inputs: Texts
    answers: Texts
    references: list[Key | None] = field(default_factory=list)
    """The answers, as they are looked for inside texts."""
    passages: list[Key | None] = field(default_factory=list)
    """The inputs without the instruction about them, as they are looked for inside user turns."""
    ends: Counter[Key | None] = field(default_factory=Counter)
    """Of `passages`, those that are only taken for inputs: how many rows have them."""
    questions: list[tuple[bytes, Key | None] | None] = field(default_factory=list)
    """The answer's last line where that is a question: its hash, for equal lines, and as a phrase."""
    groups: list[str | None] = field(default_factory=list)
    phrases: dict[Key, str] = field(default_factory=dict)
    """Phrase of a later split -> the first row here that has it anywhere in its turns."""
    asked: dict[Key, str] = field(default_factory=dict)
    """Phrase of a later split -> the first row here that has it in a user turn, or in a text."""
    lines: dict[bytes, str] = field(default_factory=dict)
    """Question of a later split -> the first row here that has it as a line."""


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
    read: dict[str, _Split] = {}
    wanted = _Wanted()
    for name in reversed(list(splits)):  # the last first, so that what is looked for is known by then
        read[name] = _read(splits[name], group, threshold < 1, on_rows, wanted, later=len(read) + 1 < len(splits))
    return [_pair(a, b, read[a], read[b], threshold) for a, b in combinations(splits, 2)]


def _read(
    source: Source,
    group: str | None,
    near: bool,
    on_rows: Callable[[int], None] | None,
    wanted: _Wanted,
    *,
    later: bool,
) -> _Split:
    """Read a split and find in it what is wanted; one that is `later` than others adds its own to that."""
    found = _Split(read_part(source, "input", near, on_rows), read_part(source, "answer", near, on_rows))
    columns: set[str] = set()
    for rows in _chunks(source):
        turns = [(example.where, *turn) for _, example, _ in rows for turn in _turns(example)]
        for key, at in wanted.phrases.search([hash_words(turn) for *_, turn in turns]):
            where, role, _ = turns[at]
            found.phrases.setdefault(key, where)
            if role in ("user", "text"):
                found.asked.setdefault(key, where)
        for where, line in ((where, line) for where, _, turn in turns if "?" in turn for line in turn.split("\n")):
            if line.rstrip().endswith("?") and (digest := text_hash(line)) in wanted.questions:
                found.lines.setdefault(digest, where)
        if later:
            _add_wanted(found, [answer for *_, answer in rows])
            _add_inputs(found, source, rows)
        found.groups += [_group(raw, group) for raw, *_ in rows]
        columns.update(name for raw, *_ in rows for name in raw)
    if group and group not in columns:
        listed = ", ".join(sorted(columns))
        raise RecipeError(f"{source.files[0]}: no column '{group}'.{nearest(group, columns)} Columns: {listed}.")
    found.passages = [None if found.ends[key] > _MAX_ALIKE else key for key in found.passages]
    wanted.phrases.add(found.passages)
    wanted.phrases.add(found.references)
    wanted.phrases.add(question[1] for question in found.questions if question)
    wanted.questions.update(question[0] for question in found.questions if question)
    return found


def _add_wanted(found: _Split, answers: Sequence[str]) -> None:
    lasts = [answer.rstrip().rpartition("\n")[2] for answer in answers]
    asked = phrase_keys([hash_words(last) for last in lasts])
    found.references += phrase_keys([hash_words(answer) for answer in answers])
    found.questions += [(text_hash(q), key) if q.endswith("?") else None for q, key in zip(lasts, asked, strict=True)]


def _add_inputs(found: _Split, source: Source, rows: Sequence[tuple[Raw, Example, str]]) -> None:
    """Note what each row is about: its `input` column, else what follows the last blank line of its last user message."""
    given = [source.passage(raw) for raw, *_ in rows]
    keys = phrase_keys([hash_words(text or _end(row[1])) for text, row in zip(given, rows, strict=True)])
    for text, key in zip(given, keys, strict=True):
        if key and not text:
            found.ends[key] += 1
        short = key and not text and key[0] < _MIN_INPUT_WORDS
        found.passages.append(None if short else key)


def _end(example: Example) -> str:
    asked = [turn for role, turn in _turns(example) if role == "user"]
    return _BLANK_LINE.split(asked[-1].strip())[-1] if asked else ""


def _chunks(source: Source) -> Iterator[list[tuple[Raw, Example, str]]]:
    """Yield rows with their answers, as many at once as have about `_MAX_WORDS` words."""
    rows, characters = [], 0
    for raw, example in read_pairs(source, []):
        rows.append((raw, example, split_parts(raw, example, source)[1]))
        characters += sum(len(turn) for _, turn in _turns(example))
        if characters >= 6 * _MAX_WORDS:
            yield rows
            rows, characters = [], 0
    if rows:
        yield rows


def _turns(example: Example) -> list[tuple[str, str]]:
    """Return (role, what is said); a row of text has one turn, of role "text"."""
    if example.text is not None:
        return [("text", example.text)]
    turns = (*example.messages, *example.chosen, *example.rejected)
    return [(turn["role"], str(turn.get("content") or "")) for turn in turns]


def _group(raw: Raw, column: str | None) -> str | None:
    value = raw.get(column) if column else None
    return value if value is None or isinstance(value, str) else json.dumps(value, default=str)


def _pair(earlier: str, later: str, first: _Split, second: _Split, threshold: float) -> PairAudit:
    leaked: set[int] = set()
    findings = []
    for name, a, b in (("input", first.inputs, second.inputs), ("answer", first.answers, second.answers)):
        findings.append(_equal(f"same {name}", a, b, leaked))
        if threshold < 1:
            findings.append(_alike(f"nearly the same {name}", a, b, threshold, leaked))
    passages = (first.asked.get(key) if key else None for key in second.passages)
    findings.append(_count("input found verbatim", second.inputs, passages, leaked))
    findings.append(_within(first, second, leaked))
    findings.append(_asked(first, second, leaked))
    if any(value is not None for value in second.groups):
        findings.append(_shared(first, second, leaked))
    return PairAudit(earlier, later, len(second.inputs.where), findings, len(leaked))


def _places(texts: Texts) -> dict[bytes, str]:
    """Return hash -> the first row of that text; no text does not count."""
    return {texts.hashes[row]: texts.where[row] for row in texts.unique if texts.hashes[row] != _NOTHING}


def _equal(kind: str, known: Texts, asked: Texts, leaked: set[int]) -> Finding:
    places = _places(known)
    return _count(kind, asked, (places.get(digest) for digest in asked.hashes), leaked)


def _within(first: _Split, second: _Split, leaked: set[int]) -> Finding:
    """Count answers that are an earlier row's, or stand word for word in any of its turns."""
    places = _places(first.answers)
    rows = zip(second.answers.hashes, second.references, strict=True)
    found = (places.get(digest) or (first.phrases.get(key) if key else None) for digest, key in rows)
    return _count("answer found verbatim", second.answers, found, leaked)


def _asked(first: _Split, second: _Split, leaked: set[int]) -> Finding:
    """Count closing questions that are a line of an earlier row, or stand word for word in any of its turns."""
    found = (q and (first.lines.get(q[0]) or (first.phrases.get(q[1]) if q[1] else None)) for q in second.questions)
    return _count("closing question found", second.inputs, found, leaked)


def _shared(first: _Split, second: _Split, leaked: set[int]) -> Finding:
    """Count distinct groups that have rows in both splits; each of their rows leaks."""
    places: dict[str | None, str] = {}
    for where, value in zip(first.inputs.where, first.groups, strict=True):
        places.setdefault(value, where)
    known: dict[str, int] = {}
    for row, value in enumerate(second.groups):
        if value is not None:
            known.setdefault(value, row)
            if value in places:
                leaked.add(row)
    found = Finding("same group", 0, len(known))
    for value, row in known.items():
        if value in places:
            _note(found, Twin(second.inputs.where[row], places[value], 1.0), row, leaked)
    return found


def _count(kind: str, asked: Texts, places: Iterable[str | None], leaked: set[int]) -> Finding:
    """Count the rows of `asked` that have a place in the earlier split."""
    found = Finding(kind, 0, len(asked.where))
    for row, place in enumerate(places):
        if place is not None:
            _note(found, Twin(asked.where[row], place, 1.0), row, leaked)
    return found


def _alike(kind: str, known: Texts, asked: Texts, threshold: float, leaked: set[int]) -> Finding:
    """Count rows that are near duplicates and not equal; every repetition of a text counts."""
    found = Finding(kind, 0, len(asked.where))
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
