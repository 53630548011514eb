"""What each trick of the MLX engine on a CPU is worth: the same training step with one of them taken away at a time.

    python benchmarks/mlx_cpu.py --layers 8 --steps 4 --repeats 3

SmolLM2-135M's shape with fewer layers, random weights, 4 rows of 368 tokens (or --tokens) with 64 supervised each, LoRA r 16 on all linear layers,
float32. Each line is a process of its own; lines are interleaved, medians count. Prints a table and writes it to results/.
"""

from __future__ import annotations

import argparse
import datetime
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from smolmlx.data.batches import Batch
from smolmlx.models import make_model
from smolmlx.recipe import Train

HERE = Path(__file__).resolve().parent
ROWS, SUPERVISED, RANK, SCALE = 4, 64, 16, 2.0
SHAPE = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 2048,
    "rope_theta": 100000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
VARIANTS = {
    "all of them": "",
    "rows on one core (BLAS on all)": "lanes",
    "MLX's own exp, softmax, SiLU": "math",
    "arrays of both lanes of one rank": "ranks",
    "MLX's own rotary positions": "rotary",
    "attention in one block": "blocks",
    "feed-forward's product kept": "product",
    "vocabulary in parts": "columns",
    "logits of 8 MB a piece (16)": "pieces16",
    "logits of 8 MB a piece (4)": "pieces4",
    "freed memory back to the kernel": "memory",
    "loss and its gradient apart": "slope",
    "adapters' gradients early": "lora",
    "not compiled": "compile",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4, help="timed steps, after one that compiles")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=368, help="of a row")
    parser.add_argument("--without", help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.model:
        print(json.dumps(measure(options.model, options.without, options.steps, options.tokens)))
        return
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in VARIANTS}
    with tempfile.TemporaryDirectory() as folder:
        make_model({**SHAPE, "num_hidden_layers": options.layers}, Path(folder), seed=0)
        for _ in range(options.repeats):
            for name, without in VARIANTS.items():
                command = [
                    sys.executable,
                    __file__,
                    "--model",
                    folder,
                    "--without",
                    without,
                    "--steps",
                    str(options.steps),
                    "--tokens",
                    str(options.tokens),
                ]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                runs[name].append(json.loads(done.stdout.splitlines()[-1]))
                print(name, runs[name][-1], file=sys.stderr)
    page = table(runs, options)
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / f"{datetime.date.today():%Y-%m-%d}-mlx-cpu.md").write_text(page, encoding="utf-8")
    print(page)


def table(runs: dict[str, list[dict[str, float]]], options: argparse.Namespace) -> str:
    import sft

    place = sft.machine()
    medians = {
        name: {key: statistics.median(run[key] for run in found) for key in found[0]} for name, found in runs.items()
    }
    whole = medians["all of them"]
    lines = [
        f"{options.layers} layers, {options.repeats} runs of {options.steps} steps. {place['cpu']}, {place['cores']} cores, load {place['load']:.1f} at the end, "
        f"{datetime.date.today()}, commit {sft.commit()}.",
        f"`python benchmarks/mlx_cpu.py --layers {options.layers} --steps {options.steps} --repeats {options.repeats} --tokens {options.tokens}`",
        "",
        "| without | s/step | times as long | peak GB | loss |",
        "|---|---|---|---|---|",
    ]
    for name, row in medians.items():
        ratio = row["seconds"] / whole["seconds"]
        lines.append(
            f"| {'-' if row is whole else name} | {row['seconds']:.2f} | {ratio:.2f} | {row['peak_bytes'] / 1e9:.2f} | {row['loss']:.6f} |"
        )
    return "\n".join(lines) + "\n"


def measure(folder: Path, without: str, steps: int, tokens: int) -> dict[str, Any]:
    """Return the median time of a step, the peak memory of this process, and the last loss."""
    from smolmlx import memory
    from smolmlx_mlx import blas

    if without == "memory":
        memory.keep_freed = lambda: None
    blas.ensure()
    import mlx.core as mx
    from mlx import nn
    from mlx.utils import tree_flatten

    from smolmlx_mlx import cpu_math, lanes, losses, model, step
    from smolmlx_mlx.optimizer import Optimizer

    if without == "math":
        model.use_fast_math = lambda _: None
    if without == "ranks":
        cpu_math.lane_here = lambda: 0
    if without == "rotary":
        cpu_math._Rope.__call__ = nn.RoPE.__call__  # type: ignore[method-assign]
    if without == "blocks":
        cpu_math._BLOCK = 1 << 30
    if without == "product":
        cpu_math._is_same = lambda one, other: False
    if without.startswith("pieces"):
        losses._CPU_PIECE = int(without.removeprefix("pieces")) << 20
    if without == "columns":
        losses.Losses._by_columns = lambda _: False  # type: ignore[method-assign]
    if without == "slope":
        losses.Losses._head_is_frozen = lambda _: False  # type: ignore[method-assign]
    if without == "lora":
        model.EagerLoRALinear = model.LoRALinear
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    net = model.load_base(folder, config, "float32", "none")
    mx.random.seed(0)
    targets = {path: None for path, _ in net.named_modules() if path.endswith("_proj")}
    model.add_lora(net, targets, RANK, SCALE)
    net.train()
    parameters = net.trainable_parameters()
    assert tree_flatten(parameters)
    spread = None if without == "lanes" else lanes.open_lanes(ROWS)
    objective = losses.Losses(net, spread)
    stepper = step.Stepper(net, Optimizer(parameters, Train()), without != "compile", objective)
    batch, seconds, loss = make_batch(tokens), [], 0.0
    inputs, count = losses.to_inputs(batch), float(batch.num_supervised)
    for _ in range(steps + 1):
        start = time.perf_counter()
        loss = float(stepper.step([inputs], count, 1e-4)[0].item())
        mx.eval(net.trainable_parameters())
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": statistics.median(seconds[1:]), "peak_bytes": peak, "loss": loss}


def make_batch(tokens: int) -> Batch:
    ids = np.random.default_rng(0).integers(10, SHAPE["vocab_size"], (ROWS, tokens)).astype(np.int32)
    ends = np.arange(tokens - SUPERVISED - 1, tokens - 1)
    index = np.concatenate([row * tokens + ends for row in range(ROWS)]).astype(np.int32)
    labels = ids.reshape(-1)[index + 1]
    empty = np.zeros_like(ids)
    return Batch(ids, empty, empty + 1, empty, index, labels, np.ones(len(index), np.float32), packed=False)


if __name__ == "__main__":
    main()
