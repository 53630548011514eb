"""PEFT to mlx-lm: names, transposes, one rank and scale for all, and what mlx-lm's layers cannot hold."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from smolmlx.adapters import folding, names
from smolmlx.adapters.adapter import Adapter, Module
from smolmlx.adapters.base import Weights
from smolmlx.adapters.target import Origin, Target
from smolmlx.adapters.tensors import Made, Words
from smolmlx.errors import RecipeError

_SWELLING, _ALWAYS_FINE = 32, 256 << 20
"""How many times its size an adapter may take when padded to one rank, and the bytes that are never too many."""


def build(adapter: Adapter, base: Weights | None, origin: Origin | None = None) -> Target:
    """Plan every tensor of the mlx-lm adapter; `origin` asks for exactly the tensors it once had.

    Raises:
        RecipeError: what mlx-lm cannot hold, by name, all reasons at once.
    """
    tied = _tied(adapter, base)
    problems = _refusals(adapter, base, tied)
    if problems:
        raise RecipeError(f"{adapter.folder}: cannot be kept exactly in an mlx-lm adapter", problems)
    pieces = [
        piece
        for module in adapter.modules
        if not (module.path == names.HEAD and tied)
        for piece in _pieces(adapter, module, origin)
    ]
    scale = origin.scale if origin else folding.common_scale([module.scale for _, module, _, _ in pieces])
    rank = max(a.shape[1] for _, _, a, _ in pieces)
    _refuse_swelling(adapter, [a.size // a.shape[1] + b.size // a.shape[1] for _, _, a, b in pieces], rank)
    target = Target()
    for path, module, a, b in pieces:
        _add(target, adapter, path, module, (a, b), rank, folding.factor(module.scale, scale))
    for name, tensor in adapter.copies.items():
        entry = adapter.file.entries[tensor]
        target.bulk[f"copy.{name}"] = Made(entry.dtype, entry.shape, partial(adapter.file.words, tensor))
    target.config = _config(adapter, target, rank, scale)
    if adapter.copies:
        target.notes.append(f"left out {len(adapter.copies)} unchanged copies of the base's embeddings")
    return target


Piece = tuple[str, Module, Words, Words]


def _pieces(adapter: Adapter, module: Module, origin: Origin | None) -> list[Piece]:
    a, b = adapter.words(module)
    paths = names.mlx_paths(module.path, module.kind)
    if len(paths) == 1:
        return [(paths[0], module, a, b)]
    half = None
    if origin is not None:
        known = [origin.entries[f"{path}.lora_a"].shape[1] for path in paths if f"{path}.lora_a" in origin.entries]
        half = known[0] if known else None
    pairs = names.split_gate_up(a, b, half)
    found = [(path, module, *pair) for path, pair in zip(paths, pairs, strict=True)]
    return [piece for piece in found if origin is None or f"{piece[0]}.lora_a" in origin.entries]


def _add(
    target: Target, adapter: Adapter, path: str, module: Module, pair: tuple[Words, Words], rank: int, by: float
) -> None:
    """Plan the two or three tensors of one mlx-lm module, and note what undoing the fold takes."""
    (a, b), dtype_a, dtype_b = pair, adapter.dtype(module.a), adapter.dtype(module.b)
    own, axis = a.shape[1], 2 if module.kind == "experts" else 0
    if own < rank or by != 1.0:
        target.folded[path] = {"rank": own, "factor": by, "dtype": dtype_b}
        packed = folding.difference(b, folding.fold(b, dtype_b, by), dtype_b, by) if by != 1.0 else None
        if packed is not None:
            target.bulk[f"fold.{path}"] = Made("U8", packed.shape, lambda: packed)

    def scaled() -> Words:
        return folding.pad(folding.fold(b, dtype_b, by), axis, rank)

    target.tensors[f"{path}.lora_a"] = Made(dtype_a, _resized(a, 1, rank), lambda: folding.pad(a, 1, rank))
    target.tensors[f"{path}.lora_b"] = Made(folding.folded_dtype(dtype_b, by), _resized(b, axis, rank), scaled)
    if module.m:
        entry = adapter.file.entries[module.m]
        target.tensors[f"{path}.m"] = Made(entry.dtype, entry.shape, partial(adapter.file.words, module.m))


def _resized(words: Words, axis: int, size: int) -> tuple[int, ...]:
    return tuple(size if i == axis else n for i, n in enumerate(words.shape))


def _refuse_swelling(adapter: Adapter, sizes: list[int], rank: int) -> None:
    """Refuse a file whose one huge rank would make all others fill the disk; `sizes` are values at rank 1."""
    stored = adapter.file.path.stat().st_size
    if 4 * rank * sum(sizes) > max(_SWELLING * stored, _ALWAYS_FINE):
        raise RecipeError(
            f"{adapter.folder}: rank_pattern: mlx-lm has one rank for all, and bringing every module to {rank} makes"
            f" {4 * rank * sum(sizes) / 1e9:.1f} GB of {stored / 1e6:.1f} MB. Merge instead: smolmlx adapter merge."
        )


def _config(adapter: Adapter, target: Target, rank: int, scale: float) -> dict[str, Any]:
    old = adapter.config
    return {
        "fine_tune_type": "dora" if adapter.dora else "lora",
        "num_layers": -1,
        "lora_parameters": {
            "rank": rank,
            "scale": scale,
            "dropout": float(old.get("lora_dropout") or 0.0),
            "keys": sorted({name.rpartition(".")[0] for name in target.tensors}),
        },
        "model": old.get("base_model_name_or_path"),
        "base_model_name_or_path": old.get("base_model_name_or_path"),
        "revision": old.get("revision"),
    }


def _tied(adapter: Adapter, base: Weights | None) -> bool | None:
    """Whether head and embedding are one weight: by the base, else by PEFT's own mark on both adapters."""
    if base is not None:
        return base.tied
    both = {names.HEAD} | {m.path for m in adapter.modules if m.kind == "embedding"} <= {
        m.path for m in adapter.modules
    }
    return True if adapter.config.get("ensure_weight_tying") and both and _head_follows(adapter) else None


