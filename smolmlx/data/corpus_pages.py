"""Read the documentation of installed packages, without importing them, into clean pages and passages."""

from __future__ import annotations

import ast
import hashlib
import inspect
import os
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

STANDARD_LIBRARY = "python"
DEFAULT_PACKAGES = (
    STANDARD_LIBRARY,
    *("numpy", "torch", "torchgen", "transformers", "peft", "trl", "accelerate", "datasets", "pandas", "pyarrow"),
    *("huggingface_hub", "tokenizers", "safetensors", "sentencepiece", "mlx", "mlx_lm", "pydantic", "pydantic_core"),
    *("click", "typer", "rich", "jinja2", "hypothesis", "pytest", "_pytest", "pluggy", "outlines", "outlines_core"),
    *("sympy", "mpmath", "networkx", "scipy", "sklearn", "matplotlib", "PIL", "pygments", "mypy", "mypyc"),
    *("setuptools", "pip", "packaging", "hatchling", "pathspec", "fsspec", "httpx", "httpx2", "httpcore2", "h11"),
    *("anyio", "attr", "attrs", "cloudpickle", "dill", "multiprocess", "diskcache", "filelock", "genson", "idna"),
    *("jsonschema", "referencing", "markdown_it", "markupsafe", "google", "psutil", "dateutil", "yaml", "regex"),
    *("sortedcontainers", "tomlkit", "tqdm", "xxhash", "ruff", "typing_extensions", "typing_inspection", "numpydoc"),
)
SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "testing", "_vendor", "site-packages", "__pycache__", "lib2to3", "licenses"}
)
SKIPPED_FILES = re.compile(
    r"(?i)licen[cs]e|notice|authors|copying|requirements|top_level|entry_points|sources\.txt|record"
)
FORBIDDEN = ("Key Points:", "Follow-up Question:", "Limitation:")
"""Headers of the notes task, which the base model must not have seen."""

Kind = Literal["prose", "chat"]
BlockKind = Literal["prose", "item", "head"]


@dataclass(frozen=True, slots=True)
class Block:
    """A reflowed paragraph, a list item or a heading."""

    kind: BlockKind
    text: str


@dataclass(frozen=True, slots=True)
class Page:
    """One docstring, comment or shipped document, cleaned; `source` is relative to the package's root."""

    source: str
    name: str
    blocks: tuple[Block, ...]

    @property
    def text(self) -> str:
        parts: list[str] = []
        for previous, block in zip((None, *self.blocks), self.blocks, strict=False):
            tight = previous is not None and (previous.kind == "head" or previous.kind == block.kind == "item")
            parts += ["\n" if tight else "\n\n", "- " + block.text if block.kind == "item" else block.text]
        return "".join(parts[1:])


@dataclass(frozen=True, slots=True)
class Document:
    """One row of the corpus."""

    text: str
    kind: Kind
    source: str


@dataclass(frozen=True, slots=True)
class Collection:
    """What `collect` found: cleaned pages, versions of the packages read, and names not installed."""

    pages: tuple[Page, ...]
    versions: Mapping[str, str]
    missing: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Passage:
    """A run of consecutive well-formed sentences of one page."""

    page: Page
    sentences: tuple[str, ...]

    @property
    def text(self) -> str:
        return " ".join(self.sentences)


def _definitions(tree: ast.Module) -> Iterator[tuple[str, ast.stmt | ast.Module]]:
    """Yield every statement under the dotted name of the class or function that holds it."""
    stack: list[tuple[str, ast.stmt | ast.Module]] = [("", tree)]
    while stack:
        name, node = stack.pop()
        yield name, node
        children: list[tuple[str, ast.stmt | ast.Module]] = []
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                children.append((f"{name}.{child.name}".strip("."), child))
            elif isinstance(child, ast.stmt):
                children.append((name, child))
            elif isinstance(child, ast.ExceptHandler):
                children += [(name, statement) for statement in child.body]
        stack += reversed(children)


def _long_strings(statement: ast.stmt) -> Iterator[str]:
    """Yield the long literals in a statement: documentation of C functions, topics, shared docstrings."""
    spans = (statement.end_lineno or 0) - statement.lineno
    if spans < 2 or not isinstance(statement, ast.Expr | ast.Assign | ast.AnnAssign | ast.Return):
        return
    for node in ast.walk(statement):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) > 200:
            yield node.value


def _comments(source: str) -> Iterator[str]:
    for match in re.finditer(r"(?:^[ \t]*# [^\n]*\n){3,}", source, re.MULTILINE):
        yield re.sub(r"(?m)^[ \t]*# ", "", match.group())


