"""The LoRA adapter a stage starts from: found, read from its headers, and made the recipe's `lora` section.

Preference training goes on with the adapter of the SFT stage, whose rank, scale and layers cannot be chosen again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from smolmlx.errors import RecipeError, SmolError
from smolmlx.models import BaseModel, check_adapter_folder, check_base, read_header
from smolmlx.peft_config import DEFAULT_ALPHA, DEFAULT_RANK
from smolmlx.recipe import Loaded

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."
_FIXED = ("r", "alpha", "targets", "rslora", "dora", "last_layers")
"""Keys of the recipe's `lora` section that an adapter decides."""


@dataclass(frozen=True, slots=True)
class StartAdapter:
    """A PEFT adapter folder with one rank and one scale."""

    folder: Path
    lora: Mapping[str, Any]
    """What the recipe's `lora` section must be for it, without dropout."""
    matches: int = 1
    """Adapters that the pattern named; this one is the newest."""

    @property
    def described(self) -> str:
        """The folder, and that it was chosen where it was."""
        return f"{self.folder}{f' (the newest of {self.matches})' if self.matches > 1 else ''}"

    @property
    def weights(self) -> Path:
        return self.folder / WEIGHTS

    @property
    def has_tokenizer(self) -> bool:
        """Whether the tokenizer and template it was trained with lie beside it."""
        return (self.folder / "tokenizer.json").is_file()

    def content_hash(self) -> str:
        """Hash of the weights and of the scale they are used with."""
        digest = hashlib.sha256(self.weights.read_bytes())
        digest.update(json.dumps(self.lora, sort_keys=True).encode())
        return digest.hexdigest()[:16]

    def check(self, model: BaseModel, targets: Mapping[str, tuple[int, int]], rank: int) -> None:
        """Hold the stored tensors to the layers of the base, and the base to what was noted when the adapter was trained.

        Raises:
            RecipeError: made for another base model.
        """
        stored = {name: tuple(entry["shape"]) for name, entry in _tensors(self.weights)}
        wanted: dict[str, tuple[int, ...]] = {}
        for name, (width_in, width_out) in targets.items():
            wanted[f"{_PREFIX}{name}.lora_A.weight"] = (rank, width_in)
            wanted[f"{_PREFIX}{name}.lora_B.weight"] = (width_out, rank)
            if self.lora["dora"]:
                wanted[f"{_PREFIX}{name}.lora_magnitude_vector"] = (width_out,)
        wrong = sorted(name for name in stored.keys() | wanted.keys() if stored.get(name) != wanted.get(name))
        if wrong:
            name = wrong[0]
            raise RecipeError(
                f"model.adapter: {self.folder}: made for another base model than {model.name}: {name.removeprefix(_PREFIX)} is "
                f"{stored.get(name, 'missing')} in the adapter and {wanted.get(name, 'missing')} in the model ({len(wrong)} such tensors). "
                "Name the base it was trained on as model.id."
            )
        check_base(model, self.folder)


def find_adapter(named: str, beside: Path) -> StartAdapter:
    """Open the adapter a recipe names: a folder, a finished run's folder, or the newest match of a pattern.

    Raises:
        RecipeError: nothing there, or an adapter that training cannot go on with.
        DataError: broken files.
    """
    folder, matches = _locate(named, beside)
    try:
        config = check_adapter_folder(folder)
    except SmolError as error:
        raise type(error)(f"model.adapter: {error.head}", error.problems) from error
    problems = list(_unfit(config))
    if problems:
        raise RecipeError(f"model.adapter: {folder}: training cannot go on with this kind of adapter", problems)
    targets = config.get("target_modules")
    if not isinstance(targets, list):  # a pattern, or all-linear: the tensors say which layers
        targets = {name.removeprefix(_PREFIX).rpartition(".lora_")[0] for name, _ in _tensors(folder / WEIGHTS)}
    return StartAdapter(
        folder,
        {
            "r": int(config.get("r", DEFAULT_RANK)), "alpha": float(config.get("lora_alpha", DEFAULT_ALPHA)), "targets": sorted(targets),
            "rslora": bool(config.get("use_rslora")), "dora": bool(config.get("use_dora")), "last_layers": None,
        },
        matches,
    )  # fmt: skip


def _locate(named: str, beside: Path) -> tuple[Path, int]:
    """Return the newest adapter that is meant, and how many there are."""
    plain = Path(named).expanduser()
    matches = []
    for pattern in (plain, beside / plain):
        root = Path(pattern.anchor)
        matches += sorted(root.glob(str(pattern.relative_to(root))))
    folders = [folder for found in matches for folder in (found, found / "adapter") if (folder / CONFIG).is_file()]
    whole = [folder for folder in folders if (folder / WEIGHTS).is_file()]
    if whole:
        newest = max(whole, key=lambda folder: (folder / WEIGHTS).stat().st_mtime)
        return newest, len({folder.resolve() for folder in whole})
    if any((found / "adapters.safetensors").is_file() for found in matches):
        raise RecipeError(
            f"model.adapter: {matches[0]} is in mlx-lm's layout. Convert it: smolmlx adapter convert {matches[0]} OUT --to peft"
        )
    seen = f" ({', '.join(map(str, matches[:3]))}: no {CONFIG} with {WEIGHTS})" if matches else ""
    raise RecipeError(
        f"model.adapter: {named}: no adapter here{seen}. Train it first (for the notes: smolmlx train notes/sft), then name the run's "
        "folder: --set model.adapter=runs/NAME. Leave model.adapter out to start from the base model."
    )


def _unfit(config: Mapping[str, Any]) -> Iterator[str]:
    for key in ("rank_pattern", "alpha_pattern"):
        if config.get(key):
            yield f"{key}: layers of different ranks or scales; merge it into the base (smolmlx adapter merge) and start from that."
    if config.get("modules_to_save") or config.get("bias", "none") != "none":
        yield "modules_to_save, bias: it trains more than LoRA; merge it into the base (smolmlx adapter merge) and start from that."


def _tensors(path: Path) -> list[tuple[str, Any]]:
    """Return name and header entry of each tensor; older PEFT writes magnitudes with `.weight` behind."""
    found = read_header(path).items()
    return [
        (name.replace("lora_magnitude_vector.weight", "lora_magnitude_vector"), entry)
        for name, entry in found
        if name != "__metadata__"
    ]


def with_adapter_lora(loaded: Loaded, adapter: StartAdapter) -> Loaded:
    """Make the `lora` section the adapter's and `model.adapter` its folder; a value that the user gave must be the same.

    Raises:
        RecipeError: a key of `lora` that says otherwise.
    """
    lora, origins = loaded.recipe.lora, dict(loaded.origins)
    problems = []
    for key in _FIXED:
        given, own = getattr(lora, key), adapter.lora[key]
        if f"lora.{key}" in origins and given != own and not (isinstance(given, list) and sorted(given) == own):
            problems.append(
                f"lora.{key}: {given}, but the adapter in {adapter.folder} has {own}, and its weights cannot change that. Leave it out."
            )
        origins[f"lora.{key}"] = "model.adapter"
    if problems:
        raise RecipeError(loaded.source, problems)
    section = lora.model_copy(update=dict(adapter.lora))
    # The folder itself, not the pattern that found it: a resumed run must not meet a newer match.
    model = loaded.recipe.model.model_copy(update={"adapter": str(adapter.folder.resolve())})
    return replace(loaded, recipe=loaded.recipe.model_copy(update={"lora": section, "model": model}), origins=origins)
