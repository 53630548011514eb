"""`smolmlx serve` on loopback, asked by OpenAI's own client; the page in it; what it refuses."""

from __future__ import annotations

import http.client
import json
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import lab as labs
import smolmlx
from smolmlx.tasks.schemas import Triplets

openai = pytest.importorskip("openai")
pytest.importorskip("uvicorn")


def start(log: Path, *arguments: str) -> tuple[subprocess.Popen[bytes], str]:
    """Start the server on a free port and return it with its address."""
    with log.open("wb") as file:
        process = subprocess.Popen([sys.executable, "-m", "smolmlx", "serve", "--port", "0", *arguments], stderr=file)
    for _ in range(1200):
        if found := re.search(r"(http://\S+)/v1", log.read_text()):
            return process, found[1]
        assert process.poll() is None, log.read_text()
        time.sleep(0.1)
    process.kill()
    process.wait()
    raise AssertionError(f"the server did not start: {log.read_text()}")


@pytest.fixture(scope="module", params=["mlx", "cuda"])
def server(request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if (reason := labs.why_missing(request.param)) is not None:
        pytest.skip(reason)
    log = tmp_path_factory.mktemp("serve") / "log"
    process, address = start(log, "--model", str(tiny_model), "--backend", request.param, "--device", "cpu")
    try:
        yield address
    finally:
        process.send_signal(signal.SIGINT)
        try:
            code = process.wait(120)
        finally:
            process.kill()
    assert code in (0, 130), log.read_text()
    assert "Traceback" not in log.read_text()


@pytest.fixture
def client(server: str) -> Iterator[object]:
    with openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0) as made:
        yield made


def ask(client: object, text: str = "red apple", **options: object) -> object:
    (name, *_) = [model.id for model in client.models.list()]  # type: ignore[attr-defined]
    made = client.chat.completions.create  # type: ignore[attr-defined]
    return made(model=name, messages=[{"role": "user", "content": text}], **{"max_tokens": 12, **options})


def test_answers_as_the_library_does(client: object, tiny_model: Path) -> None:
    found = ask(client)
    model = smolmlx.load(tiny_model, device="cpu")
    assert found.choices[0].message.content.strip() == model.generate(["red apple"], max_tokens=12)[0]
    assert found.usage.completion_tokens == 12 and found.choices[0].finish_reason == "length"


def test_streams_what_it_answers(client: object) -> None:
    whole = ask(client, temperature=1.0, seed=3, max_tokens=20)
    chunks = list(
        ask(client, temperature=1.0, seed=3, max_tokens=20, stream=True, stream_options={"include_usage": True})
    )
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == whole.choices[0].message.content and sum(map(bool, pieces)) > 3
    assert chunks[-1].usage.completion_tokens == 20


def test_keeps_to_a_schema(client: object) -> None:
    form = {
        "type": "json_schema",
        "json_schema": {"name": "triplets", "strict": True, "schema": Triplets.model_json_schema()},
    }
    for seed in range(3):
        found = ask(client, response_format=form, max_tokens=80, temperature=1.0, seed=seed)
        Triplets.model_validate_json(found.choices[0].message.content)
    assert ask(client, extra_body={"choice": ["yes", "no"]}).choices[0].message.content in ("yes", "no")
    assert isinstance(json.loads(ask(client, response_format={"type": "json_object"}).choices[0].message.content), dict)


def test_requests_that_come_together_are_answered_alike(client: object) -> None:
    alone = [ask(client, text).choices[0].message.content for text in labs.WORDS]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda text: ask(client, text).choices[0].message.content, labs.WORDS))
    assert together == alone


def test_several_choices_and_plain_completions(client: object) -> None:
    found = ask(client, n=3, temperature=1.0, seed=1)
    assert len({choice.message.content for choice in found.choices}) > 1
    plain = client.completions.create(model="default", prompt=["red", "two plums"], max_tokens=5)  # type: ignore[attr-defined]
    assert [choice.index for choice in plain.choices] == [0, 1]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"frequency_penalty": 1.0}, "frequency_penalty"),
        ({"extra_body": {"beams": 4}}, "beams"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}}}, "not"),
        ({"top_p": 3.0}, "top_p"),
        ({"messages": []}, "messages"),
    ],
)
def test_refuses_by_name(client: object, options: dict[str, object], named: str) -> None:
    with pytest.raises(openai.BadRequestError, match=named):
        ask(client, **options) if "messages" not in options else client.chat.completions.create(
            model="default", **options
        )  # type: ignore[attr-defined]


def test_refuses_models_that_it_does_not_serve(client: object, tiny_model: Path) -> None:
    with pytest.raises(openai.NotFoundError, match=re.escape(str(tiny_model))):
        client.completions.create(model="gpt", prompt="x")  # type: ignore[attr-defined]


