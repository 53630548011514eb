"""Tolerant readers of what a model wrote freely: bullets, question-answer pairs, triplets, a chosen passage.

They never raise: what cannot be read is left out, or read as nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

_BULLET = re.compile(r"^[ \t]*[-*][ \t]+(\S.*)$", re.MULTILINE)
_LIST_MARK = re.compile(r"(?:[-*]|[0-9]{1,3}[.)])[ \t]+")
_FENCE = re.compile(r"```[a-z]*\n(.*?)```", re.DOTALL | re.IGNORECASE)
_QA_MARK = re.compile(
    r"^[ \t]*#{1,6}[ \t]*Q[0-9]+\b[ \t]*[.:)]?|\*\*(Question|Answer)(?::\*\*|\*\*[ \t]*:)", re.MULTILINE | re.IGNORECASE
)
_PASSAGE = re.compile(
    r"(?:^[ \t]*|\*\*)Passage(?:\*\*)?[ \t]*:(?:\*\*)?\s*(?:passage\s*)?[\[(#]?([0-9]{1,9})(?![0-9]|\.[0-9])",
    re.MULTILINE | re.IGNORECASE,
)
_WHY = re.compile(r"(?:^[ \t]*|\*\*)Why(?:\*\*)?[ \t]*:(?:\*\*)?(.*)\Z", re.MULTILINE | re.IGNORECASE | re.DOTALL)
_NUMBER = re.compile(r"[0-9]{1,9}")

_SUBJECT, _RELATION, _OBJECT = ("subject", "s"), ("relation", "predicate", "r"), ("object", "o")


@dataclass(frozen=True, slots=True)
class QAPair:
    """A question and its answer, both non-empty."""

    question: str
    answer: str


@dataclass(frozen=True, slots=True)
class Triplet:
    """A statement as (subject, relation, object), all non-empty."""

    subject: str
    relation: str
    object: str


@dataclass(frozen=True, slots=True)
class RetrievalResult:
    """Which passage was chosen, counted from 0, or None, and why."""

    index: int | None
    reasoning: str


def bullet_lines(text: str) -> tuple[str, ...]:
    """Return the text of every `- x` or `* x` line; none where there is no bullet."""
    return tuple(match.strip() for match in _BULLET.findall(text))


def parse_bullets(text: str) -> tuple[str, ...]:
    """Return the bullets; without any, the whole text as the only one; nothing for a blank text."""
    whole = text.strip()
    return bullet_lines(text) or ((whole,) if whole else ())


def parse_qa(text: str) -> tuple[QAPair, ...]:
    """Return question-answer pairs from JSON, or from `### Q<n>`, `**Question:**` and `**Answer:**` blocks."""
    items = [item for item in _json_items(text) if isinstance(item, Mapping)]
    pairs = _complete(QAPair(_field(item, ("question", "q")), _field(item, ("answer", "a"))) for item in items)
    return pairs or _complete(_qa_blocks(text))


def parse_triplets(text: str) -> tuple[Triplet, ...]:
    """Return triplets from a JSON array, or from `- (s, r, o)` lines; a further comma belongs to the object."""
    triplets = _whole(_json_triplet(item) for item in _json_items(text))
    return triplets or _whole(_line_triplet(line) for line in text.splitlines())


def parse_retrieval(text: str, num_passages: int) -> RetrievalResult:
    """Return the chosen passage from JSON or `**Passage:** 2 ... **Why:** x`; text counts from 1, the result from 0.

    `None`, `null`, no number, or a number outside 1 to `num_passages` give index None.
    """
    value = load_json(text)
    if isinstance(value, Mapping) and "passage" in value:
        return RetrievalResult(
            _index(_passage_number(value["passage"]), num_passages), _field(value, ("why", "reasoning"))
        )
    number, why = _PASSAGE.search(text), _WHY.search(text)
    return RetrievalResult(_index(int(number[1]) if number else None, num_passages), why[1].strip() if why else "")


def _index(number: int | None, num_passages: int) -> int | None:
    return number - 1 if number is not None and 1 <= number <= num_passages else None


def _passage_number(value: object) -> int | None:
    if isinstance(value, str) and _NUMBER.fullmatch(value.strip()):
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def load_json(text: str) -> object:
    """Return the first JSON value that the text is, holds in a code fence, or has from its first bracket on."""
    fenced = _FENCE.search(text)
    bracket = re.search(r"[\[{]", text)
    candidates = [text, fenced[1] if fenced else "", text[bracket.start() :] if bracket else ""]
    for candidate in candidates:
        try:
            value: object = json.JSONDecoder().raw_decode(candidate.strip())[0]
        except (ValueError, RecursionError):
            continue
        if isinstance(value, list | dict):
            return value
    return None


def _json_items(text: str) -> list[object]:
    """Return the items of a JSON array, bare or as the first array of an object; an object alone is one item."""
    value = load_json(text)
    if isinstance(value, Mapping):
        return next((list(inner) for inner in value.values() if isinstance(inner, list)), [value])
    if not isinstance(value, list):
        return []
    is_one_triplet = len(value) == 3 and all(isinstance(part, str) for part in value)
    return [value] if is_one_triplet else value


def _field(item: Mapping[str, object], names: tuple[str, ...]) -> str:
    return next((_plain(item[name]) for name in names if name in item), "")


def _plain(value: object) -> str:
    return str(value).strip() if isinstance(value, str | int | float) and not isinstance(value, bool) else ""


def _qa_blocks(text: str) -> list[QAPair]:
    pairs, question = [], ""
    marks = list(_QA_MARK.finditer(text))
    stops = [mark.start() for mark in marks[1:]] + [len(text)]
    for mark, stop in zip(marks, stops, strict=False):
        body = text[mark.end() : stop].strip()
        if (mark[1] or "").lower() == "answer":
            pairs.append(QAPair(question, body))
            question = ""
        else:
            question = body
    return pairs


def _complete(pairs: Iterable[QAPair]) -> tuple[QAPair, ...]:
    return tuple(pair for pair in pairs if pair.question and pair.answer)


def _whole(parts: Iterable[tuple[str, str, str] | None]) -> tuple[Triplet, ...]:
    return tuple(Triplet(*part) for part in parts if part and all(part))


def _json_triplet(item: object) -> tuple[str, str, str] | None:
    if isinstance(item, Mapping):
        return _field(item, _SUBJECT), _field(item, _RELATION), _field(item, _OBJECT)
    if isinstance(item, list) and len(item) == 3:
        return _plain(item[0]), _plain(item[1]), _plain(item[2])
    return None


def _line_triplet(line: str) -> tuple[str, str, str] | None:
    line = line.strip().rstrip(".,;")
    mark = _LIST_MARK.match(line)
    line = line[mark.end() :] if mark else line
    parts = line[1:-1].split(",", 2) if line.startswith("(") and line.endswith(")") else []
    if len(parts) != 3:
        return None
    subject, relation, target = (part.strip().strip("\"'").strip() for part in parts)
    return subject, relation, target
