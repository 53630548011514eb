"""Rows that would teach the wrong thing, each dropped for one named reason, and the rest written in one layout.

The filters are conservative: a row is dropped for what it certainly is, so words such as "null" or "n/a", short
answers and unpunctuated chat survive.
"""

from __future__ import annotations

import contextlib
import datetime
import decimal
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal

from smolmlx.data.formats import Example, Raw, Source, is_empty, read_rows, to_example
from smolmlx.errors import DataError, RecipeError, RunError

EMPTY_TURN = "empty turn"
BAD_ORDER = "bad role order"
NO_ANSWER = "no assistant turn"
SAME_PAIR = "chosen equals rejected"
TOO_SHORT = "too short"
TOO_LONG = "too long"
REPEATED = "repeated characters"
TRUNCATED = "truncated end"
DUPLICATE = "exact duplicate"
UNREADABLE = "unreadable row"

Layout = Literal["auto", "messages", "text", "preference"]
Turns = Sequence[Mapping[str, Any]]

_FOLLOWS: Mapping[str, tuple[str, ...]] = {
    "": ("system", "developer", "user"),
    "system": ("user",),
    "developer": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}
"""Role -> roles that may come next; '' is the start."""
# Rules, underlines, tables and tables of contents are drawn with these, so a run of them may be four times as long.
_DRAWN = r"\-=_*#~+.|/\\<>─━═·"

_MIN_CUT_CHARS, _MIN_CUT_SENTENCES = 400, 5
_FENCE = re.compile(r"^[ \t]*```", re.MULTILINE)
_SENTENCE_END = re.compile(r"[.!?…][\"'”’)\]*_]*(?=\s)")
_LIST_OR_TABLE = re.compile(r"[-*•+|#>`]|\d+[.)]")
# No English sentence ends in one of these, with or without its full stop.
_UNFINISHED = ("an", "the", "and", "or", "but", "nor", "because", "although", "whereas", "unless", "its", "their", "my")


@dataclass(frozen=True, slots=True)
class Filters:
    """What a row must be like to be kept."""

    min_chars: int = 1
    """Characters of all turns together, without the white space around each."""
    max_chars: int | None = None
    max_run: int = 40
    """Longest run of one character; characters that draw rules and tables may run four times as long."""
    keep_truncated: bool = False
    keep_duplicates: bool = False


@dataclass(slots=True)
class Tally:
    """What became of the rows, in numbers; `rows` is `kept` plus all `reasons`."""

    rows: int = 0
    kept: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)
    """Reason -> where it was met first."""

    def note(self, reason: str, where: str) -> None:
        self.reasons[reason] += 1
        self.first.setdefault(reason, where)


def read_pairs(source: Source, problems: list[str]) -> Iterator[tuple[Raw, Example]]:
    """Yield each row as it stands in its file and as an example; what cannot be read is added to `problems`."""
    try:
        for where, raw in read_rows(source.files, problems):
            try:
                example = to_example(raw, source.form, where, source.columns, source.system)
            except DataError as error:
                problems.append(str(error))
                continue
            yield raw, example
    except OSError as error:
        problems.append(f"{error.filename or source.files[-1]}: cannot be read: {error.strerror or error}")


def text_hash(text: str) -> bytes:
    """Hash a text as sha256 of its lower-cased words with one space between them."""
    return hashlib.sha256(" ".join(text.lower().split()).encode("utf-8", "surrogatepass")).digest()


def row_hash(example: Example) -> bytes:
    """Hash a row by its turns and tool calls; other columns, such as an id, do not count."""
    calls = [m["tool_calls"] for m in (*example.messages, *example.chosen, *example.rejected) if m.get("tool_calls")]
    return text_hash(example.characters() + (json.dumps(calls, sort_keys=True, default=str) if calls else ""))


def find_fault(example: Example, filters: Filters) -> str | None:
    """Return the first reason to drop a row, or None; duplicates are found by `clean_rows`."""
    fault = structure_fault(example)
    if fault is not None:
        return fault
    for side in _sides(example):
        text = example.text if example.text is not None else "\n".join(_content(turn) for turn in side)
        size = len(text.strip()) if example.text is not None else sum(len(_content(turn)) for turn in side)
        if size < filters.min_chars:
            return TOO_SHORT
        if filters.max_chars is not None and size > filters.max_chars:
            return TOO_LONG
        if _has_long_run(text, filters.max_run):
            return REPEATED
    # A document may end anywhere; of a pair, only the chosen answer is trained to be given.
    trained = [turn for turn in example.chosen or example.messages if turn["role"] == "assistant"]
    if not filters.keep_truncated and any(stops_mid_sentence(_content(turn)) for turn in trained):
        return TRUNCATED
    return None


