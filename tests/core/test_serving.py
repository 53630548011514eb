"""The server without an engine to speak of: whatever goes wrong, every request is answered, and the next one too."""

from __future__ import annotations

import asyncio
import json
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

import lab as labs
from smolmlx import backend
from smolmlx.backend import Completion, Decoding, Loading, OneOf
from smolmlx.data.chat import Tokenizer
from smolmlx.errors import RecipeError, RunError
from smolmlx.generation.row import Row
from smolmlx.models import open_model
from smolmlx.serving.requests import _OFF, ChatAsk
from smolmlx.serving.worker import Event, Failure, Job, Worker, names

pytest.importorskip("starlette")
pytest.importorskip("openai")  # brings the client that starlette tests with

Start = Callable[..., Worker]


@pytest.fixture
def start(tiny_model: Path) -> Iterator[Start]:
    """Start a worker on the numpy engine, with methods of its generator replaced."""
    workers = []

    def load(replaced: dict[str, Any]) -> Any:
        with labs.toy_installed():
            engine = backend.choose("toy", "cpu").backend
        generator = engine.generator(open_model(tiny_model), None, Tokenizer(tiny_model), Loading("cpu"))
        for name, method in replaced.items():
            setattr(generator, name, method)
        return generator

    def make(adapters: Sequence[Path] = (), **replaced: Any) -> Worker:
        workers.append(Worker(lambda: load(replaced), 4, adapters))
        return workers[-1]

    yield make
    for worker in workers:
        worker.close()


@pytest.fixture
def client(start: Start, tiny_model: Path) -> Iterator[Any]:
    from starlette.testclient import TestClient

    from smolmlx.serving.app import Service, make_app

    service = Service(start(), Tokenizer(tiny_model), {"tiny": None}, 512)
    with TestClient(make_app(service), raise_server_exceptions=False) as made:
        yield made


def wait(worker: Worker, how: Decoding = Decoding(max_tokens=4), adapter: Path | None = None) -> Event:
    told: queue.Queue[Event] = queue.Queue()
    worker.put(Job([5, 6], how, 0, adapter, lambda index, event: told.put(event)))
    return told.get(timeout=20)


def chat(**more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "red"}], "max_tokens": 4, **more}


def schema(tree: dict[str, Any]) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": tree}}}


@pytest.mark.parametrize(
    ("path", "body", "named"),
    [
        ("chat/completions", chat(**schema({"properties": {"a": {"type": "string", "required": True}}})), "required"),
        ("chat/completions", chat(chat_template_kwargs={"messages": []}), "messages"),
        ("completions", {"prompt": []}, "prompt"),
    ],
)
def test_what_was_asked_wrongly_is_named_and_the_next_is_answered(
    client: Any, path: str, body: dict[str, Any], named: str
) -> None:
    refused = client.post(f"/v1/{path}", json=body)
    assert refused.status_code == 400 and named in refused.json()["error"]["message"]
    assert client.post("/v1/chat/completions", json=chat()).status_code == 200


@pytest.mark.parametrize(
    "extreme",
    [{"top_k": 2**40}, {"seed": 2**100}, {"seed": -1}, {"max_tokens": 2**40}, {"temperature": 1e-45}],
    ids=str,
)
def test_extremes_are_answered(client: Any, extreme: dict[str, Any]) -> None:
    reply = client.post("/v1/chat/completions", json=chat(**{"temperature": 1.0, **extreme}))
    assert reply.status_code == 200, reply.text


@pytest.mark.parametrize("value", ["1e999", "Infinity", "NaN", "-1"])
@pytest.mark.parametrize("name", ["temperature", "top_p", "min_p", "repetition_penalty"])
def test_no_bound_lets_infinity_pass(client: Any, name: str, value: str) -> None:
    reply = client.post("/v1/completions", content=f'{{"prompt": "red", "{name}": {value}}}')
    assert reply.status_code == 400 and name in reply.json()["error"]["message"]


def test_null_means_the_default(client: Any) -> None:
    names = {*ChatAsk.model_fields, *_OFF} - {"messages", "max_tokens"}
    said = {"role": "assistant", "content": "apple", "refusal": None, "tool_calls": None, "function_call": None}
    messages = {"messages": [{"role": "user", "content": "red"}, said]}
    reply = client.post("/v1/chat/completions", json=chat(**messages, **dict.fromkeys(names)))
    assert reply.status_code == 200, reply.text
    assert reply.json()["choices"] == client.post("/v1/chat/completions", json=chat(**messages)).json()["choices"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/nothing", 404),
        ("GET", "/v1/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("GET", "/v1/models/gpt", 404),
    ],
)
def test_what_is_not_there_is_told_as_openai_does(client: Any, method: str, path: str, status: int) -> None:
    reply = client.request(method, path)
    assert reply.status_code == status and reply.json()["error"]["type"] == "invalid_request_error"
    assert reply.json()["error"]["message"]


