"""How the two libraries call the same weight, and in which shape they store its factors.

Dense models of the types below carry the same module names in transformers and in mlx-lm (tests compare logits for
several). Mixture-of-experts layers differ: transformers 5 stacks gate and up of all experts in one parameter.
"""

from __future__ import annotations

import numpy as np

from smolmlx import base_config
from smolmlx.adapters.adapter import Module
from smolmlx.adapters.tensors import Words

SAME_NAMES = frozenset({
    "llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "qwen2_moe", "olmoe", "gemma", "gemma2", "gemma3_text", "phi3",
    "smollm3", "olmo2", "starcoder2", "stablelm", "granite", "cohere", "cohere2",
})  # fmt: skip
SAME_EXPERTS = frozenset({"qwen2_moe", "qwen3_moe", "olmoe"})
"""Of those, the types whose stacked experts were compared too."""
EQUAL_BLOCKS = SAME_NAMES - SAME_EXPERTS
"""Types whose blocks all have the same weights."""
HEAD, HEAD_WEIGHT = "lm_head", base_config.HEAD


def mlx_paths(path: str, kind: str) -> tuple[str, ...]:
    """Return mlx-lm's name(s) of a PEFT module; two for the stacked gate and up of experts."""
    if kind != "experts":
        return (path,)
    layer, _, parameter = path.rpartition(".experts.")
    names = ("gate_proj", "up_proj") if parameter == "gate_up_proj" else (parameter,)
    return tuple(f"{layer}.switch_mlp.{name}" for name in names)


def peft_path(path: str, kind: str) -> str | None:
    """Return the transformers 5 name of an mlx-lm module, or None where it is not known."""
    if kind != "experts":
        return path
    layer, found, name = path.rpartition(".switch_mlp.")
    stacked = {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj", "down_proj": "down_proj"}
    return f"{layer}.experts.{stacked[name]}" if found and name in stacked else None


def to_peft_shape(module: Module, a: Words, b: Words) -> tuple[Words, Words]:
    """Return the words of A and B as PEFT stores them; see `adapter` for the orientation they come in."""
    if module.kind == "experts":  # A [E R, in] expert-major, B [out, R E] rank-major
        return a.reshape(-1, a.shape[2]), b.transpose(1, 2, 0).reshape(b.shape[1], -1)
    return a.T, b.T


def join_gate_up(gate: tuple[Words, Words] | None, up: tuple[Words, Words] | None) -> tuple[Words, Words]:
    """Return factors of the stacked [gate; up] weight, exact: the same A is kept once, two are put side by side."""
    if gate is None or up is None:
        a, b = gate or up or (np.zeros(0), np.zeros(0))
        zeros = np.zeros_like(b)
        return a, np.concatenate((b, zeros) if up is None else (zeros, b), axis=1)
    if np.array_equal(gate[0], up[0]):
        return gate[0], np.concatenate((gate[1], up[1]), axis=1)
    rows = np.concatenate((gate[0], up[0]), axis=1)
    over = np.concatenate((gate[1], np.zeros((*gate[1].shape[:2], up[1].shape[2]), gate[1].dtype)), axis=2)
    under = np.concatenate((np.zeros((*up[1].shape[:2], gate[1].shape[2]), up[1].dtype), up[1]), axis=2)
    return rows, np.concatenate((over, under), axis=1)


def split_gate_up(a: Words, b: Words, rank: int | None = None) -> tuple[tuple[Words, Words], tuple[Words, Words]]:
    """Undo `join_gate_up`; `rank` is that of each half where two A's were put side by side."""
    half = b.shape[1] // 2
    if rank is None or rank == a.shape[1]:
        return (a, b[:, :half]), (a, b[:, half:])
    return (a[:, :rank], b[:, :half, :rank]), (a[:, rank:], b[:, half:, rank:])
