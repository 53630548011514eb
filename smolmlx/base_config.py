"""What a base's config.json must say before it is believed: the types of the keys that are used, and sizes that fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_EMBEDDINGS = ("embed_tokens.weight", "embed_in.weight", "wte.weight")
_WIDTHS = ("word_embed_proj_dim", "hidden_size", "n_embd", "d_model")
"""Keys for the embedding's width; OPT's first one wins."""
_LARGEST = 1 << 40


def is_size(value: Any) -> bool:
    """Whether a value from JSON is a whole number above 0, and of a sane size."""
    return type(value) is int and 0 < value < _LARGEST


def _is_positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < _LARGEST


def _is_id(value: Any) -> bool:
    return type(value) is int and 0 <= value < _LARGEST


def _is_ids(value: Any) -> bool:
    return _is_id(value) or (isinstance(value, list) and all(map(_is_id, value)))


_CHECKS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(
        (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
        ),
        (is_size, "a positive integer"),
    ),
    "intermediate_size": (lambda value: is_size(value) or isinstance(value, list), "a positive integer"),
    **dict.fromkeys(("rope_theta", "rms_norm_eps"), (_is_positive, "a number above 0")),
    "rope_scaling": (lambda value: isinstance(value, dict), "an object"),
    "eos_token_id": (_is_ids, "a token id or a list of them"),
    "tie_word_embeddings": (lambda value: isinstance(value, bool), "true or false"),
}


def config_problems(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Name every key that is missing, of another type than is meant, or does not fit the stored embedding.

    Keys other than model_type may be missing: architectures name their sizes differently, or nest them.
    """
    problems = []
    if not isinstance(config.get("model_type"), str):
        problems.append(f"model_type: expected the name of an architecture, found {config.get('model_type')!r}.")
    for key, (is_good, what) in _CHECKS.items():
        value = config.get(key)
        if value is not None and not is_good(value):
            problems.append(f"{key}: expected {what}, found {value!r:.80}.")
    name = find_embedding(shapes)
    if name is not None:
        width = next((key for key in _WIDTHS if key in config), "")
        packed = f"{name.removesuffix('weight')}scales" in shapes  # its columns are no longer the width
        for key, stored in zip(("vocab_size", "" if packed else width), shapes[name], strict=True):
            said = config.get(key)
            if is_size(said) and stored != said:
                problems.append(f"{key}: {said}, but {name} is stored as {list(shapes[name])}.")
    return problems


def find_embedding(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Return the name of the input embedding, where it has one that is known here."""
    return next((name for name, shape in shapes.items() if name.endswith(_EMBEDDINGS) and len(shape) == 2), None)
