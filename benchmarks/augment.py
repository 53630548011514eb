"""How fast, and in how much memory, `data augment` makes rows when the model costs nothing.

    python benchmarks/augment.py --rows 300000

A stub in the process answers at once, so what is measured is everything around a model: planning, prompts, checks,
journal, published files. Prints rows, rows/s, and the peak memory of the process before and after.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from smolmlx.synth.augment import augment
from smolmlx.synth.jobs import Order, Workshop
from smolmlx.synth.runtimes import Reply, Request
from smolmlx.synth.store import ChunkStore
from smolmlx.tasks.registry import read_registry

ROWS_PER_CHUNK = 2.25
"""Seven tasks of probability 1/4, and what is taken from their answers: 7/4 + 1/4 + 1/8 + 1/8."""
WORDS = 500
CHUNKS_PER_DOCUMENT = 10
SPLITS = {"train": 0.8, "validation": 0.1, "test": 0.1}


class Stub:
    """A model that answers at once, always acceptably."""

    name, model, together, concurrency = "stub", "stub", 1, 64

    async def __aenter__(self) -> Stub:
        return self

    async def __aexit__(self, *exception: object) -> None:
        return None

    async def ask(self, requests: Sequence[Request]) -> list[Reply]:
        await asyncio.sleep(0)
        return [Reply(_answer(request), 700, 60) for request in requests]


def _answer(request: Request) -> str:
    (field, *others) = request.schema.model_fields
    line = f"What seed {request.seed} says of it, in a line of some length."
    item = {
        "bullets": [line, f"Again: {line}"],
        "pairs": [{"question": f"Why {request.seed}?", "answer": line}],
        "triplets": [{"subject": f"seed {request.seed}", "relation": "says", "object": "a line"}],
        "text": line * 20,
    }
    return json.dumps({"question": line, "why": line} if others else {field: item[field]})


def write_chunks(folder: Path, count: int) -> None:
    """Write chunks of random words, one file a split, whole documents in each."""
    dice = random.Random(0)
    vocabulary = [f"word{i}" for i in range(5000)]
    number = 0
    for split, share in SPLITS.items():
        with (folder / f"{split}.jsonl").open("w") as file:
            for i in range(max(2 * CHUNKS_PER_DOCUMENT, round(count * share))):
                document = f"{split}{i // CHUNKS_PER_DOCUMENT}"
                words = dice.choices(vocabulary, k=WORDS)
                text = " ".join(f"{word}." if k % 15 == 14 else word for k, word in enumerate(words))
                place = {"start": i % CHUNKS_PER_DOCUMENT * 400, "words": WORDS, "split": split}
                file.write(json.dumps({"id": f"chunk{number}", "text": text, "document": document, **place}) + "\n")
                number += 1


def peak_bytes() -> int:
    """Return the most memory this process has had; Linux counts in kilobytes, macOS in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=10_000)
    rows = parser.parse_args().rows
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_chunks(folder, round(rows / ROWS_PER_CHUNK))
        before = peak_bytes()
        began, cpu = time.perf_counter(), time.process_time()
        with ChunkStore(folder) as store:
            workshop = Workshop(store, read_registry(), Order(model="stub", runtime="stub"))
            made = augment(workshop, Stub(), folder / "rows")
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    print(
        f"{made.totals.rows:,} rows of {made.totals.jobs:,} jobs on {len(store):,} chunks: {seconds:.1f} s, "
        f"{cpu:.1f} s of CPU time, {made.totals.rows / seconds:,.0f} rows/s; peak memory {before / 1e6:.0f} MB before, {peak_bytes() / 1e6:.0f} MB after"
    )


if __name__ == "__main__":
    main()
