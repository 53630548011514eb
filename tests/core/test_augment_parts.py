"""What augmentation is made of: excerpts, the journal, the store of chunks, and an engine in this process."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest

import lab as labs
from augment_work import always, prose, published
from smolmlx.backend import Loading, choose
from smolmlx.data.chat import Tokenizer
from smolmlx.errors import BackendError, DataError, RunError
from smolmlx.models import open_model
from smolmlx.synth.augment import Totals, augment
from smolmlx.synth.jobs import GAP, Order, Workshop, excerpt, take_out
from smolmlx.synth.journal import Journal, Record
from smolmlx.synth.notes import Dice
from smolmlx.synth.runtimes import TOO_LONG, LocalRuntime
from smolmlx.synth.store import ChunkStore
from smolmlx.tasks.registry import Registry, read_registry


def test_excerpts_and_gaps() -> None:
    text = prose(3, 40)
    for i in range(50):
        part = excerpt(text, 60, Dice(i))
        assert part in text and 40 <= len(part.split()) <= 60 and part.endswith(".")
        for style, portion in (("tail10", 0.1), ("tail20", 0.2), ("infill", 0.1)):
            rest, taken = take_out(text, style, Dice(i))
            assert len(taken.split()) == round(portion * len(text.split()))
            whole = rest.replace(GAP, taken) if style == "infill" else f"{rest} {taken}"
            assert whole.split() == text.split()
    assert excerpt("short text", 60, Dice(0)) == "short text"
    assert len(excerpt("word " * 200, 60, Dice(0)).split()) == 60


def test_an_engine_in_this_process(tiny_model: Path, tmp_path: Path) -> None:
    """The numpy engine on random weights: nothing it writes is of use, and all of it is asked, read and counted."""
    rows = [{"text": prose(i, 1 + i % 2), "document": str(i)} for i in range(6)]
    (tmp_path / "chunks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree = always(read_registry()).model_dump(by_alias=True)
    for spec in tree["tasks"].values():
        spec |= {"max_tokens": 24, "min_words": 5}
    tokenizer, base = Tokenizer(tiny_model), open_model(tiny_model)
    with labs.toy_installed(), ChunkStore(tmp_path / "chunks.jsonl") as store:
        generator = choose("toy", "cpu").backend.generator(base, None, tokenizer, Loading("cpu"))
        made = Workshop(
            store, Registry.model_validate(tree), Order(("bullets", "rephrase"), model="tiny", runtime="local")
        )
        results = [
            augment(made, LocalRuntime(generator, tokenizer, "tiny", batch_size=size), tmp_path / f"out{i}")
            for i, size in enumerate((4, 3))
        ]
        seen: list[int] = []

        def stop_early(totals: Totals) -> None:
            seen.append(totals.done)
            if totals.done == 5:
                raise RunError("stopped")

        with pytest.raises(RunError, match="stopped"):
            local = LocalRuntime(generator, tokenizer, "tiny", batch_size=4)
            augment(made, local, tmp_path / "out2", on_progress=stop_early)
        journal = tmp_path / "out2" / "journal.jsonl"
        assert seen == [0, 1, 2, 3, 4, 5] and len(journal.read_text().splitlines()) == 5  # each kept as it ended
        augment(made, LocalRuntime(generator, tokenizer, "tiny", batch_size=4), tmp_path / "out2")
        broken = LocalRuntime(generator, tokenizer, "tiny", batch_size=4)
        with (
            pytest.raises(BackendError, match="no memory"),
            mock.patch.object(generator.batcher(1).__class__, "run", side_effect=BackendError("no memory")),
        ):
            augment(made, broken, tmp_path / "broken")
        short = LocalRuntime(generator, tokenizer, "tiny", context=40)
        too_long = augment(made, short, tmp_path / "short")
    assert published(tmp_path / "out0") == published(tmp_path / "out1") == published(tmp_path / "out2")
    totals = results[0].totals
    assert totals.done == totals.jobs == 12 and totals.prompt_tokens > 500 and totals.completion_tokens > 12
    assert totals.attempts_refused["cut off"] > 0
    assert dict(too_long.totals.rejected) == {TOO_LONG: 12}


def test_the_benchmark_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "augment.py"
    monkeypatch.setattr(sys, "argv", [path.name, "--rows", "50"])
    runpy.run_path(str(path), run_name="__main__")
    assert "rows/s" in capsys.readouterr().out


def test_journal(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path, 3) as journal:
        journal.append(Record(1, "b", "failed", reasons=["time-out"]))
        journal.append(Record(1, "b", "accepted", [{"x": "é"}], ["empty"], 3, 4))
        journal.append(Record(0, "a", "rejected", reasons=["empty", "cut off"]))
        with pytest.raises(RunError, match="another process is writing here"):
            Journal(path, 3)
    with path.open("ab") as file:
        file.write(b'{"job": 2, "key": "c", "sta')
    with Journal(path, 3) as journal:
        assert [journal.is_done(n) for n in range(3)] == [True, True, False]
        assert [(r.number, r.state, list(r.rows)) for r in journal.records()] == [
            (0, "rejected", []),
            (1, "accepted", [{"x": "é"}]),
        ]
        journal.append(Record(2, "c", "accepted"))
    assert path.read_bytes().count(b"\n") == 4
    with pytest.raises(RunError, match="names job 2 of 2"):
        Journal(path, 2)
    path.write_bytes(b"oops\n")
    with pytest.raises(RunError, match="a line is broken"):
        Journal(path, 2)


def test_store_refuses_what_is_no_chunk(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "one two"}\n\n{"text": "three", "split": "test"}\n')
    with ChunkStore(tmp_path / "rows.jsonl") as store:
        assert [(c.document, c.split, c.words) for c in map(store.__getitem__, range(2))] == [
            ("rows.jsonl:1", "train", 2),
            ("rows.jsonl:3", "test", 1),
        ]
    for text, says in [
        ("{}\n", "has a field `text`"),
        ("{", "not valid JSON"),
        ("", "no chunks"),
        ('{"text":"a","split":"x"}', "unknown split"),
        ('{"text":"a"}\n{"text":"a","start":"abc"}', r"rows.jsonl:2: start 'abc': expected a number of words"),
        ('{"text":"a","words":-1}', r"rows.jsonl:1: words -1: expected"),
        (
            '{"text":"a","id":"x"}\n{"text":"b"}\n{"text":"c","id":"x"}',
            r"jsonl:3: chunk id 'x' is that of .*jsonl:1 too",
        ),
        (
            '{"text":"a","document":"d","split":"train"}\n{"text":"b","document":"d","split":"test"}',
            r"jsonl:2: document 'd' is in split 'test' here and in 'train' at .*jsonl:1",
        ),
    ]:
        (tmp_path / "rows.jsonl").write_text(text)
        with pytest.raises(DataError, match=says):
            ChunkStore(tmp_path / "rows.jsonl")
    with pytest.raises(DataError, match="no such file or folder"):
        ChunkStore(tmp_path / "none")


def test_print_tasks(tmp_path: Path, call: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = call("data", "augment", "--print-tasks")
    (tmp_path / "mine.yaml").write_text(out)
    assert code == 0 and read_registry(tmp_path / "mine.yaml").prompt_version == read_registry().prompt_version
    (tmp_path / "mine.yaml").write_text(out.replace("smolmlx-research", "mine"))
    code, out, _ = call("data", "augment", "--print-tasks", "--tasks-file", tmp_path / "mine.yaml")
    assert code == 0 and "name: mine" in out
