"""The one thread that owns a model: requests that come together are answered in one batch."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from smolmlx.backend import Completion, Decoding, Generator
from smolmlx.errors import DataError, RecipeError, SmolError
from smolmlx.generation.batching import Batcher
from smolmlx.generation.row import Row

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Failure:
    """Why there is no answer."""

    status: int
    """HTTP's: 400 for what was asked wrongly, 500 for what went wrong here."""
    message: str


Event = str | Completion | Failure
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

    def fail(self, error: BaseException, status: int = 500) -> None:
        """Tell whoever waits why there is no answer."""
        message = str(error) if isinstance(error, SmolError) else f"{type(error).__name__}: {error}"
        self.tell(self.index, Failure(status, message))


class Worker:
    """Loads a generator in a thread of its own and answers jobs until it is closed."""

    def __init__(self, load: Callable[[], Generator], batch_size: int, adapters: Sequence[Path] = ()) -> None:
        """Start the thread, and wait until the model is loaded and each adapter has been put on it once.

        Raises:
            SmolError: what loading raised.
        """
        self._load, self._batch_size, self._adapters = load, batch_size, adapters
        self._active: tuple[Path | None] | None = None
        """The adapter in use; None where that is not certain."""
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
            for adapter in reversed(self._adapters):  # the default stays
                self._use(generator, adapter)
        except BaseException as error:  # raised again where the thread was started
            self._failed = error
            return
        finally:
            self._ready.set()
        while not self._closing:
            job = self._kept.pop(0) if self._kept else self._jobs.get()
            if job is None:
                return
            self._answer(generator, job)

    def _use(self, generator: Generator, adapter: Path | None) -> None:
        if self._active != (adapter,):
            self._active = None
            generator.use_adapter(adapter)
            self._active = (adapter,)

    def _answer(self, generator: Generator, first: Job) -> None:
        """Answer a job, and whatever comes for the same adapter meanwhile; nothing that goes wrong ends the thread."""
        jobs = {id(first): first}
        try:
            self._use(generator, first.adapter)
            batcher = generator.batcher(self._batch_size)
            jobs.clear()
            self._run(batcher, first, jobs)
        except BaseException as error:  # a panic in a Rust library is no Exception
            _report(error)
            for job in jobs.values():
                job.fail(error)

    def _run(self, batcher: Batcher, first: Job, jobs: dict[int, Job]) -> None:
        """Run a batch; `jobs` holds, by their rows' ids, those that still wait for an answer."""

        def begin(job: Job) -> Iterator[Row]:
            if job.cancelled:
                return
            try:
                row = job.row = batcher.make_row(job.index, job.prompt, job.how, job.tell if job.stream else None)
            except BaseException as error:  # what one job asks must not end the others' answers
                asked_wrongly = isinstance(error, RecipeError | DataError)
                if not asked_wrongly:
                    _report(error)
                job.fail(error, 400 if asked_wrongly else 500)
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
            if row.error is not None:
                _report(row.error)
                job.fail(row.error)
            else:
                job.tell(job.index, row.completion())


def _report(error: BaseException) -> None:
    """Show whoever runs the server what its clients are told in one line."""
    _log.error("serve: %s", error, exc_info=None if isinstance(error, SmolError) else error)


def names(model: str, adapters: Sequence[Path]) -> Mapping[str, Path | None]:
    """Return served name -> adapter: the adapters first, numbered where two folders are called alike; the base last.

    Raises:
        RecipeError: a numbered name is another folder's own.
    """
    found: dict[str, Path | None] = {}
    plain = [adapter.parent.name if adapter.name == "adapter" else adapter.name for adapter in adapters]
    for number, (name, adapter) in enumerate(zip(plain, adapters, strict=True), 1):
        label = f"{model}+{name}" if plain.count(name) == 1 else f"{model}+{name}-{number}"
        if label in found:
            raise RecipeError(f"--adapter {adapter}: the name {label} is taken by {found[label]}. Rename a folder.")
        found[label] = adapter
    return {**found, model: None}
