"""mlx-lm's own server with the embedded model behind `data augment`: a server we did not write."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

import lab as labs
from smolmlx.models import embedded_folder
from smolmlx.synth.augment import augment
from smolmlx.synth.jobs import Order, Workshop
from smolmlx.synth.server import Limits, ServerRuntime
from smolmlx.synth.store import ChunkStore
from smolmlx.tasks.registry import BUILT_IN, read_registry

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


def test_rows_through_mlx_lm(url: str, tmp_path: Path) -> None:
    rows = [{"text": ". ".join(labs.sentence(7 * i + k) for k in range(9)) + ".", "document": str(i)} for i in range(5)]
    (tmp_path / "chunks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tasks.yaml").write_text(
        BUILT_IN.read_text().replace("max_tokens: 600", "max_tokens: 24\n    probability: 1\n    min_words: 5")
    )
    with ChunkStore(tmp_path / "chunks.jsonl") as store:
        runtime = ServerRuntime(url, str(embedded_folder()), limits=Limits(concurrency=2, timeout=600))
        assert runtime.find_model() == str(embedded_folder())
        order = Order(("bullets",), model=runtime.model, runtime="server")
        made = Workshop(store, read_registry(tmp_path / "tasks.yaml"), order)
        first = augment(made, runtime, tmp_path / "out")
        again = augment(made, runtime, tmp_path / "again")
    totals = first.totals
    assert totals.done == totals.jobs == 5 and not totals.failed and totals.accepted + totals.rejected.total() == 5
    assert totals.prompt_tokens > 5 * 40 and totals.completion_tokens > 0
    assert again.totals.jobs == 5 and runtime.traffic.requests >= 10
