"""First weights: a function of the seed, and induction heads only where there is room for them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from smolmlx import first_weights
from smolmlx.errors import RecipeError
from smolmlx.models import llama_shapes

CONFIG: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 128,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
}


def draw(kind: str, seed: int = 0, **changes: Any) -> first_weights.Weights:
    config = {**CONFIG, **changes}
    return first_weights.draw(config, llama_shapes(config), kind, seed)


def test_induction_changes_two_heads_and_the_embedding_alone() -> None:
    normal, planted = draw("normal"), draw("induction")
    changed = {name for name in normal if not np.array_equal(normal[name], planted[name])}
    heads = {f"model.layers.{i}.self_attn.{kind}_proj.weight" for i in (0, 2) for kind in "qkvo"}
    assert changed == heads | {"model.embed_tokens.weight"}
    second = slice(32, None)  # the other heads
    for name in heads:
        rows = (slice(None), second) if "o_proj" in name else second
        assert np.array_equal(normal[name][rows], planted[name][rows])


def test_induction_is_a_function_of_the_seed() -> None:
    first, same, other = draw("induction"), draw("induction"), draw("induction", seed=1)
    assert all(np.array_equal(first[name], same[name]) for name in first)
    assert not np.array_equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])
    assert {weight.dtype for weight in first.values()} == {np.dtype(np.float32)}


@pytest.mark.parametrize(
    "changes", [{"num_hidden_layers": 1}, {"num_attention_heads": 1, "num_key_value_heads": 1}, {"rope_theta": 10.0}]
)
def test_no_room_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="first_weights: normal"):
        draw("induction", **changes)
