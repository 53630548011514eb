"""CPU seconds and peak memory of `smolmlx data dedupe` and `data audit` over made rows.

    python benchmarks/overlap.py 50000 100000

A tenth of the inputs is repeated and a tenth nearly so; the audit's held-out file has a tenth as many rows. Each command
runs in a process of its own.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

WORDS = [f"w{i}" for i in range(5000)]
RUN = """
import resource, sys, time
from smolmlx.cli import main
began = time.perf_counter()
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
used = resource.getrusage(resource.RUSAGE_SELF)
unit = 1e6 if sys.platform == "darwin" else 1e3
print(f"{time.perf_counter() - began:.1f} s, {used.ru_utime + used.ru_stime:.1f} s of CPU, {used.ru_maxrss / unit:.0f} MB", file=sys.stderr)
"""


def write_rows(path: Path, count: int, repeat: bool) -> Path:
    rng = random.Random(count)
    last = ""
    with path.open("w") as file:
        for i in range(count):
            text = " ".join(rng.choices(WORDS, k=60))
            if repeat and i % 10 in (1, 2):
                text = last if i % 10 == 1 else f"{last[:-3]}zz"
            last = text
            file.write(json.dumps({"prompt": text, "completion": " ".join(rng.choices(WORDS, k=30))}) + "\n")
    return path


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for count in map(int, sys.argv[1:]):
            train = write_rows(Path(folder) / "train.jsonl", count, True)
            test = write_rows(Path(folder) / "test.jsonl", count // 10, False)
            for words in (["dedupe", train, Path(folder) / "out.jsonl", "--on", "input"], ["audit", train, test]):
                done = subprocess.run(
                    [sys.executable, "-c", RUN, "data", *words], capture_output=True, text=True, check=True
                )
                print(f"{count:>9,} rows  data {words[0]:<7} {done.stderr.splitlines()[-1]}")


if __name__ == "__main__":
    main()