def structure_fault(example: Example) -> str | None:
    """Return what is wrong with the turns of a row: none to learn from, an empty one, or roles out of order."""
    if example.text is not None:
        return None
    for side in _sides(example):
        roles = [str(turn["role"]) for turn in side]
        if any(map(is_empty, side)):
            return EMPTY_TURN
        if any(role not in _FOLLOWS[before] for before, role in zip(["", *roles], roles, strict=False)):
            return BAD_ORDER
        if "assistant" not in roles:
            return NO_ANSWER
    return SAME_PAIR if example.chosen and example.chosen == example.rejected else None


def _sides(example: Example) -> list[Turns]:
    """Both conversations of a preference pair, else the one there is."""
    if example.chosen:
        return [(*example.messages, *example.chosen), (*example.messages, *example.rejected)]
    return [example.messages]


def _content(turn: Mapping[str, Any]) -> str:
    return str(turn.get("content") or "").strip()


def _has_long_run(text: str, longest: int) -> bool:
    """Say whether a visible character stands in a run that is longer than allowed."""
    # Such a run covers two of the places looked at here, and the expression is slow on text without one.
    stride = longest // 2
    if not any(text[i] == text[i + 1] == text[i + stride] for i in range(0, len(text) - stride, stride)):
        return False
    pattern = rf"([^\s{_DRAWN}])\1{{{longest},}}|([{_DRAWN}])\2{{{4 * longest},}}"
    return re.search(pattern, text) is not None


def stops_mid_sentence(answer: str) -> bool:
    """Say whether an answer was certainly cut off, as by a token limit.

    Evidence is a code fence that is not closed, a last line of prose that ends in a comma, an opening bracket or a
    word such as "the"; or a long, punctuated answer whose last paragraph breaks off in lower case. Everything else,
    such as a list, a number, a signature or chat without full stops, is let through.
    """
    text = answer.rstrip()
    if "````" not in text and len(_FENCE.findall(text)) % 2:
        return True
    line = text.rpartition("\n")[2].strip()
    if len(line) < 40 or len(text) < 80 or _FENCE.search(text):
        return False
    if line[-1] in ",([{" or line.rpartition(" ")[2] in _UNFINISHED:
        return True
    ends = list(_SENTENCE_END.finditer(line))
    if not ends or not line[-1].islower() or _LIST_OR_TABLE.match(line) or len(text) < _MIN_CUT_CHARS:
        return False
    words = line[ends[-1].end() :].split()
    return len(words) >= 4 and words[0][0].isupper() and len(_SENTENCE_END.findall(text)) >= _MIN_CUT_SENTENCES


def clean_rows(source: Source, filters: Filters, tally: Tally) -> Iterator[tuple[Raw, Example]]:
    """Yield the rows that are kept, as read and as examples; `tally` is filled as they pass.

    Keeps 32 bytes per row to know duplicates by.

    Raises:
        DataError: a file that cannot be read to its end; a single bad row is only counted.
    """
    problems: list[str] = []
    seen: set[bytes] = set()
    for raw, example in read_pairs(source, problems):
        tally.rows += 1
        reason = find_fault(example, filters)
        if reason is None and not filters.keep_duplicates:
            digest = row_hash(example)
            reason = DUPLICATE if digest in seen else None
            seen.add(digest)
        if reason is None:
            tally.kept += 1
            yield raw, example
        else:
            tally.note(reason, example.where)
    _count_unreadable(source, problems, tally)


@dataclass(slots=True)
class Survey:
    """What cleaning would find in a source, its columns, and one of its rows."""

    tally: Tally
    columns: Counter[str]
    """Column -> number of rows that have it."""
    duplicates: int
    example: Example


def survey(source: Source, row: int = 1, on_rows: Callable[[int], None] | None = None) -> Survey:
    """Read a source and change nothing; `row`, counted from 1, is the one that is kept to be shown.

    Raises:
        DataError: rows that cannot be read, up to 20 of them named.
        RecipeError: no such row.
    """
    problems: list[str] = []
    seen: set[bytes] = set()
    tally, columns, filters = Tally(), Counter[str](), Filters()
    chosen: Example | None = None
    for raw, example in read_pairs(source, problems):
        tally.rows += 1
        columns.update(map(str, raw))
        chosen = example if tally.rows == row else chosen
        digest = row_hash(example)
        if reason := find_fault(example, filters) or (DUPLICATE if digest in seen else None):
            tally.note(reason, example.where)
        seen.add(digest)
        if on_rows is not None and tally.rows % 1024 == 0:
            on_rows(tally.rows)
    name = ", ".join(map(str, source.files))
    if problems:
        raise DataError(name, problems)
    if chosen is None:
        raise RecipeError(f"--row {row}: {name} has {tally.rows} rows; they count from 1.")
    tally.kept = tally.rows - sum(tally.reasons.values())
    return Survey(tally, columns, tally.rows - len(seen), chosen)