def _python_texts(source: str) -> Iterator[tuple[str, str, bool]]:
    """Yield (name, text, strict) of a module; comments and loose strings are held to the stricter filter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other people's invalid escapes are not ours to report
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError, RecursionError):
            return
    for name, node in _definitions(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if docstring := ast.get_docstring(node):
                yield name, docstring, False
        elif isinstance(node, ast.stmt):
            for text in _long_strings(node):
                yield "", text, True
    for text in _comments(source):
        yield "", text, True


def _description(metadata: str) -> str:
    """Return the long description of a dist-info METADATA: the body, or the older indented header."""
    head, _, body = metadata.partition("\n\n")
    older = re.search(r"^Description: (.*(?:\n[ |].*)*)", head, re.MULTILINE)
    return body or (re.sub(r"(?m)^ {8}\|?", "", older.group(1)) if older else "")


def _read_pages(job: tuple[Path, str]) -> list[Page]:
    """Read one file into pages; `job` is its path and its name relative to the root."""
    path, source = job
    try:
        text = path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError):
        return []
    if path.suffix in {".py", ".pyi"}:
        stem = source.removesuffix(path.suffix).removesuffix("/__init__").removeprefix(STANDARD_LIBRARY + "/")
        module = ".".join(part for part in stem.split("/") if not part.startswith("_"))
        texts = list(_python_texts(text))
    else:
        module, texts = "", [("", _description(text) if path.name == "METADATA" else text, False)]
    pages: list[Page] = []
    for name, raw, strict in texts:
        qualified = f"{module}.{name}".strip(".") if name else ""
        blocks = clean(raw, strict=strict)
        if blocks:
            pages.append(Page(f"{source}:{name}" if name else source, qualified, tuple(blocks)))
    return pages


def _package_files(package: str, library: Path, sites: Sequence[Path]) -> list[tuple[Path, str]]:
    homes = [(library, STANDARD_LIBRARY)] if package == STANDARD_LIBRARY else [(s / package, package) for s in sites]
    homes += [(s / f"{package}.py", f"{package}.py") for s in sites if package != STANDARD_LIBRARY]
    jobs: dict[str, Path] = {}
    for home, label in homes:
        if home.is_file():
            jobs.setdefault(label, home)
        for path in home.rglob("*") if home.is_dir() else ():
            relative = path.relative_to(home)
            text_file = path.suffix in {".rst", ".md", ".txt"} and not SKIPPED_FILES.search(path.name)
            if (path.suffix in {".py", ".pyi"} or text_file) and not SKIPPED_FOLDERS & set(relative.parts):
                jobs.setdefault(f"{label}/{relative.as_posix()}", path)
    return [(path, source) for source, path in sorted(jobs.items())]


def _distributions(sites: Sequence[Path]) -> dict[str, tuple[Path, str]]:
    """Map each importable name to its distribution's METADATA file and version."""
    owners: dict[str, tuple[Path, str]] = {}
    for info in sorted(folder for site in sites for folder in site.glob("*.dist-info")):
        metadata, record = info / "METADATA", info / "RECORD"
        if not (metadata.is_file() and record.is_file()):
            continue
        version = re.search(r"^Version: (\S+)", metadata.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
        names = {
            re.split(r"[/,]", line)[0].removesuffix(".py") for line in record.read_text(encoding="utf-8").splitlines()
        }
        for name in names:
            owners.setdefault(name, (metadata, version.group(1) if version else "unknown"))
    return owners


def collect(
    packages: Sequence[str] = DEFAULT_PACKAGES,
    *,
    library: Path | None = None,
    sites: Sequence[Path] | None = None,
    workers: int | None = None,
) -> Collection:
    """Read and clean the documentation of `packages`, in sorted order, dropping repeated paragraphs.

    `library` and `sites` are the folders of the standard library and of installed packages, by default those of
    the running interpreter. Packages that are not installed are listed in `missing`.
    """
    paths = sysconfig.get_paths()
    library = library or Path(paths["stdlib"])
    sites = list(dict.fromkeys([Path(paths["purelib"]), Path(paths["platlib"])])) if sites is None else sites
    owners, versions, missing = _distributions(sites), {}, []
    jobs: dict[str, Path] = {}
    for package in sorted(set(packages)):
        files = _package_files(package, library, sites)
        jobs.update((source, path) for path, source in files)
        if not files:
            missing.append(package)
        elif package == STANDARD_LIBRARY:
            versions[package] = ".".join(map(str, sys.version_info[:3]))
        elif package in owners:
            metadata, versions[package] = owners[package]
            jobs[f"{metadata.parent.name.removesuffix('.dist-info').rsplit('-', 1)[0]}/METADATA"] = metadata
    pages = _map_files([(path, source) for source, path in sorted(jobs.items())], workers)
    return Collection(tuple(_without_repeats(pages)), versions, tuple(missing))


def _map_files(jobs: Sequence[tuple[Path, str]], workers: int | None) -> Iterator[Page]:
    workers = workers or os.cpu_count() or 1
    if workers == 1 or len(jobs) < 64:
        for job in jobs:
            yield from _read_pages(job)
        return
    with ProcessPoolExecutor(workers) as pool:
        for pages in pool.map(_read_pages, jobs, chunksize=32):
            yield from pages


def digest(*parts: object) -> int:
    return int.from_bytes(hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()[:8], "big")


def _without_repeats(pages: Iterable[Page]) -> Iterator[Page]:
    """Keep the first occurrence of each paragraph, then the pages that are still long enough."""
    seen: set[int] = set()
    for page in pages:
        kept: list[Block] = []
        for block in page.blocks:
            key = digest(" ".join(block.text.lower().split()))
            if block.kind == "head" or key not in seen:
                kept.append(block)
            seen.add(key)
        kept = _without_loose_ends(kept)
        if len(" ".join(block.text for block in kept)) >= 60 and any(len(block.text) >= 40 for block in kept):
            yield Page(page.source, page.name, tuple(kept))


def _without_loose_ends(blocks: Sequence[Block]) -> list[Block]:
    """Drop headings with nothing under them and sentences that announced code or a table."""
    kept: list[Block] = []
    for block in reversed(blocks):
        after = kept[-1].kind if kept else "head"
        announces = block.kind == "prose" and block.text.endswith(":") and after != "item"
        if not announces and not (block.kind == after == "head"):
            kept.append(block)
    return kept[::-1]


_PLAIN = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "–": "-", "—": "-", "…": "...", "\xa0": " ", "•": "-"})
_DIRECTIVE = re.compile(r"\.\. ?([\w:-]+?)::\s*(.*)")
_ADMONITIONS = frozenset({"note", "warning", "tip", "important", "attention", "hint", "caution", "admonition", "topic"})
_UNDERLINE = re.compile(r"([=\-~^*#+\"'`_.:])\1{2,}$")
_SECTION = re.compile(
    r"(?:#+ )?\**(Args|Arguments|Parameters|Keyword Arguments|Keyword Args|Other Parameters|Params|Returns?|Yields?|"
    r"Raises|Attributes|Examples?|Notes?|Warnings?|See Also|References?|Usage|Inputs?|Outputs?|Shape|Methods):?\**:?$",
    re.IGNORECASE,
)
_FIELD_SECTIONS = frozenset(
    {"args", "arguments", "parameters", "keyword arguments", "keyword args", "other parameters", "params"}
)
_FIELD_SECTIONS |= {"attributes", "returns", "return", "raises", "yields", "yield", "methods"}
_DROPPED_SECTIONS = frozenset({"see also", "references", "reference", "methods", "shape"})
_BULLET = re.compile(r"(?:[-*+]|\(?\d{1,2}[.)])\s+(?=\S)")
_SPHINX_FIELD = re.compile(r":(?:param|arg|keyword|ivar|cvar|raises?|type|rtype|returns?)\b\s*([^:]*):\s*")
_FIELD = re.compile(
    r"[-*]?\s*[`*]*([A-Za-z_][\w.]*(?:, \*{0,2}\w+)*)[`*]*\s*(?:\(([^()]*(?:\([^()]*\)[^()]*)*)\))?\s*:(?:\s+(.*)|$)"
)
_NUMPY_FIELD = re.compile(r"([`*\w][^:(){}]{0,60}?) : (.*)$")
_LICENCE = re.compile(
    r"(?i)copyright|licensed under|permission is hereby|redistribution|without warrant|\bas is\"|all rights reserved|"
    r"apache license|mit license|bsd license|spdx|gnu general public"
)
_INLINE = (
    (re.compile(r"!\[[^\]]*\]\([^)]*\)"), ""),
    (re.compile(r"\[([^\[\]]+)\]\((?:[^()]|\([^()]*\))*\)"), r"\1"),
    (re.compile(r"(?<!\S)\[`~?([^`\]]+)`\](?=[\s.,;:)]|$)"), r"`\1`"),
    (re.compile(r":[\w:+-]+:`[~!]?([^`<]+?)\s*<[^`>]*>`"), r"\1"),
    (re.compile(r":[\w:+-]+:`~([^`]*?)([^.`]+)`"), r"`\2`"),
    (re.compile(r":[\w:+-]+:`!?([^`]+)`"), r"`\1`"),
    (re.compile(r"`([^`<]+?)\s*<[^`>]*>`__?"), r"\1"),
    (re.compile(r"`([^`]+)`__?(?!\w)"), r"`\1`"),
    (
        re.compile(
            r"</?(?:a|b|i|p|br|hr|img|div|span|h\d|[uo]l|li|code|pre|em|strong|Tip|hf\w+|td|tr|th|table)\b[^<>]*>|<!--.*?-->"
        ),
        "",
    ),
    (re.compile(r"``+([^`]+)``+"), r"`\1`"),
    (re.compile(r"\s*\[[\w#*]*\d[\w#*]*\]_"), ""),
    (re.compile(r"\*\*([^*\n]+)\*\*"), r"\1"),
    (re.compile(r"(?<![\w*])\*([^*\s][^*\n]*?)\*(?![\w*])"), r"\1"),
    (re.compile(r"\[\[[^\]]*\]\]"), ""),
    (re.compile(r"\s+"), " "),
)


