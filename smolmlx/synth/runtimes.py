"""What answers the requests of data generation: one small protocol, and the runtime that asks an engine in this process.

`smolmlx.synth.server` holds the other one, for any OpenAI-compatible server.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

from smolmlx.backend import Choice, Decoding, Generator, Loading
from smolmlx.data.chat import Tokenizer
from smolmlx.models import find_model
from smolmlx.tasks.schemas import Answer

if TYPE_CHECKING:
    from smolmlx.generation.row import Row

_TURNS = 4
"""Turns of the loop in which who asked keeps an answer and brings the next request, so that its place is not left empty."""
TOO_LONG = "prompt too long for the model"


@dataclass(frozen=True, slots=True)
class Request:
    """One question to a model, and how it may answer."""

    prompt: str
    schema: type[Answer]
    max_tokens: int
    temperature: float
    seed: int


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back: a text, or the reason there is none."""

    text: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cut: bool = False
    """The answer was ended by `max_tokens`."""
    failed: str | None = None
    """No answer for now (time-out, error of a server): asked again when the run is resumed."""
    rejected: str | None = None
    """No answer ever to this request."""


class Runtime(Protocol):
    """Something that answers requests; used as an async context."""

    name: str
    model: str
    together: int
    """Requests of one call."""
    concurrency: int
    """Calls at a time."""

    async def __aenter__(self) -> Runtime: ...
    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
    async def ask(self, requests: Sequence[Request]) -> list[Reply]:
        """Answer requests, in their order. Raises SmolError where no further request can succeed."""


class LocalRuntime:
    """An engine's generator in this process: one running batch, which requests join as places fall free."""

    name = "local"
    together = 1

    def __init__(
        self,
        generator: Generator,
        tokenizer: Tokenizer,
        model: str,
        *,
        context: int | None = None,
        batch_size: int = 32,
    ) -> None:
        """Take a loaded generator.

        Args:
            context: most tokens of prompt and answer together, where the model has such a bound.
        """
        self.tokenizer, self.model, self.context, self.concurrency = tokenizer, model, context, batch_size
        self._batcher = generator.batcher(batch_size)
        self._waiting: list[Row] = []
        self._asked: dict[Row, asyncio.Future[None]] = {}
        self._running: asyncio.Task[None] | None = None

    async def __aenter__(self) -> LocalRuntime:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._running is not None:
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)

    async def ask(self, requests: Sequence[Request]) -> list[Reply]:
        return list(await asyncio.gather(*map(self._ask, requests)))

    async def _ask(self, request: Request) -> Reply:
        prompt = self.tokenizer.encode(self.tokenizer.prompt([_user(request)]))
        # A model of few tokens has room for its answer, and so for most of a chunk, if that takes a third at most.
        most = request.max_tokens if self.context is None else min(request.max_tokens, self.context // 3)
        if self.context is not None and len(prompt) + most > self.context:
            return Reply(rejected=TOO_LONG)
        # Every row is row 0 of its own seed: what it draws depends on no other.
        row = self._batcher.make_row(0, prompt, _decoding(request, most))
        self._waiting.append(row)
        self._asked[row] = asyncio.get_running_loop().create_future()
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(self._run())
            self._running.add_done_callback(self._tell_failure)
        try:
            await self._asked[row]
        finally:
            row.cancel()  # over by now, unless who asked was stopped
        done = row.completion()
        return Reply(done.text, len(prompt), len(done.ids), cut=not done.finished or done.shortened)

    async def _run(self) -> None:
        """Answer what waits, and what comes while it is answered."""
        with contextlib.closing(self._batcher.run(self._take(), self._take)) as ended:
            for row in ended:
                if not (answered := self._asked.pop(row)).done():
                    answered.set_result(None)
                for _ in range(_TURNS):
                    await asyncio.sleep(0)

    def _take(self) -> list[Row]:
        rows, self._waiting = self._waiting, []
        return rows

    def _tell_failure(self, running: asyncio.Task[None]) -> None:
        if not running.cancelled() and (error := running.exception()) is not None:
            for answered in self._asked.values():
                if not answered.done():
                    answered.set_exception(error)
                    answered.exception()  # asyncio would warn of one that nobody was left to see


def open_local(
    model: str, adapter: str | None, choice: Choice, *, quantize: str = "none", batch_size: int = 32
) -> LocalRuntime:
    """Load a model, with the tokenizer that its adapter brings where there is one.

    Args:
        model: hub id, folder or `tiny`.
        adapter: its folder.
    """
    base, folder = find_model(model), Path(adapter) if adapter else None
    has_own = folder is not None and (folder / "tokenizer.json").is_file()
    tokenizer = Tokenizer(folder if has_own and folder else base.folder)
    generator = choice.backend.generator(base, folder, tokenizer, Loading(choice.device, quantize=quantize))
    name = f"{model} + {adapter}" if adapter else model
    return LocalRuntime(generator, tokenizer, name, context=base.context, batch_size=batch_size)


def _user(request: Request) -> dict[str, str]:
    return {"role": "user", "content": request.prompt}


def _decoding(request: Request, max_tokens: int) -> Decoding:
    """Return how to decode: kept to the request's schema, so that an answer is always whole."""
    return Decoding(max_tokens=max_tokens, temperature=request.temperature, seed=request.seed, schema=request.schema)
