"""Rows made through a server's batch endpoint: the same rows, paid for once, whatever happens on the way."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from openai_server import Behaviour, serving
from smolmlx.data.splits import Method
from smolmlx.errors import BackendError, RunError
from smolmlx.synth.augment import augment
from smolmlx.synth.batch import LEDGER, BatchRuntime
from smolmlx.synth.chunks import Cut, write_chunks
from smolmlx.synth.jobs import Order, Workshop
from smolmlx.synth.server import ServerRuntime
from smolmlx.synth.store import ChunkStore
from smolmlx.tasks.registry import read_registry

FILES = ("train.jsonl", "validation.jsonl", "test.jsonl")


@pytest.fixture(scope="module")
def chunks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("documents")
    for i in range(8):
        text = " ".join(f"Document {i} says in sentence {j} that sentence {j * i} follows." for j in range(60))
        (folder / f"{i}.txt").write_text(text)
    write_chunks([str(folder)], folder / "chunks", Cut(120, 20), Method(seed=1))
    return folder / "chunks"


@pytest.fixture
def work(chunks: Path) -> Iterator[Workshop]:
    with ChunkStore(chunks) as store:
        yield Workshop(store, read_registry(), Order(model="rule", runtime="server", seed=0))


def batches(url: str, folder: Path, together: int = 20, **how: Any) -> BatchRuntime:
    return BatchRuntime(url, "rule", folder, together=together, first_wait=0.02, retries=0, **how)


def rows(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in FILES if (folder / name).exists()]


@pytest.fixture
def plain(work: Workshop, tmp_path: Path) -> list[bytes]:
    """The rows that one request at a time makes."""
    with serving() as server:
        augment(work, ServerRuntime(server.url, "rule"), tmp_path / "plain")
    return rows(tmp_path / "plain")


def test_the_same_rows_as_one_by_one(work: Workshop, tmp_path: Path, plain: list[bytes]) -> None:
    notes: list[str] = []
    with serving(Behaviour(batch_seconds=0.1)) as server:
        augment(work, batches(server.url, tmp_path / "out", on_note=notes.append), tmp_path / "out")
        assert len(server.seen.batches) == len(notes) > 1
        assert set(server.seen.asked.values()) == {1}
    assert rows(tmp_path / "out") == plain != []


def test_an_interrupted_run_waits_for_its_batches_and_pays_for_none_twice(
    work: Workshop, tmp_path: Path, plain: list[bytes]
) -> None:
    out = tmp_path / "out"
    jobs = [job for job in work.jobs() if job.task != "continuation"][:20]
    requests = [request for job in jobs if (request := work.request(job, 0))]
    with serving(Behaviour(batch_seconds=1e9)) as server:

        async def interrupted() -> None:
            async with batches(server.url, out) as runtime:
                asking = asyncio.create_task(runtime.ask(requests))
                while not runtime.ledger.batch_of:
                    await asyncio.sleep(0.01)
                asking.cancel()
                await asyncio.gather(asking, return_exceptions=True)

        asyncio.run(interrupted())
        server.how.batch_seconds = 0.0
        with (out / LEDGER).open("ab") as stream:
            stream.write(b'{"batch": "batch-9", "requ')  # a kill in the middle of a line
        augment(work, batches(server.url, out), out)
        assert set(server.seen.asked.values()) == {1}
    assert rows(out) == plain


def test_requests_without_an_answer_are_sent_again(work: Workshop, tmp_path: Path, plain: list[bytes]) -> None:
    out = tmp_path / "out"
    with serving(Behaviour(unanswered=0.2)) as server:
        first = augment(work, batches(server.url, out), out)
        assert set(first.totals.failed) == {"http 500"}
        asked = server.seen.asked.total()
        second = augment(work, batches(server.url, out), out)
        assert not second.totals.failed
        assert server.seen.asked.total() == asked + first.totals.failed.total()  # the others are not asked again
    assert rows(out) == plain


@pytest.mark.parametrize("status", ["expired", "cancelled"])
def test_what_an_ended_batch_has_answered_counts(work: Workshop, tmp_path: Path, status: str) -> None:
    with serving(Behaviour(batch_status=status)) as server:
        result = augment(work, batches(server.url, tmp_path / "out"), tmp_path / "out")
    assert result.totals.rows and not result.totals.failed


def test_a_refused_batch_is_said_with_the_servers_reason(work: Workshop, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with serving(Behaviour(batch_status="failed")) as server:
        with pytest.raises(BackendError, match="told to fail"):
            augment(work, batches(server.url, out), out)
        server.how.batch_status = "completed"
        assert augment(work, batches(server.url, out), out).totals.rows


def test_servers_without_batches_and_without_an_answer(work: Workshop, tmp_path: Path) -> None:
    with serving(Behaviour(batches=False)) as server:
        with pytest.raises(BackendError, match="Leave --batch out"):
            augment(work, batches(server.url, tmp_path / "a"), tmp_path / "a")
        url = server.url
    with pytest.raises(RunError, match="goes on with the batches"):
        augment(work, batches(url, tmp_path / "b"), tmp_path / "b")


def test_command_line(chunks: Path, call: Callable[..., tuple[int, str, str]]) -> None:
    with serving() as server:
        code, out, err = call(
            "data", "augment", chunks, "out", "--server", server.url, "--batch", "--batch-requests", 30, "--json"
        )
        assert code == 0, err
        assert server.seen.batches and not server.seen.bodies
    assert json.loads(out)["rows"] > 0
    code, _, err = call("data", "augment", chunks, "out", "--model", "tiny", "--batch")
    assert code == 2 and "needs --server" in err
