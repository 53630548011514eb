"""What an adapter is, in a few lines, without its base: kind, rank, scale, targets, size, and what looks wrong."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from smolmlx.adapters import adapter as adapters
from smolmlx.adapters.adapter import Adapter
from smolmlx.adapters.tensors import FLOATS
from smolmlx.data.chat import Tokenizer
from smolmlx.errors import SmolError
from smolmlx.models import local_folder

_LOUD = 16.0
"""A scale from which even small weights speak over the base; mlx-lm's default is 20."""


@dataclass(frozen=True, slots=True)
class Inspection:
    """Facts of an adapter folder."""

    folder: str
    form: str
    """peft or mlx."""
    kind: str
    """LoRA, rsLoRA, DoRA or full."""
    base: str | None
    revision: str | None
    ranks: dict[int, int]
    """Rank -> modules that have it."""
    scales: dict[float, int]
    """What multiplies the product of the factors -> modules."""
    targets: dict[str, int]
    """Last part of a module's name -> modules."""
    layers: tuple[int, ...]
    full: tuple[str, ...]
    dropout: float
    dtypes: tuple[str, ...]
    num_parameters: int
    num_bytes: int
    problems: tuple[str, ...]


def inspect(folder: Path) -> Inspection:
    """Look into an adapter folder; every tensor is read once.

    Raises:
        RecipeError, DataError: not an adapter, or a broken one; see `adapter.read`. A kind that is refused elsewhere is
            described, with the reasons among its problems.
    """
    found, refusals = adapters.describe(folder)
    config = found.config
    inner = config.get("lora_parameters")
    dropout = config.get("lora_dropout") or (inner.get("dropout") if isinstance(inner, dict) else 0.0) or 0.0
    blocks = [re.search(r"\.(\d+)\.", module.path) for module in found.modules]  # a second number is an expert's
    layers = {int(block[1]) for block in blocks if block}
    entries = found.file.entries
    revision = config.get("revision")
    return Inspection(
        folder=str(folder),
        form=found.form,
        kind=found.kind,
        base=found.base_name,
        revision=str(revision) if revision else None,
        ranks=dict(sorted(Counter(module.rank for module in found.modules).items())),
        scales=dict(sorted(Counter(round(module.scale, 6) for module in found.modules).items())),
        targets=dict(sorted(Counter(module.path.rpartition(".")[2] for module in found.modules).items())),
        layers=tuple(sorted(layers)),
        full=tuple(sorted(found.full)),
        dropout=float(dropout),
        dtypes=tuple(sorted({entry.dtype for entry in entries.values()})),
        num_parameters=sum(math.prod(entries[name].shape) for name in entries if name not in found.copies.values()),
        num_bytes=found.file.path.stat().st_size,
        problems=(*(f"not converted or merged: {reason}" for reason in refusals), *_problems(found)),
    )


def _problems(found: Adapter) -> list[str]:
    problems = []
    silent = []
    for name, entry in found.file.entries.items():
        if entry.dtype in FLOATS and not np.isfinite(found.file.floats(name)).all():
            problems.append(f"{name}: has values that are not finite; the run that made it went wrong.")
    for module in found.modules:
        if not found.file.words(module.b).any():
            silent.append(module.path)
    if silent:
        whole = len(silent) == len(found.modules)
        problems.append(
            "B is zero everywhere: an adapter that was never trained."
            if whole
            else f"{silent[0]} and {len(silent) - 1} more: B is zero, so they change nothing."
        )
    loud = max((module.scale for module in found.modules), default=0.0)
    if loud >= _LOUD:
        problems.append(
            f"scale {loud:g} is large (2 is usual; mlx-lm's default is 20): expect the adapter to drown the base."
        )
    base = found.base_name
    if not base:
        problems.append("no base model is recorded; whoever loads it must know it.")
    elif base.startswith(("/", ".", "~")) and local_folder(base) is None and adapters.recorded_base(found) is None:
        problems.append(
            f"its base is recorded as {base}, a folder that is not on this machine. Pass another copy: --model M to merge,"
            " analyze and export, --base M to convert."
        )
    problems += _tokenizer_problems(found.folder)
    if found.copies:
        problems.append(f"carries {len(found.copies)} whole embedding weights beside the adapter, which make it large.")
    return problems


def _tokenizer_problems(folder: Path) -> list[str]:
    if not (folder / "tokenizer.json").is_file():
        return []
    try:
        Tokenizer(folder)
    except SmolError as error:
        return [str(error)]
    return []
