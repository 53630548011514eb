"""Documents from files and folders: text, Markdown, HTML, LaTeX, PDF, or rows with a `text`, each with a name of its own.

What cannot be used is left out with a reason, so that one broken file of a thousand does not stop the others.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
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
_LATEX = re.compile(
    r"""
      \\(?:url|path|nolinkurl|href\s*(?:\[[^\]\n]*\])?)\s*\{(?P<address>[^{}\n]*(?:\{[^{}\n]*\}[^{}\n]*)*)\}
    | \\begin\{(?P<code>verbatim\*?|Verbatim|lstlisting|minted|comment)\}[\s\S]*?(?:\\end\{(?P=code)\}|\Z)
    | \\verb\*?(?P<mark>[^\sA-Za-z*])[^\n]*?(?P=mark)
    | \\(?:input|include|subfile)\s*\{(?P<input>[^}]+)\}
    | \\[\s\S]  # an escaped sign, so that the one behind it is read for itself
    | (?P<comment>%[^\n]*(?:\n(?![ \t\r]*(?:\n|\Z))[ \t]*)?)  # with the line's end, unless a paragraph ends there
    """,
    re.VERBOSE,
)
"""What decides in LaTeX whether a % begins a comment, and whether a file is taken in."""
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


@dataclass(frozen=True, slots=True)
class _Source:
    """A file that was named or found."""

    path: Path
    name: str
    """What its documents are called: unique, and without the folders above what was named."""
    top: Path
    """The folder that was named, or that the named file lies in."""


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
    files = find_files(names)
    parts = _included([file for file in files if suffix_of(file.path) == ".tex"])
    seen: dict[str, str] = {}
    for file in files:
        if file.path.resolve() in parts:
            continue
        if _are_chunks(file.path):
            left_out.note(CHUNKS, file.name)
            continue
        for document in _read(file, left_out):
            if not document.text:
                left_out.note(NO_TEXT, document.id, "scanned?" if file.path.suffix.lower() == ".pdf" else "")
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


def find_files(names: Sequence[str]) -> list[_Source]:
    """Return the files that are read, each once.

    Raises:
        DataError: a name that is no file or folder, a folder without documents, or a kind of file that is not known.
    """
    problems: list[str] = []
    found: dict[Path, _Source] = {}
    for name in names:
        root = Path(name).expanduser()
        if root.is_dir():
            inside = [path for path in sorted(root.rglob("*")) if path.is_file() and suffix_of(path) in SUFFIXES]
            visible = [path for path in inside if not any(p.startswith(".") for p in path.relative_to(root).parts)]
            if not visible:
                problems.append(f"{name}: no document in this folder (looked for {', '.join(SUFFIXES)})")
            for path in visible:
                found.setdefault(path, _Source(path, path.relative_to(root).as_posix(), root))
        elif not root.is_file():
            problems.append(f"{name}: no such file or folder")
        elif suffix_of(root) not in SUFFIXES:
            problems.append(f"{name}: unknown kind of document. Known: {', '.join(SUFFIXES)}")
        else:
            found.setdefault(root, _Source(root, root.name, root.parent))
    if problems:
        raise DataError("documents", problems)
    taken = Counter(file.name for file in found.values())
    return [file if taken[file.name] == 1 else replace(file, name=file.path.as_posix()) for file in found.values()]


def _read(file: _Source, left_out: LeftOut) -> Iterator[Document]:
    path, name, suffix = file.path, file.name, suffix_of(file.path)
    if suffix in ROWS:
        yield from _read_rows(path, name, left_out)
        return
    try:
        data = path.read_bytes()
        if suffix == ".pdf":
            text = pdf_text(data)
        else:
            source = decode(data, html=TO_TEXT[suffix] is html_text)
            text = TO_TEXT[suffix](_with_inputs(source, file, (path.resolve(),)) if suffix == ".tex" else source)
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


def _included(files: Sequence[_Source]) -> set[Path]:
    """Return the LaTeX files that another of `files` takes in, directly or not; of two that do so mutually, the later."""
    found: set[Path] = set()
    for file in files:
        own = file.path.resolve()
        if own not in found:
            found |= _inputs(file) - {own}
    return found


def _inputs(file: _Source) -> set[Path]:
    """Return what `_with_inputs` may put into a file, itself included."""
    seen, level = {file.path.resolve()}, [file.path]
    for _ in range(_DEEPEST_INPUT):
        found = dict.fromkeys(target for path in level for target in _targets(path, file))
        level = [target for target in found if target not in seen]
        seen.update(level)
    return seen


def _targets(path: Path, file: _Source) -> list[Path]:
    try:
        source = path.read_text(encoding="utf-8", errors="replace")
    except OSError:  # said where its text is read
        return []
    names = [match["input"].strip() for match in _LATEX.finditer(source) if match["input"]]
    found = [_input_path(name, file, path.parent) for name in names]
    return [target for target in found if target is not None]


def _with_inputs(source: str, file: _Source, chain: tuple[Path, ...]) -> str:
    """Put the text of included files in their place; one that is missing, or takes itself in, is left out.

    Comments and listings go too, and the % of addresses, none of which is shown: pylatexenc would take it for a comment.

    Args:
        chain: the files that led here, the one whose text this is last.
    """

    def insert(match: re.Match[str]) -> str:
        if match["address"]:
            return match[0].replace("%", "")
        if match["code"] or match["comment"]:
            return ""
        if not match["input"]:
            return match[0]
        target = _input_path(match["input"].strip(), file, chain[-1].parent)
        if target is None or target in chain or len(chain) > _DEEPEST_INPUT:
            return ""
        return _with_inputs(decode(target.read_bytes()), file, (*chain, target))

    return _LATEX.sub(insert, source)


def _input_path(name: str, file: _Source, folder: Path) -> Path | None:
    """Look a file up as LaTeX does: from the main file's folder, with .tex added; then from the including file's.

    What lies outside the folder that was named is not found: a stranger's document must not take in any file there is.
    """
    top = file.top.resolve()
    for place in (file.path.parent, folder):
        for candidate in (place / name, place / f"{name}.tex"):
            try:
                target = candidate.resolve()
                if target.is_relative_to(top) and target.is_file():
                    return target
            except (OSError, RuntimeError):  # a name that no file can have, or links in a circle
                continue
    return None
