"""Read an mlx-lm adapter folder, as strictly as mlx-lm's own loader does, and name what it would refuse."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from smolmlx.adapters.adapter import Adapter, Module, first_and_count
from smolmlx.adapters.tensors import FLOATS, TensorFile
from smolmlx.errors import DataError, RecipeError
from smolmlx.peft_config import is_number

_LEAVES = {"lora_a": "a", "lora_b": "b", "m": "m"}
EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|tok_embeddings|embed_in)$")
"""Embeddings by name: their tensors have the shapes of a linear layer's."""


def read(folder: Path, config: Mapping[str, Any], file: TensorFile) -> Adapter:
    """Return the checked adapter; see `adapter.read`."""
    kind = config.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora", "full"):
        raise RecipeError(f"{folder}: fine_tune_type {kind!r} is none of mlx-lm's: lora, dora, full.")
    odd = [f"{name}: {e.dtype}; expected a float." for name, e in file.entries.items() if e.dtype not in FLOATS]
    if odd:
        raise DataError(f"{file.path}", odd)
    if kind == "full":
        return Adapter(folder, "mlx", config, file, (), {name: name for name in file.entries})
    rank, scale = _parameters(folder, config)
    if type(config.get("num_layers")) is not int:
        raise DataError(
            f"{folder}/adapter_config.json: num_layers: expected a whole number (-1 for all blocks), found"
            f" {config.get('num_layers', 'nothing')!r:.80}."
        )
    modules, problems = _modules(file, rank, scale, kind == "dora")
    problems += _unmatched(modules, config) + outside_layers(modules, config, 0)
    if not modules and not problems:
        problems.append("no LoRA tensor in it.")
    if problems:
        raise DataError(f"{file.path}", problems)
    return Adapter(folder, "mlx", config, file, tuple(modules))


def _parameters(folder: Path, config: Mapping[str, Any]) -> tuple[int, float]:
    """Return rank and scale. Old files carry `alpha` beside `scale`; `scale` is what counts."""
    found = config.get("lora_parameters")
    if not isinstance(found, dict):
        raise DataError(f"{folder}: adapter_config.json has no lora_parameters table (rank, scale, dropout).")
    problems = []
    rank, scale, dropout = found.get("rank"), found.get("scale"), found.get("dropout", 0.0)
    if type(rank) is not int or rank <= 0:
        problems.append(f"lora_parameters.rank: expected a positive integer, found {rank!r}.")
    if scale is None and "alpha" in found:
        problems.append("lora_parameters.scale: missing ('alpha' does not stand for it). Write scale = alpha / rank.")
    elif not is_number(scale):
        problems.append(f"lora_parameters.scale: expected a number, found {scale!r}.")
    if not is_number(dropout):
        problems.append(f"lora_parameters.dropout: expected a number, found {dropout!r}.")
    keys = found.get("keys")
    if keys is not None and not (isinstance(keys, list) and all(isinstance(key, str) for key in keys)):
        problems.append(f"lora_parameters.keys: expected a list of names, found {keys!r}.")
    if problems:
        raise DataError(f"{folder}/adapter_config.json", problems)
    assert isinstance(rank, int) and isinstance(scale, (int, float))
    return rank, float(scale)


def _modules(file: TensorFile, rank: int, scale: float, dora: bool) -> tuple[list[Module], list[str]]:
    grouped: dict[str, dict[str, str]] = defaultdict(dict)
    problems = []
    for name in file.entries:
        path, _, leaf = name.rpartition(".")
        if leaf in _LEAVES and path:
            grouped[path][_LEAVES[leaf]] = name
        else:
            problems.append(f"{name}: an extra tensor: not a lora_a, lora_b or m, so mlx-lm's loader refuses it.")
    modules, misfits = [], []
    for path, leaves in sorted(grouped.items()):
        missing = [leaf for leaf in ("a", "b", *(("m",) if dora else ())) if leaf not in leaves]
        if missing:
            problems += [f"{path}: {'m' if leaf == 'm' else 'lora_' + leaf} is missing." for leaf in missing]
            continue
        if "m" in leaves and not dora:
            problems.append(f"{path}: a magnitude m, though fine_tune_type is lora.")
            continue
        a, b = file.entries[leaves["a"]].shape, file.entries[leaves["b"]].shape
        stacked = len(a) == len(b) == 3
        kind = "experts" if stacked else "embedding" if EMBEDDING.search(path) else "linear"
        if stacked:
            fits = a[0] == b[0] > 0 and a[1] == b[2] == rank
        else:
            fits = len(a) == len(b) == 2 and a[1] == b[0] == rank
        if not fits:
            misfits.append(f"{path}: lora_a is {list(a)} and lora_b {list(b)}, which do not fit rank {rank}.")
            continue
        rows = a[0] if kind == "embedding" else b[1]
        if "m" in leaves and file.entries[leaves["m"]].shape != (rows,):
            problems.append(f"{path}: m is {list(file.entries[leaves['m']].shape)}, expected [{rows}].")
            continue
        modules.append(Module(path, kind, rank, scale, leaves["a"], leaves["b"], leaves.get("m")))
    return modules, problems + first_and_count(misfits)


def _unmatched(modules: list[Module], config: Mapping[str, Any]) -> list[str]:
    """Name modules that mlx-lm would not adapt: `keys` are relative to a block, or full paths."""
    keys = config["lora_parameters"].get("keys")
    if keys is None:
        return []
    known = set(keys)
    return [
        f"{module.path}: an extra module: it is not among lora_parameters.keys, so mlx-lm's loader refuses it."
        for module in modules
        if module.path not in known and re.sub(r"^.*?\.\d+\.", "", module.path) not in known
    ]


def outside_layers(modules: Sequence[Module], config: Mapping[str, Any], num_blocks: int) -> list[str]:
    """Name modules below the last `num_layers` blocks, which mlx-lm would not adapt; keys of full paths reach all.

    Args:
        num_blocks: of the base; 0 where it is not known, which leaves what the modules themselves tell.
    """
    last, keys = config["num_layers"], set(config["lora_parameters"].get("keys") or ())
    found = {module.path: re.match(r".*?\.(\d+)\.", module.path) for module in modules}
    blocks = {path: int(block[1]) for path, block in found.items() if block}
    num_blocks = num_blocks or max(blocks.values(), default=-1) + 1
    return [
        f"{path}: an extra module: num_layers is {last}, and its block is not among the last {last} of {num_blocks}, so"
        " mlx-lm's loader refuses it."
        for path, block in blocks.items()
        if last > 0 and block < num_blocks - last and path not in keys
    ]
