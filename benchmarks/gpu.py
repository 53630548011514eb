"""Everything about the CUDA engine that needs a GPU, in one run: its tests, then its speed beside TRL.

    python benchmarks/gpu.py            # writes benchmarks/results/<date>-gpu.md; about ten minutes

Needs the `cuda` extra, pytest, and SmolLM2's tokenizer (see benchmarks/README.md).
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import os
import subprocess
import sys
import time
from pathlib import Path

import sft

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PACKAGES = ("torch", "transformers", "trl", "peft", "unsloth", "bitsandbytes")
STEPS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("doctor", ("-m", "smolmlx", "doctor")),
    ("tests", ("-m", "pytest", "-q", "-rs", "tests/conformance", "tests/parity", "-k", "cuda")),
    ("quickstart", ("-m", "smolmlx", "train", "quickstart", "--backend", "cuda", "--set", "evaluate=null")),
    ("speed, float32", ("benchmarks/sft.py", "--device", "cuda", "--steps", "20", "--repeats", "2")),
    (
        "speed, bfloat16",
        ("benchmarks/sft.py", "--device", "cuda", "--dtype", "bfloat16", "--steps", "20", "--repeats", "2"),
    ),
)
LAST_LINES = 40


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="comma-separated steps: " + ", ".join(name for name, _ in STEPS))
    parser.add_argument("--out", type=Path, default=HERE / "results" / f"{datetime.date.today():%Y-%m-%d}-gpu.md")
    options = parser.parse_args()
    place = sft.machine()
    if place["gpu"] is None:
        raise SystemExit("benchmarks/gpu.py: no NVIDIA GPU here (nvidia-smi is missing or finds none).")
    chosen = [step for step in STEPS if options.only is None or step[0] in options.only.split(",")]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    page = [
        f"# CUDA engine on {place['gpu']}",
        f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC, commit {sft.commit()}, {place['cores']} cores, {versions()}.",
        "`python benchmarks/gpu.py`",
    ]
    failed = []
    for name, arguments in chosen:
        status, section = run(name, arguments)
        failed += [name] if status else []
        page.append(section)
        options.out.write_text("\n\n".join(page) + "\n", encoding="utf-8")  # what is done is kept if a later step hangs
        print(section, flush=True)
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


def run(name: str, arguments: tuple[str, ...]) -> tuple[int, str]:
    """Run one step; return its exit status and its section of the page."""
    place = {**os.environ, "SMOLMLX_TEST_DEVICE": "cuda", "HF_HUB_OFFLINE": "1"}
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=place, capture_output=True, text=True, check=False
    )
    seconds = time.perf_counter() - start
    lines = (done.stdout + ("" if name.startswith("speed") and not done.returncode else done.stderr)).splitlines()
    shown = "\n".join(lines[-LAST_LINES:])
    text = shown if name.startswith("speed") else f"```\n{shown}\n```"
    command = " ".join(["python", *arguments])
    return done.returncode, f"## {name}\n\n`{command}`: exit {done.returncode}, {seconds:.0f} s\n\n{text}"


def versions() -> str:
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"no {name}")
    return ", ".join(found)


if __name__ == "__main__":
    main()
