"""The notes record and its validator: one place decides what a row of `data/notes` must look like."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

INSTRUCTION = "Turn this passage into notes: Summary, Key Points (three bullets), Limitation, Follow-up Question."
FIELDS = (
    "id",
    "instruction",
    "input",
    "output",
    "source",
    "concept",
    "topic",
    "difficulty",
    "pattern",
    "split",
    "input_sha256",
)
SOURCES = ("gold", "rule", "model")
TOPICS = (
    "optimization",
    "architectures",
    "attention",
    "data",
    "evaluation",
    "generalization",
    "alignment",
    "systems",
)
MORE_TOPICS = (
    "biology", "compilers", "databases", "graphics", "hardware", "language", "logistics", "networks", "numerics", "robotics", "security",
    "signals", "software", "statistics",
)  # fmt: skip
"""Topics from outside machine learning that only the `train` split holds, for the number of its subjects."""
OTHER_TOPIC = "other"
"""The topic of rows from outside machine learning, which only the `ood` split may hold."""
DIFFICULTIES = ("introductory", "intermediate", "advanced")
SPLITS = ("train", "validation", "test")
OOD_SPLIT = "ood"

_CHOICES = {"source": SOURCES, "difficulty": DIFFICULTIES, "split": (*SPLITS, OOD_SPLIT)}


@dataclass(frozen=True, slots=True)
class Notes:
    """One answer in its four sections."""

    summary: str
    key_points: tuple[str, ...]
    limitation: str
    question: str

    @property
    def lines(self) -> tuple[str, ...]:
        return (self.summary, *self.key_points, self.limitation, self.question)

    def render(self) -> str:
        """Lay the answer out: each header alone on its line, the text below it, one `- ` bullet per point."""
        bullets = "\n".join(f"- {point}" for point in self.key_points)
        return (
            f"Summary:\n{self.summary}\nKey Points:\n{bullets}\nLimitation:\n{self.limitation}\n"
            f"Follow-up Question:\n{self.question}"
        )


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with a notes file; prints as `path:line: message`. Line 0 is the file as a whole, and not printed."""

    path: Path
    line: int
    message: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.message}" if self.line else f"{self.path}: {self.message}"


@dataclass(slots=True)
class _Seen:
    """Where each id, input and concept stood first, over all files of one validation."""

    ids: dict[str, str] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)
    splits: dict[str, tuple[str, str]] = field(default_factory=dict)


def input_sha256(text: str) -> str:
    """Hash a passage as sha256 of its stripped, lower-cased text with each whitespace run as one space."""
    return hashlib.sha256(" ".join(text.lower().split()).encode("utf-8")).hexdigest()


def validate_notes(
    paths: Path | str | Iterable[Path | str], is_compliant: Callable[[str], Sequence[str]]
) -> list[Problem]:
    """List everything wrong with notes files, in the order of the files and their lines.

    Ids, inputs and the split of a concept are compared over all the files together. `is_compliant` returns what is
    wrong with one answer, nothing if it is compliant (evaluation owns that rule, and data may not import evaluation).
    """
    seen = _Seen()
    problems: list[Problem] = []
    for path in [Path(paths)] if isinstance(paths, (Path, str)) else [Path(path) for path in paths]:
        problems += _file_problems(path, is_compliant, seen)
    return problems


def _file_problems(path: Path, is_compliant: Callable[[str], Sequence[str]], seen: _Seen) -> list[Problem]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        return [Problem(path, 0, "no such file or folder. Check the path.")]
    except OSError as error:
        return [Problem(path, 0, f"cannot be read: {error.strerror or error}")]
    except UnicodeDecodeError as error:
        return [Problem(path, 0, f"cannot be read as UTF-8 text: {error}")]
    # Not splitlines(): JSON strings may hold U+2028 unescaped, and it would cut the record there.
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not lines:
        return [Problem(path, 0, "holds no rows")]
    return [
        Problem(path, number, message)
        for number, line in lines
        for message in _line_messages(line, f"{path}:{number}", is_compliant, seen)
    ]


def _line_messages(line: str, place: str, is_compliant: Callable[[str], Sequence[str]], seen: _Seen) -> list[str]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        return [f"not JSON: {error}"]
    if not isinstance(row, dict):
        return [f"expected one JSON object, found {type(row).__name__}"]
    present = {name: value for name, value in row.items() if isinstance(value, str) and value.strip()}
    return [
        *_field_messages(row),
        *_value_messages(present),
        *_repeat_messages(present, place, seen),
        *(f"answer not compliant: {reason}" for reason in _answer_reasons(present, is_compliant)),
    ]


def _field_messages(row: Mapping[str, object]) -> list[str]:
    messages = [f"missing field '{name}'" for name in FIELDS if name not in row]
    for name in FIELDS:
        value = row.get(name, "-")
        if not isinstance(value, str):
            messages.append(f"field '{name}' must be text, found {type(value).__name__}")
        elif not value.strip():
            messages.append(f"field '{name}' is empty")
    messages += [f"unknown field '{name}'" for name in row if name not in FIELDS]
    return messages


def _value_messages(row: Mapping[str, str]) -> list[str]:
    only = {OOD_SPLIT: (OTHER_TOPIC,), "train": TOPICS + MORE_TOPICS}
    topics = only.get(row.get("split", ""), TOPICS)
    messages = [
        f"unknown {name} '{row[name]}' (known: {', '.join(known)})"
        for name, known in {**_CHOICES, "topic": topics}.items()
        if name in row and row[name] not in known
    ]
    if row.get("instruction", INSTRUCTION) != INSTRUCTION:
        messages.append("instruction is not the one of the notes task")
    if "input" in row and "input_sha256" in row:
        actual = input_sha256(row["input"])
        if actual != row["input_sha256"]:
            messages.append(f"input_sha256 mismatch: the input hashes to {actual}, the row says {row['input_sha256']}")
    return messages


def _repeat_messages(row: Mapping[str, str], place: str, seen: _Seen) -> list[str]:
    """Compare a row with those before it, and remember it for those after it."""
    messages = []
    if "id" in row and (first := seen.ids.setdefault(row["id"], place)) != place:
        messages.append(f"duplicate id '{row['id']}', first used at {first}")
    if "input" in row and (first := seen.inputs.setdefault(input_sha256(row["input"]), place)) != place:
        messages.append(f"duplicate input, first used at {first}")
    if "concept" in row and "split" in row:
        split, first = seen.splits.setdefault(row["concept"], (row["split"], place))
        if split != row["split"]:
            messages.append(f"concept '{row['concept']}' in two splits: {row['split']} here, {split} at {first}")
    return messages


def _answer_reasons(row: Mapping[str, str], is_compliant: Callable[[str], Sequence[str]]) -> Sequence[str]:
    return is_compliant(row["output"]) if "output" in row else ()
