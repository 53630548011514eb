"""What an adapter is, whichever library wrote it: modules with two factors each, in one orientation.

Factors are kept in mlx-lm's orientation (R rank):
    linear      a [in, R]     b [R, out]     delta W [out, in] = scale * (a b)^T
    embedding   a [V, R]      b [R, D]       delta W [V, D]    = scale * a b
    experts     a [E, R, in]  b [E, out, R]  delta W [E, out, in] = scale * b a
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from smolmlx.adapters.tensors import Floats, TensorFile, Words, read_json, to_floats
from smolmlx.errors import RecipeError, SmolError
from smolmlx.models import (
    BASE_FILE,
    EMBEDDED,
    MLX_ADAPTER,
    BaseModel,
    find_local,
    find_model,
    local_folder,
    looks_local,
    noted_base,
)
from smolmlx.signposts import find_results, listed

PEFT_WEIGHTS, MLX_WEIGHTS, CONFIG = "adapter_model.safetensors", MLX_ADAPTER, "adapter_config.json"
SIDE_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "tokenizer.model", "vocab.json", "merges.txt", "generation_config.json",
)  # fmt: skip
"""What travels with a model beside its weights; nothing else is copied. The tokenizer's belong together."""
ADAPTER_SIDE_FILES = (*SIDE_FILES, BASE_FILE)
"""The same for an adapter."""


@dataclass(frozen=True, slots=True)
class Module:
    """One adapted weight."""

    path: str
    """As the library that wrote it names it, e.g. model.layers.0.mlp.up_proj."""
    kind: str
    """linear, embedding or experts."""
    rank: int
    scale: float
    """What multiplies the product of the factors."""
    a: str
    """Tensor names in the file."""
    b: str
    m: str | None = None


@dataclass(frozen=True)
class Adapter:
    """A checked adapter folder."""

    folder: Path
    form: str
    """peft or mlx."""
    config: Mapping[str, Any]
    file: TensorFile
    modules: tuple[Module, ...]
    full: Mapping[str, str] = field(default_factory=dict)
    """Parameter name -> tensor that replaces the base's (PEFT's modules_to_save, mlx-lm's full fine-tune)."""
    copies: Mapping[str, str] = field(default_factory=dict)
    """Parameter name -> tensor that PEFT saved as an unchanged copy of the base's."""

    @property
    def dora(self) -> bool:
        return any(module.m for module in self.modules)

    @property
    def kind(self) -> str:
        """LoRA, rsLoRA, DoRA or full."""
        if not self.modules:
            return "full"
        return "DoRA" if self.dora else "rsLoRA" if self.config.get("use_rslora") else "LoRA"

    @property
    def base_name(self) -> str | None:
        found = self.config.get("base_model_name_or_path") or self.config.get("model")
        return found if isinstance(found, str) else None

    def words(self, module: Module) -> tuple[Words, Words]:
        """Return (a, b) as stored words, in the orientation of this file's head; views where possible."""
        a, b = self.file.words(module.a), self.file.words(module.b)
        if self.form == "mlx":
            return a, b
        if module.kind == "experts":  # A is expert-major, B rank-major
            rank = module.rank
            return a.reshape(-1, rank, a.shape[1]), b.reshape(b.shape[0], rank, -1).transpose(2, 0, 1)
        return a.T, b.T

    def factors(self, module: Module) -> tuple[Floats, Floats]:
        """Return (a, b) as float32."""
        a, b = self.words(module)
        return to_floats(np.ascontiguousarray(a), self.dtype(module.a)), to_floats(
            np.ascontiguousarray(b), self.dtype(module.b)
        )

    def dtype(self, name: str) -> str:
        return self.file.entries[name].dtype


def read(folder: Path) -> Adapter:
    """Open an adapter folder of either library and check that it is whole.

    Raises:
        RecipeError: not an adapter folder, or one of a kind that is refused, with all reasons.
        DataError: broken files, tensors missing or too many, shapes that do not fit.
    """
    found, refusals = describe(folder)
    if refusals:
        raise RecipeError(f"{folder}: an adapter of a kind that is not converted or merged", refusals)
    return found


def describe(folder: Path) -> tuple[Adapter, list[str]]:
    """Open an adapter folder as `read` does, one of a kind that is refused too; also return the reasons.

    Tensors that such a kind has beside A and B are not among the modules.
    """
    from smolmlx.adapters import mlx_format, peft_format

    form = detect(folder)
    config = read_json(folder / CONFIG)
    if form == "peft":
        return peft_format.describe(folder, config, TensorFile(folder / PEFT_WEIGHTS))
    return mlx_format.read(folder, config, TensorFile(folder / MLX_WEIGHTS)), []


