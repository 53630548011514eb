"""Documents from files and folders: text, Markdown, HTML, LaTeX, PDF, or rows with a `text`, each with a name of its own.

What cannot be used is left out with a reason, so that one broken file of a thousand does not stop the others.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from smolmlx.data.clean import text_hash
from smolmlx.data.formats import read_rows
from smolmlx.data.splits import SPLITS
from smolmlx.errors import DataError
from smolmlx.synth.markup import TO_TEXT, html_text, pdf_text, suffix_of

MADE_BY = "smolmlx data chunk"
ROWS = (".jsonl", ".jsonl.gz")
SUFFIXES = (*TO_TEXT, ".pdf", *ROWS)

NO_TEXT = "no text"
DUPLICATE = "same text as another document"
UNREADABLE = "cannot be read"
CHUNKS = f"chunks, made by `{MADE_BY}`"
_INPUT = re.compile(r"(?<!\\)\\(?:input|include|subfile)\s*\{([^}]+)\}")
_COMMENT = re.compile(r"(?<!\\)%.*")
_CHARSET = re.compile(rb"<meta[^>]+charset=[\"']?([\w-]+)", re.IGNORECASE)
_DEEPEST_INPUT = 20


@dataclass(frozen=True, slots=True)
class Document:
    """A document's running text; `id` is its path below what was named, with the row behind `#` for rows."""

    id: str
    path: Path
    text: str
    digest: str
    """Hash of its words, lower-cased: two documents with one digest say the same."""


@dataclass(slots=True)
class LeftOut:
    """Documents that are not used: where, and why."""

    entries: list[tuple[str, str, str]] = field(default_factory=list)
    """(reason, place, detail)"""

    def note(self, reason: str, where: str, detail: str = "") -> None:
        self.entries.append((reason, where, detail))


def read_documents(names: Sequence[str], left_out: LeftOut) -> Iterator[Document]:
    """Yield the documents of files and folders in the order of their paths, each text once.

    A LaTeX file that another one includes is part of that document. Files that `data chunk` wrote are left out: chunks
    of documents that may be read here too would come into other splits than theirs. Keeps a hash per document.

    Raises:
        DataError: a name that is no file or folder, a kind of file that is not known, or a missing library.
    """
    files = _find(names)
    parts = _included([path for path, _ in files if suffix_of(path) == ".tex"])
    seen: dict[str, str] = {}
    for path, name in files:
        if path.resolve() in parts:
            continue
        if _are_chunks(path):
            left_out.note(CHUNKS, name)
            continue
        for document in _read(path, name, left_out):
            if not document.text:
                left_out.note(NO_TEXT, document.id, "scanned?" if path.suffix.lower() == ".pdf" else "")
            elif (first := seen.setdefault(document.digest, document.id)) != document.id:
                left_out.note(DUPLICATE, document.id, first)
            else:
                yield document


def _are_chunks(path: Path) -> bool:
    return path.name in {f"{split}.jsonl" for split in SPLITS} and read_made_by(path.parent) == MADE_BY


def read_made_by(folder: Path) -> str | None:
    """Return which command wrote a folder's manifest; None without one."""
    try:
        tree = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return str(tree.get("made_by")) if isinstance(tree, dict) else None


def _find(names: Sequence[str]) -> list[tuple[Path, str]]:
    """Return every file with the name its documents get: unique, and without the folders above what was named."""
    problems: list[str] = []
    found: dict[Path, str] = {}
    for name in names:
        root = Path(name).expanduser()
        if root.is_dir():
            inside = [path for path in sorted(root.rglob("*")) if path.is_file() and suffix_of(path) in SUFFIXES]
            visible = [path for path in inside if not any(p.startswith(".") for p in path.relative_to(root).parts)]
            if not visible:
                problems.append(f"{name}: no document in this folder (looked for {', '.join(SUFFIXES)})")
            for path in visible:
                found.setdefault(path, path.relative_to(root).as_posix())
        elif not root.is_file():
            problems.append(f"{name}: no such file or folder")
        elif suffix_of(root) not in SUFFIXES:
            problems.append(f"{name}: unknown kind of document. Known: {', '.join(SUFFIXES)}")
        else:
            found.setdefault(root, root.name)
    if problems:
        raise DataError("documents", problems)
    taken = Counter(found.values())
    return [(path, name if taken[name] == 1 else path.as_posix()) for path, name in found.items()]


