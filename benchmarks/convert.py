"""How fast an adapter converts beside a copy of the same bytes, and how much memory a merge takes.

    python benchmarks/convert.py                    # 160 MB adapter; Qwen2.5-1.5B's shape, 3 GB of disk twice
    python benchmarks/convert.py --layers 4         # a smaller merge

Weights are random. Each measurement is a process of its own; memory is its peak, mapped file pages included. Two limits
are judged, a line each: converting runs at half the speed of the copy or faster, and a merge takes less memory than the
model's size and 1 GB. The exit code is 1 where one is missed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from smolmlx.adapters import tensors
from smolmlx.adapters.convert import convert
from smolmlx.adapters.merge import merge
from smolmlx.adapters.tensors import Made
from smolmlx.models import llama_shapes, open_model

SHAPE = {  # Qwen2.5-1.5B without its biases
    "model_type": "llama", "vocab_size": 151_936, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
    "num_attention_heads": 12, "num_key_value_heads": 2, "tie_word_embeddings": True,
}  # fmt: skip


SHARE_OF_COPY = 0.5
SPARE_BYTES = 1_000_000_000


def noise(shape: tuple[int, ...], dtype: str) -> Made:
    """Small values, made when they are written: a million random ones over and over, since drawing more takes minutes."""

    def words() -> tensors.Words:
        values = np.random.default_rng(0).standard_normal(1 << 20, np.float32) * np.float32(0.02)
        return np.resize(tensors.from_floats(values, dtype), shape)

    return Made(dtype, shape, words)


def make_base(folder: Path, layers: int) -> None:
    folder.mkdir()
    config = {**SHAPE, "num_hidden_layers": layers, "torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    made = {name: noise(shape, "BF16") for name, shape in llama_shapes(config).items()}
    tensors.write(folder / "model.safetensors", made, {"format": "pt"})


def make_adapter(folder: Path, base: Path, rank: int, patterns: bool) -> None:
    """All linear layers of the blocks; with `patterns`, every module of one kind has a scale of its own."""
    folder.mkdir()
    made = {}
    for path, (width_in, width_out) in open_model(base).linear_shapes().items():
        made[f"base_model.model.{path}.lora_A.weight"] = noise((rank, width_in), "F32")
        made[f"base_model.model.{path}.lora_B.weight"] = noise((width_out, rank), "F32")
    tensors.write(folder / "adapter_model.safetensors", made, {"format": "pt"})
    targets = sorted({name.split(".")[-3] for name in made})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": targets}
    config |= {"base_model_name_or_path": str(base), "alpha_pattern": {"up_proj": 1.5 * rank} if patterns else {}}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def sync(folder: Path) -> None:
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def measure(job: str, source: Path, out: Path, base: Path) -> dict[str, float]:
    """Run one job in this process and return its seconds (by the clock, and of the CPU: they tell a busy machine) and memory."""
    began, cpu = time.perf_counter(), time.process_time()
    if job == "copy":
        shutil.copytree(source, out)
    elif job == "convert":
        convert(source, out)
    else:
        merge(open_model(base), [(source, 1.0)], out)
    sync(out)
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "cpu_seconds": time.process_time() - cpu, "peak_bytes": peak_bytes()}


def peak_bytes() -> int:
    """Return the largest resident size of this process, mapped file pages included.

    Linux hands ru_maxrss down from the parent that started a process, so there the process's own mark is read.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def apart(job: str, source: Path, out: Path, base: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--job", job, str(source), str(out), str(base)]
    found: dict[str, float] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return found


def judge(rows: list[dict[str, Any]]) -> list[tuple[str, bool]]:
    """Return each limit in words, with what was measured, and whether it is kept."""
    found = {row["job"]: row for row in rows}
    verdicts = []
    for kind in ("plain", "patterns"):
        share = found[f"convert, {kind}"]["bytes_per_second"] / found[f"copy, {kind}"]["bytes_per_second"]
        words = f"convert, {kind}: at least {SHARE_OF_COPY:.0%} of the copy's speed: {share:.0%}"
        verdicts.append((words, share >= SHARE_OF_COPY))
    merged = found["merge"]
    limit = merged["bytes"] + SPARE_BYTES
    words = f"merge: memory below the model's size and 1 GB, {limit / 1e6:.0f} MB: {merged['peak_bytes'] / 1e6:.0f} MB"
    return [*verdicts, (words, merged["peak_bytes"] < limit)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--rank", type=int, default=0, help="0: what makes 160 MB")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--job", nargs=4, metavar=("JOB", "SOURCE", "OUT", "BASE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job:
        job, *paths = arguments.job
        print(json.dumps(measure(job, *map(Path, paths))))
        return
    with tempfile.TemporaryDirectory(prefix="smolmlx-bench-") as name:
        folder = Path(name)
        make_base(folder / "base", arguments.layers)
        per_rank = sum(4 * (a + b) for a, b in open_model(folder / "base").linear_shapes().values())
        rank = arguments.rank or math.ceil(160e6 / per_rank)
        rows = []
        for kind in ("plain", "patterns"):
            make_adapter(folder / kind, folder / "base", rank, kind == "patterns")
            size = (folder / kind / "adapter_model.safetensors").stat().st_size
            for job in ("copy", "convert"):
                runs = []
                for repeat in range(arguments.repeats):
                    runs.append(apart(job, folder / kind, folder / f"out-{repeat}", folder / "base"))
                    shutil.rmtree(folder / f"out-{repeat}")
                best = min(runs, key=lambda run: run["seconds"])
                rows.append(
                    {"job": f"{job}, {kind}", "bytes": size, **best, "bytes_per_second": size / best["seconds"]}
                )
        merged = apart("merge", folder / "plain", folder / "merged", folder / "base")
        size = (folder / "base" / "model.safetensors").stat().st_size
        rows.append({"job": "merge", "bytes": size, **merged, "bytes_per_second": size / merged["seconds"]})
    print(f"{'job':<20}{'MB':>8}{'seconds':>10}{'CPU':>8}{'MB/s':>8}{'peak MB':>10}")
    for row in rows:
        print(
            f"{row['job']:<20}{row['bytes'] / 1e6:>8.0f}{row['seconds']:>10.2f}{row['cpu_seconds']:>8.2f}"
            f"{row['bytes_per_second'] / 1e6:>8.0f}{row['peak_bytes'] / 1e6:>10.0f}"
        )
    verdicts = judge(rows)
    for words, kept in verdicts:
        print(f"{'yes' if kept else 'no ':<5}{words}")
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    record = {"command": sys.argv, "machine": platform.platform(), "cpus": os.cpu_count(), "rank": rank, "rows": rows}
    record["limits"] = [{"limit": words, "kept": kept} for words, kept in verdicts]
    (results / f"convert-{stamp}.json").write_text(json.dumps(record, indent=1) + "\n")
    sys.exit(0 if all(kept for _, kept in verdicts) else 1)


if __name__ == "__main__":
    main()
