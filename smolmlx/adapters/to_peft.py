"""mlx-lm to PEFT: names, transposes, alpha from scale, stacked experts, and what PEFT cannot hold."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from smolmlx.adapters import folding, names
from smolmlx.adapters.adapter import Adapter, Module
from smolmlx.adapters.base import Weights
from smolmlx.adapters.peft_format import EXPERT_PARAMETERS, PREFIX
from smolmlx.adapters.target import Origin, Target
from smolmlx.adapters.tensors import Made, Words
from smolmlx.errors import RecipeError

_ROUTER = ".mlp.gate"  # a plain parameter in transformers 5, so PEFT reaches it through target_parameters


def build(adapter: Adapter, base: Weights | None, origin: Origin | None = None) -> Target:
    """Plan every tensor of the PEFT adapter; `origin` asks for exactly the tensors it once had.

    Raises:
        RecipeError: what PEFT cannot hold, by name, all reasons at once.
    """
    tied = _tied(adapter, base, origin)
    problems = _refusals(adapter, tied)
    if problems:
        raise RecipeError(f"{adapter.folder}: cannot be kept exactly in a PEFT adapter", problems)
    target = Target()
    ranks: dict[str, int] = {}
    experts: dict[str, dict[str, tuple[Words, Words, str, str]]] = {}
    for module in adapter.modules:
        a, b, dtype_b = _factors(adapter, module, origin)
        dtype_a = adapter.dtype(module.a)
        if module.kind == "experts":
            path = names.peft_path(module.path, module.kind)
            assert path is not None
            experts.setdefault(path, {})[module.path.rpartition(".")[2]] = (a, b, dtype_a, dtype_b)
            continue
        ranks[module.path] = a.shape[1]
        _add(target, module, a, b, dtype_a, dtype_b, bool(tied))
        if module.m:
            entry = adapter.file.entries[module.m]
            name = f"{PREFIX}{module.path}.lora_magnitude_vector"
            if origin is not None and f"{name}.weight" in origin.entries:
                name += ".weight"
            target.tensors[name] = Made(entry.dtype, entry.shape, partial(adapter.file.words, module.m))
    for path in sorted(experts):
        ranks[path] = _add_experts(target, path, experts[path], set(experts))
    if origin is not None:
        _add_copies(target, origin)
    target.config = _config(adapter, ranks, bool(tied))
    if experts and adapter.config["lora_parameters"].get("dropout"):
        target.notes.append("lora_dropout is 0: PEFT has no dropout on experts; it plays no part after training")
    return target


def _factors(adapter: Adapter, module: Module, origin: Origin | None) -> tuple[Words, Words, str]:
    """Return (a, b, dtype of b) with a fold of an earlier conversion undone."""
    a, b = adapter.words(module)
    dtype = adapter.dtype(module.b)
    fold = origin.folded.get(module.path) if origin else None
    if origin is None or fold is None:
        return a, b, dtype
    rank, by, old = int(fold["rank"]), float(fold["factor"]), str(fold["dtype"])
    short = (b[:, :, :rank] if module.kind == "experts" else b[:rank]), a[:, :rank]
    if by == 1.0:
        return short[1], short[0], dtype
    words = folding.unfold(np.ascontiguousarray(short[0]), old, by)
    packed = f"fold.{module.path}"
    if origin.bulk is not None and packed in origin.bulk.entries:
        words = folding.mend(words, old, origin.bulk.words(packed))
    return short[1], words, old


def _add(target: Target, module: Module, a: Words, b: Words, dtype_a: str, dtype_b: str, tied: bool) -> None:
    path = f"{PREFIX}{module.path}"
    first, second = names.to_peft_shape(module, a, b)
    leaves = (
        ("lora_embedding_A", "lora_embedding_B") if module.kind == "embedding" else ("lora_A.weight", "lora_B.weight")
    )
    target.tensors[f"{path}.{leaves[0]}"] = Made(dtype_a, first.shape, lambda: first)
    target.tensors[f"{path}.{leaves[1]}"] = Made(dtype_b, second.shape, lambda: second)
    if module.kind == "embedding" and tied:  # PEFT stores the tied head too, crosswise
        target.tensors[f"{PREFIX}{names.HEAD}.lora_A.weight"] = Made(dtype_b, b.shape, lambda: b)
        target.tensors[f"{PREFIX}{names.HEAD}.lora_B.weight"] = Made(dtype_a, a.shape, lambda: a)


def _add_experts(
    target: Target, path: str, parts: Mapping[str, tuple[Words, Words, str, str]], all_paths: set[str]
) -> int:
    """Plan the stacked experts of one parameter and return their rank."""
    dtype_a, dtype_b = next(iter(parts.values()))[2:]
    pairs = {name: part[:2] for name, part in parts.items()}
    if path.endswith("gate_up_proj"):
        a, b = names.join_gate_up(pairs.get("gate_proj"), pairs.get("up_proj"))
    else:
        a, b = pairs["down_proj"]
    module = Module(path, "experts", a.shape[1], 1.0, "", "")
    first, second = names.to_peft_shape(module, a, b)
    experts, _, parameter = path.rpartition(".")
    outer = sum(
        f"{experts}.{name}" in all_paths for name in EXPERT_PARAMETERS[EXPERT_PARAMETERS.index(parameter) + 1 :]
    )
    wrapper = f"{PREFIX}{experts}{'.base_layer' * outer}"
    target.tensors[f"{wrapper}.lora_A.weight"] = Made(dtype_a, first.shape, lambda: first)
    target.tensors[f"{wrapper}.lora_B.weight"] = Made(dtype_b, second.shape, lambda: second)
    return int(a.shape[1])


def _add_copies(target: Target, origin: Origin) -> None:
    """Put back the base weights that PEFT had saved beside the adapter."""
    for name, entry in origin.entries.items():
        stored = f"copy.{name.removeprefix(PREFIX).replace('.base_layer.weight', '.weight')}"
        if name.endswith(".base_layer.weight") and origin.bulk is not None and stored in origin.bulk.entries:
            target.tensors[name] = Made(entry.dtype, entry.shape, partial(origin.bulk.words, stored))


def _config(adapter: Adapter, ranks: Mapping[str, int], tied: bool) -> dict[str, Any]:
    """Return the adapter_config.json: every module by its full path, so that a base never adapts more than was trained."""
    found = adapter.config["lora_parameters"]
    rank, scale = int(found["rank"]), float(found["scale"])
    experts = {module.kind for module in adapter.modules} >= {"experts"}
    parameters = sorted(
        path if ".experts." in path else f"{path}.weight"
        for path in ranks
        if ".experts." in path or _router(path, experts)
    )
    other = {re.escape(path): own for path, own in sorted(ranks.items()) if own != rank}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base_name,
        "revision": adapter.config.get("revision"),
        "r": rank,
        "lora_alpha": _number(scale * rank),
        "lora_dropout": 0.0 if parameters else float(found.get("dropout") or 0.0),
        "target_modules": sorted(path for path in ranks if ".experts." not in path and not _router(path, experts)),
        "target_parameters": parameters or None,
        "rank_pattern": other,
        "alpha_pattern": {pattern: _number(scale * own) for pattern, own in other.items()},
        "use_rslora": False,
        "use_dora": adapter.dora,
        "ensure_weight_tying": tied and any(module.kind == "embedding" for module in adapter.modules),
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "inference_mode": True,
    }


def _router(path: str, experts: bool) -> bool:
    return experts and path.endswith(_ROUTER)


def _number(value: float) -> int | float:
    """alpha as PEFT's users write it: an integer where it is one."""
    return int(value) if value.is_integer() else value


