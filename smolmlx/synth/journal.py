"""The append-only record of a generation: one line per finished job, so that a kill at any moment loses no finished one.

A line is written by one system call; a line that a kill or a full disk cut off is dropped when the journal is opened again.
"""

from __future__ import annotations

import json
import os
import time
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from smolmlx.data.clean import json_line
from smolmlx.errors import RunError
from smolmlx.rundir import hold, writing

ACCEPTED, REJECTED, FAILED = "accepted", "rejected", "failed"
_NONE = -1
_SYNC_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Record:
    """What became of a job."""

    number: int
    key: str
    state: str
    rows: Sequence[Mapping[str, Any]] = ()
    reasons: Sequence[str] = ()
    """Why attempts were not accepted, in order; of a failed job the last is why it failed."""
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Journal:
    """An open journal; only one process can have it open. Memory: nine bytes a job."""

    def __init__(self, path: Path, num_jobs: int) -> None:
        """Open or make a journal, and read what earlier runs finished.

        Raises:
            RunError: it cannot be written, is in use, or was not written by these jobs.
        """
        self.path = path
        self._offsets = array("q", [_NONE]) * num_jobs
        self._failed = bytearray(num_jobs)
        self._synced = time.monotonic()
        busy = f"{path}: another process is writing here. Wait for it, or choose another folder."
        self._lock = hold(path.with_name(f".{path.name}.lock"), busy).lock
        with writing(path):
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0), 0o644)
        self._end = 0
        try:
            self._read(num_jobs)
        except RunError:
            self.close()
            raise

    def _read(self, num_jobs: int) -> None:
        with self.path.open("rb") as lines:
            for line in lines:
                if not line.endswith(b"\n"):
                    break
                self._remember(_parse(line, self.path, num_jobs), self._end)
                self._end += len(line)
        with writing(self.path):
            os.ftruncate(self._file, self._end)

    def _remember(self, record: Record, offset: int) -> None:
        self._offsets[record.number] = offset
        self._failed[record.number] = record.state == FAILED

    def is_done(self, number: int) -> bool:
        """Whether a job was accepted or rejected; a failed one is asked again."""
        return self._offsets[number] != _NONE and not self._failed[number]

    def append(self, record: Record) -> None:
        """Write a record; it is safe from a kill when this returns, and from a power cut some seconds later."""
        tree: dict[str, Any] = {"job": record.number, "key": record.key, "state": record.state}
        tree |= {"reasons": list(record.reasons)} if record.reasons else {}
        tree |= {"tokens": [record.prompt_tokens, record.completion_tokens], "rows": list(record.rows)}
        line = json_line(tree, record.key)
        with writing(self.path):
            written = os.write(self._file, line)
            while written < len(line):  # a disk nearly full takes a part
                written += os.write(self._file, line[written:])
            if time.monotonic() - self._synced > _SYNC_SECONDS:
                self.sync()
        self._remember(record, self._end)
        self._end += len(line)

    def sync(self) -> None:
        os.fsync(self._file)
        self._synced = time.monotonic()

    def records(self) -> Iterator[Record]:
        """Yield the last record of every job, in the order of jobs."""
        with self.path.open("rb") as file:
            for offset in self._offsets:
                if offset != _NONE:
                    file.seek(offset)
                    yield _parse(file.readline(), self.path, len(self._offsets))

    def close(self) -> None:
        with writing(self.path):
            self.sync()
            os.close(self._file)
            self._lock.release()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _parse(line: bytes, path: Path, num_jobs: int) -> Record:
    try:
        tree = json.loads(line)
        prompt_tokens, completion_tokens = tree["tokens"]
        record = Record(
            int(tree["job"]),
            tree["key"],
            tree["state"],
            tree["rows"],
            tree.get("reasons", ()),
            prompt_tokens,
            completion_tokens,
        )
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{path}: a line is broken ({error!r}). Delete that line, and run the same command again."
        ) from error
    if not 0 <= record.number < num_jobs:
        raise RunError(f"{path}: names job {record.number} of {num_jobs}: not a journal of these chunks and tasks.")
    return record