def _strip_code(lines: Sequence[str]) -> Iterator[str]:
    """Blank out fenced code, doctests, literal blocks and the directives whose body is not prose."""
    fenced = doctest = False
    skipped: int | None = None
    for line in lines:
        bare, indent = line.strip(), len(line) - len(line.lstrip())
        doctest = bool(bare) and (doctest or bare.startswith((">>>", "In [", "$ ")))
        if bare.startswith(("```", "~~~")) and not (fenced is False and bare.count("```") > 1):
            fenced = not fenced
            yield ""
        elif fenced or doctest or (skipped is not None and (not bare or indent > skipped)):
            yield ""
        elif found := _DIRECTIVE.match(bare):
            keep = found.group(1) in _ADMONITIONS
            skipped = None if keep else indent
            yield found.group(2) if keep and found.group(1) == "note" else ""
        elif bare.startswith(".. ") or bare.endswith("::"):
            skipped = indent
            yield "" if bare.startswith(".. ") else line.rstrip()[:-1]
        else:
            skipped = None
            yield line


@dataclass(slots=True)
class _Reader:
    """Groups lines into blocks; `section` is the last heading in lower case."""

    blocks: list[Block] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    kind: BlockKind = "prose"
    indent: int = 0
    section: str = ""
    field_indent: int | None = None

    def flush(self, kind: BlockKind | None = None) -> None:
        text = _inline(" ".join(self.lines)) if self.lines else ""
        text = re.sub(r"^(\S+) \((.*)\):$", r"\1: \2", text)
        if text and self.section not in _DROPPED_SECTIONS:
            self.blocks.append(Block(kind or self.kind, text))
        self.lines, self.kind = [], "prose"

    def head(self, title: str) -> None:
        self.flush()
        self.section, self.field_indent = title.lower().strip(" :*#"), None
        if self.section not in _DROPPED_SECTIONS:
            self.blocks.append(Block("head", _inline(title.strip(" :*#")) + ":"))

    def item(self, text: str, indent: int) -> None:
        self.flush()
        self.lines, self.kind, self.indent = [text], "item", indent

    def read(self, line: str) -> None:
        bare, indent = line.strip(), len(line) - len(line.lstrip())
        if not bare:
            self.flush()
        elif _UNDERLINE.match(bare):
            title = " ".join(self.lines)
            self.lines = []
            if title and len(title) < 60:
                self.head(title)
        elif found := _SECTION.match(bare):
            self.head(found.group(1))
        elif bare.startswith("#"):
            self.head(bare)
        else:
            self.body(bare, indent)

    def body(self, bare: str, indent: int) -> None:
        if self.section in _FIELD_SECTIONS and self.field_indent is None:
            self.field_indent = indent
        if found := _SPHINX_FIELD.match(bare):
            name = found.group(1).split(" ")[-1]
            self.item(f"{name}: {bare[found.end() :]}" if name else bare[found.end() :], indent)
        elif indent == self.field_indent and (found := _NUMPY_FIELD.match(bare)):
            self.item(f"{found.group(1)} ({found.group(2)}):", indent)
        elif indent == self.field_indent and (found := _FIELD.match(bare)):
            name, hint, rest = found.group(1), found.group(2), found.group(3) or ""
            self.item(f"{name}{f' ({hint})' if hint else ''}: {rest}", indent)
        elif found := _BULLET.match(bare):
            self.item(bare[found.end() :], indent)
        else:
            if self.kind == "item" and indent <= self.indent:
                self.flush()
            self.lines.append(bare)


