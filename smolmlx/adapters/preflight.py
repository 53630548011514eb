"""What can be said of a source before anything heavy: its config against its weights, its tokenizer against its embedding.

The engines build what a config says, so one that leaves out its sizes fills the memory with a default model.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from smolmlx.adapters.merge import Prepared
from smolmlx.adapters.names import SAME_NAMES
from smolmlx.adapters.verification import prompts
from smolmlx.data.chat import Tokenizer
from smolmlx.errors import DataError

_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_WIDTHS = ("word_embed_proj_dim", "hidden_size", "n_embd", "d_model")
"""Keys for the embedding's width; OPT's first one wins."""
_EMBEDDINGS = ("embed_tokens.weight", "embed_in.weight", "wte.weight")


def check_source(prepared: Prepared, folder: Path) -> None:
    """Refuse a base that no library can load as what it is.

    Args:
        folder: of the base, whose config.json is named.

    Raises:
        DataError: sizes missing from the config or not those of the weights; a tokenizer with more tokens than the
            embedding has rows.
        RecipeError: a broken tokenizer.
    """
    problems = _size_problems(prepared.config) or _shape_problems(prepared)
    if problems:
        raise DataError(f"{folder / 'config.json'}: not the config of these weights; fetch it again", problems)
    embedding = _embedding(prepared)
    if embedding is not None:
        _refuse_small_embedding(Tokenizer(prepared.tokenizer), embedding[1][0])


def is_count(value: Any) -> bool:
    """Whether a value from JSON is a whole number above 0."""
    return type(value) is int and value > 0


def _size_problems(config: Mapping[str, Any]) -> list[str]:
    if isinstance(config.get("text_config"), dict):  # of a model with images: its sizes lie there
        return []
    # Other types call their sizes otherwise, but all have a vocabulary.
    keys = _SIZES if config.get("model_type") in SAME_NAMES else _SIZES[:1]
    problems = [] if isinstance(config.get("model_type"), str) else ["model_type: missing."]
    for key in keys:
        if key not in config:
            problems.append(f"{key}: missing.")
        elif not is_count(config[key]):
            problems.append(f"{key}: {config[key]!r}; expected a whole number above 0.")
    for key in ("num_key_value_heads", "head_dim"):
        if config.get(key) is not None and not is_count(config[key]):
            problems.append(f"{key}: {config[key]!r}; expected a whole number above 0.")
    return problems


def _shape_problems(prepared: Prepared) -> list[str]:
    config, problems = prepared.config, []
    embedding = _embedding(prepared)
    if embedding is not None and "text_config" not in config:
        name, (rows, columns) = embedding
        width = next((key for key in _WIDTHS if key in config), None)
        if rows != config["vocab_size"]:
            problems.append(f"vocab_size: {config['vocab_size']}, but {name} has {rows} rows.")
        if width and columns != config[width]:
            problems.append(f"{width}: {config[width]!r}, but {name} has {columns} columns.")
    if config.get("model_type") in SAME_NAMES:
        parts = [name.split(".") for name in prepared.tensors if name.startswith("model.layers.")]
        layers = 1 + max((int(part[2]) for part in parts if part[2].isdigit()), default=-1)
        if layers != config["num_hidden_layers"]:
            problems.append(f"num_hidden_layers: {config['num_hidden_layers']}, but the weights are of {layers}.")
    return problems


def _embedding(prepared: Prepared) -> tuple[str, tuple[int, ...]] | None:
    """Return name and shape of the input embedding, where it has a name known here."""
    for name, made in prepared.tensors.items():
        if name.endswith(_EMBEDDINGS) and len(made.shape) == 2:
            return name, made.shape
    return None


def _refuse_small_embedding(tokenizer: Tokenizer, rows: int) -> None:
    """Added tokens may lie beyond it (Gemma 3's image token does) while no text gives them."""
    ids = [*tokenizer.fast.get_vocab(with_added_tokens=False).values(), *tokenizer.eos_ids]
    ids += [found for ids in prompts(tokenizer) for found in ids]
    if max(ids, default=0) >= rows:
        raise DataError(
            f"{tokenizer.folder}: its tokenizer gives ids up to {max(ids)}, the embedding has {rows} rows. Put the tokenizer"
            " there that belongs to this base, or resize the base: model.resize_token_embeddings(len(tokenizer))."
        )
