"""How much each layer changed: norms of the weight change and its shape, for every adapted weight.

    frobenius       ||dW||
    relative        ||dW|| / ||W||                     needs the base
    largest         max |dW|
    effective_rank  exp of the entropy of the singular values, normed to sum 1 (Roy and Vetterli 2007)
    cosine          between W and W + dW               needs the base

dW is the whole change, DoRA's rescaling included, but effective_rank is that of the low-rank part s BA. Where the base
stores experts one by one, so does the table; else its effective rank is the mean over experts.
"""

from __future__ import annotations

import csv
import io
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from smolmlx.adapters import adapter as adapters
from smolmlx.adapters.adapter import Module
from smolmlx.adapters.base import Weights
from smolmlx.adapters.delta import Term, find_changes, row_blocks
from smolmlx.adapters.tensors import Floats
from smolmlx.errors import RecipeError
from smolmlx.models import BaseModel, check_base
from smolmlx.rundir import RunDir

DATA_FILE = "weight_changes.json"
"""In a run's folder."""


@dataclass(frozen=True, slots=True)
class LayerChange:
    """The change of one weight; see the module's docstring."""

    weight: str
    frobenius: float
    relative: float | None
    largest: float
    effective_rank: float | None
    cosine: float | None


def analyze(folder: Path, base: BaseModel | None = None) -> list[LayerChange]:
    """Measure an adapter, with what needs the base only where it is given or found on this machine.

    Raises:
        RecipeError: DoRA or whole weights without their base; an adapter made for another base.
        DataError: a broken adapter.
    """
    adapter = adapters.read(folder)
    base = base or adapters.recorded_base(adapter)
    if base is not None:
        check_base(base, folder)
        weights = Weights(base)
        changes = find_changes([(adapter, 1.0)], weights)
        return [_measure(name, term, weights) for name, terms in sorted(changes.items(), key=_order) for term in terms]
    if adapter.dora or adapter.full:
        raise RecipeError(f"{folder}: {adapter.kind} changes weights relative to the base's. Pass --model M.")
    return [_measure(module.path, Term(adapter, module), None) for module in sorted(adapter.modules, key=_module_order)]


def _measure(name: str, term: Term, weights: Weights | None) -> LayerChange:
    stored = weights.find(name) if weights else None
    shape = term.shape
    squares = base_squares = inner = 0.0
    largest = 0.0
    for rows in row_blocks(shape):
        base: Floats = weights.rows(stored, rows) if weights and stored else np.zeros((1,), np.float32)
        change = term.change(base, rows) if weights else _low_rank_rows(term, rows)
        squares += float(np.square(change, dtype=np.float64).sum())
        largest = max(largest, float(np.abs(change).max(initial=0.0)))
        if weights:
            base_squares += float(np.square(base, dtype=np.float64).sum())
            inner += float(np.multiply(base, change, dtype=np.float64).sum())
    norm, base_norm = squares**0.5, base_squares**0.5
    adapted = max(base_squares + 2 * inner + squares, 0.0) ** 0.5
    known = weights is not None and base_norm > 0 and adapted > 0
    return LayerChange(
        name,
        norm,
        norm / base_norm if known else None,
        largest,
        effective_rank(*term.low_rank()) if term.module else None,
        min(1.0, (base_squares + inner) / (base_norm * adapted)) if known else None,
    )


def effective_rank(left: Floats, right: Floats) -> float:
    """Return the effective rank of left [..., rows, R] @ right [..., R, columns], from the factors alone."""
    _, first = np.linalg.qr(left.astype(np.float64))
    _, second = np.linalg.qr(np.swapaxes(right, -1, -2).astype(np.float64))
    values = np.linalg.svd(first @ np.swapaxes(second, -1, -2), compute_uv=False)
    total = values.sum(axis=-1, keepdims=True)
    shares = np.divide(values, total, out=np.zeros_like(values), where=total > 0)
    entropy = -(shares * np.log(shares, out=np.zeros_like(shares), where=shares > 0)).sum(axis=-1)
    return float(np.mean(np.where(total[..., 0] > 0, np.exp(entropy), 0.0)))


def to_csv(changes: list[LayerChange]) -> str:
    """Return the table as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(asdict(changes[0])) if changes else ["weight"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(change) for change in changes)
    return text.getvalue()


def to_json(changes: list[LayerChange]) -> dict[str, object]:
    """Return the table as JSON, each weight with its `layer` (null outside the blocks) and `module`, for a map of both."""
    weights = [{**asdict(change), **dict(zip(("layer", "module"), _place(change), strict=True))} for change in changes]
    return {"total": total(changes), "weights": weights}


def keep(changes: list[LayerChange], run: RunDir) -> Path:
    """Write the table into a finished run's folder, for reports."""
    run.write_json(DATA_FILE, to_json(changes))
    return run.path / DATA_FILE


def _place(change: LayerChange) -> tuple[int | None, str]:
    """Return the number of the block and the name of the module."""
    layer = re.search(r"\.(\d+)\.", change.weight)
    return int(layer[1]) if layer else None, change.weight.removesuffix(".weight").rpartition(".")[2]


def check_chart(path: Path) -> None:
    """Refuse a chart's file name that is neither SVG nor PNG.

    Raises:
        RecipeError
    """
    if path.suffix not in {".svg", ".png"}:
        raise RecipeError(f"--chart {path}: charts are written as .svg or .png.")


def draw(changes: list[LayerChange], path: Path) -> None:
    """Draw a map of layers and modules, coloured by relative change (absolute without a base), as SVG or PNG.

    Raises:
        BackendError: vl-convert is not installed.
        RecipeError: a file name of another kind.
    """
    from smolmlx.reports import charts

    check_chart(path)
    relative = bool(changes) and changes[0].relative is not None
    values = []
    for change in changes:
        layer, module = _place(change)
        size = change.relative if relative else change.frobenius
        values.append({"layer": "-" if layer is None else f"{layer}", "module": module, "size": size})
    shown = {"aggregate": "mean", "field": "size", "type": "quantitative"}  # experts stored one by one share a cell
    spec = {
        "data": {"values": values},
        "mark": "rect",
        "encoding": {
            "x": {"field": "layer", "type": "ordinal", "sort": None, "title": "layer (-: outside the blocks)"},
            "y": {"field": "module", "type": "nominal", "sort": None, "title": None},
            "color": {**shown, "title": "‖ΔW‖ / ‖W‖" if relative else "‖ΔW‖"},
        },
        "width": {"step": 18},
        "height": {"step": 24},
    }
    if path.suffix == ".svg":
        path.write_text(charts.to_svg(spec), encoding="utf-8")
    else:
        path.write_bytes(charts.to_png(spec))


def _low_rank_rows(term: Term, rows: slice) -> Floats:
    left, right = term.low_rank()
    found: Floats = left[rows] @ (right[rows] if right.ndim == 3 else right)
    return found


def _order(item: tuple[str, object]) -> tuple[object, ...]:
    return _natural(item[0])


def _module_order(module: Module) -> tuple[object, ...]:
    return _natural(module.path)


def _natural(name: str) -> tuple[object, ...]:
    """Sort layers by number."""
    return tuple((0, int(part)) if part.isdigit() else (1, part) for part in name.split("."))


def total(changes: list[LayerChange]) -> float:
    """Return the Frobenius norm of all changes together."""
    return float(np.sqrt(sum(change.frobenius**2 for change in changes)))