@pytest.mark.parametrize("stream", [False, True])
def test_clients_that_leave_go_unnoticed(server: str, client: object, stream: bool) -> None:
    """The server ends without a traceback in its log, see its fixture; tests/core counts what it still works."""
    body = {"model": "default", "prompt": "red", "n": 24, "max_tokens": 400, "temperature": 1.0, "stream": stream}
    connection = http.client.HTTPConnection(server.removeprefix("http://"))
    connection.request("POST", "/v1/completions", json.dumps(body))
    time.sleep(0.3)
    connection.close()
    ask(client, max_tokens=4)
    time.sleep(1.5)  # the server looks once a second


@pytest.mark.parametrize("stream", [False, True])
def test_ctrl_c_ends_the_answers_under_way(tiny_model: Path, tmp_path: Path, stream: bool) -> None:
    """Clients are told in JSON, and whoever runs the server in one line."""
    log = tmp_path / "log"
    process, address = start(log, "--model", str(tiny_model), "--device", "cpu")
    try:
        # 1,024 answers of 500 tokens for 32 places: far more than the 5 s that uvicorn would wait for
        body = {"prompt": ["red"] * 8, "n": 128, "max_tokens": 500, "temperature": 1.0, "stream": stream}
        connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=60)
        connection.request("POST", "/v1/completions", json.dumps(body))
        time.sleep(1.0)
        process.send_signal(signal.SIGINT)
        response = connection.getresponse()
        answer = response.read().decode()
        connection.close()
        assert process.wait(60) == 130, log.read_text()
    finally:
        process.kill()
        process.wait()
    if stream:
        answer = answer.strip().split("\n\n")[-1].removeprefix("data: ")
    assert response.status == (200 if stream else 503)
    assert json.loads(answer)["error"]["message"] == "the server is shutting down."
    assert log.read_text().partition("Ctrl-C ends it.")[2].split() == ["Interrupted."]


def test_shows_a_model_by_its_name(client: object, tiny_model: Path) -> None:
    found = client.models.retrieve(str(tiny_model))  # type: ignore[attr-defined]
    assert found.id == str(tiny_model)
    with pytest.raises(openai.NotFoundError, match="not served here"):
        client.models.retrieve("gpt")  # type: ignore[attr-defined]


def test_page_loads_nothing_from_elsewhere(server: str) -> None:
    with urllib.request.urlopen(f"{server}/") as reply:
        page = reply.read().decode()
    assert "smolmlx" in page and not re.search(r"(src|href)=|https?://|@import", page)


def test_port_in_use(server: str, call: object) -> None:
    port = server.rpartition(":")[2]
    code, _, err = call("serve", "--model", "tiny", "--port", port)  # type: ignore[operator]
    assert code == 3 and "Choose another --port" in err


@pytest.mark.parametrize("host", ["999.1.1.1", "203.0.113.7", "ä" * 70])
def test_host_that_is_none(call: object, host: str) -> None:
    code, _, err = call("serve", "--model", "tiny", "--host", host)  # type: ignore[operator]
    assert code == 2 and f"--host {host}: " in err and "--port" not in err


def test_drives_data_augment(server: str, tmp_path: Path) -> None:
    """What comes back keeps to the task's schema: an answer is refused for its length at most, never for its form."""
    from smolmlx.synth.augment import augment
    from smolmlx.synth.jobs import Order, Workshop
    from smolmlx.synth.server import Limits, ServerRuntime
    from smolmlx.synth.store import ChunkStore
    from smolmlx.tasks.registry import BUILT_IN, read_registry

    rows = [{"text": ". ".join(labs.sentence(7 * i + k) for k in range(9)) + ".", "document": str(i)} for i in range(5)]
    (tmp_path / "chunks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = BUILT_IN.read_text().replace("max_tokens: 400", "max_tokens: 90\n    probability: 1\n    min_words: 5", 1)
    (tmp_path / "tasks.yaml").write_text(text)
    with ChunkStore(tmp_path / "chunks.jsonl") as store:
        runtime = ServerRuntime(f"{server}/v1", "default", limits=Limits(concurrency=5, timeout=300))
        made = Workshop(
            store, read_registry(tmp_path / "tasks.yaml"), Order(("triplets",), model="tiny", runtime="server")
        )
        totals = augment(made, runtime, tmp_path / "out").totals
    assert totals.done == totals.jobs == 5 and not totals.failed
    assert totals.accepted + totals.rejected.total() == 5
    assert set(totals.rejected) <= {"cut off", "repeated item", "empty"}
