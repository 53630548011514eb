"""mlx-lm's own server with the embedded model behind `data augment`: a server we did not write."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

import lab as labs
from smolmlx.models import embedded_folder
from smolmlx.synth.augment import augment
from smolmlx.synth.jobs import Order, Workshop
from smolmlx.synth.server import Limits, ServerRuntime
from smolmlx.synth.store import ChunkStore
from smolmlx.tasks.registry import Registry, read_registry

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    if reason := labs.why_missing("mlx"):
        pytest.skip(reason)
    if not (embedded_folder() / "model.safetensors").is_file():
        pytest.skip("the embedded model has no weights in this checkout")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlx_lm", "server", "--model", str(embedded_folder()), "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ})
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5).close()
                break
            except OSError:
                assert process.poll() is None, "mlx_lm.server ended before it answered"
                time.sleep(0.5)
        yield f"{address}/v1"
    finally:
        process.terminate()
        process.wait()


TROUBLES = {2: "500", 4: "429", 5: "hang", 7: "500", 9: "429", 11: "500"}
"""Number of a request, from 1 -> what the proxy does to it."""
AT_ONCE, TIMEOUT = 3, 15.0
TASKS = ("bullets", "triplets", "rephrase")


class _Handler(BaseHTTPRequestHandler):
    server: _Proxy

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        with urllib.request.urlopen(f"{self.server.origin}{self.path}", timeout=60) as answer:
            self._send(answer.status, answer.read())

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers["content-length"]))
        with self.server.counting:
            self.server.requests += 1
            self.server.at_once += 1
            self.server.most_at_once = max(self.server.most_at_once, self.server.at_once)
            trouble = TROUBLES.get(self.server.requests, "none")
            self.server.troubles[trouble] += 1
        answer = b"{}"
        if trouble == "none":
            headers = {"content-type": "application/json"}
            asked = urllib.request.Request(f"{self.server.origin}{self.path}", data, headers)
            with urllib.request.urlopen(asked, timeout=600) as response:
                answer = response.read()
        elif trouble == "hang":
            self.connection.recv(1)  # until the client gives up
        with self.server.counting:  # before the client knows, who may then begin its next
            self.server.at_once -= 1
        if trouble != "hang":
            self._send(
                200 if trouble == "none" else int(trouble), answer, {"Retry-After": "0.5"} if trouble == "429" else {}
            )

    def _send(self, status: int, data: bytes, headers: Mapping[str, str] = MappingProxyType({})) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)


class _Proxy(ThreadingHTTPServer):
    """Stands in front of a server, makes trouble, and counts."""

    daemon_threads = True

    def __init__(self, origin: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.origin, self.url = origin, f"http://127.0.0.1:{self.server_address[1]}/v1"
        self.requests = self.at_once = self.most_at_once = 0
        self.troubles: Counter[str] = Counter()
        self.counting = threading.Lock()


@pytest.fixture
def proxy(url: str) -> Iterator[_Proxy]:
    server = _Proxy(url.removesuffix("/v1"))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def greedy() -> Registry:
    """Return the tasks for every chunk, with answers that are always the same; what the embedded model was taught to do."""
    tree = read_registry().model_dump(by_alias=True)
    for name in TASKS:
        asked = {
            "instructions": ["Make three bullets from this text."],
            "hints": {},
            "body": "{passage}",
            "maker": None,
        }
        tree["tasks"][name] |= {"max_tokens": 160, "min_words": 5, "probability": 1.0, "temperature": 0.0, **asked}
    return Registry.model_validate(tree)


def test_rows_through_mlx_lm_in_trouble_are_those_of_a_calm_run(url: str, proxy: _Proxy, tmp_path: Path) -> None:
    notes = Path(__file__).resolve().parents[2] / "data" / "notes" / "validation.jsonl"
    passages = [json.loads(line)["input"] for line in notes.read_text(encoding="utf-8").splitlines()[:3]]
    rows = [{"text": passage, "document": str(i)} for i, passage in enumerate(passages)]
    (tmp_path / "chunks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rough = ServerRuntime(proxy.url, str(embedded_folder()), limits=Limits(AT_ONCE, TIMEOUT, retries=12))
    calm = ServerRuntime(url, str(embedded_folder()), limits=Limits(1, 600))
    assert rough.find_model() == str(embedded_folder())
    with ChunkStore(tmp_path / "chunks.jsonl") as store:
        order = Order(TASKS, model=calm.model, runtime="server")
        made = Workshop(store, greedy(), order)
        found = [
            augment(made, runtime, tmp_path / name, attempts=1) for name, runtime in (("rough", rough), ("calm", calm))
        ]
    totals = found[0].totals
    assert totals.done == totals.jobs == totals.accepted + totals.rejected.total() == 9 and not totals.failed
    assert totals.accepted >= 1
    done = [json.loads(line)["job"] for line in (tmp_path / "rough" / "journal.jsonl").read_text().splitlines()]
    assert sorted(done) == list(range(9))  # each once
    assert {"hang": 1, "500": 3, "429": 2}.items() <= proxy.troubles.items()
    assert rough.traffic.retries["http 500"] == 3 and rough.traffic.retries["http 429"] == 2
    assert rough.traffic.retries["time-out"] >= 1  # more on a machine that is very busy
    assert 1 < proxy.most_at_once <= AT_ONCE + rough.traffic.retries["time-out"] - 1
    for name in ("train.jsonl", "manifest.json"):
        assert (tmp_path / "rough" / name).read_bytes() == (tmp_path / "calm" / name).read_bytes()
