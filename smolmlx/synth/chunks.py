"""Documents cut into overlapping chunks of words, in files by split; a document is in one split only.

Memory holds a few numbers per document and per chunk; the texts are streamed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import tempfile
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np

from smolmlx.data.clean import json_line, replacing
from smolmlx.data.splits import LEFT_OUT, SPLITS, Method, assign, check_method
from smolmlx.errors import DataError, RecipeError
from smolmlx.rundir import writing
from smolmlx.synth.documents import MADE_BY, LeftOut, read_documents, read_made_by

_WORD = re.compile(r"\S+")


@dataclass(frozen=True, slots=True)
class Cut:
    """How documents are cut: words per chunk, and words that a chunk shares with the one before."""

    words: int = 500
    overlap: int = 100

    def check(self) -> None:
        """Raises RecipeError where chunks would not move on."""
        if not 0 <= self.overlap < self.words:
            raise RecipeError(
                f"--overlap {self.overlap}: expected 0 to {self.words - 1}, less than --words {self.words}."
            )

    def windows(self, num_words: int) -> Iterator[tuple[int, int]]:
        """Yield (first, one past last) word of each chunk; a tail wholly inside the chunk before is dropped."""
        for start in range(0, num_words, self.words - self.overlap):
            if start == 0 or start + self.overlap < num_words:
                yield start, min(start + self.words, num_words)


@dataclass(frozen=True, slots=True)
class Chunk:
    """A stretch of a document: words `start` to `start + words`, with the line breaks they had."""

    id: str
    text: str
    document: str
    split: str
    start: int
    words: int


def cut_text(text: str, cut: Cut) -> Iterator[tuple[int, int, str]]:
    """Yield (first word, number of words, text) of each chunk."""
    spans = [match.span() for match in _WORD.finditer(text)]
    for start, stop in cut.windows(len(spans)):
        yield start, stop - start, text[spans[start][0] : spans[stop - 1][1]]


def write_chunks(
    names: Sequence[str],
    out_dir: Path,
    cut: Cut,
    method: Method,
    on_documents: Callable[[int], None] | None = None,
    *,
    fewer_splits: str = "--shares 1,0",
) -> dict[str, Any]:
    """Write train.jsonl, validation.jsonl and test.jsonl of chunks and, last, manifest.json; return the manifest.

    Documents go to splits whole, so that shares of chunks come out as asked or as near as whole documents allow; every
    split with a share above 0 gets one at least.

    Args:
        on_documents: called with the number of documents read so far.
        fewer_splits: what is to be typed for train alone, for messages.

    Raises:
        DataError: nothing to read, or fewer documents than splits.
        RecipeError: sizes that contradict each other, or a folder that holds something else or is one of `names`.
        RunError: `out_dir` cannot be written.
    """
    method = replace(method, group="document")
    cut.check()
    check_shares(method)
    _check_folder(out_dir, names)
    left_out = LeftOut()
    with writing(out_dir):
        out_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out_dir) as draft:
            documents, labels = _draft(names, cut, draft, left_out, on_documents)
            if not documents:
                raise _nothing(names, left_out)
            splits = _splits(labels, method, fewer_splits)
            manifest = _write_splits(draft, out_dir, documents, splits)
    described = {"seed": method.seed, "shares" if method.counts is None else "counts": method.counts or method.shares}
    tree = {"made_by": MADE_BY, **asdict(cut), **described, **manifest, "left_out": _count_left_out(left_out)}
    with replacing(out_dir / "manifest.json") as file:
        file.write(json.dumps(tree, indent=2, ensure_ascii=False).encode() + b"\n")
    for name in set(SPLITS) - set(tree["files"]):  # of an earlier division
        (out_dir / f"{name}.jsonl").unlink(missing_ok=True)
    return tree


def check_shares(method: Method) -> None:
    """Refuse shares that are none.

    Raises:
        RecipeError
    """
    try:
        check_method(method)
    except RecipeError as error:
        raise RecipeError("data chunk", error.problems) from error


def _check_folder(out_dir: Path, names: Sequence[str]) -> None:
    if any(Path(name).expanduser().resolve() == out_dir.resolve() for name in names):
        raise RecipeError(f"{out_dir}: chunks would stand among the documents. Choose another folder.")
    present = [name for name in (*(f"{split}.jsonl" for split in SPLITS), "manifest.json") if (out_dir / name).exists()]
    if present and read_made_by(out_dir) != MADE_BY:
        raise RecipeError(f"{out_dir}: holds {', '.join(present)}, not written by `{MADE_BY}`. Choose another folder.")


def _draft(
    names: Sequence[str], cut: Cut, draft: IO[bytes], left_out: LeftOut, on_documents: Callable[[int], None] | None
) -> tuple[list[dict[str, Any]], array[int]]:
    """Write all chunks in order; return what is known of each document, and each chunk's document by number."""
    documents: list[dict[str, Any]] = []
    labels = array("q")
    for document in read_documents(names, left_out):
        words = len(_WORD.findall(document.text))
        entry = {"id": document.id, "path": str(document.path), "sha256": document.digest, "words": words, "chunks": 0}
        for index, (start, size, text) in enumerate(cut_text(document.text, cut)):
            row: dict[str, Any] = {
                "id": f"{document.id}:{index}",
                "text": text,
                "document": document.id,
                "start": start,
                "words": size,
            }
            draft.write(json_line(row, row["id"]))
            labels.append(len(documents))
            entry["chunks"] = index + 1
        documents.append(entry)
        if on_documents is not None:
            on_documents(len(documents))
    return documents, labels


