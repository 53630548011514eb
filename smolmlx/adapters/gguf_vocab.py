"""A tokenizer as GGUF holds it: tokens with types, merges or scores, the pre-tokenizer's name, special ids and template.

Byte-level BPE is written as such ("gpt2"), never as SentencePiece; a SentencePiece vocabulary needs its scores, which only
tokenizer.model has. llama.cpp normalizes no text, so a tokenizer that does is refused, but for NFC, which most text is in.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
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
_SPACES = (
    {"type": "Prepend", "prepend": "▁"},
    {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
)
"""What SentencePiece does to spaces, and llama.cpp with it."""
_MODEL_TYPES = {1: "Unigram", 2: "BPE", 3: "word", 4: "character"}
NFC_NOTE = (
    "llama.cpp does not normalize: text that is not in NFC (e + U+0301 for é) is cut differently than by this tokenizer."
    " Put text into NFC first"
)


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
    tree = _read_tree(folder)
    model = tree["model"]
    _refuse_normalizer(tree, folder)
    vocab = model_vocab(model, folder)
    size = max(size, 1 + max(vocab.values(), default=-1))
    # Gemma 3's text models have an image token behind the last row, where llama.cpp wants a row for each token.
    added = {int(token["id"]): token for token in tree.get("added_tokens", []) if int(token["id"]) < size}
    tokens = [f"[PAD{i}]" for i in range(size)]
    types = [UNUSED] * len(tokens)
    for token, index in vocab.items():
        tokens[index], types[index] = token, NORMAL
    for index, token in added.items():
        tokens[index], types[index] = token["content"], CONTROL if token.get("special") else USER_DEFINED
    if _is_byte_level(tree):
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
        return Vocabulary("gpt2", _pre_name(tree, folder), tokens, types, merges, [], False)
    _refuse_pre_tokenizer(tree, folder)
    pieces = read_pieces(folder)
    _refuse_other_pieces(folder, vocab, added, pieces)
    scores = [-1000.0] * len(tokens)
    for index, (text, score, kind) in enumerate(pieces):
        if index not in added or kind in (UNKNOWN, CONTROL, BYTE):
            tokens[index], types[index] = text, kind
        scores[index] = score
    return Vocabulary("llama", "default", tokens, types, [], scores, _adds_space(tree))


def _read_tree(folder: Path) -> dict[str, Any]:
    tree: dict[str, Any] = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    return tree


def model_vocab(model: Mapping[str, Any], folder: Path) -> dict[str, int]:
    """Return token -> id of a BPE model.

    Raises:
        RecipeError: WordPiece, Unigram, and the like.
    """
    vocab = model.get("vocab")
    if model.get("type", "BPE") != "BPE" or not isinstance(vocab, dict):
        raise RecipeError(
            f"{folder}/tokenizer.json: a {model.get('type')} tokenizer; written for llama.cpp are byte-level BPE and"
            " SentencePiece's BPE. Use llama.cpp's converter on `export hf`."
        )
    return {str(token): int(index) for token, index in vocab.items()}


def _normalizers(tree: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    found = tree.get("normalizer") or {}
    return list(found.get("normalizers", [found] if found else []))


def normalizes(folder: Path) -> bool:
    """Whether the tokenizer puts text into NFC, which llama.cpp does not."""
    return any(step.get("type") == "NFC" for step in _normalizers(_read_tree(folder)))


def _refuse_normalizer(tree: Mapping[str, Any], folder: Path) -> None:
    """llama.cpp cuts text as it comes; SentencePiece's treatment of spaces is all that it knows."""
    byte_level = _is_byte_level(tree)
    others = [step for step in _normalizers(tree) if step.get("type") != "NFC" and (byte_level or step not in _SPACES)]
    if others:
        names = ", ".join(str(step.get("type")) for step in others)
        raise RecipeError(
            f"{folder}/tokenizer.json: normalizer {names}: llama.cpp does not normalize text, so ids would differ. Known:"
            " none, and NFC. Use `export hf`."
        )


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


def _refuse_pre_tokenizer(tree: Mapping[str, Any], folder: Path) -> None:
    """SentencePiece's BPE cuts a text at spaces at most, which its pieces begin with (Gemma's has a Split at " ")."""
    for step in _pre_tokenizers(tree):
        if step.get("type") != "Metaspace" and (step.get("type"), step.get("pattern")) != ("Split", {"String": " "}):
            raise RecipeError(
                f"{folder}/tokenizer.json: pre-tokenizer {step.get('type')}: neither byte-level BPE nor SentencePiece's, so"
                " ids would differ in llama.cpp. Use `export hf`."
            )


def _adds_space(tree: Mapping[str, Any]) -> bool:
    """Whether a space is put before the text, as SentencePiece does by default."""
    text = json.dumps([tree.get("normalizer"), tree.get("pre_tokenizer")])
    return '"Prepend"' in text or ('"Metaspace"' in text and '"prepend_scheme": "never"' not in text)


def read_pieces(folder: Path) -> list[tuple[str, float, int]]:
    """Return (piece, score, type) of a SentencePiece model, whose types are GGUF's own numbers.

    Reads the few fields of sentencepiece_model.proto by hand: ModelProto.pieces = 1; piece = 1, score = 2, type = 3;
    ModelProto.trainer_spec = 2; model_type = 3.

    Raises:
        RecipeError: no tokenizer.model, a broken one, or one that is not of BPE.
    """
    path = folder / "tokenizer.model"
    if not path.is_file():
        raise RecipeError(
            f"{folder}: a SentencePiece-type tokenizer without tokenizer.model, whose scores llama.cpp needs (its ids would be"
            " wrong without). Copy tokenizer.model from the original model into the folder."
        )
    data = path.read_bytes()
    pieces, model_type = [], 1  # where a file says nothing, sentencepiece takes it for Unigram
    try:
        for field, value in _fields(data):
            if field == 2 and isinstance(value, bytes):
                model_type = next((int(found) for inner, found in _fields(value) if inner == 3), model_type)
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
    if _MODEL_TYPES.get(model_type) != "BPE":
        raise RecipeError(
            f"{path}: a {_MODEL_TYPES.get(model_type, model_type)} model, which llama.cpp would cut as BPE, so ids would"
            " differ. Use `export hf`."
        )
    return pieces


def _refuse_other_pieces(
    folder: Path, vocab: Mapping[str, int], added: Mapping[int, Any], pieces: Sequence[tuple[str, float, int]]
) -> None:
    """A tokenizer.model that was left behind by another tokenizer gives other scores, and other tokens.

    Bytes are not compared: Gemma's tokenizer.json calls <0x09> a tab.
    """
    ours = {index: token for token, index in vocab.items() if index not in added}
    theirs = {
        index: ours.get(index, text) if kind == BYTE else text
        for index, (text, _, kind) in enumerate(pieces)
        if index not in added
    }
    for index in sorted({*ours, *theirs}):
        if ours.get(index) != theirs.get(index):
            raise RecipeError(
                f"{folder}: tokenizer.model is not of the same tokenizer as tokenizer.json: id {index} is"
                f" {_shown(theirs.get(index))} in the first, {_shown(ours.get(index))} in the second. Copy both from one"
                " model."
            )


def _shown(token: str | None) -> str:
    return "no token" if token is None else repr(token)


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
