"""One table: supervised fine-tuning with smolmlx's engines and with their peers, the same work for all.

    python benchmarks/sft.py --shape smollm2-135m --steps 8 --repeats 3

Each contestant runs in a process of its own (benchmarks/peers/), so its peak memory is its own. What is the same for
all, and what cannot be, is written in benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from smolmlx.data.chat import Encoded, Tokenizer
from smolmlx.data.encode import Account, Encoding, encode_rows
from smolmlx.data.formats import open_source
from smolmlx.data.store import cache_folder
from smolmlx.models import make_model

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "peers"))

from job import Job  # noqa: E402 - from peers/, which other environments run too

Tree = dict[str, Any]
RANK, ALPHA, BATCH, RATE, MAX_LENGTH = 16, 32.0, 4, 1e-4, 1024
HELD_OUT_ROWS = 8
COLUMNS = [
    "",
    "s/step",
    "rows/s (range)",
    "supervised tokens/s",
    "peak GB",
    "final loss",
    "rows/s ratio",
    "memory ratio",
]
RATIOS = ("speed_ratio", "memory_ratio")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
_TEXT = (
    "the of and to in is that for it as was with be by on not but at are this have from or had an which you were all "
    "their one we can there more if about when what so up out who them some her would other time into has two like "
    "then first any now such most even new way should well also where after much before through back good being here "
    "over world year still day work own many model data learn test value point number part case group small large "
    "result change order state long line place right hand high end set field light level form read late open"
)
WORDS = _TEXT.split()


@dataclass(frozen=True, slots=True)
class Contestant:
    """One line of the table."""

    label: str
    script: str
    """File in peers/."""
    needs: tuple[str, ...]
    """Modules without which the line is skipped."""
    rival: str
    """The contestant that its ratios are taken against."""
    options: Mapping[str, Any] = field(default_factory=dict)
    apart: bool = False
    """Lives in the peers' environment (--peers-python)."""


CONTESTANTS = {
    "smolmlx-mlx": Contestant("smolmlx, MLX engine", "smolmlx_run.py", ("mlx_lm",), "mlx-lm", {"engine": "mlx"}),
    "smolmlx-mlx-checkpointing": Contestant(
        "smolmlx, MLX engine, gradient checkpointing",
        "smolmlx_run.py",
        ("mlx_lm",),
        "mlx-lm",
        {"engine": "mlx", "checkpointing": True},
    ),
    "mlx-lm": Contestant("mlx-lm --mask-prompt", "mlx_lm_run.py", ("mlx_lm",), "mlx-lm"),
    "mlx-lm-lora": Contestant("mlx-lm-lora", "mlx_lm_lora_run.py", ("mlx_lm_lora",), "mlx-lm", apart=True),
    "mlx-tune": Contestant("mlx-tune", "mlx_tune_run.py", ("mlx_tune",), "mlx-lm", apart=True),
    "smolmlx-cuda": Contestant("smolmlx, PyTorch engine", "smolmlx_run.py", ("trl",), "trl", {"engine": "cuda"}),
    "trl": Contestant("TRL, plain defaults", "trl_run.py", ("trl", "peft"), "trl"),
    "trl-no-checkpointing": Contestant(
        "TRL, checkpointing off", "trl_run.py", ("trl", "peft"), "trl", {"gradient_checkpointing": False}
    ),
}


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows that everyone trains on, counted by smolmlx's definition of a supervised token."""

    folder: Path
    held_out: list[dict[str, list[int]]]
    tokens: float
    """Mean per row, prompt and answer."""
    supervised: float
    """Mean per row: the answer and its end-of-turn token."""
    spread: float
    """Standard deviation of the row lengths, as a share of their mean."""


def main() -> None:
    options = parse_options()
    work = cache_folder() / "benchmarks" / options.shape
    model = make_folder(options.shape, options.assets, work / "model")
    rows = make_rows(options.rows, model, work / f"rows-{options.rows}")
    print(f"{options.rows} rows of {rows.tokens:.0f} tokens, {rows.supervised:.0f} of them supervised", file=sys.stderr)
    chosen, skipped = find_contestants(options.engines.split(","), options.peers_python)
    report: Tree = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command("benchmarks/sft.py"),
        "commit": commit(),
        "machine": machine(),
        "work": describe_work(options, rows),
        "skipped": skipped,
        "runs": [],
    }
    out = options.out or HERE / "results" / f"{datetime.date.today():%Y-%m-%d}-sft-{options.shape}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    for repeat in range(options.repeats):  # interleaved, so that a slow minute of the machine hits all alike
        for name in chosen:
            run = measure(name, model, rows, repeat, options)
            report["runs"].append(run)
            skipped |= {name: run["error"]} if "error" in run else {}
            print(describe(run), file=sys.stderr)
            out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    report["summary"] = summarise([run for run in report["runs"] if "error" not in run])
    report["warnings"] = target_warnings(report["summary"], rows.supervised)
    report["table"] = table(report)
    out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(report["table"])