def list_problems(source: Source) -> tuple[int, list[str]]:
    """Return how many rows could be read, and everything wrong with any row: unreadable, bad turns, or an id again."""
    problems: list[str] = []
    ids: dict[str, str] = {}
    rows = 0
    for raw, example in read_pairs(source, problems):
        rows += 1
        if fault := structure_fault(example):
            problems.append(f"{example.where}: {fault}")
        if raw.get("id") is not None and (first := ids.setdefault(str(raw["id"]), example.where)) != example.where:
            problems.append(f"{example.where}: duplicate id '{raw['id']}', first used at {first}")
    return rows, problems


def _count_unreadable(source: Source, problems: Sequence[str], tally: Tally) -> None:
    whole = [problem for problem in problems if problem.startswith(tuple(f"{path}: " for path in source.files))]
    if whole:
        raise DataError(", ".join(map(str, source.files)), whole)
    tally.rows += len(problems)
    for problem in problems:
        tally.note(UNREADABLE, problem)


def prepare(
    source: Source, target: Path, filters: Filters, to: Layout = "auto", on_rows: Callable[[int], None] | None = None
) -> Tally:
    """Write the rows worth keeping as JSONL in one layout, with the columns that the layout does not use.

    Args:
        on_rows: called now and then with the number of rows read so far.

    Raises:
        DataError: a file that cannot be read, or no row that is kept; `target` is then left as it was.
        RecipeError: a layout that the rows do not have.
        RunError: `target` cannot be written.
    """
    layout = choose_layout(source, to)
    tally = Tally()
    with replacing(target) as file:
        for raw, example in clean_rows(source, filters, tally):
            if on_rows is not None and tally.kept % 256 == 0:
                on_rows(tally.rows)
            file.write(json_line(lay_out(raw, example, source, layout), example.where))
        if not tally.kept:
            listed = [f"{reason}: {count}, first {tally.first[reason]}" for reason, count in tally.reasons.items()]
            raise DataError(f"{source.files[0]}: no row is left of {tally.rows}", listed)
    return tally


def choose_layout(source: Source, to: Layout) -> Layout:
    """Return the layout rows are written in; `auto` is that of their kind.

    Raises:
        RecipeError: the rows cannot take the layout.
    """
    own: Layout = "messages" if source.form.kind == "chat" else source.form.kind
    possible = ("preference", "messages") if own == "preference" else (own,)
    if to not in ("auto", *possible):
        raise RecipeError(
            f"--to {to}: rows of format '{source.form.name}' can be written as {' or '.join(possible)}, not as {to}."
        )
    return own if to == "auto" else to


def lay_out(raw: Raw, example: Example, source: Source, layout: Layout) -> dict[str, Any]:
    """Return a row in a layout, with the columns that the layout does not use."""
    sides: dict[str, Turns]
    if example.text is not None:
        body: dict[str, Any] = {"text": example.text}
    else:
        if layout == "preference":
            sides = {"prompt": example.messages, "chosen": example.chosen, "rejected": example.rejected}
        else:
            sides = {"messages": (*example.messages, *example.chosen)}
        body = {name: [dict(turn) for turn in turns] for name, turns in sides.items()}
    used = {*source.form.columns, *source.form.optional, *source.columns.values()}
    if example.text is None:
        used |= {"system", "prompt"} if example.chosen else {"system"}
    return {**{name: value for name, value in raw.items() if name not in used}, **body}


def json_line(row: Mapping[str, Any], where: str) -> bytes:
    """Return a row as one line of JSONL.

    Raises:
        DataError: a value that JSON has no form for, such as the bytes of an image in parquet.
    """
    try:
        return json.dumps(row, ensure_ascii=False, default=_plain).encode() + b"\n"
    except UnicodeEncodeError:  # half a surrogate pair, which only an escape can hold
        return json.dumps(row, default=_plain).encode() + b"\n"
    except TypeError as error:
        raise DataError(f"{where}: cannot be written as JSON: {error}") from error


def _plain(value: Any) -> str:
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, decimal.Decimal):
        return str(value)
    raise TypeError(f"a value of type {type(value).__name__}")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Yield a file to write; it takes the place of `path` in one rename when all went well.

    Raises:
        RunError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            yield file
        temporary.replace(path)
    except OSError as error:
        why = error.strerror or error
        raise RunError(f"{path}: cannot write: {why}. Free some space, or choose another place.") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
