"""Write a model's config so that transformers and mlx-lm both read the same model from it.

transformers 5 saves some values under new names only; mlx-lm then takes its defaults without a word.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from smolmlx.adapters.names import SAME_NAMES
from smolmlx.models import with_rope_theta

# transformers 5's name -> the one mlx-lm 0.32 and llama.cpp's tools look for.
_ALIASES = {"num_local_experts": "num_experts", "dtype": "torch_dtype"}
_PERIODIC = ("gemma3_text", "cohere2")
"""mlx-lm takes every n-th layer of these to attend in full, transformers 5 those that `layer_types` says."""
COMPARED = SAME_NAMES | {"gpt_neox", "lfm2", "exaone4"}
"""Types whose configs were seen to give the same logits in transformers and mlx-lm; tests ask both."""
_MLX_DIFFERS = {"glm": "mlx-lm 0.32 rotates the whole head, transformers a part of it"}
_MLX_WINDOWS = frozenset({
    "afmoe", "cohere2", "exaone4", "exaone_moe", "gemma3", "gemma3_text", "gemma3n", "gemma4", "gemma4_text", "gpt_oss",
    "laguna", "mellum", "mimo_v2_flash", "ministral3", "muse_glimmer", "muse_spark", "olmo3",
})  # fmt: skip
"""Types whose sliding window mlx-lm 0.32 has (its models/ name the files that read `sliding_window`)."""
_WITHOUT_WINDOW = frozenset({"llama", "gemma", "granite", "olmo2", "stablelm", "cohere"})
"""Types for which transformers ignores a `sliding_window`."""
_QUANTIZATION = ("quantization", "quantization_config")


def readable(config: Mapping[str, Any], *, dtype: str | None = None) -> dict[str, Any]:
    """Return a config with every value under both names; `dtype` replaces the stored type.

    Quantization blocks are dropped when a dtype is given: the weights are then whole.
    """
    found = with_rope_theta(config)
    for new, old in _ALIASES.items():
        if new in found and old not in found and (new != "num_local_experts" or "moe" in str(found.get("model_type"))):
            found[old] = found[new]
    kind = found.get("model_type")
    if kind == "gpt_neox":
        rope = found.get("rope_parameters") or {}
        found.setdefault("rotary_pct", rope.get("partial_rotary_factor", 0.25))
        found.setdefault("rotary_emb_base", rope.get("rope_theta", 10000.0))
    if kind == "lfm2" and "hidden_size" in found:
        found.setdefault("block_dim", found["hidden_size"])
    if kind == "exaone4":
        found.setdefault("rope_scaling", None)  # mlx-lm does not load without it
    _add_window_pattern(found)
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


def _add_window_pattern(config: dict[str, Any]) -> None:
    """Say in mlx-lm's words which layers have a sliding window; `layer_types` is what transformers goes by."""
    kinds = config.get("layer_types")
    if not isinstance(kinds, list) or not kinds:
        return
    if config.get("model_type") == "exaone4":
        windowed = config.get("sliding_window") is not None
        config["sliding_window_pattern"] = (
            "".join("L" if kind == "sliding_attention" else "G" for kind in kinds) if windowed else None
        )
    period = _period(kinds)
    if config.get("model_type") in _PERIODIC and period:
        config["sliding_window_pattern"] = period


def _period(kinds: list[Any]) -> int | None:
    """Return n where exactly every n-th layer attends in full, else None."""
    if "full_attention" not in kinds:
        return None
    period = kinds.index("full_attention") + 1
    return period if all((kind == "full_attention") == (i % period == 0) for i, kind in enumerate(kinds, 1)) else None


def mlx_difference(config: Mapping[str, Any]) -> str | None:
    """Return why mlx-lm computes another model than transformers from any config of this one, if it does."""
    kind, kinds = str(config.get("model_type")), config.get("layer_types")
    if kind in _MLX_DIFFERS and _rotary_share(config) != 1:
        return f"model_type {kind}: {_MLX_DIFFERS[kind]}"
    if kind in _PERIODIC and isinstance(kinds, list) and kinds and _period(kinds) is None:
        return (
            f"layer_types: mlx-lm 0.32's {kind} has one layer that attends in full every so many layers, this model not"
        )
    return None


def _rotary_share(config: Mapping[str, Any]) -> float:
    rope = config.get("rope_parameters")
    inner = rope.get("partial_rotary_factor") if isinstance(rope, dict) else None
    return float(inner or config.get("partial_rotary_factor") or 0.5)


def limits(config: Mapping[str, Any]) -> list[str]:
    """Say where mlx-lm may not compute what transformers does from this config: it differs, has no window, or was not asked."""
    kind = config.get("model_type")
    found = [text for text in (mlx_difference(config),) if text]
    found += [f"not verified {text}" for text in (ignored_window(config),) if text]
    return found + ([] if kind in COMPARED else [uncompared(config)])


def uncompared(config: Mapping[str, Any]) -> str:
    return (
        f"model_type {config.get('model_type')}: what transformers and mlx-lm make of its config was not compared for this"
        " type; look at both before relying on either"
    )


def ignored_window(config: Mapping[str, Any]) -> str | None:
    """Say beyond which length mlx-lm no longer agrees with transformers, where it ignores the model's sliding window."""
    kind, window = config.get("model_type"), sliding_window(config)
    if window is None or kind in _MLX_WINDOWS:
        return None
    return f"beyond {window} tokens: mlx-lm has no sliding window for {kind}"


def sliding_window(config: Mapping[str, Any]) -> int | None:
    """Return the tokens that a layer of this model sees at most, where that is less than its context."""
    window, kinds = config.get("sliding_window"), config.get("layer_types")
    if not isinstance(window, int) or config.get("model_type") in _WITHOUT_WINDOW:
        return None
    if config.get("use_sliding_window") is False:
        return None
    if isinstance(kinds, list) and "sliding_attention" not in kinds:
        return None
    context = config.get("max_position_embeddings")
    return None if isinstance(context, int) and window >= context else window
