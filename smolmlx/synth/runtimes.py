"""What answers the requests of data generation: one small protocol, and the runtime that asks an engine in this process.

`smolmlx.synth.server` holds the other one, for any OpenAI-compatible server.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Protocol

from smolmlx.backend import Decoding, Generator
from smolmlx.data.chat import Tokenizer
from smolmlx.tasks.schemas import Answer

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
    """Requests of one call. Calls are the same from run to run, so that a batch may decide how a row is sampled."""
    concurrency: int
    """Calls at a time."""
    company: bool
    """Whether the requests of a call bear on each other's answers, so that a call is only ever repeated whole."""

    async def __aenter__(self) -> Runtime: ...
    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
    async def ask(self, requests: Sequence[Request]) -> list[Reply]:
        """Answer requests, in their order. Raises SmolError where no further request can succeed."""


class LocalRuntime:
    """An engine's generator in this process, given whole batches."""

    name = "local"
    concurrency = 1
    company = True

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
        self.generator, self.tokenizer, self.model = generator, tokenizer, model
        self.context, self.batch_size = context, batch_size
        # Twice the batch: rows that end early make room for others, and a kill loses little.
        self.together = 2 * batch_size

    async def __aenter__(self) -> LocalRuntime:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    async def ask(self, requests: Sequence[Request]) -> list[Reply]:
        prompts = [self.tokenizer.encode(self.tokenizer.prompt([_user(request)])) for request in requests]
        replies = [Reply(rejected=TOO_LONG)] * len(requests)
        groups: dict[Request, list[int]] = {}
        for row, (request, ids) in enumerate(zip(requests, prompts, strict=True)):
            # A model of few tokens has room for its answer, and so for most of a chunk, if that takes a third at most.
            most = request.max_tokens if self.context is None else min(request.max_tokens, self.context // 3)
            if self.context is None or len(ids) + most <= self.context:
                groups.setdefault(replace(request, prompt="", seed=0, max_tokens=most), []).append(row)
        for kind, rows in groups.items():
            how = _decoding(kind, requests[rows[0]].seed, self.batch_size)
            for done in self.generator.generate([prompts[row] for row in rows], how):
                row = rows[done.index]
                replies[row] = Reply(
                    done.text, len(prompts[row]), len(done.ids), cut=not done.finished or done.shortened
                )
                await asyncio.sleep(0)  # a place to be interrupted
        return replies


def _user(request: Request) -> dict[str, str]:
    return {"role": "user", "content": request.prompt}


def _decoding(request: Request, seed: int, batch_size: int) -> Decoding:
    """Return how to decode: kept to the request's schema, so that an answer is always whole."""
    return Decoding(
        batch_size=batch_size,
        max_tokens=request.max_tokens,
        temperature=request.temperature,
        seed=seed,
        schema=request.schema,
    )
