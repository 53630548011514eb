"""How far training moved each weight: the norms of a LoRA adapter's updates, from its file alone."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from smolmlx.session import Arrays, load_arrays

_LAYER = re.compile(r"\.layers\.(\d+)\.(?:.*\.)?([^.]+)\.lora_A\.weight$")


@dataclass(frozen=True, slots=True)
class Change:
    """The update of one matrix."""

    layer: int
    module: str
    norm: float
    """Frobenius norm of (alpha / r) B A."""
    rms: float
    """Root mean square of its entries, so that matrices of different sizes compare."""


def weight_changes(adapter: Path) -> list[Change]:
    """Return the change of every adapted matrix in a layer, in the file's order; [] where there is no LoRA adapter.

    ||B A||_F^2 = sum((B^T B) * (A A^T)), so the product itself is never built.
    """
    weights, config = adapter / "adapter_model.safetensors", adapter / "adapter_config.json"
    if not weights.is_file() or not config.is_file():
        return []
    tree = json.loads(config.read_text(encoding="utf-8"))
    arrays = load_arrays(weights)
    found = []
    for name, lora_a in arrays.items():
        match = _LAYER.search(name)
        lora_b = arrays.get(name.replace(".lora_A.", ".lora_B."))
        if match is not None and lora_b is not None:
            rank = lora_a.shape[0]
            scale = tree["lora_alpha"] / (math.sqrt(rank) if tree.get("use_rslora") else rank)
            norm = scale * math.sqrt(max(0.0, _squared_norm({"a": lora_a, "b": lora_b})))
            rms = norm / math.sqrt(lora_b.shape[0] * lora_a.shape[1])
            found.append(Change(int(match[1]), match[2], norm, rms))
    return found


def _squared_norm(pair: Arrays) -> float:
    a, b = pair["a"].astype(np.float64), pair["b"].astype(np.float64)
    return float(((b.T @ b) * (a @ a.T)).sum())