def describe_work(options: argparse.Namespace, rows: Rows) -> Tree:
    return {
        **{name: getattr(options, name) for name in ("shape", "rows", "warmup", "steps", "repeats", "device", "dtype")},
        "batch": BATCH,
        "rank": RANK,
        "alpha": ALPHA,
        "learning_rate": RATE,
        "tokens_per_row": rows.tokens,
        "supervised_per_row": rows.supervised,
        "length_spread": rows.spread,
    }


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8, help="timed steps of each run (64 are one epoch of 256 rows)")
    parser.add_argument("--warmup", type=int, default=3, help="first steps that are left out, at least 3")
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3, help="runs of each, with other seeds; medians count")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the base's weights")
    options = parse_common(parser, CONTESTANTS)
    if options.device == "cuda":
        options.engines = ",".join(name for name in options.engines.split(",") if CONTESTANTS[name].rival == "trl")
    elif options.dtype != "float32":
        parser.error(f"--dtype {options.dtype}: the CPU runs compare float32; use --device cuda.")
    if options.warmup < 3:
        parser.error("--warmup: the first steps compile and fill caches; leave at least 3 out")
    return options


def parse_common(parser: argparse.ArgumentParser, contestants: Mapping[str, Contestant]) -> argparse.Namespace:
    """Add what every benchmark of contestants takes, and parse."""
    parser.add_argument("--shape", choices=("smollm2-135m", "tiny"), default="smollm2-135m")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: the PyTorch contestants alone")
    parser.add_argument("--engines", default=",".join(contestants), help="comma-separated, in the order of the table")
    parser.add_argument(
        "--peers-python", type=Path, default=Path(os.environ.get("SMOLMLX_PEERS_PYTHON", ".venv-peers/bin/python"))
    )
    shared = next((f for f in (HERE.parent, HERE.parent.parent) if (f / "shared").is_dir()), HERE.parent.parent)
    parser.add_argument("--assets", type=Path, default=shared / "shared" / "assets")
    parser.add_argument("--timeout", type=int, default=3600, help="seconds for one run")
    parser.add_argument("--out", type=Path, help="JSON file; default: in benchmarks/results/, by date")
    options = parser.parse_args()
    unknown = [name for name in options.engines.split(",") if name not in contestants]
    if unknown:
        parser.error(f"--engines {', '.join(unknown)}: not one of {', '.join(contestants)}")
    return options


def make_folder(shape: str, assets: Path, folder: Path) -> Path:
    """Draw a model of SmolLM2-135M's shape (or a tiny one) beside SmolLM2's tokenizer, once."""
    source = assets / "tokenizers" / "smollm2-135m-instruct"
    if not source.is_dir():
        raise SystemExit(f"{source}: missing. Pass --assets with a folder that holds tokenizers/smollm2-135m-instruct.")
    if not (folder / "model.safetensors").is_file():
        config = json.loads((source / "config.json").read_text(encoding="utf-8"))
        config |= {"torch_dtype": "float32"} | (TINY if shape == "tiny" else {})
        make_model(config, folder, seed=0)
        for name in TOKENIZER_FILES:
            shutil.copy(source / name, folder / name)
    return folder


def make_rows(count: int, model: Path, folder: Path) -> Rows:
    """Write `count` chat rows of common words, and a few held-out ones; the same on every machine.

    Lengths vary by about a fifth, as in real chat data (Taskmaster 0.21, GSM8K 0.30): padding is part of the work.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(135)
    for name, number in (("train", count), ("held_out", HELD_OUT_ROWS)):
        lines = [json.dumps(_row(rng)) for _ in range(number)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    tokenizer = Tokenizer(model)
    train, held_out = (_encode(folder / f"{name}.jsonl", tokenizer) for name in ("train", "held_out"))
    lengths = np.array([len(row.ids) for row in train])
    scored = [{"ids": row.ids, "mask": [int(bit) for bit in row.mask]} for row in held_out]
    supervised = statistics.mean(sum(row.mask) for row in train)
    return Rows(folder, scored, float(lengths.mean()), supervised, float(lengths.std() / lengths.mean()))


def _row(rng: np.random.Generator) -> Tree:
    """About 300 prompt tokens, 35 of them the template's, and 60 answer tokens."""
    prompt = int(np.clip(rng.normal(300, 75), 120, 540)) - 35
    answer = int(np.clip(rng.normal(60, 20), 15, 130)) - 1
    texts = [" ".join(rng.choice(WORDS, size)) for size in (prompt, answer)]
    turns = zip(("user", "assistant"), texts, strict=True)
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


