"""One table: preference training with smolmlx's engines and with their peers, the same work for all.

    python benchmarks/dpo.py --shape smollm2-135m --steps 5 --repeats 1

128 pairs of about 300 prompt and 90 + 90 answer tokens, batches of 4, LoRA from new weights, so that the reference is the
base. Each contestant runs in a process of its own (benchmarks/peers/). See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sft import (
    HERE,
    WORDS,
    Contestant,
    command,
    commit,
    machine,
    make_folder,
    missing_modules,
    parse_common,
    run_contestant,
)

from smolmlx.data.chat import Tokenizer
from smolmlx.data.encode import Account, Encoding
from smolmlx.data.formats import open_source
from smolmlx.data.pairs import encode_pairs
from smolmlx.data.store import cache_folder

sys.path.insert(0, str(HERE / "peers"))

from job import Job

Tree = dict[str, Any]
RANK, ALPHA, BATCH, RATE, MAX_LENGTH, BETA = 16, 32.0, 4, 1e-5, 1024, 0.1
COLUMNS = ("", "s/step", "pairs/s", "s before the first step", "peak GB", "pairs/s ratio", "memory ratio")
CONTESTANTS = {
    "smolmlx-mlx": Contestant("smolmlx, MLX engine", "smolmlx_dpo.py", ("mlx_lm",), "mlx-lm-lora", {"engine": "mlx"}),
    "smolmlx-mlx-apart": Contestant(
        "smolmlx, MLX engine, prompts not shared", "smolmlx_dpo.py", ("mlx_lm",), "mlx-lm-lora", {"engine": "mlx", "shared": False}
    ),
    "mlx-lm-lora": Contestant("mlx-lm-lora", "mlx_lm_lora_dpo.py", ("mlx_lm_lora",), "mlx-lm-lora", apart=True),
    "mlx-tune": Contestant("mlx-tune", "mlx_tune_dpo.py", ("mlx_tune",), "mlx-lm-lora", apart=True),
    "smolmlx-cuda": Contestant("smolmlx, PyTorch engine", "smolmlx_dpo.py", ("trl",), "trl", {"engine": "cuda"}),
    "trl": Contestant("TRL, defaults, precomputed reference", "trl_dpo.py", ("trl", "peft"), "trl"),
}  # fmt: skip


def main() -> None:
    options = parse_options()
    work = cache_folder() / "benchmarks" / options.shape
    model = make_folder(options.shape, options.assets, work / "model")
    rows = make_pairs(options.pairs, model, work / f"pairs-{options.pairs}")
    report: Tree = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command("benchmarks/dpo.py"),
        "commit": commit(),
        "machine": machine(),
        "work": {"shape": options.shape, "pairs": options.pairs, "batch": BATCH, "rank": RANK, "beta": BETA},
        "skipped": {},
        "runs": [],
    }
    out = options.out or HERE / "results" / f"{datetime.date.today():%Y-%m-%d}-dpo-{options.shape}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    for repeat in range(options.repeats):
        for name in options.engines.split(","):
            missing = missing_modules(CONTESTANTS[name], options.peers_python)
            if missing:
                report["skipped"][name] = missing
                continue
            run = measure(name, model, rows, repeat, options)
            report["runs"].append(run)
            print({key: run.get(key) for key in ("contestant", "seconds_per_step", "peak_bytes", "error", "output")}, file=sys.stderr)  # fmt: skip
            out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    report["table"] = table([run for run in report["runs"] if "error" not in run], report)
    out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(report["table"])


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=128)
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each run")
    parser.add_argument("--warmup", type=int, default=2, help="first steps that are left out")
    parser.add_argument("--repeats", type=int, default=1, help="runs of each, with other seeds; medians count")
    options = parse_common(parser, CONTESTANTS)
    if options.device == "cuda":
        options.engines = ",".join(name for name in options.engines.split(",") if CONTESTANTS[name].rival == "trl")
    return options


def make_pairs(count: int, model: Path, folder: Path) -> Path:
    """Write pairs of common words as text, and as token ids for peers that take those; the same on every machine."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(89)
    (folder / "train.jsonl").write_text("".join(json.dumps(_pair(rng)) + "\n" for _ in range(count)), encoding="utf-8")
    source = open_source(str(folder / "train.jsonl"))
    rows = list(encode_pairs(source, Tokenizer(model), Encoding(MAX_LENGTH, "pair"), Account()))
    lines = [
        json.dumps({"chosen": chosen.ids, "rejected": rejected.ids})
        for chosen, rejected in zip(rows[::2], rows[1::2], strict=True)
    ]
    (folder / "ids.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def _pair(rng: np.random.Generator) -> Tree:
    """About 300 prompt tokens, 35 of them the template's, and two answers of about 90."""
    sizes = [int(np.clip(rng.normal(mean, mean / 5), mean / 2, 1.8 * mean)) for mean in (265, 90, 90)]
    prompt, chosen, rejected = (" ".join(rng.choice(WORDS, size)) for size in sizes)
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def measure(name: str, model: Path, rows: Path, repeat: int, options: argparse.Namespace) -> Tree:
    """Run one contestant in a fresh process and return what it recorded."""
    contestant = CONTESTANTS[name]
    with tempfile.TemporaryDirectory(prefix=f"bench-{name}-") as scratch:
        job = Job(
            model=str(model), rows=str(rows), held_out=[], scratch=scratch, steps=options.warmup + options.steps, batch_size=BATCH,
            learning_rate=RATE, rank=RANK, alpha=ALPHA, max_length=MAX_LENGTH, seed=repeat, device=options.device, dtype="float32",
            options={"beta": BETA, **contestant.options},
        )  # fmt: skip
        result = run_contestant(contestant, job, options)
    if "error" not in result:
        timed = result["seconds"][options.warmup :]
        result |= {"seconds_per_step": statistics.mean(timed), "pairs_per_second": BATCH * len(timed) / sum(timed)}
    return {"contestant": name, "repeat": repeat, **result}


def table(runs: Sequence[Mapping[str, Any]], report: Tree) -> str:
    """Return the Markdown table: medians over the runs, and ratios to each one's rival."""
    found: dict[str, Tree] = {}
    for name in dict.fromkeys(run["contestant"] for run in runs):
        own = [run for run in runs if run["contestant"] == name]
        keys = ("seconds_per_step", "pairs_per_second", "reference_seconds", "peak_bytes")
        found[name] = {key: statistics.median(run[key] or 0.0 for run in own) for key in keys}
    work, place = report["work"], report["machine"]
    lines = [
        f"{work['shape']}, {work['pairs']} pairs, batch {work['batch']}, LoRA r {work['rank']}, float32. {place['cpu']}, "
        f"{place['cores']} cores, load {place['load']:.1f}. {report['date'][:10]}.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        f"|{'---|' * len(COLUMNS)}",
    ]
    for name, row in found.items():
        rival = found.get(CONTESTANTS[name].rival)
        ratios = [
            f"{row[key] / rival[key]:.2f}x {CONTESTANTS[name].rival}" if rival else "-"
            for key in ("pairs_per_second", "peak_bytes")
        ]
        cells = [
            CONTESTANTS[name].label, f"{row['seconds_per_step']:.2f}", f"{row['pairs_per_second']:.3f}", f"{row['reference_seconds']:.1f}",
            f"{row['peak_bytes'] / 1e9:.2f}", *ratios,
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    lines += [f"\nSkipped: {name} ({why})." for name, why in report["skipped"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
