"""Chunks on disk, read by number: an index of offsets in memory, the texts where they lie."""

from __future__ import annotations

import hashlib
import json
from array import array
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from smolmlx.data.splits import SPLITS
from smolmlx.errors import DataError
from smolmlx.synth.chunks import Chunk
from smolmlx.synth.documents import ROWS, SUFFIXES
from smolmlx.synth.markup import suffix_of


class ChunkStore:
    """The chunks of a folder written by `data chunk`, or of one JSONL file with a `text` per row."""

    def __init__(self, source: Path) -> None:
        """Index all chunks.

        Raises:
            DataError: nothing there, or rows that are no chunks.
        """
        self.source = source
        self._files: list[tuple[Path, BinaryIO]] = []
        self._offsets, self._lines, self._file, self._document = array("q"), array("q"), array("b"), array("q")
        self._starts, self._words, self._ids = array("q"), array("q"), array("q")
        self._documents: dict[str, list[int]] = {}
        self._splits: dict[str, array[int]] = {}
        self._split_names: list[str] = []
        self._document_chunks: list[list[int]] = []
        digest = hashlib.sha256()
        try:
            for path in _find(source):
                self._index(path, digest)
            if not len(self):
                raise DataError(f"{source}: no chunks. Make some with: smolmlx data chunk DOCUMENTS {source}")
            self._check_ids()
        except DataError:
            self.close()
            raise
        self.fingerprint = digest.hexdigest()[:16]

    def _index(self, path: Path, digest: hashlib._Hash) -> None:
        file = path.open("rb")
        self._files.append((path, file))
        offset = 0
        for number, line in enumerate(file, 1):
            digest.update(line)
            if line.strip():
                self._lines.append(number)
                self._add(_parse(line, path, number), len(self._files) - 1, offset)
            offset += len(line)

    def _add(self, chunk: Chunk, file: int, offset: int) -> None:
        number = len(self._offsets)
        self._offsets.append(offset)
        self._file.append(file)
        mine = self._documents.setdefault(chunk.document, [])
        if not mine:
            self._document_chunks.append(mine)
            mine.append(len(self._document_chunks) - 1)  # a list begins with its own number
        elif (other := self._split_names[mine[1]]) != chunk.split:
            raise DataError(
                f"{self._place(number)}: document '{chunk.document}' is in split '{chunk.split}' here and in '{other}' "
                f"at {self._place(mine[1])}. A document belongs to one split; make chunks with `smolmlx data chunk`."
            )
        mine.append(number)
        self._ids.append(hash(chunk.id))
        self._document.append(mine[0])
        self._starts.append(chunk.start)
        self._words.append(chunk.words)
        if chunk.split not in self._splits:
            self._splits[chunk.split] = array("q")
        self._splits[chunk.split].append(number)
        self._split_names.append(chunk.split)

    def _place(self, number: int) -> str:
        return f"{self._files[self._file[number]][0]}:{self._lines[number]}"

    def _check_ids(self) -> None:
        """Refuse two chunks of one name; hashes first, since names of millions would fill the memory."""
        hashes = np.frombuffer(self._ids, np.int64)
        order = np.argsort(hashes, kind="stable")
        for at in np.flatnonzero(np.diff(hashes[order]) == 0):
            first, second = int(order[at]), int(order[at + 1])
            if self[first].id == self[second].id:
                raise DataError(
                    f"{self._place(second)}: chunk id '{self[second].id}' is that of {self._place(first)} too. Rows are "
                    "named after their chunk: give each its own `id`, or none."
                )

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, number: int) -> Chunk:
        path, file = self._files[self._file[number]]
        file.seek(self._offsets[number])
        return _parse(file.readline(), path, self._lines[number])

    def num_words(self, number: int) -> int:
        return self._words[number]

    def split_of(self, number: int) -> array[int]:
        """Return the numbers of all chunks in this chunk's split, in order."""
        return self._splits[self._split_names[number]]

    def document_of(self, number: int) -> list[int]:
        """Return the numbers of all chunks of this chunk's document, in order."""
        return self._document_chunks[self._document[number]][1:]

    def overlap(self, one: int, other: int) -> bool:
        """Whether two chunks share words: the same chunk, or neighbours in a document."""
        if self._document[one] != self._document[other]:
            return False
        first, second = sorted((one, other), key=lambda number: self._starts[number])
        return self._starts[second] < self._starts[first] + self._words[first]

    def close(self) -> None:
        for _, file in self._files:
            file.close()

    def __enter__(self) -> ChunkStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _find(source: Path) -> list[Path]:
    if not source.exists():
        raise DataError(f"{source}: no such file or folder. Make chunks with: smolmlx data chunk DOCUMENTS {source}")
    if source.is_file() and (suffix := suffix_of(source)) in SUFFIXES and suffix not in ROWS:
        raise DataError(f"{source}: a document, not chunks. Cut it first: smolmlx data chunk {source} chunks")
    if source.is_file():
        return [source]
    found = [path for name in SPLITS if (path := source / f"{name}.jsonl").is_file()]
    if not found:
        raise DataError(
            f"{source}: no chunks here. Pass a folder written by `smolmlx data chunk`, or a jsonl file with a `text` per row."
        )
    return found


def _parse(line: bytes, path: Path, number: int) -> Chunk:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{path}:{number}: not valid JSON: {error}") from error
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise DataError(f"{path}:{number}: a chunk has a field `text`; make chunks with `smolmlx data chunk`.")
    own = f"{path.name}:{number}"
    split = row.get("split") or (path.stem if path.stem in SPLITS else SPLITS[0])
    if split not in SPLITS:
        raise DataError(f"{path}:{number}: unknown split '{split}' (known: {', '.join(SPLITS)})")
    words = _whole(row, "words", path, number)
    return Chunk(
        id=str(row.get("id") or own),
        text=row["text"],
        document=str(row.get("document") or row.get("id") or own),
        split=str(split),
        start=_whole(row, "start", path, number) or 0,
        words=len(row["text"].split()) if words is None else words,
    )


def _whole(row: dict[str, Any], field: str, path: Path, number: int) -> int | None:
    value = row.get(field)
    if value is not None and not (isinstance(value, int) and 0 <= value < 2**53):
        raise DataError(f"{path}:{number}: {field} {value!r}: expected a number of words, 0 or more.")
    return value
