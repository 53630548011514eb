"""Write a model's config so that transformers and mlx-lm both read the same model from it.

transformers 5 saves some values under new names only; mlx-lm then takes its defaults without a word.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from smolmlx.models import with_rope_theta

# transformers 5's name -> the one mlx-lm 0.32 and llama.cpp's tools look for.
_ALIASES = {"num_local_experts": "num_experts", "dtype": "torch_dtype"}
_QUANTIZATION = ("quantization", "quantization_config")


def readable(config: Mapping[str, Any], *, dtype: str | None = None) -> dict[str, Any]:
    """Return a config with every value under both names; `dtype` replaces the stored type.

    Quantization blocks are dropped when a dtype is given: the weights are then whole.
    """
    found = with_rope_theta(config)
    for new, old in _ALIASES.items():
        if new in found and old not in found and (new != "num_local_experts" or "moe" in str(found.get("model_type"))):
            found[old] = found[new]
    rope = found.get("rope_parameters")
    if str(found.get("model_type")).startswith("gemma3") and isinstance(rope, dict) and "full_attention" in rope:
        rope = rope["full_attention"]  # both libraries scale these layers alone
    if isinstance(rope, dict) and "partial_rotary_factor" in rope:  # mlx-lm's StableLM does not load without it
        found.setdefault("partial_rotary_factor", rope["partial_rotary_factor"])
    if isinstance(rope, dict) and rope.get("rope_type", "default") != "default" and not found.get("rope_scaling"):
        found["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    if dtype is not None:
        found = {key: value for key, value in found.items() if key not in _QUANTIZATION}
        found |= {"dtype": dtype, "torch_dtype": dtype}
    return found
