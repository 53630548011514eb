"""A tokenizer as GGUF holds it: tokens with types, merges or scores, the pre-tokenizer's name, special ids and template.

Byte-level BPE is written as such ("gpt2"), never as SentencePiece; a SentencePiece vocabulary needs its scores, which only
tokenizer.model has.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from smolmlx.data.chat import Tokenizer
from smolmlx.errors import RecipeError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {_QWEN2: "qwen2", _LLAMA3: "llama-bpe"}


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What goes into a GGUF's tokenizer.ggml keys."""

    model: str
    """gpt2 (byte-level BPE) or llama (SentencePiece)."""
    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    scores: list[float]
    add_space_prefix: bool


def read_vocabulary(folder: Path, size: int) -> Vocabulary:
    """Read tokenizer.json (and tokenizer.model); ids up to `size` without a token become unused ones.

    Raises:
        RecipeError: a kind of tokenizer that llama.cpp would cut differently.
    """
    tree = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    model = tree["model"]
    added = {int(token["id"]): token for token in tree.get("added_tokens", [])}
    tokens = [f"[PAD{i}]" for i in range(max(size, 1 + max([*model_vocab(model, folder).values(), *added])))]
    types = [UNUSED] * len(tokens)
    for token, index in model_vocab(model, folder).items():
        tokens[index], types[index] = token, NORMAL
    for index, token in added.items():
        tokens[index], types[index] = token["content"], CONTROL if token.get("special") else USER_DEFINED
    if _is_byte_level(tree):
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
        return Vocabulary("gpt2", _pre_name(tree, folder), tokens, types, merges, [], False)
    pieces = read_pieces(folder)
    scores = [-1000.0] * len(tokens)
    for index, (text, score, kind) in enumerate(pieces):
        if index >= len(tokens):
            break
        if index not in added or kind in (UNKNOWN, CONTROL, BYTE):
            tokens[index], types[index] = text, kind
        scores[index] = score
    return Vocabulary("llama", "default", tokens, types, [], scores, _adds_space(tree))


def model_vocab(model: Mapping[str, Any], folder: Path) -> dict[str, int]:
    """Return token -> id of a BPE model.

    Raises:
        RecipeError: WordPiece, Unigram without tokenizer.model, and the like.
    """
    vocab = model.get("vocab")
    if isinstance(vocab, list):  # Unigram
        return {piece[0]: index for index, piece in enumerate(vocab)}
    if model.get("type", "BPE") != "BPE" or not isinstance(vocab, dict):
        raise RecipeError(
            f"{folder}/tokenizer.json: a {model.get('type')} tokenizer; llama.cpp export knows BPE and SentencePiece."
        )
    return {str(token): int(index) for token, index in vocab.items()}


def _pre_tokenizers(tree: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    found = tree.get("pre_tokenizer") or {}
    return list(found.get("pretokenizers", [found] if found else []))


def _is_byte_level(tree: Mapping[str, Any]) -> bool:
    return any(step.get("type") == "ByteLevel" for step in _pre_tokenizers(tree))


def _pre_name(tree: Mapping[str, Any], folder: Path) -> str:
    """Return llama.cpp's name of a pre-tokenizer, by what it does."""
    steps = _pre_tokenizers(tree)
    last = steps[-1]
    if last.get("type") == "ByteLevel" and not last.get("add_prefix_space"):
        before = steps[:-1]
        if not before and last.get("use_regex", True):
            return "gpt-2"
        if (
            last.get("use_regex", True)
            and [step.get("type") for step in before] == ["Digits"]
            and before[0].get("individual_digits")
        ):
            return "smollm"
        if not last.get("use_regex", True) and [step.get("type") for step in before] == ["Split"]:
            name = _SPLITS.get(str((before[0].get("pattern") or {}).get("Regex")))
            if name:
                return name
    raise RecipeError(
        f"{folder}/tokenizer.json: a pre-tokenizer whose name in llama.cpp is not known here, so ids would differ: "
        f"{json.dumps(tree.get('pre_tokenizer'))[:300]}. Known: GPT-2's, SmolLM's, Qwen2's, Llama 3's."
    )


def _adds_space(tree: Mapping[str, Any]) -> bool:
    """Whether a space is put before the text, as SentencePiece does by default."""
    text = json.dumps([tree.get("normalizer"), tree.get("pre_tokenizer")])
    return '"Prepend"' in text or ('"Metaspace"' in text and '"prepend_scheme": "never"' not in text)


def read_pieces(folder: Path) -> list[tuple[str, float, int]]:
    """Return (piece, score, type) of a SentencePiece model, whose types are GGUF's own numbers.

    Reads the few fields of sentencepiece_model.proto by hand: ModelProto.pieces = 1; piece = 1, score = 2, type = 3.

    Raises:
        RecipeError: no tokenizer.model, or a broken one.
    """
    path = folder / "tokenizer.model"
    if not path.is_file():
        raise RecipeError(
            f"{folder}: a SentencePiece-type tokenizer without tokenizer.model, whose scores llama.cpp needs (its ids would be"
            " wrong without). Copy tokenizer.model from the original model into the folder."
        )
    data = path.read_bytes()
    pieces = []
    try:
        for field, value in _fields(data):
            if field == 1 and isinstance(value, bytes):
                text, score, kind = "", 0.0, NORMAL
                for inner, content in _fields(value):
                    if inner == 1 and isinstance(content, bytes):
                        text = content.decode("utf-8")
                    elif inner == 2 and isinstance(content, bytes):
                        score = float(np.frombuffer(content, "<f4")[0])
                    elif inner == 3 and isinstance(content, int):
                        kind = content
                pieces.append((text, score, kind))
    except (IndexError, ValueError) as error:
        raise RecipeError(f"{path}: not a SentencePiece model. Fetch it again.") from error
    if not pieces:
        raise RecipeError(f"{path}: holds no pieces. Fetch it again.")
    return pieces


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield (field number, value) of a protobuf message: varints as int, everything else as bytes."""
    place = 0

    def varint() -> int:
        nonlocal place
        value = shift = 0
        while True:
            byte = data[place]
            place += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while place < len(data):
        key = varint()
        kind = key & 7
        if kind == 0:
            yield key >> 3, varint()
            continue
        if kind not in (1, 2, 5):
            raise ValueError(f"wire type {kind}")
        length = varint() if kind == 2 else {1: 8, 5: 4}[kind]
        if place + length > len(data):
            raise ValueError("truncated")
        yield key >> 3, data[place : place + length]
        place += length


def adds_special(tokenizer: Tokenizer) -> tuple[bool, bool]:
    """Return whether the tokenizer puts a BOS before and an EOS behind a text by itself."""
    plain = tokenizer.fast.encode("a", add_special_tokens=False).ids
    whole = tokenizer.fast.encode("a", add_special_tokens=True).ids
    return whole[:1] != plain[:1], whole[-1:] != plain[-1:]