def _tied(adapter: Adapter, base: Weights | None, origin: Origin | None) -> bool | None:
    if base is not None:
        return base.tied
    if origin is not None and any(module.kind == "embedding" for module in adapter.modules):
        head = f"{PREFIX}{names.HEAD}.lora_A.weight" in origin.entries
        return head and f"{names.HEAD}.lora_a" not in adapter.file.entries
    return None


def _refusals(adapter: Adapter, tied: bool | None) -> list[str]:
    if not adapter.modules:
        return [
            "fine_tune_type: full: whole weights, and PEFT's modules_to_save needs a LoRA beside them."
            " Use it as a model: smolmlx adapter merge."
        ]
    problems = []
    embeddings = [module.path for module in adapter.modules if module.kind == "embedding"]
    if adapter.dora and embeddings:
        problems.append(f"{embeddings[0]}: DoRA on an embedding: mlx-lm's magnitude is per row, PEFT's per column.")
    if adapter.dora and adapter.config["lora_parameters"].get("dropout"):
        problems.append(
            f"lora_parameters.dropout: {adapter.config['lora_parameters']['dropout']} with DoRA: the libraries drop"
            " different things in training. It plays no part afterwards: set it to 0 in adapter_config.json to convert."
        )
    if embeddings and tied is None:
        problems.append(
            f"{embeddings[0]}: whether the base ties it to the head decides what this means. Pass --base MODEL."
        )
    for module in adapter.modules:
        if names.peft_path(module.path, module.kind) is None:
            problems.append(f"{module.path}: stacked experts that transformers stores under a name unknown here.")
    types = {tuple(adapter.dtype(n) for n in (m.a, m.b)) for m in adapter.modules if m.kind == "experts"}
    if len(types) > 1:
        problems.append("experts of different types in one adapter; save them in one type first.")
    return problems
