"""safetensors files as headers and bytes: read by memory map, checked before anything is believed, written as a stream.

Values move as unsigned words of the stored width, so that bfloat16 needs no float type and no bit changes.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from smolmlx import weight_files
from smolmlx.errors import DataError
from smolmlx.weight_files import MAX_HEADER_BYTES

Words = npt.NDArray[Any]
"""An array of unsigned words (or of floats, where a function says so)."""
Floats = npt.NDArray[np.float32]

WIDTHS = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
FLOATS = ("F32", "F16", "BF16")
_MAX_CONFIG_BYTES = 8 << 20
_MAX_DIMENSIONS = 8
_PIECE = 8 << 20  # bytes


@dataclass(frozen=True, slots=True)
class Entry:
    """Where one tensor lies: `start` and `end` count bytes from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Made:
    """A tensor to be written; `words` is called when its turn comes, so that one is in memory at a time."""

    dtype: str
    shape: tuple[int, ...]
    words: Callable[[], Words]


class TensorFile:
    """An open safetensors file.

    Raises:
        DataError: not a whole, well-formed safetensors file; nothing larger than its header has been read by then.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                    raise _broken(path, f"a header of {length} bytes in a file of {size}")
                self.header = file.read(length)
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
        tree = _parse(path, self.header)
        self.metadata: dict[str, str] = tree.pop("__metadata__", None) or {}
        self.entries = {name: _entry(path, name, found) for name, found in tree.items()}
        _check_layout(path, self.entries, size - 8 - length)
        empty = size == 8 + length
        self._data: Words = np.zeros(0, np.uint8) if empty else np.memmap(path, np.uint8, "r", offset=8 + length)

    def words(self, name: str) -> Words:
        """Return a tensor as unsigned words in its shape, not copied."""
        entry = self.entries[name]
        return self._data[entry.start : entry.end].view(f"<u{WIDTHS[entry.dtype]}").reshape(entry.shape)

    def checksum(self) -> int:
        """Return a CRC-32 of all tensors' bytes, made of those of their pieces, on all cores: one would take longer than the copy."""
        pieces = (self._data[start : start + _PIECE].data for start in range(0, len(self._data), _PIECE))
        with ThreadPoolExecutor() as pool:  # zlib lets other threads run meanwhile
            found = np.array(list(pool.map(zlib.crc32, pieces)), "<u4")
        return zlib.crc32(found.tobytes())

    def floats(self, name: str) -> Floats:
        """Return a tensor widened to float32."""
        return to_floats(self.words(name), self.entries[name].dtype)


def to_floats(words: Words, dtype: str) -> Floats:
    """Return float32 values of F64, F32, F16 or BF16 words."""
    if dtype == "F64":
        return words.view(np.float64).astype(np.float32)
    if dtype == "F32":
        return words.view(np.float32)
    if dtype == "F16":
        return words.view(np.float16).astype(np.float32)
    assert dtype == "BF16", dtype
    return (words.astype(np.uint32) << 16).view(np.float32)


def from_floats(values: npt.NDArray[Any], dtype: str) -> Words:
    """Round float32 values once, to nearest even, and return the words of `dtype`."""
    # In whatever order they lie: a transposed copy costs more than the arithmetic.
    values = np.asarray(values, np.float32)
    if dtype == "F32":
        return values.view(np.uint32)
    if dtype == "F16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16).view(np.uint16)
    assert dtype == "BF16", dtype
    bits = values.view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), ((bits >> 16) | 0x40).astype(np.uint16), rounded)


def write(path: Path, tensors: Mapping[str, Made], metadata: Mapping[str, str]) -> None:
    """Write tensors, widest words first and then by name, as the safetensors library lays them out."""
    names = sorted(tensors, key=lambda name: (-WIDTHS[tensors[name].dtype], name))
    tree: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    place = 0
    for name in names:
        made = tensors[name]
        end = place + WIDTHS[made.dtype] * math.prod(made.shape)
        tree[name] = {"dtype": made.dtype, "shape": list(made.shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(tree, separators=(",", ":"), ensure_ascii=False).encode()
    write_raw(path, text + b" " * (-len(text) % 8), (tensors[name] for name in names))


def write_raw(path: Path, header: bytes, tensors: Iterable[Made]) -> None:
    """Write a header as it is given and the tensors in the order of their offsets."""
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little"))
        file.write(header)
        for made in tensors:
            words = np.asarray(made.words(), order="C")
            assert words.shape == made.shape and words.itemsize == WIDTHS[made.dtype], (path, made)
            file.write(words.reshape(-1).view(np.uint8).data)


def parse_header(header: bytes, path: Path) -> dict[str, Entry]:
    """Return the entries of a stored header by name.

    Raises:
        DataError: not a safetensors header.
    """
    tree = _parse(path, header)
    tree.pop("__metadata__", None)
    return {name: _entry(path, name, found) for name, found in tree.items()}


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON table of a bounded size.

    Raises:
        DataError: missing, too long, or not a JSON table.
    """
    try:
        if path.stat().st_size > _MAX_CONFIG_BYTES:
            raise DataError(f"{path}: {path.stat().st_size} bytes; a config has at most {_MAX_CONFIG_BYTES}.")
        return parse_json(path.read_bytes(), path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def parse_json(text: bytes, path: Path) -> dict[str, Any]:
    """Parse a JSON table; see `read_json`."""
    try:
        tree = json.loads(text.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON ({error}). Fetch the file again.") from error
    if not isinstance(tree, dict):
        raise DataError(f"{path}: expected a JSON table, found {type(tree).__name__}.")
    return tree


def _parse(path: Path, header: bytes) -> dict[str, Any]:
    try:
        tree = weight_files.parse_header(header)
    except ValueError as error:
        raise _broken(path, str(error)) from error
    odd = [name for name in tree if not name.isascii() and any(0xD800 <= ord(letter) < 0xE000 for letter in name)]
    if odd:
        raise _broken(path, f"{odd[0]!r} is not a name: half a character")
    return tree


def _entry(path: Path, name: str, found: Any) -> Entry:
    if not isinstance(found, dict) or found.get("dtype") not in WIDTHS:
        raise _broken(path, f"{name} has no known dtype")
    shape, offsets = _naturals(found.get("shape")), _naturals(found.get("data_offsets"))
    if shape is None or len(shape) > _MAX_DIMENSIONS or offsets is None or len(offsets) != 2:
        raise _broken(path, f"{name} has no valid shape and offsets")
    entry = Entry(found["dtype"], shape, offsets[0], offsets[1])
    if entry.end - entry.start != math.prod(shape) * WIDTHS[entry.dtype]:
        raise _broken(path, f"{name}: {entry.end - entry.start} bytes for shape {list(shape)} of {entry.dtype}")
    return entry


def _naturals(value: Any) -> tuple[int, ...] | None:
    good = isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)
    return tuple(value) if good else None


def _check_layout(path: Path, entries: Mapping[str, Entry], size: int) -> None:
    """Tensors must follow each other without holes or overlaps, and fill the file."""
    place = 0
    for entry in sorted(entries.values(), key=lambda entry: (entry.start, entry.end)):
        if entry.start != place:
            raise _broken(path, f"its tensors overlap or leave a hole at byte {place}")
        place = entry.end
    if place != size:
        raise _broken(path, f"its header promises {place} bytes of data, the file has {size}")


def _broken(path: Path, why: str) -> DataError:
    return DataError(f"{path}: not a whole safetensors file: {why}. Fetch it again.")
