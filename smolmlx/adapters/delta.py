"""What adapters add to a base's weights: which stored tensor each module changes, and the new values, some rows at a time.

Values are float32. A DoRA module replaces W by m * (W + s BA) / ||W + s BA||, rows apart (https://arxiv.org/abs/2402.09353).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from smolmlx.adapters import mlx_format, names
from smolmlx.adapters.adapter import Adapter, Module
from smolmlx.adapters.base import Weights
from smolmlx.adapters.tensors import Floats, from_floats
from smolmlx.errors import RecipeError

_BLOCK_BYTES = 64 << 20
"""Size of the float32 rows that are worked on at once."""


@dataclass(frozen=True)
class Term:
    """One adapter's share in the change of one stored weight."""

    adapter: Adapter
    module: Module | None
    """None where `full` replaces the weight."""
    weight: float = 1.0
    """Coefficient in a linear combination."""
    full: str | None = None
    expert: int | None = None
    """Which expert, where the base stores them one by one."""
    half: int | None = None
    """0 for gate and 1 for up: which half of the rows this part of the adapter concerns."""
    stacked_half: int | None = None
    """The same, where the base's tensor holds both halves and only one is concerned."""

    @cached_property
    def _factors(self) -> tuple[Floats, Floats]:
        assert self.module is not None
        a, b = self.adapter.factors(self.module)
        if self.module.kind == "experts":
            if self.half is not None and self.module.path.endswith("gate_up_proj"):
                a, b = names.split_gate_up(a, b)[self.half]
            if self.expert is not None:
                a, b = a[self.expert], b[self.expert]
        return a, b

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the stored weight that this term fits."""
        if self.full is not None:
            return self.adapter.file.entries[self.full].shape
        assert self.module is not None
        a, b = self.adapter.words(self.module)
        if self.module.kind == "embedding":
            return a.shape[0], b.shape[1]
        if self.module.kind == "linear":
            return b.shape[1], a.shape[0]
        rows = b.shape[1]
        if self.half is not None and self.module.path.endswith("gate_up_proj"):
            rows //= 2
        if self.stacked_half is not None:
            rows *= 2
        return (rows, a.shape[2]) if self.expert is not None else (a.shape[0], rows, a.shape[2])

    @cached_property
    def _magnitude(self) -> Floats:
        assert self.module is not None and self.module.m is not None
        return self.adapter.file.floats(self.module.m)

    def low_rank(self) -> tuple[Floats, Floats]:
        """Return (left [..., rows, R], right [..., R, columns]) with the scale in the right one: s BA = left right."""
        assert self.module is not None
        a, b = self._factors
        if self.module.kind == "experts":
            return b, a * np.float32(self.module.scale)
        if self.module.kind == "embedding":
            return a, b * np.float32(self.module.scale)
        return b.T, a.T * np.float32(self.module.scale)

    def change(self, base: Floats, rows: slice) -> Floats:
        """Return what this term adds to `base`, the rows `rows` of the stored weight (the first axis)."""
        weight = np.float32(self.weight)
        if self.full is not None:
            return weight * (self.adapter.file.floats(self.full)[rows] - base)
        assert self.module is not None
        left, right = self.low_rank()
        if self.stacked_half is None:
            added: Floats = left[rows] @ (right[rows] if right.ndim == 3 else right)
        else:
            added = np.zeros_like(base)
            middle = base.shape[1] // 2
            part = slice(0, middle) if self.stacked_half == 0 else slice(middle, None)
            added[:, part] = left[rows] @ right[rows]
        if self.module.m is None:
            return weight * added
        adapted = base + added
        length = np.linalg.norm(adapted, axis=1, keepdims=True)
        return weight * (self._magnitude[rows, None] / np.where(length == 0, 1, length) * adapted - base)


Changes = Mapping[str, Sequence[Term]]


def find_changes(adapters: Sequence[tuple[Adapter, float]], weights: Weights) -> Changes:
    """Return stored weight name -> what changes it.

    Raises:
        RecipeError: made for another base: a module that it lacks, or has in another shape or under another name.
    """
    found: dict[str, list[Term]] = {}
    for adapter, weight in adapters:
        problems = _copy_problems(adapter, weights)
        if adapter.form == "mlx" and adapter.modules:
            num_blocks = weights.model.config.get("num_hidden_layers") or 0
            problems += mlx_format.outside_layers(adapter.modules, adapter.config, num_blocks)
        for name, term in _all_spots(adapter, weight, weights, problems):
            problems += _misfits(name, term, weights)
            found.setdefault(name, []).append(term)
        if problems:
            raise RecipeError(f"{adapter.folder}: made for another base than {weights.model.name}", problems)
    return found


def _copy_problems(adapter: Adapter, weights: Weights) -> list[str]:
    """Name weights saved beside the adapter that are not the base's own, as they must be to be left out."""
    problems = []
    for name, tensor in adapter.copies.items():
        known, entry = weights.find(name), adapter.file.entries[tensor]
        if known is None or weights.shape(known) != entry.shape:
            problems.append(
                f"{name}: saved beside the adapter as {list(entry.shape)}, the base's is"
                f" {list(weights.shape(known)) if known else 'missing'} (a resized vocabulary?)."
            )
        elif not np.array_equal(adapter.file.words(tensor), from_floats(weights.floats(known), entry.dtype)):
            problems.append(f"{name}: saved beside the adapter and not equal to the base's: it was trained or resized.")
    return problems


