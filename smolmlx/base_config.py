"""What a base's config.json must say before it is believed: the types of the keys that are used, and sizes that fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_LARGEST = 1 << 40


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 < value < _LARGEST


def _is_id(value: Any) -> bool:
    return type(value) is int and 0 <= value < _LARGEST


def _is_ids(value: Any) -> bool:
    return _is_id(value) or (isinstance(value, list) and all(map(_is_id, value)))


_CHECKS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(
        ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"),
        (_is_size, "a positive integer"),
    ),
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
    rows, columns = (*shapes.get(EMBEDDING, ()), None, None)[:2]
    packed = f"{EMBEDDING.removesuffix('weight')}scales" in shapes  # its columns are no longer the width
    for key, stored in (("vocab_size", rows), ("hidden_size", None if packed else columns)):
        said = config.get(key)
        if _is_size(said) and stored not in (None, said):
            problems.append(f"{key}: {said}, but {EMBEDDING} is stored as {list(shapes[EMBEDDING])}.")
    return problems
