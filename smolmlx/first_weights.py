"""First weights of a model that is made from scratch, drawn in numpy so that every engine starts from the same ones.

`normal` is what transformers draws. `induction` begins with the two attention heads that copy from the context (Elhage
et al. 2021, Olsson et al. 2022): one looks at the token before, one finds where the present token stood earlier and
proposes what followed it there. Training discovers this pair only after very many tokens; a model that gets a few
million never does, and then answers without reading its prompt. Both heads are ordinary weights and go on learning.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from smolmlx.errors import RecipeError

Weights = dict[str, npt.NDArray[np.float32]]
Array = npt.NDArray[np.float32]

# Logit scales of the two heads, and how loudly each writes; chosen on the embedded model's shape (docs/log.md).
_LOOK_BACK = 8.0
_MATCH = 8.0
_WRITE = 0.375
_PROPOSE = 3.75
# Rotary pairs slower than this many radians a position still agree over some hundred positions, so they can carry content.
_SLOW = 0.007


def draw(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], kind: str, seed: int) -> Weights:
    """Return name -> first weights of a Llama-type model.

    Normal(0, initializer_range) for matrices and embeddings, ones for norms, as in transformers' Llama; for `induction`
    the two heads replace the first head of layer 0 and of the middle layer.

    Raises:
        RecipeError: `induction` for a shape that has no room for it.
    """
    rng = np.random.default_rng([seed, 0x1417])
    std = np.float32(config.get("initializer_range", 0.02))
    weights = {
        name: np.ones(shape, np.float32) if len(shape) == 1 else rng.standard_normal(shape, dtype=np.float32) * std
        for name, shape in shapes.items()
    }
    if kind == "induction":
        _plant(weights, config, rng)
    return weights


def _plant(weights: Weights, config: Mapping[str, Any], rng: np.random.Generator) -> None:
    """Write both heads. The residual stream of width D is divided: [0, D-h-1) content, one constant, [D-h, D) the past.

    h is the width of a head. Every embedding holds the same number in the constant's dimension, which attention without
    biases needs to see positions alone; equal for all tokens, it cancels in a tied head's softmax.
    """
    embedding = weights["model.embed_tokens.weight"]
    width, layers = embedding.shape[1], int(config["num_hidden_layers"])
    head = int(config.get("head_dim") or width // int(config["num_attention_heads"]))
    theta = float(config.get("rope_theta", 10000.0))
    half, content, past = head // 2, width - head - 1, slice(width - head, width)
    speeds = theta ** (-np.arange(half) / half)  # radians a position; dimension i turns with i + half
    fast, slow = np.arange(half // 4), np.flatnonzero(speeds < _SLOW)
    if layers < 2 or content < head or len(fast) < 2 or len(slow) < 4:
        raise RecipeError(
            "model.first_weights: induction needs two layers, three heads' width, 16 dimensions a head and slow rotations."
            f" {layers} layers, width {width}, {head} a head and rope_theta {theta:g} do not have them."
            " Raise model.config.rope_theta to 100000, or take first_weights: normal."
        )
    embedding[:, :content] = rng.standard_normal((len(embedding), content)) / np.sqrt(width)
    embedding[:, past] = rng.standard_normal((len(embedding), head)) / np.sqrt(width) / 10
    embedding[:, content] = 0.5

    read, said = _frame(rng, content, head), _frame(rng, content, head)
    # The token before: a query that turns one position further than its key agrees best with the position before.
    query, key = np.zeros((head, width)), np.zeros((head, width))
    key[fast, content] = 1.0
    query[fast, content] = np.cos(speeds[fast]) * _LOOK_BACK
    query[fast + half, content] = -np.sin(speeds[fast]) * _LOOK_BACK
    _set_head(weights, 0, query, key, _padded(read.T, width), past, np.eye(head) * _WRITE)
    # The match: the present token's content against what each position wrote about its past.
    dimensions = np.concatenate([slow, slow + half])
    query, key = np.zeros((head, width)), np.zeros((head, width))
    key[dimensions, past] = np.eye(head)[: len(dimensions)]
    query[dimensions, :content] = read.T[: len(dimensions)] * _MATCH
    _set_head(weights, layers // 2, query, key, _padded(said.T, width), slice(0, content), said * _PROPOSE)


def _frame(rng: np.random.Generator, rows: int, columns: int) -> npt.NDArray[np.float64]:
    """Return random orthonormal columns."""
    return np.linalg.qr(rng.standard_normal((rows, columns)))[0]


def _padded(matrix: npt.NDArray[np.float64], width: int) -> npt.NDArray[np.float64]:
    return np.pad(matrix, ((0, 0), (0, width - matrix.shape[1])))


def _set_head(weights: Weights, layer: int, query: Any, key: Any, value: Any, where: slice, out: Any) -> None:
    """Replace the first head of a layer (and its key-value head); `out` writes to the dimensions `where` alone."""
    attention, size = f"model.layers.{layer}.self_attn.", len(query)
    weights[attention + "q_proj.weight"][:size] = query
    weights[attention + "k_proj.weight"][:size] = key
    weights[attention + "v_proj.weight"][:size] = value
    weights[attention + "o_proj.weight"][:, :size] = 0
    weights[attention + "o_proj.weight"][where, :size] = out