def _all_spots(adapter: Adapter, weight: float, weights: Weights, problems: list[str]) -> Iterator[tuple[str, Term]]:
    """Yield what an adapter changes; what the base lacks goes to `problems`."""
    for path, tensor in adapter.full.items():
        if weights.find(path):
            yield path, Term(adapter, None, weight, full=tensor)
        else:
            problems.append(f"{path}: the base has no such weight.")
    for module in adapter.modules:
        spots = list(_spots(adapter, module, weight, weights))
        experts = {term.expert for _, term in spots if term.expert is not None}
        if not spots and module.kind == "experts":
            raise RecipeError(
                f"{adapter.folder}: {module.path}: {weights.model.name} has no experts under a name known here"
                f" ({weights.model.config.get('model_type')}), so they are neither converted nor merged. Merge with the library that"
                f" made it: {'PeftModel.merge_and_unload()' if adapter.form == 'peft' else 'mlx_lm.fuse'}."
            )
        if not spots:
            problems.append(f"{module.path}: the base has no such weight.")
        elif experts and len(experts) != (adapted := len(adapter.words(module)[0])):
            problems.append(f"{module.path}: adapts {adapted} experts, the base has {len(experts)}.")
        else:
            yield from spots


def _misfits(name: str, term: Term, weights: Weights) -> list[str]:
    stored = weights.find(name)
    assert stored is not None
    if not weights.is_float(stored):
        return [f"{name}: stored as {weights.dtype(stored)} in the base; read here are floats of 16, 32 and 64 bits."]
    if weights.shape(stored) == term.shape:
        return []
    return [f"{name}: adapts a weight of {list(term.shape)}, the base's is {list(weights.shape(stored))}."]


def _spots(adapter: Adapter, module: Module, weight: float, weights: Weights) -> Iterator[tuple[str, Term]]:
    if module.kind != "experts":
        name = f"{module.path}.weight"
        if weights.find(name):
            yield name, Term(adapter, module, weight)
        return
    for path in names.mlx_paths(module.path, module.kind) if adapter.form == "peft" else (module.path,):
        layer, _, part = path.rpartition(".switch_mlp.")
        half = {"gate_proj": 0, "up_proj": 1}.get(part)
        stacked = f"{layer}.experts.{'down_proj' if half is None else 'gate_up_proj'}"
        if weights.find(f"{path}.weight"):
            yield f"{path}.weight", Term(adapter, module, weight, half=half)
        elif weights.find(stacked):
            yield stacked, Term(adapter, module, weight, half=half, stacked_half=half)
        else:
            expert = 0
            while weights.find(f"{layer}.experts.{expert}.{part}.weight"):
                yield f"{layer}.experts.{expert}.{part}.weight", Term(adapter, module, weight, expert=expert, half=half)
                expert += 1


def row_blocks(shape: tuple[int, ...]) -> Iterator[slice]:
    """Yield slices of the first axis, of a bounded size in float32."""
    rows = shape[0] if shape else 1
    size = max(1, _BLOCK_BYTES // max(4, 4 * int(np.prod(shape[1:]))))
    for start in range(0, rows, size):
        yield slice(start, min(rows, start + size))
