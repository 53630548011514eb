"""The one thread that owns a model: requests that come together are answered in one batch."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from smolmlx.backend import Completion, Decoding, Generator
from smolmlx.errors import SmolError
from smolmlx.generation.batching import Batcher
from smolmlx.generation.row import Row

Event = str | Completion | SmolError
"""Further text, the finished answer, or why there is none."""


@dataclass(slots=True)
class Job:
    """One answer that somebody waits for."""

    prompt: Sequence[int]
    how: Decoding
    index: int
    """Which of a request's answers this is: a sampled one depends on (seed, index)."""
    adapter: Path | None
    tell: Callable[[int, Event], None]
    """Called from the worker's thread with (index, event)."""
    stream: bool = False
    """Whether text is told while it is written."""
    row: Row | None = None
    cancelled: bool = False

    def cancel(self) -> None:
        """Stop working for a client that has gone."""
        self.cancelled = True
        if self.row is not None:
            self.row.cancel()


class Worker:
    """Loads a generator in a thread of its own and answers jobs until it is closed."""

    def __init__(self, load: Callable[[], Generator], batch_size: int) -> None:
        """Start the thread, and wait until the model is loaded.

        Raises:
            SmolError: what loading raised.
        """
        self._load, self._batch_size = load, batch_size
        self._jobs: queue.Queue[Job | None] = queue.Queue()
        self._kept: list[Job] = []
        self._closing = False
        self._failed: BaseException | None = None
        self._ready, self._ended = threading.Event(), threading.Event()
        threading.Thread(target=self._live, name="smolmlx-serve", daemon=True).start()
        self._ready.wait()
        if self._failed is not None:
            raise self._failed

    def put(self, job: Job) -> None:
        self._jobs.put(job)

    def close(self) -> None:
        """Finish what is in the batch, and let go of the model."""
        self._closing = True
        self._jobs.put(None)
        self._ended.wait()

    def _live(self) -> None:
        try:
            self._work()
        finally:
            self._ended.set()
        # MLX frees what a thread has compiled when the thread ends, outside Python's join(), and needs the interpreter for it:
        # where that is shutting down by then, the process aborts. A thread that sleeps never gets there.
        threading.Event().wait()

    def _work(self) -> None:
        try:
            generator = self._load()
        except SmolError as error:
            self._failed = error
            return
        finally:
            self._ready.set()
        adapter: Path | None = None
        fresh = True
        while not self._closing:
            job = self._kept.pop(0) if self._kept else self._jobs.get()
            if job is None:
                return
            if fresh or job.adapter != adapter:
                generator.use_adapter(job.adapter)
                adapter, fresh = job.adapter, False
            self._run(generator.batcher(self._batch_size), job)

    def _run(self, batcher: Batcher, first: Job) -> None:
        """Answer a job, and whatever comes for the same adapter meanwhile."""
        jobs: dict[int, Job] = {}

        def begin(job: Job) -> Iterator[Row]:
            if job.cancelled:
                return
            try:
                row = job.row = batcher.make_row(job.index, job.prompt, job.how, job.tell if job.stream else None)
            except SmolError as error:
                job.tell(job.index, error)
                return
            jobs[id(row)] = job
            yield row

        def more() -> list[Row]:
            found: list[Row] = []
            # Once a job for another adapter waits, nothing more is taken in, so that it gets its turn.
            while not self._kept and not self._closing and not self._jobs.empty():
                job = self._jobs.get()
                if job is None:
                    self._closing = True
                elif job.adapter != first.adapter:
                    self._kept.append(job)
                else:
                    found += begin(job)
            return found

        for row in batcher.run(list(begin(first)), more):
            job = jobs.pop(id(row))
            job.tell(job.index, row.completion())


def names(model: str, adapters: Sequence[Path]) -> Mapping[str, Path | None]:
    """Return served name -> adapter: the adapters first, the base last."""
    found: dict[str, Path | None] = {}
    for adapter in adapters:
        base = f"{model}+{adapter.parent.name if adapter.name == 'adapter' else adapter.name}"
        found[base] = adapter
    return {**found, model: None}
