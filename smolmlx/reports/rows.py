"""The per-row viewer's data: each answer cut into pieces, with what is wrong with it marked."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from smolmlx.evals.headlines import FORM, SUMMED_UP, Metric
from smolmlx.evals.notes import BOILERPLATE
from smolmlx.evals.text import content_spans, content_tokens
from smolmlx.reports.boards import Board, Entrant
from smolmlx.reports.folders import AnswerRow, Tree

FORMULAIC = "formulaic phrase"
MANY_UNSUPPORTED = "over a third of its terms unsupported"
EMPTY = "empty answer"
WRONG = {
    "valid": "does not keep to its schema",
    "ended": "empty, or cut off at its last token",
    "index_accuracy": "another passage than the one that answers",
}
"""Metric of the research suite -> what it means where it is 0."""
_UNSUPPORTED_SHARE = 1 / 3

Piece = tuple[str, str]
"""Text and its mark: '' for none, 'u' for a term without support, 'b' for boilerplate."""


def view_rows(board: Board, limit: int) -> list[dict[str, Any]]:
    """Return the first `limit` rows, ready for JSON: what was asked and wanted, and each system's answer with its flaws."""
    return [
        {
            "id": row.id,
            "input": row.input,
            "reference": row.reference,
            "answers": [_answer(row, entrant, i, board.metrics) for entrant in board.entrants],
        }
        for i, row in enumerate(board.rows[:limit])
    ]


def _answer(row: AnswerRow, entrant: Entrant, index: int, metrics: Sequence[Metric]) -> dict[str, Any]:
    text = entrant.answers[index]
    score = entrant.scores[index] if index < len(entrant.scores) else {}
    known = {*content_tokens(row.input), *content_tokens(row.reference)}
    return {
        "pieces": mark_text(text, known),
        "flaws": flaws(text, score),
        **_rank(score, metrics),
    }


def _rank(score: Tree, metrics: Sequence[Metric]) -> dict[str, Any]:
    """Return the figure that answers are sorted by, and how it reads: content, not form, of those that the row has."""
    for metric in metrics:
        value = _number(score.get(metric.key))
        if metric.key in SUMMED_UP and metric.key not in FORM and value is not None:
            return {"score": value, "shown": f"{metric.label.removesuffix(' alignment')} {value:.2f}"}
    return {"score": None, "shown": ""}


def _number(value: object) -> float | None:
    return round(float(value), 4) if isinstance(value, (int, float)) and math.isfinite(value) else None


def flaws(text: str, score: Tree) -> list[str]:
    """Name what is wrong with an answer: every strict problem of its score, boilerplate, too little support,
    a broken schema, a wrong passage."""
    if not text.strip():
        return [EMPTY]
    found = list(score.get("problems", ()))
    if score.get("formulaic"):
        found.append(FORMULAIC)
    if score.get("unsupported", 0.0) > _UNSUPPORTED_SHARE:
        found.append(MANY_UNSUPPORTED)
    found += [flaw for metric, flaw in WRONG.items() if score.get(metric) == 0]
    return found


def count_flaws(rows: Sequence[dict[str, Any]]) -> Counter[str]:
    """Count the kinds of flaws, numbers and quotations left out, so that they can be chosen from a list."""
    return Counter(
        kind for row in rows for answer in row["answers"] for kind in {flaw_kind(flaw) for flaw in answer["flaws"]}
    )


def flaw_kind(flaw: str) -> str:
    """Return a flaw without what differs from answer to answer."""
    flaw = re.sub(r", not '.*'$|, not \".*\"$", "", flaw, flags=re.DOTALL)
    flaw = re.sub(r": \d+ bullets, ", ": other than ", flaw)
    flaw = re.sub(r": \d+ headers$", ": header repeated", flaw)
    return re.sub(r"^(headers out of order).*", r"\1", flaw)


def mark_text(text: str, known: set[str]) -> list[Piece]:
    """Cut a text into pieces; together they are the text. Boilerplate wins over unsupported terms."""
    marks = [""] * len(text)
    for start, end in content_spans(text):
        if text[start:end].lower() not in known:
            marks[start:end] = "u" * (end - start)
    for phrase in BOILERPLATE:
        for match in re.finditer(re.escape(phrase), text, re.IGNORECASE):
            marks[match.start() : match.end()] = "b" * (match.end() - match.start())
    pieces: list[Piece] = []
    start = 0
    for end in range(1, len(text) + 1):
        if end == len(text) or marks[end] != marks[start]:
            pieces.append((text[start:end], marks[start]))
            start = end
    return pieces
