"""How long `smolmlx plan` takes, and how much memory, for a data set of N chat rows: tokenized from scratch, then from the cache.

    python benchmarks/plan.py 30000 300000

Rows of common words, about 120 tokens each; the embedded model's tokenizer. Each plan is a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import sft

PROMPT_WORDS, ANSWER_WORDS = 50, 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=int, nargs="*", default=[30_000, 300_000])
    options = parser.parse_args()
    print("| rows | file | tokenized | peak | from the cache | peak |\n|---|---|---|---|---|---|")
    for count in options.rows:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_rows(folder / "rows.jsonl", count)
            size = (folder / "rows.jsonl").stat().st_size
            first, again = plan(folder), plan(folder)
        cells = [
            f"{count:,}",
            f"{size / 1e6:.0f} MB",
            *(f for s, p in (first, again) for f in (f"{s:.1f} s", f"{p / 1e6:.0f} MB")),
        ]
        print(f"| {' | '.join(cells)} |", flush=True)


def write_rows(path: Path, count: int) -> None:
    rng = np.random.default_rng(0)
    with path.open("w", encoding="utf-8") as stream:
        for _ in range(count):
            words = rng.choice(sft.WORDS, PROMPT_WORDS + ANSWER_WORDS)
            sizes = rng.integers(5, [2 * PROMPT_WORDS - 5, 2 * ANSWER_WORDS - 5])
            texts = [
                " ".join(np.resize(part, size))
                for part, size in zip(np.split(words, [PROMPT_WORDS]), sizes, strict=True)
            ]
            turns = [{"role": role, "content": text} for role, text in zip(("user", "assistant"), texts, strict=True)]
            stream.write(json.dumps({"messages": turns}) + "\n")


def plan(folder: Path) -> tuple[float, int]:
    """Return the seconds and peak bytes of one `smolmlx plan`."""
    recipe = folder / "recipe.yaml"
    recipe.write_text(f"model: {{id: tiny}}\ndata: {{train: {folder}/rows.jsonl, max_length: 512}}\n", encoding="utf-8")
    place = {**os.environ, "SMOLMLX_CACHE": str(folder / "cache")}
    code = (
        "import resource, sys; from smolmlx.cli import main\n"
        "try: main()\n"
        "finally: print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)"
    )
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code, "plan", str(recipe), "--json"],
        env=place,
        capture_output=True,
        text=True,
        check=True,
    )
    unit = 1 if sys.platform == "darwin" else 1024
    return time.perf_counter() - start, int(done.stderr.split()[-1]) * unit


if __name__ == "__main__":
    main()
