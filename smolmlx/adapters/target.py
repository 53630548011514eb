"""What a conversion will write, and what a converted file remembers of the one it came from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from smolmlx.adapters.adapter import Adapter
from smolmlx.adapters.tensors import Entry, Made, TensorFile, parse_header, parse_json
from smolmlx.errors import DataError

KEY = "smolmlx_origin"
"""Key of the safetensors metadata; stock loaders ignore it."""
BULK = "origin.safetensors"
"""Beside the adapter where the original had more than the target can hold; no loader looks for it."""


@dataclass(slots=True)
class Target:
    """Tensors and config of a converted adapter, still to be written."""

    tensors: dict[str, Made] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    folded: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Module -> the rank, factor and dtype that undo a fold."""
    bulk: dict[str, Made] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def is_exactly(self, entries: Mapping[str, Entry]) -> bool:
        """Whether names, types and shapes are those of an earlier file."""
        now = {name: (made.dtype, made.shape) for name, made in self.tensors.items()}
        return now == {name: (entry.dtype, entry.shape) for name, entry in entries.items()}


@dataclass(frozen=True, slots=True)
class Origin:
    """The file that a converted adapter was made from: its header and config, byte for byte."""

    form: str
    header: bytes
    config: str
    entries: Mapping[str, Entry]
    folded: Mapping[str, Mapping[str, Any]]
    checksum: int
    """Of the tensors' bytes."""
    bulk: TensorFile | None

    @property
    def scale(self) -> float:
        """The scale of an mlx-lm origin."""
        return float(json.loads(self.config)["lora_parameters"]["scale"])


def remember(adapter: Adapter, target: Target) -> str:
    """Return the metadata value from which the original comes back."""
    return json.dumps(
        {
            "form": adapter.form,
            "header": adapter.file.header.decode("utf-8"),
            "config": (adapter.folder / "adapter_config.json").read_bytes().decode("utf-8"),
            "written": _hash(target.config),
            "folded": target.folded,
            "checksum": adapter.file.checksum(),
        }
    )


def recall(adapter: Adapter) -> tuple[Origin | None, str | None]:
    """Return the origin noted in an adapter, or None and why it no longer holds."""
    text = adapter.file.metadata.get(KEY)
    if text is None:
        return None, None
    path: Path = adapter.file.path
    tree = parse_json(text.encode(), path)
    try:
        header, config, folded = tree["header"].encode(), str(tree["config"]), dict(tree["folded"])
        parse_json(config.encode(), path)
        entries, checksum = parse_header(header, path), int(tree["checksum"])
        origin = Origin(str(tree["form"]), header, config, entries, folded, checksum, _bulk(adapter.folder))
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise DataError(f"{path}: its {KEY} note is broken. Remove it from the metadata to convert afresh.") from error
    if origin.form == adapter.form:
        return None, None
    if tree.get("written") != _hash(adapter.config):
        return None, "adapter_config.json was changed since the conversion, so it is converted afresh"
    return origin, None


def _bulk(folder: Path) -> TensorFile | None:
    return TensorFile(folder / BULK) if (folder / BULK).is_file() else None


def _hash(config: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(dict(config), sort_keys=True).encode()).hexdigest()
