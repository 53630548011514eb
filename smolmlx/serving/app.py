"""The routes of `smolmlx serve`: chat completions, completions, models, and a page to try them.

starlette routes and streams, uvicorn speaks HTTP; both come with the extra `serve`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from smolmlx.backend import Completion
from smolmlx.data.chat import Tokenizer
from smolmlx.errors import RecipeError, SmolError
from smolmlx.serving.requests import Ask, ChatAsk, TextAsk, explain
from smolmlx.serving.worker import Event, Failure, Job, Worker

_PAGE = Path(__file__).with_name("page.html")


@dataclass(frozen=True, slots=True)
class Service:
    """What is served."""

    worker: Worker
    tokenizer: Tokenizer
    models: Mapping[str, Path | None]
    """Name -> adapter; the first is the default."""
    context: int | None = None
    """Most tokens of prompt and answer together."""
    ending: Callable[[], bool] = lambda: False
    """Whether the server shuts down: answers under way are then given up."""


@dataclass(frozen=True, slots=True)
class _Call:
    """One request under way: its jobs, and their events as they come."""

    id: str
    model: str
    chat: bool
    jobs: Sequence[Job]
    events: asyncio.Queue[tuple[int, Event]]

    def head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": int(time.time()), "model": self.model}

    def cancel(self) -> None:
        for job in self.jobs:
            job.cancel()


def make_app(service: Service) -> Starlette:
    """Return the application."""

    async def chat(request: Request) -> Response:
        return await _answer(service, request, ChatAsk)

    async def text(request: Request) -> Response:
        return await _answer(service, request, TextAsk)

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [_card(name) for name in service.models]})

    async def model(request: Request) -> Response:
        name = request.path_params["name"]
        return JSONResponse(_card(name)) if name in service.models else _not_served(service, name)

    async def failed(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        there = "there are /v1/chat/completions and /v1/completions (POST), /v1/models (GET)"
        response = _error(error.status_code, f"{request.method} {request.url.path}: {error.detail.lower()}; {there}.")
        response.headers.update(error.headers or {})
        return response

    async def page(request: Request) -> Response:
        return HTMLResponse(_PAGE.read_text(encoding="utf-8"))

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    return Starlette(
        routes=[
            Route("/", page),
            Route("/health", health),
            Route("/v1/models", models),
            Route("/v1/models/{name:path}", model),  # a model's name may be a folder
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/v1/completions", text, methods=["POST"]),
        ],
        exception_handlers={HTTPException: failed},
    )


async def _answer(service: Service, request: Request, kind: type[Ask]) -> Response:
    try:
        ask = kind.model_validate_json(await request.body())
    except ValidationError as error:
        return _error(400, explain(error))
    if ask.model not in (None, "default", *service.models):
        return _not_served(service, str(ask.model))
    try:
        call = _begin(service, ask)
    except SmolError as error:
        return _error(400, str(error))
    # The first event says whether the request can be honoured at all, while the status can still be chosen.
    first = await _next(service, call, request)
    if first is None:
        call.cancel()
        return Response(status_code=499)  # nobody reads it
    events = _until_done(service, call, first, request)
    if ask.stream and not isinstance(first[1], Failure):
        usage = ask.stream_options is not None and ask.stream_options.include_usage
        return StreamingResponse(_stream(call, events, usage), media_type="text/event-stream")
    answers: dict[int, Completion] = {}
    async for index, event in events:
        if isinstance(event, Failure):
            await events.aclose()
            return _error(event.status, event.message)
        if isinstance(event, Completion):
            answers[index] = event
    kind_name = "chat.completion" if call.chat else "text_completion"
    choices = [_choice(call, index, answers[index].text, answers[index]) for index in sorted(answers)]
    return JSONResponse({**call.head(kind_name), "choices": choices, "usage": _usage(list(answers.values()))})


def _begin(service: Service, ask: Ask) -> _Call:
    """Hand a request to the worker; raises SmolError for what cannot be asked."""
    model = next(iter(service.models)) if ask.model in (None, "default") else str(ask.model)
    tokenizer = service.tokenizer
    if isinstance(ask, ChatAsk):
        text = tokenizer.prompt([message.plain() for message in ask.messages], **ask.chat_template_kwargs)
        prompts = [tokenizer.encode(text)]
    else:
        assert isinstance(ask, TextAsk)
        texts = [ask.prompt] if isinstance(ask.prompt, str) else ask.prompt
        prompts = [tokenizer.encode(text, special=True) for text in texts]
    how = ask.decoding()
    loop, events = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Event]]()

    def tell(index: int, event: Event) -> None:
        with contextlib.suppress(RuntimeError):  # the server is down, its loop closed: nobody waits any more
            loop.call_soon_threadsafe(events.put_nowait, (index, event))

    jobs: list[Job] = []
    for prompt in prompts:
        room = how.max_tokens if service.context is None else service.context - len(prompt)
        if not prompt or room < 1:
            raise RecipeError(f"the prompt has {len(prompt)} tokens; expected 1 to {(service.context or 0) - 1}.")
        for _ in range(ask.n or 1):
            bounded = replace(how, max_tokens=min(how.max_tokens, room))
            jobs.append(Job(prompt, bounded, len(jobs), service.models[model], tell, ask.stream))
    for job in jobs:
        service.worker.put(job)
    chat = isinstance(ask, ChatAsk)
    return _Call(f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}", model, chat, jobs, events)


async def _until_done(
    service: Service, call: _Call, first: tuple[int, Event], request: Request
) -> AsyncGenerator[tuple[int, Event], None]:
    """Yield events until every job is done; a client that goes away ends its jobs."""
    left = len(call.jobs)
    event: tuple[int, Event] | None = first
    try:
        while event is not None:
            yield event
            left -= not isinstance(event[1], str)
            event = await _next(service, call, request) if left else None
    finally:
        if left:
            call.cancel()


async def _next(service: Service, call: _Call, request: Request) -> tuple[int, Event] | None:
    """Return what comes next, a failure once the server shuts down, or None once the client has left."""
    while not service.ending():
        try:
            return await asyncio.wait_for(call.events.get(), timeout=1.0)
        except TimeoutError:
            if await request.is_disconnected():
                return None
        except asyncio.CancelledError:  # a second Ctrl-C does not wait for the answers
            if not service.ending():
                raise
    return 0, Failure(503, "the server is shutting down.")


async def _stream(call: _Call, events: AsyncIterator[tuple[int, Event]], usage: bool) -> AsyncIterator[str]:
    head = call.head("chat.completion.chunk" if call.chat else "text_completion")
    done: list[Completion] = []
    if call.chat:
        for job in call.jobs:
            delta = {"index": job.index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
            yield _line({**head, "choices": [delta]})
    async for index, event in events:
        if isinstance(event, Failure):
            call.cancel()
            yield _line({"error": {"message": event.message, "type": _kind(event.status)}})
            return
        if isinstance(event, Completion):
            done.append(event)
        yield _line({**head, "choices": [_piece(call, index, event)]})
    if usage:
        yield _line({**head, "choices": [], "usage": _usage(done)})
    yield "data: [DONE]\n\n"


def _piece(call: _Call, index: int, event: str | Completion) -> dict[str, Any]:
    text = event if isinstance(event, str) else ""
    reason = None if isinstance(event, str) else _reason(event)
    if call.chat:
        return {"index": index, "delta": {"content": text} if text else {}, "finish_reason": reason}
    return {"index": index, "text": text, "finish_reason": reason}


def _choice(call: _Call, index: int, text: str, completion: Completion) -> dict[str, Any]:
    body: dict[str, Any] = {"message": {"role": "assistant", "content": text}} if call.chat else {"text": text}
    return {"index": index, **body, "logprobs": None, "finish_reason": _reason(completion)}


def _reason(completion: Completion) -> str:
    # An answer that its schema closed because tokens ran out is whole by form, but its author must know that it was cut.
    return "stop" if completion.finished and not completion.shortened else "length"


def _usage(done: Sequence[Completion]) -> dict[str, int]:
    asked, made = sum(one.num_prompt for one in done), sum(len(one.ids) for one in done)
    return {"prompt_tokens": asked, "completion_tokens": made, "total_tokens": asked + made}


def _line(tree: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(tree, ensure_ascii=False)}\n\n"


def _card(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "smolmlx"}


def _not_served(service: Service, name: str) -> Response:
    return _error(404, f"model '{name}' is not served here. Served: {', '.join(service.models)}.")


def _error(status: int, message: str) -> Response:
    body = {"message": message, "type": _kind(status), "code": None, "param": None}
    return JSONResponse({"error": body}, status_code=status)


def _kind(status: int) -> str:
    return "invalid_request_error" if status < 500 else "server_error"
