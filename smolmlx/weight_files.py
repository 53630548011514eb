"""Which files of a folder are a base's weights, and their headers, read without believing what they promise.

transformers takes model.safetensors, or else the files that the index names; mlx-lm takes every model*.safetensors. A
folder of which the two would load different weights is refused.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from smolmlx.errors import DataError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PATTERN = "model*.safetensors"
MAX_HEADER_BYTES = 32 << 20
"""Room for 80,000 tensors with a note of as many; a longer header is broken or meant to fill the memory."""
_MAX_TENSORS, _MAX_ENTRY_BYTES, _MAX_NOTES = 200_000, 4096, 1000
_ASCII_ONLY_FROM = 1 << 20
"""Bytes of metadata beyond which other letters are refused: one of them makes Python's text four times as long."""
# Possessive throughout, so that a match costs no memory per letter.
_STRING = rb'"(?:[^"\\]++|\\.)*+"'
_PAIR = re.compile(
    rb"\s*+(" + _STRING + rb")\s*+:\s*+(\{(?:[^{}\"]++|" + _STRING + rb")*+\}|null)\s*+([,}])", re.DOTALL
)
_NOTES = re.compile(
    rb"\{\s*+(?:" + _STRING + rb"\s*+:\s*+" + _STRING + rb"\s*+,?\s*+){0,%d}+\}" % _MAX_NOTES, re.DOTALL
)


def weight_files(folder: Path) -> list[Path]:
    """Return the files of a base's weights; none where it has none.

    Raises:
        DataError: an index that is broken or names files that are not there, or more files than it names.
    """
    there = {path.name for path in folder.glob(PATTERN)}
    listed = set(weight_map(folder).values()) or there
    outside = sorted(name for name in listed if Path(name).name != name or not name.endswith(".safetensors"))
    if outside:
        raise DataError(f"{folder / INDEX}", [f"{name!r}: not a file of this folder." for name in outside])
    missing = sorted(name for name in listed if not (folder / name).is_file())
    if missing and there - listed != {SINGLE}:
        raise DataError(f"{folder}", [f"{name}: this shard is missing. Fetch it." for name in missing])
    if SINGLE in there and len(there | listed) > 1:
        other = min((there | listed) - {SINGLE})
        raise DataError(
            f"{folder}: holds {SINGLE} and {other} too, two sets of weights: transformers loads the first, mlx-lm both."
            " Move one set away, with its index."
        )
    if there - listed:
        raise DataError(
            f"{folder}: {min(there - listed)} is not in {INDEX}: mlx-lm loads it, transformers does not. Move it away."
        )
    return [folder / name for name in sorted(listed)]


def weight_map(folder: Path) -> dict[str, str]:
    """Return weight -> file as the index says; empty where there is no index.

    Raises:
        DataError: not an index.
    """
    if not (folder / INDEX).is_file():
        return {}
    try:
        tree = json.loads((folder / INDEX).read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{folder / INDEX}: not valid JSON ({error}). Fetch the file again.") from error
    table = tree.get("weight_map") if isinstance(tree, dict) else None
    if not isinstance(table, dict) or not table or not all(isinstance(name, str) for name in table.values()):
        raise DataError(f"{folder / INDEX}: no weight_map table of weight: file. Fetch the file again.")
    return table


def parse_header(header: bytes) -> dict[str, Any]:
    """Parse the header of a safetensors file an entry at a time: whole, a list of millions would become objects first.

    Raises:
        ValueError: not such a header.
    """
    start = re.match(rb"\s*+\{", header)
    if not start:
        raise ValueError("its header is not JSON: not a table")
    if re.fullmatch(rb"\s*+\{\s*+\}\s*+", header):
        return {}
    found: dict[str, Any] = {}
    place, closed = start.end(), False
    while not closed:
        pair = _PAIR.match(header, place)
        if not pair or len(pair[1]) > _MAX_ENTRY_BYTES:
            raise ValueError(f"its header is not JSON of a table at byte {place}")
        if pair[1] == b'"__metadata__"':
            _check_notes(pair[2])
        elif len(pair[2]) > _MAX_ENTRY_BYTES:
            raise ValueError(f"no tensor is described in {len(pair[2])} bytes")
        name, entry = _load(b"[%b,%b]" % pair.group(1, 2), place)
        if name in found or len(found) > _MAX_TENSORS:
            raise ValueError(
                f"{name!r} is twice in its header" if name in found else f"more than {_MAX_TENSORS} tensors"
            )
        found[name] = entry
        place, closed = pair.end(), pair[3] == b"}"
    if header[place:].strip():
        raise ValueError(f"its header goes on after its end at byte {place}")
    return found


def _load(piece: bytes, place: int) -> Any:
    try:
        return json.loads(piece.decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its header is not JSON at byte {place}") from error


def _check_notes(piece: bytes) -> None:
    if piece == b"null":  # so mlx writes it
        return
    if not _NOTES.fullmatch(piece) or (len(piece) > _ASCII_ONLY_FROM and not piece.isascii()):
        raise ValueError("its metadata is not a table of texts")
