"""Read a PEFT LoRA folder: tensor names, scales and targets as PEFT itself understands them, and what is refused.

Read from PEFT 0.21's own files; patterns match as its `get_pattern_key` and `check_target_module_exists` do.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from smolmlx.adapters.adapter import Adapter, Module, first_and_count
from smolmlx.adapters.mlx_format import EMBEDDING
from smolmlx.adapters.names import HEAD, HEAD_WEIGHT
from smolmlx.adapters.tensors import FLOATS, TensorFile
from smolmlx.errors import DataError, RecipeError
from smolmlx.peft_config import DEFAULT_ALPHA, DEFAULT_RANK, config_problems, other_kind

PREFIX = "base_model.model."
EXPERT_PARAMETERS = ("gate_up_proj", "down_proj")
"""Stacked expert weights of transformers 5, in the order in which PEFT nests its wrappers, innermost first."""

_LEAVES = {
    ".lora_A.weight": "a", ".lora_B.weight": "b", ".lora_embedding_A": "ea", ".lora_embedding_B": "eb",
    ".lora_magnitude_vector": "m", ".lora_magnitude_vector.weight": "m",
}  # fmt: skip
# Settings that leave the meaning of the saved weights alone, and those that this file reads.
_HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_type", "peft_version", "task_type",
    "r", "lora_alpha", "lora_dropout", "target_modules", "target_parameters", "exclude_modules", "use_rslora",
    "use_dora", "rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern", "modules_to_save",
    "ensure_weight_tying", "init_lora_weights", "bias", "lora_bias", "megatron_core", "qalora_group_size",
    "loftq_config", "eva_config", "base_model_class", "runtime_config", "parent_library",
}  # fmt: skip
_REFUSED = {
    "lora_bias": "it trains a bias beside B, which mlx-lm's layers have no place for",
    "fan_in_fan_out": "its base stores weights transposed (Conv1D)",
    "layer_replication": "its base repeats layers",
    "trainable_token_indices": "it trains single rows of the embedding, outside LoRA",
    "alora_invocation_tokens": "aLoRA switches on after a token, which a merged or converted adapter cannot do",
    "use_qalora": "QALoRA pools its inputs before A",
}
_OWN_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga", "mica")


def describe(folder: Path, config: Mapping[str, Any], file: TensorFile) -> tuple[Adapter, list[str]]:
    """Return what can be told of an adapter, and why it is of a kind that is refused; see `adapter.describe`."""
    if problems := config_problems(config):
        raise DataError(f"{folder / 'adapter_config.json'}", problems)
    if problems := other_kind(config):
        raise RecipeError(f"{folder}: not an adapter that can be read", problems)
    refusals = _refusals(config)
    grouped, full, copies, problems = _group(file, config)
    modules = []
    for path, leaves in sorted(grouped.items()):
        ranked = path
        if path == HEAD and config.get("ensure_weight_tying"):  # PEFT makes the head of the embedding's factors
            ranked = next((name for name in grouped if "ea" in grouped[name]), path)
        module, problem = _module(path, leaves, config, file, ranked)
        if module:
            modules.append(module)
        problems += problem
    problems += _misfits(modules, file) + _unmatched(modules, config)
    columns = [m.path for m in modules if m.m and m.kind == "embedding"]
    if columns and not problems:
        refusals.append(
            f"{columns[0]}: DoRA on an embedding: PEFT's magnitude is per column there, mlx-lm's and this program's per"
            " row. Merge with PEFT: PeftModel.merge_and_unload()."
        )
    if config.get("use_dora"):
        problems += [f"{m.path}: no lora_magnitude_vector, though use_dora is set." for m in modules if not m.m]
    else:
        problems += [f"{m.path}: a lora_magnitude_vector, though use_dora is not set." for m in modules if m.m]
    if not modules and not problems:
        problems.append("no LoRA tensor in it.")
    if problems and not refusals:
        raise DataError(f"{file.path}", problems)
    return Adapter(folder, "peft", config, file, tuple(modules), full, copies), refusals


def pattern_value(patterns: Mapping[str, Any], path: str, otherwise: Any) -> Any:
    """Return the value of the first pattern that matches a module path, as PEFT does."""
    for key, value in patterns.items():
        if re.match(rf"(.*\.)?({key})$", path):
            return value
    return otherwise


def _refusals(config: Mapping[str, Any]) -> list[str]:
    """Name every setting that would be lost."""
    problems = [f"{key}: {config[key]!r}: {why}." for key, why in _REFUSED.items() if config.get(key)]
    if config.get("bias", "none") != "none":
        problems.append(f"bias: {config['bias']!r}: trained biases have no place in mlx-lm's adapters.")
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(_OWN_BASE):
        problems.append(
            f"init_lora_weights: {start!r}: this start changes the base weights, so the adapter fits no other copy of the base."
            " Convert it with PEFT first: save_pretrained(path_initial_model_for_weight_conversion=...)."
        )
    known = _HARMLESS | set(_REFUSED)
    problems += [
        f"{key}: {config[key]!r}: a setting unknown here." for key in config if key not in known and config[key]
    ]
    return problems


Grouped = dict[str, dict[str, str]]


def _group(file: TensorFile, config: Mapping[str, Any]) -> tuple[Grouped, dict[str, str], dict[str, str], list[str]]:
    """Sort tensors into modules' leaves, full parameters and copies of the base."""
    grouped: Grouped = defaultdict(dict)
    full: dict[str, str] = {}
    copies: dict[str, str] = {}
    problems = []
    saved = config.get("modules_to_save") or []
    for name, entry in file.entries.items():
        bare = name.removeprefix(PREFIX)
        leaf = next((leaf for leaf in _LEAVES if bare.endswith(leaf)), None)
        if bare == name:
            problems.append(f"{name}: an extra tensor: PEFT's names begin with {PREFIX}")
        elif entry.dtype not in FLOATS:
            problems.append(f"{name}: {entry.dtype}; expected float32, float16 or bfloat16.")
        elif leaf:
            grouped[bare.removesuffix(leaf)][_LEAVES[leaf]] = name
        elif bare.endswith(".base_layer.weight"):
            copies[bare.replace(".base_layer.weight", ".weight")] = name
        elif _saved_whole(bare, saved) or (bare == HEAD_WEIGHT and config.get("ensure_weight_tying")):
            full[bare] = name
        else:
            problems.append(f"{name}: an extra tensor: neither LoRA nor in modules_to_save.")
    head = full.get(HEAD_WEIGHT)
    if head and not _saved_whole(HEAD_WEIGHT, saved):  # PEFT saves the other side of a tie by itself
        embedding = next((full[name] for name in full if EMBEDDING.search(name.removesuffix(".weight"))), None)
        if embedding is None or not np.array_equal(file.words(embedding), file.words(head)):
            problems.append(f"{head}: not in modules_to_save, and not the saved embedding as ensure_weight_tying says.")
    return grouped, full, copies, problems