def detect(folder: Path) -> str:
    """Return peft or mlx, by the weight file of a folder.

    Raises:
        RecipeError: none, both, sharded, or a pickle.
    """
    if not folder.is_dir():
        why = "a file, not a folder" if folder.is_file() else "no such folder"
        raise RecipeError(f"{folder}: {why}. Pass a folder with {CONFIG} and {PEFT_WEIGHTS} or {MLX_WEIGHTS}.")
    found = [name for name in (PEFT_WEIGHTS, MLX_WEIGHTS) if (folder / name).is_file()]
    if len(found) == 2:
        raise RecipeError(
            f"{folder}: holds both {PEFT_WEIGHTS} (PEFT) and {MLX_WEIGHTS} (mlx-lm), which may differ. Move one away."
        )
    if not found:
        raise RecipeError(f"{folder}: not an adapter folder: {_why_no_weights(folder)}")
    if not (folder / CONFIG).is_file():
        raise RecipeError(f"{folder}: no {CONFIG}, so rank and scale are unknown. Copy it from where the weights were.")
    return "peft" if found[0] == PEFT_WEIGHTS else "mlx"


def _why_no_weights(folder: Path) -> str:
    if any(folder.glob("adapter_model-*.safetensors")) or any(folder.glob("adapter_model.safetensors.index.json")):
        return "its weights are sharded, which no loader of adapters reads. Save it again in one file."
    if (folder / "adapter_model.bin").is_file() or (folder / "adapters.npz").is_file():
        return "its weights are not safetensors (a pickle is not read). Save it again as safetensors."
    return f"needs {PEFT_WEIGHTS} (PEFT) or {MLX_WEIGHTS} (mlx-lm)."


def first_and_count(problems: Sequence[str]) -> list[str]:
    """Return problems that modules share, one for all where they are many."""
    if len(problems) <= 3:
        return list(problems)
    return [f"{problems[0]} The same holds for {len(problems) - 1} other modules."]


def recorded_base(adapter: Adapter) -> BaseModel | None:
    """Return the base that the adapter names, if it is on this machine; nothing is downloaded.

    Where its config names a folder that is gone, it is the base that base_model.json names, if that has the same weights.
    """
    found = find_local(adapter.base_name) if adapter.base_name else None
    note = None if found else noted_base(adapter.folder)
    if note:
        found = find_local(note.name)
        found = found if found and found.weights_fingerprint() == note.weights else None
    return found


def find_folder(name: str | Path) -> Path:
    """Return the adapter folder of a path, or the one inside a run's folder; what may be a model or a hub id comes back.

    Raises:
        RecipeError: a file, a path where nothing is, or a folder that only holds runs or a whole model.
    """
    path = Path(name)
    if (path / CONFIG).is_file():
        return path
    if (path / "adapter" / CONFIG).is_file():
        return path / "adapter"
    expected = "a finished run's folder, an adapter's, or (to export) a model's"
    if path.is_file():
        holds = (path.parent / CONFIG).is_file()
        raise RecipeError(f"{name}: a file. Pass {f'the folder it lies in, {path.parent}' if holds else expected}.")
    if looks_local(str(name)) and local_folder(str(name)) is None and str(name) != EMBEDDED:
        raise RecipeError(f"{name}: no such folder. Pass {expected}.")
    if not (path / "config.json").is_file():
        _refuse_what_holds_others(path)
    return path


def _refuse_what_holds_others(folder: Path) -> None:
    models, adapters = find_results(folder)
    if adapters:
        raise RecipeError(
            f"{folder}: not an adapter's folder itself. Pass one that lies in it: {listed(adapters, 'or')}."
        )
    if models:
        raise RecipeError(
            f"{folder}: holds a whole model and no adapter. Pass it where a model is taken: {listed(models, 'or')}."
        )


def named_base(folder: Path) -> BaseModel:
    """Open the base that an adapter names, from the hub or its cache if need be.

    Raises:
        RecipeError: none is named.
        SmolError: what `find_model` says of the one that is named.
    """
    found = read(folder)
    if base := recorded_base(found):
        return base
    if found.base_name is None:
        raise RecipeError(f"{folder}: names no base model. Pass --model M.")
    revision = found.config.get("revision")
    try:
        return find_model(found.base_name, str(revision) if revision else None)
    except SmolError as error:
        raise type(error)(
            f"{error}\n  It is the base that {folder / CONFIG} names. Pass --model M for another copy."
        ) from error
