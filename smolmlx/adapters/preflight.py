"""What can be said of a source and of OUT before anything heavy: config beside weights, tokenizer beside embedding.

The engines build what a config says, so one that leaves out its sizes fills the memory with a default model.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from smolmlx.adapters.convert import refuse_used
from smolmlx.adapters.merge import Prepared
from smolmlx.adapters.names import SAME_NAMES
from smolmlx.adapters.verification import prompts
from smolmlx.base_config import find_embedding
from smolmlx.data.chat import Tokenizer
from smolmlx.errors import DataError, RecipeError

_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_WEIGHTS = (".gguf", ".safetensors", ".bin", ".pt", ".pth")
"""Endings of files, which a folder would be mistaken for."""


def check_out(target: str, out: Path) -> None:
    """Refuse an OUT that is in use, that is named as another kind of thing, or that cannot be written.

    Raises:
        RecipeError
    """
    _refuse_ending(target, out)
    try:
        refuse_used(out)
        for parent in out.parents:
            if parent.is_file():
                raise RecipeError(f"{out}: {parent} is a file, so nothing can be written below it. Choose another OUT.")
        there = next(parent for parent in out.absolute().parents if parent.is_dir())
        tempfile.TemporaryDirectory(prefix=".smolmlx-", dir=there).cleanup()
    except OSError as error:
        raise RecipeError(f"{out}: cannot be written ({error.strerror or error}). Choose another OUT.") from error


def is_gguf_file(out: Path) -> bool:
    """Whether OUT of `export gguf` names a file, not a folder."""
    return out.suffix.lower() == ".gguf"


def _refuse_ending(target: str, out: Path) -> None:
    ending = out.suffix.lower()
    if ending not in _WEIGHTS or (target == "gguf" and is_gguf_file(out)):
        return
    if target == "gguf":
        raise RecipeError(
            f"{out}: export gguf writes a .gguf file, or a folder with one in it. Name it {out.with_suffix('.gguf')}, or"
            f" {out.with_suffix('')} for a folder."
        )
    other = " For a GGUF file: smolmlx export gguf." if ending == ".gguf" else ""
    raise RecipeError(
        f"{out}: export {target} writes a folder, no {ending} file. Name it {out.with_suffix('')}.{other}"
    )


def check_source(prepared: Prepared, folder: Path) -> None:
    """Refuse a base that no library can load as what it is; `open_model` has looked at what its config says.

    Args:
        folder: of the base, whose config.json is named.

    Raises:
        DataError: sizes missing from the config or not those of the weights; a tokenizer with more tokens than the
            embedding has rows; a broken tokenizer.
    """
    problems = _missing_sizes(prepared) or _wrong_layers(prepared)
    if problems:
        raise DataError(f"{folder / 'config.json'}: not the config of these weights; fetch it again", problems)
    shapes = {name: made.shape for name, made in prepared.tensors.items()}
    name = find_embedding(shapes)
    if name is not None:
        _refuse_small_embedding(Tokenizer(prepared.tokenizer), shapes[name][0])


def _missing_sizes(prepared: Prepared) -> list[str]:
    if isinstance(prepared.config.get("text_config"), dict):  # of a model with images: its sizes lie there
        return []
    # Other types call their sizes otherwise, but all have a vocabulary.
    keys = _SIZES if prepared.config.get("model_type") in SAME_NAMES else _SIZES[:1]
    return [f"{key}: missing." for key in keys if prepared.config.get(key) is None]


def _wrong_layers(prepared: Prepared) -> list[str]:
    said = prepared.config.get("num_hidden_layers")
    parts = [name.split(".") for name in prepared.tensors if name.startswith("model.layers.")]
    layers = 1 + max((int(part[2]) for part in parts if part[2].isdigit()), default=-1)
    if prepared.config.get("model_type") in SAME_NAMES and layers != said:
        return [f"num_hidden_layers: {said}, but the weights are of {layers}."]
    return []


def _refuse_small_embedding(tokenizer: Tokenizer, rows: int) -> None:
    """Added tokens may lie beyond it (Gemma 3's image token does) while no text gives them."""
    ids = [*tokenizer.fast.get_vocab(with_added_tokens=False).values(), *tokenizer.eos_ids]
    ids += [found for ids in prompts(tokenizer) for found in ids]
    if max(ids, default=0) >= rows:
        raise DataError(
            f"{tokenizer.folder}: its tokenizer gives ids up to {max(ids)}, the embedding has {rows} rows. Put the tokenizer"
            " there that belongs to this base, or resize the base: model.resize_token_embeddings(len(tokenizer))."
        )