def _module(
    path: str, leaves: Mapping[str, str], config: Mapping[str, Any], file: TensorFile, ranked: str
) -> tuple[Module | None, list[str]]:
    embedding = "ea" in leaves or "eb" in leaves
    a, b = (leaves.get("ea"), leaves.get("eb")) if embedding else (leaves.get("a"), leaves.get("b"))
    if a is None or b is None:
        return None, [f"{path}: lora_{'B' if b is None else 'A'} is missing."]
    real, kind = path, "embedding" if embedding else "linear"
    if path.endswith((".experts", ".base_layer")):
        parameter = _expert_parameter(path, config)
        if parameter is None:
            return None, [
                f"{path}: adapts a parameter that target_parameters does not name as one of {', '.join(EXPERT_PARAMETERS)}."
            ]
        real, ranked, kind = parameter, parameter, "experts"
    rank = pattern_value(config.get("rank_pattern") or {}, real, config.get("r", DEFAULT_RANK))
    alpha = pattern_value(config.get("alpha_pattern") or {}, real, config.get("lora_alpha", DEFAULT_ALPHA))
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    if ranked != real and file.entries[a].shape[:1] != (rank,):  # its scale does not follow
        rank = pattern_value(config.get("rank_pattern") or {}, ranked, config.get("r", DEFAULT_RANK))
    return Module(real, kind, rank, scale, a, b, leaves.get("m")), []