def _inline(text: str) -> str:
    for pattern, replacement in _INLINE:
        text = pattern.sub(replacement, text)
    return text.strip()


def letter_share(text: str) -> float:
    """Return the share of characters that are letters or spaces."""
    return sum(character.isalpha() or character == " " for character in text) / max(1, len(text))


def _readable(block: Block, strict: bool) -> bool:
    text = block.text
    if block.kind == "head":
        return len(text) < 60 and letter_share(text) >= 0.75
    noise = sum(not character.isascii() for character in text) > 0.04 * len(text)
    table = text.count("|") > 1 or "+--" in text or "\\" in text or "://" in text or "{" in text or "$" in text
    if noise or table or _LICENCE.search(text) or "<|" in text or any(header in text for header in FORBIDDEN):
        return False
    if len(text.split()) < 4 or text.count("`") % 2 or text.count("=") > 2 or text.count("_") > 0.04 * len(text):
        return False
    if re.search(r"(?:\b[A-Z]{3,} ){3}| --\w|\./|^TODO|^FIXME", text):
        return False
    if strict:
        return bool(re.match(r'[A-Z`"].*[.!?:)]$', text)) and letter_share(text) >= 0.82 and len(text) >= 60
    return letter_share(text) >= (0.72 if block.kind == "item" else 0.76)


