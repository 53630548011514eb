"""What a contestant is told and what it reports: two JSON files, so that each has a process and a memory of its own.

Standard library only, because peers may live in another virtual environment than smolmlx.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

_OPENBLAS = "/usr/lib/x86_64-linux-gnu/openblas-pthread/libblas.so.3"


@dataclass(frozen=True, slots=True)
class Job:
    """One run of one contestant. Optimizer AdamW, constant learning rate, no decay, no dropout."""

    model: str
    """Folder of the base model with its tokenizer."""
    rows: str
    """Folder with train.jsonl: chat rows as `messages`."""
    held_out: list[dict[str, list[int]]]
    """Rows as `ids` and `mask` (1: supervised), scored after the last step."""
    scratch: str
    """An empty folder to write to."""
    steps: int
    batch_size: int
    learning_rate: float
    rank: int
    alpha: float
    max_length: int
    seed: int
    device: str
    """cpu or cuda."""
    dtype: str
    """Of the base's weights; adapters are float32."""
    options: dict[str, Any]
    """What sets this contestant apart from others of the same script."""


@dataclass(slots=True)
class Recorder:
    """Wall-clock time, size and loss of each step, and the memory of this process."""

    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    """As the contestant reports them: over its own targets, which differ."""
    tokens: list[int] = field(default_factory=list)
    """Tokens of the rows of each batch, without padding."""
    targets: list[int] = field(default_factory=list)
    """Positions each batch really trains."""
    targets_per_row: float = 0.0
    """The same over the whole data set."""
    shapes: list[list[int]] = field(default_factory=list)
    """Padded shape of each batch; compiled engines trace anew for each one."""
    reference_seconds: float | None = None
    """Preference training: time until the first step can be taken, the reference's log-probabilities included."""
    loaded_bytes: int = 0
    peak_bytes: int = 0
    held_out_loss: float | None = None
    _clock: float = 0.0

    def start(self) -> None:
        """Start the clock; call when the model is loaded and the first step is about to be taken."""
        self.loaded_bytes = peak_bytes()
        self._clock = time.perf_counter()

    def add_batch(self, tokens: int, targets: int, shape: Sequence[int]) -> None:
        """Note a batch, in the order in which they will be trained."""
        self.tokens.append(int(tokens))
        self.targets.append(int(targets))
        self.shapes.append([int(size) for size in shape])

    def end_step(self, loss: float) -> None:
        """Note a finished step: the time since the one before, so nothing a user waits for is left out."""
        now = time.perf_counter()
        self.seconds.append(now - self._clock)
        self._clock = now
        self.losses.append(float(loss))
        self.peak_bytes = peak_bytes()


def peak_bytes() -> int:
    """Largest resident set of this process so far; on CUDA the most that torch has held there."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def read_job() -> Job:
    """Read the job file named by the first argument."""
    return Job(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))


def write_result(recorder: Recorder, packages: Sequence[str], settings: str) -> None:
    """Write the result file named by the second argument."""
    steps = len(recorder.seconds)
    tree = {name: value for name, value in asdict(recorder).items() if not name.startswith("_")}
    for name in ("tokens", "targets", "shapes"):
        tree[name] = tree[name][:steps]  # data loaders draw a batch ahead
    tree["versions"] = {name: importlib.metadata.version(name) for name in packages}
    tree["settings"] = settings
    Path(sys.argv[2]).write_text(json.dumps(tree), encoding="utf-8")


def load_blas() -> None:
    """Give MLX a fast BLAS on Linux; must run before `mlx.core` is imported.

    The mlx[cpu] wheel carries the reference BLAS, which would make every MLX peer 14 times slower than it need be.
    """
    if sys.platform == "linux":
        ctypes.CDLL(_OPENBLAS, mode=ctypes.RTLD_GLOBAL)