def test_a_model_is_shown_by_its_name(start: Start, tiny_model: Path) -> None:
    from starlette.testclient import TestClient

    from smolmlx.serving.app import Service, make_app

    names = ["/folder/model+best", "my/model"]
    with TestClient(make_app(Service(start(), Tokenizer(tiny_model), dict.fromkeys(names)))) as client:
        for name in names:
            for path in (name, quote(name, safe="")):
                assert (
                    client.get(f"/v1/models/{path}").json()
                    == client.get("/v1/models").json()["data"][names.index(name)]
                )


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_places(
    start: Start, tiny_model: Path, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 4 answers of 400 tokens, which take at least 4 s, little is written once nobody waits."""
    from smolmlx.serving.app import Service, make_app

    taken, step, take = [0], threading.Event(), Row.take

    def slow(row: Row, token: int) -> list[int]:
        taken[0] += 1
        step.set()
        if row.index == 0:
            time.sleep(0.01)
        return take(row, token)

    monkeypatch.setattr(Row, "take", slow)
    worker = start()
    body = json.dumps(chat(max_tokens=400, n=4, stream=stream)).encode()
    asked = [{"type": "http.request", "body": body, "more_body": False}]
    scope = {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": "POST",
        "path": "/v1/chat/completions", "raw_path": b"", "query_string": b"", "root_path": "", "headers": [],
    }  # fmt: skip

    async def receive() -> Any:
        while not asked and not step.is_set():
            await asyncio.sleep(0.01)
        return asked.pop() if asked else {"type": "http.disconnect"}

    async def send(message: Any) -> None: ...

    app = make_app(Service(worker, Tokenizer(tiny_model), {"tiny": None}, 512))

    async def leave() -> None:
        await app(scope, receive, send)
        await asyncio.to_thread(worker.close)  # ends when all answers have

    asyncio.run(leave())
    assert 0 < taken[0] < 1000


@pytest.mark.parametrize("stream", [False, True])
def test_what_goes_wrong_in_a_batch_is_told(start: Start, tiny_model: Path, stream: bool) -> None:
    from starlette.testclient import TestClient

    from smolmlx.serving.app import Service, make_app

    def batcher(size: int) -> Any:
        raise RunError("out of memory")

    service = Service(start(batcher=batcher), Tokenizer(tiny_model), {"tiny": None}, 512)
    with TestClient(make_app(service)) as client:
        for _ in range(2):
            found = client.post("/v1/chat/completions", json=chat(stream=stream, n=2))
            assert found.status_code == 500 and found.json()["error"]["message"] == "out of memory"
            assert found.json()["error"]["type"] == "server_error"


class Panic(BaseException):
    """What pyo3 raises is no Exception."""


@pytest.mark.parametrize("error", [RunError("out of memory"), MemoryError("x"), Panic("y")])
def test_an_error_under_way_reaches_all_that_wait(start: Start, error: BaseException) -> None:
    worker, told = start(), queue.Queue[Event]()

    def tell(index: int, event: Event) -> None:
        if isinstance(event, str):
            raise error
        told.put(event)

    worker.put(Job([5, 6], Decoding(max_tokens=4), 0, None, tell, stream=True))
    failure = told.get(timeout=20)
    assert isinstance(failure, Failure) and failure.status == 500 and str(error) in failure.message
    assert isinstance(wait(worker), Completion)


def test_a_row_that_fails_leaves_the_others(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    def allowed(row: Row, num_words: int) -> None:
        if row.restricted:
            raise ValueError("broken grammar")

    monkeypatch.setattr(Row, "allowed", allowed)
    worker, told = start(), queue.Queue[tuple[int, Event]]()
    for index, constraint in enumerate((None, OneOf(("yes", "no")), None)):
        how = Decoding(max_tokens=40, schema=constraint)
        worker.put(Job([5, 6], how, index, None, lambda index, event: told.put((index, event))))
    found = dict(told.get(timeout=20) for _ in range(3))
    assert isinstance(found[0], Completion) and isinstance(found[2], Completion)
    assert isinstance(found[1], Failure) and found[1].status == 500 and "broken grammar" in found[1].message


def test_an_adapter_that_is_gone_fails_its_requests_alone(start: Start, tmp_path: Path) -> None:
    worker = start()
    failure = wait(worker, adapter=tmp_path)
    assert isinstance(failure, Failure) and failure.status == 500 and "not an adapter folder" in failure.message
    assert isinstance(wait(worker), Completion)


def test_adapters_are_tried_at_the_start(start: Start, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="not an adapter folder"):
        start([tmp_path])


def test_adapters_called_alike_are_numbered() -> None:
    folders = [Path("x/best"), Path("y/best"), Path("z/adapter")]
    assert names("m", folders) == {"m+best-1": folders[0], "m+best-2": folders[1], "m+z": folders[2], "m": None}
    with pytest.raises(RecipeError, match=r"m\+best-1 is taken"):
        names("m", [*folders[:2], Path("best-1")])
