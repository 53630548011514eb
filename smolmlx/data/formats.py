"""Files of rows: find out what they are, read them one by one, and turn each into messages or text.

Formats are detected from the columns, named, and can be steered with a column mapping; nothing is registered. Every
problem of a file is collected with its line before anything is refused.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import math
import re
import shlex
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from smolmlx.errors import DataError, nearest

Role = Literal["system", "user", "assistant", "tool"]
Raw = Mapping[str, Any]


class MissingFile(DataError):
    """There is no file or folder of this name."""


@dataclass(frozen=True, slots=True)
class Example:
    """One row, in the one shape the data plane works on: messages, plain text, or a preference pair."""

    where: str
    """`file:line`, for messages to the user."""
    messages: tuple[Mapping[str, Any], ...] = ()
    text: str | None = None
    chosen: tuple[Mapping[str, Any], ...] = ()
    rejected: tuple[Mapping[str, Any], ...] = ()

    def characters(self) -> str:
        """All text of the row, for hashes and duplicate counts."""
        if self.text is not None:
            return self.text
        return "\n".join(f"{m['role']}: {m.get('content')}" for m in (*self.messages, *self.chosen, *self.rejected))


def is_empty(turn: Mapping[str, Any]) -> bool:
    """Whether a turn says nothing: `data validate` and training refuse the same ones."""
    return not str(turn.get("content") or "").strip() and not turn.get("tool_calls")


@dataclass(frozen=True, slots=True)
class Format:
    """A named layout of columns."""

    name: str
    columns: tuple[str, ...]
    """Columns that must be there."""
    optional: tuple[str, ...] = ()
    kind: Literal["chat", "text", "preference"] = "chat"


# First match wins: the more specific layouts stand first.
FORMATS = (
    Format("preference", ("prompt", "chosen", "rejected"), kind="preference"),
    Format("preference-implicit", ("chosen", "rejected"), kind="preference"),
    Format("messages", ("messages",)),
    Format("sharegpt", ("conversations",), ("system",)),
    Format("alpaca", ("instruction", "output"), ("input", "system")),
    Format("prompt-completion", ("prompt", "completion"), ("system",)),
    Format("prompt-response", ("prompt", "response"), ("system",)),
    Format("instruction-response", ("instruction", "response"), ("system",)),
    Format("question-answer", ("question", "answer"), ("system",)),
    Format("input-output", ("input", "output"), ("system",)),
    Format("text", ("text",), kind="text"),
)
BY_NAME = {form.name: form for form in FORMATS}
_SHAREGPT_ROLES: Mapping[str, Role] = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "bing": "assistant", "bard": "assistant", "model": "assistant", "system": "system", "tool": "tool", "function": "tool",
}  # fmt: skip
_BROKEN_JSON = (ValueError, RecursionError)  # the second: nested deeper than Python reads
_BROKEN_GZIP = (gzip.BadGzipFile, zlib.error, EOFError)
SPLIT_WORDS: Mapping[str, frozenset[str]] = {
    "train": frozenset({"train", "training"}),
    "validation": frozenset({"validation", "valid", "val", "dev"}),
    "test": frozenset({"test", "testing", "eval", "evaluation"}),
}
"""Split -> words for it in the paths of a folder's files; those that the hub's `datasets` knows."""
_BETWEEN_WORDS = re.compile(r"[^a-z]+")
_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet", ".csv", ".txt", ".md")


@dataclass(frozen=True, slots=True)
class Source:
    """Files that hold the same kind of rows, their format, and how columns are renamed."""

    files: tuple[Path, ...]
    form: Format
    columns: Mapping[str, str]
    system: str | None = None
    skipped: tuple[Path, ...] = ()
    """Data files of the folders named that are not of the split asked for, by their names."""

    def idle_columns(self) -> list[str]:
        """Return what is wrong with each part of `columns` that would do nothing: no such field, or in no row."""
        own = (*self.form.columns, *self.form.optional)
        fields = own if self.form.kind == "text" or "system" in own else (*own, "system")
        known = f"Known: {', '.join(fields)}."
        problems = [
            f"{field}: format '{self.form.name}' has no such field.{nearest(field, fields)} {known}"
            for field in self.columns
            if field not in fields
        ]
        absent = set(self.columns.values())
        for _, raw in read_rows(self.files, []):
            absent -= set(raw)
            if not absent:
                break
        return problems + [f"'{column}': no row of {self.files[0]} has this column." for column in sorted(absent)]

    def passage(self, raw: Raw) -> str:
        """Return the `input` of an alpaca row, which its instruction is about; empty where it has none."""
        column = self.columns.get("input", "input")
        value = raw.get(column if column in raw else "input") if self.form.name == "alpaca" else None
        return value if isinstance(value, str) and value.strip() else ""

    def content_hash(self) -> str:
        """Hash of all bytes of all files and of how they are read."""
        digest = hashlib.sha256(repr((self.form.name, sorted(self.columns.items()), self.system)).encode())
        for path in self.files:
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
        return digest.hexdigest()[:16]

    def __iter__(self) -> Iterator[Example]:
        """Yield every row.

        Raises:
            DataError: with every bad row named, once the whole source has been read.
        """
        problems: list[str] = []
        count = 0
        for where, raw in read_rows(self.files, problems):
            count += 1
            try:
                yield _whole(to_example(raw, self.form, where, self.columns, self.system))
            except DataError as error:
                problems.append(str(error))
        if problems:
            raise DataError(", ".join(str(path) for path in self.files), problems)
        if not count:
            raise DataError(f"{self.files[0]}: no rows. Check the path.")


def open_source(
    paths: str | Sequence[str],
    *,
    form: str = "auto",
    columns: Mapping[str, str] | None = None,
    system: str | None = None,
    split: str = "train",
    folders: Sequence[Path] = (),
) -> Source:
    """Find the files behind a recipe's `data.train` and detect their format.

    Args:
        split: which files of a dataset folder or hub id to take.
        folders: where relative paths are tried, in order.

    Raises:
        DataError: missing file, unknown suffix or schema (with the columns seen), or an unknown format name.
    """
    columns = dict(columns or {})
    files, skipped = find_files(paths, split, folders)
    if form != "auto":
        if form not in BY_NAME:
            raise DataError(
                f"data.format: unknown format '{form}'.{nearest(form, BY_NAME)} Known: {', '.join(BY_NAME)}."
            )
        return Source(files, BY_NAME[form], columns, system, skipped)
    problems: list[str] = []
    first = next(read_rows(files, problems), None)
    if first is None:
        if problems:
            raise DataError(str(files[0]), problems)
        raise DataError(f"{files[0]}: no rows. Check the path.")
    source = Source(files, detect(first[1], columns, str(files[0])), columns, system, skipped)
    _check_prompts(source)
    return source


def _check_prompts(source: Source) -> None:
    """Say once, rather than for each row, that no row has a prompt column.

    Raises:
        DataError: every row has two texts to compare, and nothing that was asked.
    """
    if source.form.name != "preference-implicit":
        return
    seen: dict[str, None] = {}
    count = 0
    for _, raw in read_rows(source.files, []):
        count += 1
        sides = [raw.get(source.columns.get(name, name)) for name in ("chosen", "rejected")]
        if not all(isinstance(side, str) and not side.lstrip().startswith("[") for side in sides):
            return
        seen |= dict.fromkeys(map(str, raw))
    used = {"system", *(source.columns.get(name, name) for name in ("chosen", "rejected"))}
    column = next((name for name in seen if name not in used), "your_column")
    raise DataError(
        f"{source.files[0]}: no prompt column in {count:,} row{'s' if count > 1 else ''} (columns {', '.join(seen)}), and chosen and rejected are answers alone. "
        f"Name the prompt's column, e.g. data.columns: {{prompt: {column}}} in a recipe, --column prompt={column} in `smolmlx data`."
    )


def find_files(
    paths: str | Sequence[str], split: str, folders: Sequence[Path] = ()
) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    """Return the files behind names of files, folders and hub ids, and those of the folders left out; see `open_source`."""
    names = [paths] if isinstance(paths, str) else list(paths)
    if not names:
        raise DataError("data.train: an empty list. Name a file, a folder or a hub id.")
    found = [_expand(name, split, folders) for name in names]
    return tuple(path for chosen, _ in found for path in chosen), tuple(path for _, left in found for path in left)


def detect(raw: Raw, columns: Mapping[str, str], where: str) -> Format:
    """Name the format of a row by its columns.

    Raises:
        DataError: no known format has these columns.
    """
    seen = set(raw) | {field for field, column in columns.items() if column in raw}
    for form in FORMATS:
        if set(form.columns) <= seen:
            return form
    _refuse_near(raw, where)
    known = "; ".join(f"{form.name} ({', '.join(form.columns)})" for form in FORMATS)
    raise DataError(
        f"{where}: unknown schema: columns {', '.join(sorted(map(str, raw))) or '(none)'}. Known: {known}. "
        "Rename columns, or map them in the recipe, e.g. data.columns: {prompt: your_column, completion: your_other_column}."
    )


def _refuse_near(raw: Raw, where: str) -> None:
    """Refuse columns of which it is clear what they should have been: parted by another mark, or in other letters."""
    names = [str(key) for key in raw]
    mark = next((mark for mark in (";", "\t", "|") if mark in names[0]), None) if len(names) == 1 else None
    if mark and where.lower().endswith(".csv"):
        raise DataError(f"{where}: looks separated by {mark!r}; this reads commas. Save it with commas, or as .jsonl.")
    lower = {name.strip().lower(): name for name in names}
    for form in FORMATS:
        if set(form.columns) <= set(lower):
            wrong = {field: lower[field] for field in form.columns if lower[field] != field}
            asked = " ".join(f"{name}: did you mean {field}?" for field, name in wrong.items())
            options = " ".join(f"--column {shlex.quote(f'{field}={name}')}" for field, name in wrong.items())
            mapping = ", ".join(f"{field}: {name}" for field, name in wrong.items())
            raise DataError(
                f"{where}: {asked} Rename them, or map them: {options}, in a recipe data.columns: {{{mapping}}}."
            )


def _expand(name: str, split: str, folders: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    path = locate(name, folders)
    if path is None:
        looks_like_id = name.count("/") == 1 and not name.endswith(_SUFFIXES) and not name.startswith((".", "/", "~"))
        if not looks_like_id:
            then = ", then from the recipe's" if folders else ""
            raise MissingFile(f"{name}: no such file or folder. Paths are looked up from the working folder{then}.")
        path = _download(name)
    if path.is_dir():
        return _files_of(path, split)
    if not path.name.lower().endswith(_SUFFIXES):
        raise DataError(f"{path}: unknown kind of file. Known: {', '.join(_SUFFIXES)}, or a folder of those.")
    return [path], []


def locate(name: str, folders: Sequence[Path]) -> Path | None:
    """Return the file or folder of a name: from the working folder, then from each of `folders`; None where it is in none."""
    plain = Path(name).expanduser()
    for candidate in (plain, *(folder / plain for folder in folders)):
        if candidate.exists():
            return candidate
    return None


def _files_of(folder: Path, split: str) -> tuple[list[Path], list[Path]]:
    """Return the data files of a folder that belong to a split, and the others, by words in their paths as the hub has it."""
    found = [
        path
        for path in sorted(folder.rglob("*"))
        if path.name.lower().endswith(_SUFFIXES[:6]) and not _is_metadata(path)
    ]
    words = {path: set(_BETWEEN_WORDS.split(path.relative_to(folder).as_posix().lower())) for path in found}
    chosen = [path for path in found if words[path] & SPLIT_WORDS[split]]
    if not chosen and split == "train":
        chosen = [path for path in found if not any(words[path] & known for known in SPLIT_WORDS.values())]
    if not chosen:
        raise DataError(f"{folder}: no data files for split '{split}' here (looked for {', '.join(_SUFFIXES[:6])}).")
    return chosen, [path for path in found if path not in chosen]


def _is_metadata(path: Path) -> bool:
    return path.name in {
        "dataset_infos.json",
        "dataset_info.json",
        "state.json",
        "manifest.json",
    } or path.name.startswith(".")


def _download(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import (
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
        )
    except ImportError as error:
        raise DataError(
            f"{name}: not a local path, and huggingface_hub is not installed. pip install 'smolmlx[mlx]' or [cuda]."
        ) from error
    patterns = [f"*{suffix}" for suffix in _SUFFIXES[:6]]
    try:
        return Path(snapshot_download(name, repo_type="dataset", allow_patterns=patterns))
    except RepositoryNotFoundError as error:
        raise DataError(
            f"{name}: no such file, and no such dataset on the hub (or it is gated: `hf auth login`)."
        ) from error
    except HFValidationError as error:
        raise DataError(
            f"{name}: no such file, and not a hub id either (owner/name: letters, digits, '-', '_' and '.')."
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise DataError(f"{name}: no such file, not in the hub cache, and the hub cannot be reached.") from error


def read_rows(files: Iterable[Path], problems: list[str]) -> Iterator[tuple[str, Raw]]:
    """Yield (`file:line`, row) of each file in turn; what cannot be read is added to `problems`."""
    for path in files:
        if not path.is_file():
            problems.append(f"{path}: no such file")
            continue
        name = path.name.lower()
        if name.endswith((".jsonl", ".jsonl.gz")):
            yield from _read_jsonl(path, problems)
        elif name.endswith((".json", ".json.gz")):
            yield from _read_json(path, problems)
        elif name.endswith(".csv"):
            yield from _read_csv(path, problems)
        elif name.endswith(".parquet"):
            yield from _read_parquet(path, problems)
        else:
            yield from _read_document(path, problems)


def _read_document(path: Path, problems: list[str]) -> Iterator[tuple[str, Raw]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        problems.append(f"{path}: cannot be read as UTF-8 text: {error}")
        return
    yield f"{path}:1", {"text": text}


def _open(path: Path) -> IO[bytes] | gzip.GzipFile:
    return gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb")


def _read_jsonl(path: Path, problems: list[str]) -> Iterator[tuple[str, Raw]]:
    try:
        with _open(path) as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip())
                except UnicodeDecodeError as error:
                    problems.append(f"{path}:{number}: cannot be read as UTF-8 text: {error}")
                    continue
                except _BROKEN_JSON as error:
                    problems.append(f"{path}:{number}: not valid JSON: {_what_is_wrong(error)}")
                    continue
                if isinstance(row, dict):
                    yield f"{path}:{number}", row
                else:
                    problems.append(f"{path}:{number}: expected an object, got {type(row).__name__}")
    except _BROKEN_GZIP as error:
        problems.append(f"{path}: cannot be unpacked: {error}")


def _what_is_wrong(error: Exception) -> str:
    """Say what one line of JSON lacks, without the line number that the library gives: it counts within that line."""
    return f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)


def _read_json(path: Path, problems: list[str]) -> Iterator[tuple[str, Raw]]:
    try:
        with _open(path) as file:
            tree = json.loads(file.read().decode("utf-8-sig"))
    except (*_BROKEN_JSON, *_BROKEN_GZIP) as error:
        problems.append(f"{path}: not valid JSON: {error}. (One object per line? Then name it .jsonl.)")
        return
    if isinstance(tree, dict):  # {"data": [...]} and its kind: the one list of objects inside
        lists = [value for value in tree.values() if isinstance(value, list)]
        tree = lists[0] if len(lists) == 1 else None
    if not isinstance(tree, list):
        problems.append(f"{path}: expected a JSON array of objects")
        return
    for number, row in enumerate(tree, 1):
        if isinstance(row, dict):
            yield f"{path}:row {number}", row
        else:
            problems.append(f"{path}:row {number}: expected an object, got {type(row).__name__}")


def _read_csv(path: Path, problems: list[str]) -> Iterator[tuple[str, Raw]]:
    csv.field_size_limit(1 << 28)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for row in (reader := csv.DictReader(file)):
                where = f"{path}:{reader.line_num}"
                if None in row:  # where DictReader puts what is behind the last column
                    problems.append(f"{where}: more fields than the header. Put quotes around text that has commas")
                else:
                    yield where, row
    except (UnicodeDecodeError, csv.Error) as error:
        problems.append(f"{path}: cannot be read as CSV in UTF-8: {error}")


def _read_parquet(path: Path, problems: list[str]) -> Iterator[tuple[str, Raw]]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise DataError(f"{path}: reading parquet needs pyarrow: pip install 'smolmlx[parquet]'.") from error
    number = 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}:row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        problems.append(f"{path}: cannot be read as parquet: {str(error).splitlines()[0]}")


def to_example(raw: Raw, form: Format, where: str, columns: Mapping[str, str], system: str | None) -> Example:
    """Turn one raw row into messages, text or a pair.

    Raises:
        DataError: a missing or wrongly typed field, or a bad role.
    """
    row = {**raw, **{field: raw[column] for field, column in columns.items() if column in raw}}
    missing = [name for name in form.columns if row.get(name) is None]
    if missing:
        raise DataError(
            f"{where}: missing field {', '.join(repr(m) for m in missing)} of format '{form.name}' (has: {', '.join(str(key) for key, value in raw.items() if value is not None)})"
        )
    if form.kind == "text":
        return Example(where, text=_text(row, "text", where))
    if form.kind == "preference":
        return _preference(row, where, system)
    messages = _with_system(_turns(row, form, where), _own_system(row, where) or system)
    return Example(where, messages)


def _whole(example: Example) -> Example:
    """Refuse half of a surrogate pair: JSON can say it, but it is no character, and no tokenizer takes it."""
    try:
        example.characters().encode("utf-8")
    except UnicodeEncodeError as error:
        half = error.object[error.start].encode("ascii", "backslashreplace").decode()
        raise DataError(
            f"{example.where}: holds {half}, half of a character, as text does that was cut inside one. Leave the row out, or make it again"
        ) from error
    return example


def _turns(row: Raw, form: Format, where: str) -> tuple[Mapping[str, Any], ...]:
    if form.name == "messages":
        return _messages(row["messages"], where)
    if form.name == "sharegpt":
        return _sharegpt(row["conversations"], where)
    ask, answer = form.columns
    if isinstance(row[ask], list):  # conversational prompt/completion
        return (*_messages(row[ask], where), *_messages(row[answer], where))
    question = _text(row, ask, where)
    if form.name == "alpaca" and row.get("input"):
        question = f"{question}\n\n{_text(row, 'input', where)}"
    return ({"role": "user", "content": question}, {"role": "assistant", "content": _text(row, answer, where)})


def _own_system(row: Raw, where: str) -> str | None:
    return _text(row, "system", where) if row.get("system") is not None else None


def _with_system(messages: tuple[Mapping[str, Any], ...], system: Any) -> tuple[Mapping[str, Any], ...]:
    if not system or (messages and messages[0]["role"] == "system"):
        return messages
    return ({"role": "system", "content": str(system)}, *messages)


def _text(row: Raw, field: str, where: str) -> str:
    value = row[field]
    if isinstance(value, float) and not math.isfinite(value):  # how pandas writes what is missing
        raise DataError(f"{where}: field '{field}' should be text, got {value}. Leave the row out, or write its text")
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)  # a CSV-like answer such as 42
    if not isinstance(value, str):
        raise DataError(f"{where}: field '{field}' should be text, got {type(value).__name__}")
    return value


def _messages(value: Any, where: str) -> tuple[Mapping[str, Any], ...]:
    if isinstance(value, str) and value.lstrip().startswith("["):  # a JSON list inside CSV or parquet
        try:
            value = json.loads(value)
        except _BROKEN_JSON as error:
            raise DataError(f"{where}: messages are not valid JSON: {error}") from error
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: messages should be a list of {{role, content}} that is not empty")
    found = []
    for index, message in enumerate(value):
        if not isinstance(message, dict) or "role" not in message:
            raise DataError(f"{where}: message {index + 1} should be an object with role and content")
        if message["role"] not in ("system", "developer", "user", "assistant", "tool"):
            other = _SHAREGPT_ROLES.get(str(message["role"]).lower())
            hint = f". Write '{other}', or ShareGPT's layout: conversations of {{from, value}}" if other else ""
            raise DataError(
                f"{where}: message {index + 1} has unknown role '{message['role']}' (known: system, user, assistant, tool){hint}"
            )
        if not isinstance(message.get("content"), str) and not message.get("tool_calls"):
            raise DataError(f"{where}: message {index + 1} has no text content")
        found.append({key: item for key, item in message.items() if item is not None})
    return tuple(found)


def _sharegpt(value: Any, where: str) -> tuple[Mapping[str, Any], ...]:
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: conversations should be a list of {{from, value}} that is not empty")
    found = []
    for index, turn in enumerate(value):
        if isinstance(turn, dict) and "role" in turn:
            return _messages(value, where)
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise DataError(f"{where}: turn {index + 1} should be an object with from and value")
        role = _SHAREGPT_ROLES.get(str(turn.get("from")).lower())
        if role is None:
            raise DataError(
                f"{where}: turn {index + 1} is from '{turn.get('from')}' (known: {', '.join(_SHAREGPT_ROLES)})"
            )
        found.append({"role": role, "content": turn["value"]})
    return tuple(found)


def _preference(row: Raw, where: str, system: str | None) -> Example:
    """Explicit prompt, or chosen and rejected that share their first messages; a prompt that a side repeats counts once."""
    sides = [_side(row[name], where) for name in ("chosen", "rejected")]
    if row.get("prompt") is not None:
        prompt = _side(row["prompt"], where, role="user")
        chosen, rejected = [side[len(prompt) :] if side[: len(prompt)] == prompt else side for side in sides]
        return Example(where, _with_system(prompt, _own_system(row, where) or system), None, chosen, rejected)
    shared = 0
    while shared < min(map(len, sides)) - 1 and sides[0][shared] == sides[1][shared]:
        shared += 1
    if not shared:
        raise DataError(
            f"{where}: chosen and rejected share no prompt; give a prompt column, or full conversations that begin alike"
        )
    prompt = _with_system(sides[0][:shared], _own_system(row, where) or system)
    return Example(where, prompt, None, sides[0][shared:], sides[1][shared:])


def _side(value: Any, where: str, role: Role = "assistant") -> tuple[Mapping[str, Any], ...]:
    if isinstance(value, str):
        return ({"role": role, "content": value},)
    return _messages(value, where)