def _encode(path: Path, tokenizer: Tokenizer) -> list[Encoded]:
    return list(encode_rows(open_source(str(path)), tokenizer, Encoding(MAX_LENGTH), Account()))


def find_contestants(names: Sequence[str], peers_python: Path) -> tuple[list[str], dict[str, str]]:
    """Return those that can run here, and why the others cannot."""
    chosen, skipped = [], {}
    for name in names:
        missing = missing_modules(CONTESTANTS[name], peers_python)
        if missing:
            skipped[name] = missing
            print(f"{name}: skipped, {missing}", file=sys.stderr)
        else:
            chosen.append(name)
    return chosen, skipped


def missing_modules(contestant: Contestant, peers_python: Path) -> str:
    """Return what a contestant lacks to run here, or an empty string."""
    python = python_of(contestant, peers_python)
    if not Path(python).is_file():
        return f"no {python} (see benchmarks/README.md)"
    probe = "import importlib.util as u, sys; print(*[m for m in sys.argv[1:] if u.find_spec(m) is None])"
    found = subprocess.run([python, "-c", probe, *contestant.needs], capture_output=True, text=True, check=True)
    missing = found.stdout.split()
    return f"{', '.join(missing)} not installed in {python}" if missing else ""


def python_of(contestant: Contestant, peers_python: Path) -> str:
    """Return the interpreter a contestant runs in."""
    return str(peers_python) if contestant.apart else sys.executable


def measure(name: str, model: Path, rows: Rows, repeat: int, options: argparse.Namespace) -> Tree:
    """Run one contestant in a fresh process and return what it recorded, with the rates of its timed steps."""
    contestant = CONTESTANTS[name]
    with tempfile.TemporaryDirectory(prefix=f"bench-{name}-") as scratch:
        job = Job(
            model=str(model),
            rows=str(rows.folder),
            held_out=rows.held_out,
            scratch=scratch,
            steps=options.warmup + options.steps,
            batch_size=BATCH,
            learning_rate=RATE,
            rank=RANK,
            alpha=ALPHA,
            max_length=MAX_LENGTH,
            seed=repeat,
            device=options.device,
            dtype=options.dtype,
            options=dict(contestant.options),
        )
        result = run_contestant(contestant, job, options)
    if "error" in result:
        return {"contestant": name, "repeat": repeat, **result}
    return {"contestant": name, "repeat": repeat, **rates(result, options.warmup, rows), **result}


def run_contestant(contestant: Contestant, job: Job, options: argparse.Namespace) -> Tree:
    """Run a contestant's script in a process of its own and return what it wrote, or why it wrote nothing."""
    files = [Path(job.scratch) / "job.json", Path(job.scratch) / "result.json"]
    files[0].write_text(json.dumps(dataclasses.asdict(job)), encoding="utf-8")
    command = [python_of(contestant, options.peers_python), str(HERE / "peers" / contestant.script), *map(str, files)]
    place = {**os.environ, "SMOLMLX_CACHE": f"{job.scratch}/cache"}
    try:
        done = subprocess.run(command, env=place, capture_output=True, text=True, timeout=options.timeout, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"not finished after {options.timeout} s"}
    if done.returncode or not files[1].is_file():
        tail = (done.stdout + done.stderr).splitlines()[-15:]
        return {"error": f"exit status {done.returncode}", "output": tail}
    result: Tree = json.loads(files[1].read_text(encoding="utf-8"))
    return result


def rates(result: Tree, warmup: int, rows: Rows) -> Tree:
    """Return the rates over the timed steps.

    A few steps see longer or shorter rows for each contestant, so rows/s are tokens/s over the mean length of all rows.
    """
    seconds, tokens, shapes = (result[key][warmup:] for key in ("seconds", "tokens", "shapes"))
    seen = {tuple(shape) for shape in result["shapes"][:warmup]}
    fresh = []
    for shape in map(tuple, shapes):
        fresh.append(shape not in seen)
        seen.add(shape)
    known = [index for index, new in enumerate(fresh) if not new]
    rate = sum(tokens) / sum(seconds) / rows.tokens
    rate_known = sum(tokens[i] for i in known) / sum(seconds[i] for i in known) / rows.tokens if known else None
    return {
        "seconds_per_step": statistics.mean(seconds),
        "rows_per_second": rate,
        "supervised_per_second": rate * rows.supervised,
        "rows_per_second_known_shapes": rate_known,
        "new_shapes": sum(fresh),
        "padding": 1 - sum(tokens) / sum(shape[0] * shape[1] for shape in shapes),
        "final_loss": statistics.mean(result["losses"][-3:]),
    }


