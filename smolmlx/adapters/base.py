"""The weights of a base model on disk, whatever their shards and quantization, one tensor in memory at a time."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from smolmlx.adapters.names import EQUAL_BLOCKS, HEAD_WEIGHT
from smolmlx.adapters.tensors import FLOATS, WIDTHS, Floats, TensorFile, Words, to_floats
from smolmlx.errors import DataError, RecipeError
from smolmlx.models import BaseModel
from smolmlx.weight_files import weight_files

_BITS = (2, 4, 8)


class Weights:
    """Weights by their unquantized names.

    Raises:
        RecipeError: a quantization that is not MLX's own affine one.
        DataError: shards that are missing, broken, or named outside the folder; a block that lacks a weight of the others.
    """

    def __init__(self, model: BaseModel) -> None:
        self.model = model
        self._refuse_foreign_quantization()
        self._files = [TensorFile(path) for path in weight_files(model.folder)]
        self._where = {name: file for file in self._files for name in file.entries}
        packed = {
            name.removesuffix(".scales") for name in self._where if name.endswith(".scales") and model.quantization
        }
        self._packed = {f"{path}.weight": path for path in packed}
        hidden = {f"{path}.{leaf}" for path in packed for leaf in ("scales", "biases")}
        self.names = sorted(name for name in self._where if name not in hidden)
        self._refuse_holes()

    @property
    def tied(self) -> bool:
        return self.model.tied

    @property
    def quantized(self) -> bool:
        return bool(self._packed)

    def find(self, name: str) -> str | None:
        """Return the stored name of a weight; a tied head stands for the embedding where only it was saved."""
        if name in self._where:
            return name
        if self.tied and name == HEAD_WEIGHT:
            return next((found for found in self.names if found.endswith("embed_tokens.weight")), None)
        if self.tied and name.endswith("embed_tokens.weight") and HEAD_WEIGHT in self._where:
            return HEAD_WEIGHT
        return None

    def dtype(self, name: str) -> str:
        """Return the type of a weight; of a quantized one, that of its scales."""
        path = self._packed.get(name)
        name = f"{path}.scales" if path else name
        return self._where[name].entries[name].dtype

    def shape(self, name: str) -> tuple[int, ...]:
        stored = self._where[name].entries[name].shape
        if name not in self._packed:
            return stored
        bits, _ = self._packing(name)
        return (*stored[:-1], stored[-1] * 32 // bits)

    def is_float(self, name: str) -> bool:
        return name in self._packed or self.dtype(name) in (*FLOATS, "F64")

    def words(self, name: str) -> Words:
        """Return an unquantized weight as stored."""
        assert name not in self._packed
        return self._where[name].words(name)

    def floats(self, name: str) -> Floats:
        """Return a weight as float32, dequantized in float32."""
        return self.rows(name, slice(None))

    def rows(self, name: str, rows: slice) -> Floats:
        """Return a range of the first axis as float32, dequantized in float32."""
        if name not in self._packed:
            return self._part(name, rows)
        bits, group = self._packing(name)
        path = self._packed[name]
        scales, biases = self._part(f"{path}.scales", rows), self._part(f"{path}.biases", rows)
        return dequantize(self._where[name].words(name)[rows], scales, biases, bits, group)

    def _part(self, name: str, rows: slice) -> Floats:
        if name not in self._where:
            raise DataError(f"{self.model.folder}: {name} is missing. Fetch the model again.")
        words = self._where[name].words(name)
        return to_floats(words[rows] if words.ndim else words, self.dtype(name))

    def _packing(self, name: str) -> tuple[int, int]:
        settings: Mapping[str, Any] = self.model.quantization or {}
        own = settings.get(self._packed[name])
        own = own if isinstance(own, dict) else settings
        bits, group = int(own.get("bits", settings["bits"])), int(own.get("group_size", settings["group_size"]))
        if bits not in _BITS or own.get("mode", settings.get("mode", "affine")) != "affine":
            raise RecipeError(
                f"{self.model.name}: {name} is quantized to {bits} bits ({own.get('mode', 'affine')}); read here are "
                f"MLX's affine {', '.join(map(str, _BITS))} bits. Use the unquantized base, or mlx_lm.convert --dequantize."
            )
        return bits, group

    def _refuse_holes(self) -> None:
        """Refuse a model of equal blocks of which one lacks a weight of another: what merges is then no whole model."""
        if self.model.config.get("model_type") not in EQUAL_BLOCKS:
            return
        blocks: dict[str, set[str]] = {
            str(block): set() for block in range(self.model.config.get("num_hidden_layers") or 0)
        }
        for name in self.names:
            found = re.match(r"model\.layers\.(\d+)\.(.*)", name)
            if found and found[1] in blocks:
                blocks[found[1]].add(found[2])
        known = set().union(*blocks.values())
        missing = [f"model.layers.{block}.{leaf}" for block, has in blocks.items() for leaf in sorted(known - has)]
        if missing:
            listed = [f"{name}: missing, though other blocks have it. Fetch the model again." for name in missing]
            raise DataError(str(self.model.folder), listed)

    def _refuse_foreign_quantization(self) -> None:
        foreign = self.model.config.get("quantization_config")
        if isinstance(foreign, dict) and foreign.get("quant_method"):
            raise RecipeError(
                f"{self.model.name}: its weights are quantized by {foreign['quant_method']}, which is not read here."
                " Merge into the unquantized base: an adapter trained on a quantized copy fits it."
            )


def dequantize(words: Words, scales: Floats, biases: Floats, bits: int, group: int) -> Floats:
    """Return scale * q + bias of MLX's affine quantization; q lies in 32-bit words, lowest bits first.

    Args:
        words: [..., columns * bits / 32] of uint32; scales, biases: [..., columns / group].
    """
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    values = (words[..., None] >> shifts) & np.uint32((1 << bits) - 1)
    grouped = values.reshape(*scales.shape, group).astype(np.float32)
    found: Floats = (grouped * scales[..., None] + biases[..., None]).reshape(*words.shape[:-1], -1)
    return found


def num_bytes(weights: Weights) -> int:
    """Return the size of all weights as stored."""
    return sum(
        WIDTHS[entry.dtype] * int(np.prod(entry.shape)) for file in weights._files for entry in file.entries.values()
    )
