"""From a model's reply to a checked value, and from a value to the answer a row teaches, in each style.

Every reply is validated, whether or not a server or engine was asked to keep to a schema. `read` says why a reply is not
accepted, in few words that can be counted; `read_freely` never refuses.
"""

from __future__ import annotations

import ast
import json
import re
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import ValidationError

from smolmlx.data.notes import Notes
from smolmlx.evals.notes import sections
from smolmlx.evals.parsers import (
    QAPair,
    RetrievalResult,
    Triplet,
    bullet_lines,
    load_json,
    parse_bullets,
    parse_qa,
    parse_retrieval,
    parse_triplets,
)
from smolmlx.tasks.schemas import (
    ANSWERS,
    Answer,
    Bullets,
    NotesAnswer,
    Pairs,
    Quest,
    Question,
    Retrieval,
    Text,
    Triplets,
    Value,
    plain,
    to_answer,
)

CUT_OFF = "cut off"
EMPTY = "empty"
REPEATED = "repeated item"
UNREADABLE = "unreadable"

_NUMBERED = re.compile(r"^[ \t]*[0-9]{1,2}[.)][ \t]+(\S.*)$", re.MULTILINE)
_PYTHON_LIST = re.compile(r"\[.*\]", re.DOTALL)
_MOST_CHARS = 20_000
"""Longer texts are not parsed as Python: a reply is never that long, and the parser may recurse deeply."""


@dataclass(frozen=True, slots=True)
class Rejected:
    """Why a reply is not accepted."""

    reason: str


def read(schema: type[Answer], reply: str, num_passages: int = 20) -> Value | Rejected:
    """Return the value of a reply, from JSON or, failing that, from Markdown or Python; or why there is none."""
    tree = load_json(reply)
    if isinstance(tree, dict):
        try:
            return _accept(schema.model_validate(tree).value())
        except ValidationError as error:
            if schema is not Text and set(tree) & set(schema.model_fields):
                return Rejected(_fault(error))
    value = _parse(schema, reply, num_passages)
    if value is None or value == ():
        return Rejected(EMPTY if not reply.strip() else UNREADABLE)
    try:
        return _accept(to_answer(schema, value).value())
    except ValidationError as error:
        return Rejected(_fault(error))


def read_freely(task: str, reply: str, num_passages: int = 20) -> Value:
    """Return what a reply to a task holds, without bounds: metrics.md's tolerant parsers, JSON and Python lists."""
    found = _parse(ANSWERS[task], reply, num_passages)
    if ANSWERS[task] is Bullets:
        return found or (() if _is_blank_list(reply) else parse_bullets(reply))
    return reply.strip() if found is None else found


def _fault(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    place = ".".join(str(part) for part in first["loc"] if not isinstance(part, int))
    return f"invalid {place}: {first['type'].replace('_', ' ')}"


def _accept(value: Value) -> Value | Rejected:
    parts = _strings(value)
    if not parts or not all(part.strip() for part in parts):
        return Rejected(EMPTY)
    items = value.lines if isinstance(value, Notes) else value
    if isinstance(items, tuple) and len({str(item).lower() for item in items}) < len(items):
        return Rejected(REPEATED)
    return value


def _strings(value: Value) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, RetrievalResult):
        return [value.reasoning]
    if isinstance(value, Quest):
        return [value.question, value.why]
    if isinstance(value, Notes):
        return list(value.lines)
    return [part for item in value for part in ([item] if isinstance(item, str) else asdict(item).values())]


def _parse(schema: type[Answer], reply: str, num_passages: int) -> Value | None:
    if schema is Bullets:
        return _bullets(reply)
    if schema is Pairs:
        return parse_qa(reply) or tuple(QAPair(*parts) for parts in _python_tuples(reply, 2))
    if schema is Triplets:
        return parse_triplets(reply) or tuple(Triplet(*parts) for parts in _python_tuples(reply, 3))
    if schema is Retrieval:
        return parse_retrieval(reply, num_passages)
    if schema is Question:
        return None
    if schema is NotesAnswer:
        return _notes(reply)
    assert schema is Text
    tree = load_json(reply) if reply.lstrip().startswith(("{", "```")) else None
    text = tree.get("text") if isinstance(tree, dict) and len(tree) == 1 else None
    return text.strip() if isinstance(text, str) else reply.strip()


def _bullets(reply: str) -> tuple[str, ...]:
    """Return the items of a list; none of a text that is no list, which must not become a row as a single point."""
    tree = load_json(reply)
    items = next(iter(tree.values()), None) if isinstance(tree, dict) else tree
    if not isinstance(items, list):
        items = _python_list(reply)
    if items and all(isinstance(item, str) for item in items):
        return tuple(plain(item) for item in items if item.strip())
    numbered = tuple(match.strip() for match in _NUMBERED.findall(reply))
    return bullet_lines(reply) or (numbered if len(numbered) > 1 else ())


def _is_blank_list(reply: str) -> bool:
    """Whether a reply is a list without a point, rather than a text that is one."""
    tree = load_json(reply) if reply.lstrip().startswith(("{", "[", "```")) else None
    items = next(iter(tree.values()), None) if isinstance(tree, dict) else tree
    return isinstance(items, list) and all(isinstance(item, str) and not item.strip() for item in items)


def _notes(reply: str) -> Notes | None:
    summary, points, limitation, question = sections(reply).values()
    notes = Notes(plain(summary), tuple(map(plain, bullet_lines(points))), plain(limitation), plain(question))
    return notes if all(notes.lines) and points else None


def _python_list(reply: str) -> list[Any] | None:
    match = _PYTHON_LIST.search(reply) if len(reply) < _MOST_CHARS else None
    if match is None:
        return None
    try:
        found = ast.literal_eval(match[0])
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    return found if isinstance(found, list) else None


def _python_tuples(reply: str, size: int) -> list[tuple[str, ...]]:
    """Return the rows of a Python list of tuples of `size` strings, none of them blank."""
    rows = _python_list(reply) or []
    whole = [row for row in rows if isinstance(row, tuple | list) and len(row) == size]
    return [tuple(map(plain, row)) for row in whole if all(isinstance(part, str) and part.strip() for part in row)]


def render(task: str, value: Value, style: str) -> str:
    """Write a value as an answer in one of the task's styles; in JSON where that style could not be read back."""
    if isinstance(value, str):
        return value
    written = _render(value, style) if style in ("markdown", "python", "sections") else None
    if written is not None and _parse(ANSWERS[task], written, 20) == value:
        return written
    return json.dumps(to_answer(ANSWERS[task], value).model_dump(), ensure_ascii=False)


def _render(value: Value, style: str) -> str | None:
    if isinstance(value, RetrievalResult):
        number = "None" if value.index is None else value.index + 1
        return f"**Passage:** {number}\n**Why:** {value.reasoning}"
    if isinstance(value, Notes):
        return value.render()
    assert isinstance(value, tuple)
    if style == "python":
        return repr([item if isinstance(item, str) else tuple(asdict(item).values()) for item in value])
    return ("\n\n" if isinstance(value[0], QAPair) else "\n").join(map(_markdown, value))


def _markdown(item: str | QAPair | Triplet) -> str:
    if isinstance(item, QAPair):
        return f"**Question:** {item.question}\n**Answer:** {item.answer}"
    if isinstance(item, Triplet):
        return f"- ({item.subject}, {item.relation}, {item.object})"
    return f"- {item}"