def clean(text: str, *, strict: bool = False) -> list[Block]:
    """Return the readable blocks of a docstring or document; `strict` asks for whole sentences only."""
    reader = _Reader()
    for line in _strip_code(inspect.cleandoc(text.translate(_PLAIN)).split("\n")):
        reader.read(line)
    reader.flush()
    return _without_loose_ends([block for block in reader.blocks if _readable(block, strict)])


_ABBREVIATION = re.compile(r"\b(?:(?i:e\.g|i\.e|etc|vs|cf|al|fig|eq|resp|approx|dr|mr|no|sec|ch|pp|ref|incl)|[A-Z])\.$")
WORD = re.compile(r"[A-Za-z][A-Za-z'-]*")


def split_sentences(text: str) -> list[str]:
    """Split a paragraph at sentence ends, keeping abbreviations together."""
    sentences: list[str] = []
    for piece in re.split(r"(?<=[.!?])\s+(?=[A-Z`\"(])", text):
        if sentences and _ABBREVIATION.search(sentences[-1]):
            sentences[-1] += " " + piece
        else:
            sentences.append(piece)
    return sentences


def is_whole_sentence(text: str) -> bool:
    """Tell whether `text` reads as one plain English sentence, and not as code, a title or a fragment."""
    words = text.split()
    plain = re.sub(r"`[^`]{1,40}`", "it", text)
    if (
        not 5 <= len(words) <= 40
        or not re.match(r"[A-Z].*[a-z)`\"0-9][.!?]$", text)
        or re.search(r"[{}<>|\\=_*#@~^$\[\]`]", plain)
    ):
        return False
    if re.search(r"\b(?:in|by|of|from|see|and|the|as|to)[.!?]$|\( ?\)|  ", plain) and "()" not in plain:
        return False
    if "..." in text or "://" in text or ": " in plain or text.count('"') % 2 or text.count("(") != text.count(")"):
        return False
    return letter_share(plain) > 0.9 and len(WORD.findall(plain)) >= 0.85 * len(plain.split())


def passages(page: Page, rng: np.random.Generator) -> Iterator[Passage]:
    """Gather a page's whole sentences, in order, into passages of 40-140 words."""
    run: list[str] = []
    target = int(rng.integers(50, 120))
    for block in (*page.blocks, Block("head", "")):
        for sentence in split_sentences(block.text):
            usable = block.kind == "prose" and is_whole_sentence(sentence) and sentence not in run
            words = sum(len(s.split()) for s in run)
            if run and (block.kind == "head" or words + len(sentence.split()) > 140 or words >= target):
                if words >= 40 and len(run) >= 2:
                    yield Passage(page, tuple(run))
                run, target = [], int(rng.integers(50, 120))
            if usable:
                run.append(sentence)


# Chat views ---------------------------------------------------------------------------------------------------
