"""Measure how far the engines are apart and write docs/parity.md.

python tests/parity/publish.py
"""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import sys
import tempfile
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(Path(__file__).parent)]
for _name, _value in (
    ("HF_HUB_OFFLINE", "1"),
    ("TOKENIZERS_PARALLELISM", "false"),
    ("TRANSFORMERS_VERBOSITY", "error"),
    ("HF_HUB_DISABLE_PROGRESS_BARS", "1"),
    ("OMP_NUM_THREADS", "1"),
    ("OPENBLAS_NUM_THREADS", "1"),
):
    os.environ.setdefault(_name, _value)
warnings.filterwarnings("ignore", category=FutureWarning)  # of transformers, about its own names

from measure import CASES, LIMITS, PAIR, SHAPE, Bench, Figures, apart  # noqa: E402 - after the paths

HEADER = (
    "case",
    "steps",
    "loss, largest",
    "loss, mean",
    "grad norm, relative",
    "validation loss",
    "loss, first to last",
)


def row(name: str, figures: Figures) -> list[str]:
    return [
        name, str(figures.steps), f"{figures.loss:.1e}", f"{figures.mean:.1e}", f"{figures.norm:.1e}", f"{figures.val:.1e}",
        f"{figures.first:.3f} to {figures.last:.3f}",
    ]  # fmt: skip


def table(rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (HEADER, ["---"] * len(HEADER), *rows))


def processor() -> str:
    """Return the processor's name; `platform` has it on macOS alone."""
    info = Path("/proc/cpuinfo")
    names = (
        [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.exists()
        else []
    )
    return names[0] if names else platform.processor() or platform.machine()


def page(rows: list[list[str]], seconds: float) -> str:
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}"
        for name in ("mlx", "mlx-lm", "torch", "transformers", "peft", "trl", "numpy")
    )
    return f"""# The same training on both engines

Written by `python tests/parity/publish.py`; do not edit. Held by `pytest tests/parity`.

Each row is one plan run twice, by the MLX engine and by the PyTorch engine: same tokens, masks, order, learning rates
and first weights. The model is a Llama of two layers, {SHAPE["hidden_size"]} wide, with tied embeddings and grouped-query attention; float32 on
the CPU. Limits: {LIMITS["loss"]:.0e} for the loss of every step, {LIMITS["mean"]:.0e} for the mean difference, {LIMITS["norm"]:.0e} for the gradient norm.

{table(rows)}

Not compared: dropout. Each engine draws its own random numbers, reproducibly, from (seed, step).

* Date: {datetime.datetime.now(datetime.UTC):%Y-%m-%d}
* Machine: {processor()}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}, Python {platform.python_version()}
* Versions: {versions}
* Time: {seconds:.0f} s
"""


def main() -> int:
    began = time.monotonic()
    rows, failed = [], []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["SMOLMLX_CACHE"] = f"{folder}/cache"
        bench = Bench(Path(folder))
        for case in CASES:
            figures = apart(*(bench.run(engine, case) for engine in PAIR))
            rows.append(row(case, figures))
            print(f"{case}: {'within' if figures.within else 'BEYOND'} the limits", file=sys.stderr)
            failed += [] if figures.within else [case]
    print(table(rows))
    if not failed:
        (ROOT / "docs" / "parity.md").write_text(page(rows, time.monotonic() - began), encoding="utf-8")
    return 5 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