def _read(path: Path, name: str, left_out: LeftOut) -> Iterator[Document]:
    suffix = suffix_of(path)
    if suffix in ROWS:
        yield from _read_rows(path, name, left_out)
        return
    try:
        data = path.read_bytes()
        if suffix == ".pdf":
            text = pdf_text(data)
        else:
            source = decode(data, html=TO_TEXT[suffix] is html_text)
            text = TO_TEXT[suffix](_with_inputs(source, path.parent, path.parent, 0) if suffix == ".tex" else source)
    except OSError as error:
        left_out.note(UNREADABLE, name, str(error.strerror or error))
    except DataError as error:
        if "pip install" in str(error):
            raise
        left_out.note(UNREADABLE, name, str(error))
    else:
        yield _document(name, path, text)


def _document(name: str, path: Path, text: str) -> Document:
    return Document(name, path, text, text_hash(text).hex())


def _read_rows(path: Path, name: str, left_out: LeftOut) -> Iterator[Document]:
    """Yield the `text` of each row; `id`, where rows have it, takes the place of the line number."""
    problems: list[str] = []
    used: set[str] = set()
    for where, row in read_rows([path], problems):
        text = row.get("text")
        number = where.rpartition(":")[2]
        if not isinstance(text, str):
            left_out.note(UNREADABLE, f"{name}#{number}", f"no text in field 'text' (has: {', '.join(map(str, row))})")
            continue
        own = str(row.get("id") or number)
        own = own if own not in used else f"{own}@{number}"
        used.add(own)
        yield _document(f"{name}#{own}", path, TO_TEXT[".txt"](text))
    for problem in problems:
        left_out.note(UNREADABLE, name, problem)


def decode(data: bytes, html: bool = False) -> str:
    """Decode text: UTF-8, UTF-16 with its mark, or the character set that an HTML page declares.

    Raises:
        DataError: none of those.
    """
    declared = _CHARSET.search(data[:4096]) if html else None
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        encoding = "utf-16"
    else:
        encoding = declared[1].decode("ascii") if declared else "utf-8-sig"
    try:
        return data.decode(encoding)
    except (UnicodeDecodeError, LookupError) as error:
        raise DataError(f"not in {encoding} ({error}); convert it with iconv -t UTF-8") from error


def _included(files: Sequence[Path]) -> set[Path]:
    """Return the LaTeX files that another of `files` takes in, directly or not."""
    found: set[Path] = set()
    for path in files:
        found |= _inputs(path, path.parent, {path.resolve()}) - {path.resolve()}
    return found


def _inputs(path: Path, root: Path, seen: set[Path]) -> set[Path]:
    source = _COMMENT.sub("", path.read_text(encoding="utf-8", errors="replace"))
    targets = [_input_path(match[1], root, path.parent) for match in _INPUT.finditer(source)]
    for target in targets:
        if target is not None and target.resolve() not in seen:
            seen.add(target.resolve())
            _inputs(target, root, seen)
    return seen


def _with_inputs(source: str, root: Path, folder: Path, depth: int) -> str:
    """Put the text of included files in their place; one that is missing is left out."""

    def insert(match: re.Match[str]) -> str:
        target = _input_path(match[1], root, folder)
        if target is None or depth >= _DEEPEST_INPUT:
            return ""
        return _with_inputs(decode(target.read_bytes()), root, target.parent, depth + 1)

    return _INPUT.sub(insert, _COMMENT.sub("", source))


def _input_path(name: str, root: Path, folder: Path) -> Path | None:
    """Look a file up as LaTeX does: from the main file's folder, with .tex added; then from the including file's."""
    for place in (root, folder):
        for candidate in (place / name.strip(), place / f"{name.strip()}.tex"):
            if candidate.is_file():
                return candidate
    return None