def _head_follows(adapter: Adapter) -> bool:
    """Whether the head's factors are the embedding's, crosswise, as PEFT stores a tied pair."""
    embeddings = [module for module in adapter.modules if module.kind == "embedding"]
    heads = [module for module in adapter.modules if module.path == names.HEAD]
    if len(embeddings) != 1 or len(heads) != 1:
        return False
    (a, b), (head_a, head_b) = adapter.words(embeddings[0]), adapter.words(heads[0])
    return np.array_equal(head_a, b.T) and np.array_equal(head_b, a.T)


def _refusals(adapter: Adapter, base: Weights | None, tied: bool | None) -> list[str]:
    config, modules = adapter.config, {module.path: module for module in adapter.modules}
    problems = []
    if adapter.full:
        problems.append(
            f"modules_to_save: {', '.join(sorted(adapter.full))}: mlx-lm's LoRA loader takes no whole weights."
            " Merge instead: smolmlx adapter merge."
        )
    if adapter.dora and config.get("lora_dropout"):
        problems.append(
            f"lora_dropout: {config['lora_dropout']} with DoRA: the libraries drop different things in training."
            " It plays no part afterwards: set it to 0 in adapter_config.json to convert."
        )
    embeddings = [path for path, module in modules.items() if module.kind == "embedding"]
    per_expert = [path for path in modules if re.search(r"\.experts\.\d+\.", path)]
    if per_expert:
        problems.append(
            f"{per_expert[0]} and {len(per_expert) - 1} more: one LoRA for each expert (transformers 4);"
            " load and save it once with PEFT on transformers 5, which stacks them."
        )
    problems += _tying_problems(adapter, modules, embeddings, tied)
    problems += _copy_problems(adapter, base)
    return problems


def _tying_problems(
    adapter: Adapter, modules: Mapping[str, Module], embeddings: list[str], tied: bool | None
) -> list[str]:
    touched = [*embeddings, *([names.HEAD] if names.HEAD in modules else [])]
    if not touched:
        return []
    if tied is None:
        return [f"{touched[0]}: whether the base ties head and embedding decides what this means. Pass --base MODEL."]
    if not tied:
        return []
    if not embeddings:
        return [f"{names.HEAD}: the base ties it to the embedding, and mlx-lm then has no head to adapt alone."]
    if names.HEAD not in modules or not _head_follows(adapter):
        return [
            f"{embeddings[0]}: the base ties it to the head; mlx-lm adapts both, this adapter only one"
            " (trained without ensure_weight_tying)."
        ]
    scales = modules[embeddings[0]].scale, modules[names.HEAD].scale
    if scales[0] != scales[1]:
        return [
            f"{embeddings[0]}: its scale is {scales[0]:g} and its tied head's {scales[1]:g} (rank_pattern and alpha_pattern"
            " reach the embedding alone in PEFT); mlx-lm has one for both. Merge instead: smolmlx adapter merge --untie."
        ]
    return []


def _copy_problems(adapter: Adapter, base: Weights | None) -> list[str]:
    """A base weight saved beside the adapter may go only if it is the base's own; `find_changes` looks, with the base."""
    if base is not None or not adapter.copies:
        return []
    return [f"{next(iter(adapter.copies))}: saved beside the adapter; pass --base MODEL to see that it is unchanged."]
