"""Adapters between PEFT and mlx-lm, on bytes alone: the values are the same, and the way back gives the same file.

A converted file notes the header and config of the one it came from in its metadata, so that converting it back, if
nothing was changed, restores the original byte for byte. Nothing here needs torch or mlx.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from smolmlx.adapters import adapter as adapters
from smolmlx.adapters import tensors, to_mlx, to_peft
from smolmlx.adapters.adapter import ADAPTER_SIDE_FILES, CONFIG, MLX_WEIGHTS, PEFT_WEIGHTS, SIDE_FILES, Adapter
from smolmlx.adapters.base import Weights
from smolmlx.adapters.delta import find_changes
from smolmlx.adapters.names import SAME_EXPERTS, SAME_NAMES
from smolmlx.adapters.target import BULK, KEY, Origin, Target, recall, remember
from smolmlx.adapters.tensors import TensorFile
from smolmlx.errors import RecipeError
from smolmlx.models import BaseModel
from smolmlx.rundir import publish

FORMS = {"peft": PEFT_WEIGHTS, "mlx": MLX_WEIGHTS}


@dataclass(frozen=True, slots=True)
class Conversion:
    """What was written."""

    folder: Path
    form: str
    num_modules: int
    num_folded: int
    """Modules whose rank or scale was brought to the common one."""
    restored: bool
    """Whether the very file was given back that this one had been made from."""
    notes: tuple[str, ...]
    base: str
    """What its config names; '' where it names none."""


def convert(
    folder: Path, out: Path, to: str | None = None, base: BaseModel | None = None, *, fresh: bool = False
) -> Conversion:
    """Convert an adapter folder to the other library's format and publish it as one rename.

    Args:
        to: peft or mlx; left out, the form that it is not.
        fresh: convert by the rules even where the original file could be given back.
        base: needed where embeddings or a head are adapted and the recorded base is not on this machine.

    Raises:
        RecipeError: what the target cannot hold exactly, by name; an output folder that has something in it.
        DataError: a broken adapter, or one made for another base.
    """
    refuse_used(out)
    adapter = adapters.read(folder)
    to = to or ("mlx" if adapter.form == "peft" else "peft")
    if to not in FORMS:
        raise RecipeError(f"--to {to}: expected peft or mlx.")
    if to == adapter.form:
        raise RecipeError(f"{folder}: already in {to} format. Copy the folder, or pass the other --to.")
    base = base or adapters.recorded_base(adapter)
    weights = Weights(base) if base else None
    if weights:
        find_changes([(adapter, 1.0)], weights)
        _refuse_other_experts(adapter, weights)
    origin, changed = (None, None) if fresh else recall(adapter)
    build = to_mlx.build if to == "mlx" else to_peft.build
    with publish(out) as temporary:
        target = build(adapter, weights, origin) if origin else None
        restored = target is not None and origin is not None and _restore(temporary, to, target, origin)
        if target is None or not restored:
            target = build(adapter, weights)
            _name_base(target, base)
            _write(temporary, to, target, adapter)
        copy_side_files(folder, temporary, ADAPTER_SIDE_FILES)
    notes = [*target.notes, *([changed] if changed else []), *_doubt(adapter, base)]
    if origin and not restored:
        notes.append(f"its weights were changed since the conversion, or {BULK} is missing, so it is converted afresh")
    return Conversion(
        out,
        to,
        len(adapter.modules),
        len(target.folded),
        restored,
        tuple(notes),
        str(target.config.get("base_model_name_or_path") or ""),
    )


def _write(folder: Path, to: str, target: Target, adapter: Adapter) -> None:
    metadata = {"format": "mlx" if to == "mlx" else "pt", KEY: remember(adapter, target)}
    tensors.write(folder / FORMS[to], target.tensors, metadata)
    (folder / CONFIG).write_text(json.dumps(target.config, indent=2) + "\n", encoding="utf-8")
    if target.bulk:
        tensors.write(folder / BULK, target.bulk, {})


def _name_base(target: Target, base: BaseModel | None) -> None:
    """Write the base that was passed into the config of an adapter that names none."""
    if base and not target.config["base_model_name_or_path"]:
        known = {"base_model_name_or_path": base.name, "revision": base.revision}
        target.config |= {**known, "model": base.name} if "model" in target.config else known


def _restore(folder: Path, to: str, target: Target, origin: Origin) -> bool:
    """Write the original file again; return whether it is that very file."""
    if not target.is_exactly(origin.entries):
        return False
    ordered = sorted(origin.entries, key=lambda name: (origin.entries[name].start, origin.entries[name].end))
    tensors.write_raw(folder / FORMS[to], origin.header, (target.tensors[name] for name in ordered))
    (folder / CONFIG).write_bytes(origin.config.encode())
    return TensorFile(folder / FORMS[to]).checksum() == origin.checksum


def refuse_used(out: Path) -> None:
    """Refuse to write into a folder that has something in it, over a file, or inside an adapter.

    Raises:
        RecipeError
    """
    if out.is_file():
        raise RecipeError(f"{out}: already there, as a file. Choose another OUT, or remove it first.")
    if out.is_dir() and any(out.iterdir()):
        raise RecipeError(f"{out}: already there and not empty. Choose another folder, or remove it first.")
    around = next((parent for parent in out.absolute().parents if (parent / CONFIG).is_file()), None)
    if around:
        raise RecipeError(f"{out}: lies inside an adapter's folder, {around}. Choose a folder outside of it.")


def copy_side_files(source: Path, out: Path, names: Sequence[str] = SIDE_FILES) -> None:
    """Copy tokenizer, template and generation config where the source folder has them."""
    for name in names:
        if (source / name).is_file() and not (out / name).exists():
            shutil.copyfile(source / name, out / name)


def _refuse_other_experts(adapter: Adapter, weights: Weights) -> None:
    """Refuse experts whose names in the two libraries were not compared: a wrong name loads and does something else.

    Raises:
        RecipeError
    """
    kind = str(weights.model.config.get("model_type"))
    if kind not in SAME_EXPERTS and any(module.kind == "experts" for module in adapter.modules):
        raise RecipeError(
            f"{adapter.folder}: adapts the experts of a {kind} model; converted are those of {', '.join(sorted(SAME_EXPERTS))}."
            " Merge instead: smolmlx adapter merge."
        )


def _doubt(adapter: Adapter, base: BaseModel | None) -> list[str]:
    kind = str(base.config.get("model_type")) if base else None
    if kind is None and any(module.kind == "experts" for module in adapter.modules):
        return [f"the base is not here to look at; experts are named alike only in {', '.join(sorted(SAME_EXPERTS))}"]
    if kind is None or kind in SAME_NAMES:
        return []
    return [f"names of {kind} were not compared between transformers and mlx-lm; load the result before relying on it"]
