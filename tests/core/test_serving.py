"""The server without an engine to speak of: whatever goes wrong, every request is answered, and the next one too."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import lab as labs
from smolmlx import backend
from smolmlx.backend import Completion, Decoding, Loading
from smolmlx.data.chat import Tokenizer
from smolmlx.errors import RecipeError, RunError
from smolmlx.models import open_model
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
