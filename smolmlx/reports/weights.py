"""How far training moved each weight: from a LoRA adapter's file alone; DoRA is relative to its base, as in `adapter analyze`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from smolmlx.adapters import adapter as adapters
from smolmlx.adapters.adapter import CONFIG, PEFT_WEIGHTS, Adapter
from smolmlx.adapters.analysis import DATA_FILE, analyze
from smolmlx.adapters.delta import Term
from smolmlx.adapters.tensors import Floats
from smolmlx.errors import RecipeError
from smolmlx.rundir import RunDir

_LAYER = re.compile(r"\.layers\.(\d+)\.(?:.*\.)?([^.]+)$")


@dataclass(frozen=True, slots=True)
class Change:
    """The update of one matrix."""

    layer: int
    module: str
    norm: float
    """Frobenius norm of the change: of s B A, with the scale s of this matrix; of DoRA's whole change."""
    rms: float
    """Root mean square of its entries, so that matrices of different sizes compare."""


def weight_changes(folder: Path) -> list[Change]:
    """Return the change of every adapted matrix in a layer, in the file's order.

    [] where there is no LoRA adapter, or one of DoRA whose base is not here and whose run keeps no table.
    """
    if not (folder / PEFT_WEIGHTS).is_file() or not (folder / CONFIG).is_file():
        return []
    try:
        adapter = adapters.read(folder)
        known = _whole_norms(adapter) if adapter.dora else {}
    except RecipeError:  # of a kind that is not read, or DoRA without its base
        return []
    order = {name: place for place, name in enumerate(adapter.file.entries)}
    found = []
    for module in sorted(adapter.modules, key=lambda module: order[module.a]):
        match = _LAYER.search(module.path)
        if match is None or (adapter.dora and module.path not in known):
            continue
        left, right = Term(adapter, module).low_rank()
        norm = known[module.path] if adapter.dora else _norm(left, right)
        size = math.prod(left.shape[:-1]) * right.shape[-1]
        found.append(Change(int(match[1]), match[2], norm, norm / math.sqrt(size)))
    return found


def _whole_norms(adapter: Adapter) -> Mapping[str, float]:
    """Return the norms of `adapter analyze` by module: those it left in the run's folder, else measured now.

    Raises:
        RecipeError: the base is not on this machine.
    """
    run = RunDir(adapter.folder.parent)
    if (run.path / DATA_FILE).is_file():
        rows = [(str(row["weight"]), float(row["frobenius"])) for row in run.read_json(DATA_FILE)["weights"]]
    else:
        rows = [(change.weight, change.frobenius) for change in analyze(adapter.folder)]
    return {name.removesuffix(".weight"): norm for name, norm in rows}


def _norm(left: Floats, right: Floats) -> float:
    """Return ||left @ right||, squared sum((left^T left) * (right right^T)), so that the product is never built."""
    a, b = left.astype(np.float64), right.astype(np.float64)
    squared = (np.swapaxes(a, -1, -2) @ a) * (b @ np.swapaxes(b, -1, -2))
    return math.sqrt(max(0.0, float(squared.sum())))