def _nothing(names: Sequence[str], left_out: LeftOut) -> DataError:
    found = [f"{where}: {reason}{f' ({detail})' if detail else ''}" for reason, where, detail in left_out.entries[:20]]
    return DataError(f"{', '.join(names)}: no document that can be used", found)


def _splits(labels: array[int], method: Method, fewer_splits: str) -> list[int]:
    """Return the split of each document."""
    groups = np.asarray(labels, np.int64)
    chunks = np.bincount(groups)
    wanted = [split for split, share in enumerate(method.shares) if share]
    if len(chunks) < len(wanted):
        shares = ",".join(f"{share:g}" for share in method.shares)
        raise DataError(
            f"{len(chunks)} document(s) cannot fill the splits, of shares {shares}: each goes to one split whole, so"
            f" {len(wanted)} are needed. Give more documents, or leave splits out, e.g. {fewer_splits} for train alone."
        )
    try:
        by_chunk = assign(groups, method)
    except DataError:  # too few for the shares, and enough for one in each split
        return _one_each(chunks.tolist(), wanted, method)
    first = np.unique(groups, return_index=True)[1]
    return [int(split) for split in by_chunk[first]]


def _one_each(chunks: Sequence[int], wanted: Sequence[int], method: Method) -> list[int]:
    """Return the split of each document: the largest first, to a split without one, else to the one that lacks most."""
    order = np.random.default_rng(method.seed).permutation(len(chunks)).tolist()
    room = {split: method.shares[split] * sum(chunks) for split in wanted}
    splits = [LEFT_OUT] * len(chunks)
    for document in sorted(order, key=lambda document: -chunks[document]):
        empty = [split for split in wanted if split not in splits]
        split = max(empty or wanted, key=room.__getitem__)
        splits[document] = split
        room[split] -= chunks[document]
    return splits


def _write_splits(
    draft: IO[bytes], out_dir: Path, documents: Sequence[dict[str, Any]], splits: Sequence[int]
) -> dict[str, Any]:
    names = [*SPLITS, None]
    by_id = {entry["id"]: names[split] for entry, split in zip(documents, splits, strict=True)}
    used = [split for split in range(LEFT_OUT) if split in splits]
    digests = {SPLITS[split]: hashlib.sha256() for split in used}
    counts: Counter[str] = Counter()
    draft.seek(0)
    with contextlib.ExitStack() as stack:
        files: dict[str, BinaryIO] = {
            name: stack.enter_context(replacing(out_dir / f"{name}.jsonl")) for name in digests
        }
        for line in draft:
            row = json.loads(line)
            split = by_id[row["document"]]
            if split is not None:
                written = json_line({**row, "split": split}, row["id"])
                files[split].write(written)
                digests[split].update(written)
                counts[split] += 1
    entries = [{**entry, "split": by_id[entry["id"]]} for entry in documents]
    return {
        "documents": len(documents),
        "chunks": sum(counts.values()),
        "files": {
            name: {
                "path": f"{name}.jsonl",
                "documents": sum(entry["split"] == name for entry in entries),
                "rows": counts[name],
                "sha256": digest.hexdigest(),
            }
            for name, digest in digests.items()
        },
        "document_list": entries,
    }


def _count_left_out(left_out: LeftOut) -> dict[str, list[dict[str, str]]]:
    ordered = sorted(left_out.entries, key=lambda entry: entry[0])
    return {
        reason: [{"document": where, "detail": detail} for _, where, detail in entries]
        for reason, entries in groupby(ordered, key=lambda entry: entry[0])
    }