def _expert_parameter(path: str, config: Mapping[str, Any]) -> str | None:
    """Return which stacked parameter a wrapper adapts: PEFT nests one `base_layer` for each that lies further out."""
    depth = path.count(".base_layer")
    experts = path.replace(".base_layer", "")
    targets = config.get("target_parameters") or []
    adapted = [name for name in EXPERT_PARAMETERS if _matches(f"{experts}.{name}", targets)]
    return f"{experts}.{adapted[-1 - depth]}" if depth < len(adapted) else None


def _misfits(modules: Iterable[Module], file: TensorFile) -> list[str]:
    """Name modules whose tensors are not of their rank, one for all of a rank: a wrong `r` concerns them all."""
    ranks: dict[int, list[str]] = defaultdict(list)
    magnitudes = []
    for module in modules:
        a, b = file.entries[module.a].shape, file.entries[module.b].shape
        if module.kind == "experts":
            fits = len(a) == len(b) == 2 and a[0] % module.rank == 0 and b[1] == a[0] > 0
        else:
            fits = len(a) == len(b) == 2 and a[0] == b[1] == module.rank
        if not fits:
            why = f"{module.path}: A is {list(a)} and B {list(b)}, which do not fit rank {module.rank}."
            ranks[module.rank].append(why)
        elif module.m and module.kind == "linear" and file.entries[module.m].shape != (b[0],):
            found = list(file.entries[module.m].shape)
            magnitudes.append(f"{module.path}: its magnitude is {found}, expected [{b[0]}].")
    return [problem for found in ranks.values() for problem in first_and_count(found)] + magnitudes


def _matches(path: str, targets: Iterable[str]) -> bool:
    return any(path == target or path.endswith(f".{target}") for target in targets)


def _unmatched(modules: Iterable[Module], config: Mapping[str, Any]) -> list[str]:
    """Name modules whose tensors PEFT would leave out without a word, and targets that have no tensor."""
    targets = config.get("target_modules") or []
    parameters = config.get("target_parameters") or []
    layers = config.get("layers_to_transform")
    layers = [layers] if isinstance(layers, int) else layers
    modules = list(modules)
    problems = []
    for module in modules:
        path = module.path
        if path == HEAD and config.get("ensure_weight_tying"):
            continue  # PEFT adds the tied head by itself
        if module.kind == "experts" or _matches(f"{path}.weight", parameters):
            continue
        if isinstance(targets, str):
            hit = targets == "all-linear" or re.fullmatch(targets, path) is not None
        else:
            layer = re.match(r".*?\.[^.]*\.(\d+)\.", path)
            inside = not layers or path in targets or (layer is not None and int(layer[1]) in layers)
            hit = _matches(path, targets) and inside
        if not hit:
            problems.append(f"{path}: an extra module: target_modules does not match it, so PEFT would ignore it.")
    if not isinstance(targets, str):
        problems += [
            f"target_modules: '{target}' has no tensor in the file."
            for target in targets
            if not any(_matches(module.path, [target]) for module in modules) and not _excluded(target, config)
        ]
    return problems


def _excluded(target: str, config: Mapping[str, Any]) -> bool:
    excluded = config.get("exclude_modules") or []
    if isinstance(excluded, str):
        return re.fullmatch(excluded, target) is not None
    return _matches(target, excluded)


def _saved_whole(name: str, saved: Iterable[Any]) -> bool:
    """PEFT takes every module whose path ends like an entry, so 'norm' means all that end in norm."""
    parts = name.split(".")
    modules = [".".join(parts[:count]) for count in range(1, len(parts))]
    return any(module.endswith(str(entry)) for module in modules for entry in saved)
