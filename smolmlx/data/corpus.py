"""Build a pretraining corpus from the documentation that a development install already holds.

The base model used in tests and examples is pretrained here, so its text must be on every machine without a
download: docstrings, comments and shipped documents of Python and of the installed packages, read and never
imported. The same pages give chat views, made by rule, from which a tiny model learns the ChatML tokens and to
copy from its context.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from smolmlx.data.corpus_pages import DEFAULT_PACKAGES, Collection, Document, collect, digest
from smolmlx.data.corpus_views import chat_views


@dataclass(frozen=True, slots=True)
class CorpusReport:
    """Counts of a written corpus, by kind, and where it came from."""

    documents: Mapping[str, int]
    characters: Mapping[str, int]
    splits: Mapping[str, int]
    versions: Mapping[str, str]
    missing: tuple[str, ...]
    seed: int


def _split(document: Document, seed: int, validation_share: float) -> str:
    """Place a document by its source, so that chat views stay with the page they were made from."""
    return "validation" if digest(seed, document.source) % 10_000 < validation_share * 10_000 else "train"


def write_corpus(
    out_dir: Path,
    seed: int = 0,
    packages: Sequence[str] = DEFAULT_PACKAGES,
    *,
    chat_share: float = 0.35,
    validation_share: float = 0.01,
    collection: Collection | None = None,
) -> CorpusReport:
    """Write train.jsonl, validation.jsonl and card.json under `out_dir`, shuffled by `seed`.

    `chat_share` is the share of characters in chat views, less where passages run out. `collection` replaces the
    pages of the running interpreter's `packages`.
    """
    collection = collection or collect(packages)
    documents = [Document(page.text, "prose", page.source) for page in collection.pages]
    prose = sum(len(document.text) for document in documents)
    documents += chat_views(collection.pages, seed, round(prose * chat_share / (1 - chat_share)))
    documents.sort(key=lambda document: (digest(seed, document.text), document.source))
    splits: dict[str, list[Document]] = {"train": [], "validation": []}
    for document in documents:
        splits[_split(document, seed, validation_share)].append(document)
    out_dir.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        with (out_dir / f"{split}.jsonl").open("w", encoding="utf-8", newline="\n") as stream:
            stream.writelines(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows)
    report = _report(documents, splits, collection, seed)
    (out_dir / "card.json").write_text(json.dumps(asdict(report), indent=2) + "\n", encoding="utf-8")
    return report


def _report(
    documents: Sequence[Document], splits: Mapping[str, Sequence[Document]], collection: Collection, seed: int
) -> CorpusReport:
    characters: Counter[str] = Counter()
    for document in documents:
        characters[document.kind] += len(document.text)
    return CorpusReport(
        documents=dict(sorted(Counter(document.kind for document in documents).items())),
        characters=dict(sorted(characters.items())),
        splits={split: len(rows) for split, rows in splits.items()},
        versions=collection.versions,
        missing=collection.missing,
        seed=seed,
    )