def describe(run: Tree) -> str:
    if "error" in run:
        return "\n".join([f"{run['contestant']} #{run['repeat']}: {run['error']}", *run.get("output", [])])
    return (
        f"{run['contestant']} #{run['repeat']}: {run['seconds_per_step']:.2f} s/step, "
        f"{run['rows_per_second']:.3f} rows/s, "
        f"{run['peak_bytes'] / 1e9:.2f} GB, held-out {run['held_out_loss']:.4f}"
    )


def summarise(runs: Sequence[Tree]) -> dict[str, Tree]:
    """Return contestant -> median of each number over its runs, with ratios to its rival."""
    names = list(dict.fromkeys(run["contestant"] for run in runs))
    keys = ("seconds_per_step", "rows_per_second", "supervised_per_second", "targets_per_row", "padding", "new_shapes",
            "final_loss", "held_out_loss", "loaded_bytes", "peak_bytes")  # fmt: skip
    summary: dict[str, Tree] = {}
    for name in names:
        own = [run for run in runs if run["contestant"] == name]
        summary[name] = {key: statistics.median(run[key] for run in own) for key in keys}
        spread = [run["rows_per_second"] for run in own]
        summary[name] |= {"rows_per_second_range": [min(spread), max(spread)], "settings": own[0]["settings"]}
    for name, own_numbers in summary.items():
        rival = summary.get(CONTESTANTS[name].rival)
        if rival:
            own_numbers["speed_ratio"] = own_numbers["rows_per_second"] / rival["rows_per_second"]
            own_numbers["memory_ratio"] = own_numbers["peak_bytes"] / rival["peak_bytes"]
    return summary


def target_warnings(summary: Mapping[str, Tree], supervised: float) -> list[str]:
    """Say who trains more or fewer targets than the answer and its end-of-turn token."""
    return [
        f"{name} trains {numbers['targets_per_row']:.1f} targets a row where {supervised:.1f} tokens are supervised"
        for name, numbers in summary.items()
        if abs(numbers["targets_per_row"] - supervised) > 0.5
    ]


def table(report: Tree) -> str:
    """Return the Markdown table with what was the same and what was not."""
    work, place = report["work"], report["machine"]
    lines = [
        f"{work['shape']}, {work['rows']} rows of {work['tokens_per_row']:.0f} tokens "
        f"({work['supervised_per_row']:.0f} supervised), batch {work['batch']}, LoRA r {work['rank']}, {work['dtype']}. "
        f"{place['gpu'] if work['device'] == 'cuda' else place['cpu']}, {place['cores']} cores. "
        f"Medians of {work['repeats']} runs of {work['steps']} steps after {work['warmup']}. {report['date'][:10]}.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        f"|{'---|' * len(COLUMNS)}",
    ]
    for name, row in report["summary"].items():
        low, high = row["rows_per_second_range"]
        cells = [
            CONTESTANTS[name].label,
            f"{row['seconds_per_step']:.2f}",
            f"{row['rows_per_second']:.3f} ({low:.3f}-{high:.3f})",
            f"{row['supervised_per_second']:.1f}",
            f"{row['peak_bytes'] / 1e9:.2f}",
            f"{row['held_out_loss']:.4f}",
            *(f"{row[key]:.2f}x {CONTESTANTS[name].rival}" if key in row else "-" for key in RATIOS),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [f"\nSkipped: {name} ({why})." for name, why in report["skipped"].items()]
    lines += [f"\nWarning: {text}." for text in report["warnings"]]
    return "\n".join(lines)


def machine() -> Tree:
    """Return what the numbers were measured on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "platform": platform.platform(),
        "load": os.getloadavg()[0],
        "gpu": _gpu(),
        "openblas": os.environ.get("OPENBLAS_CORETYPE", "its own choice of kernels"),
    }


def _gpu() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or None


def command(script: str) -> str:
    """Return the command line; of paths of one machine only the last part, which is all that matters elsewhere."""
    return " ".join(["python", script, *(Path(word).name if word.startswith("/") else word for word in sys.argv[1:])])


def commit() -> str:
    """Return the commit that was measured, marked when the tree differs from it."""
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=HERE, capture_output=True, text=True, check=False
    )
    return found.stdout.strip()


if __name__ == "__main__":
    main()
