"""The shipped recipes and sweeps: find one by name, list them, read their header."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from smolmlx import recipe, stages
from smolmlx.errors import RecipeError, nearest
from smolmlx.models import files_root
from smolmlx.sweeps.definition import Sweep, is_sweep, open_sweep
from smolmlx.sweeps.record import refuse_other_recipes

SWEEPS = "sweeps"
"""Folder of the shipped sweeps, among the recipes."""


def folder() -> Path:
    return files_root() / "recipes"


def names() -> list[str]:
    """Return the names of all shipped recipes, e.g. `quickstart`, `notes/sft`."""
    return [name for name in _all_names() if not name.startswith(f"{SWEEPS}/")]


def sweep_names() -> list[str]:
    """Return the names of all shipped sweeps, e.g. `sweeps/notes`."""
    return [name for name in _all_names() if name.startswith(f"{SWEEPS}/")]


def _all_names() -> list[str]:
    return sorted(path.relative_to(folder()).with_suffix("").as_posix() for path in folder().rglob("*.yaml"))


def is_sweep_file(path: Path) -> bool:
    """Whether a file is a sweep rather than a recipe.

    Raises:
        RecipeError: neither, for it is no YAML mapping.
    """
    return is_sweep(recipe.read(path))


def find(name: str) -> Path:
    """Return the file of a recipe given by path or by shipped name.

    Raises:
        RecipeError: neither.
    """
    path = Path(name)
    if path.is_file():
        return path
    shipped = folder() / f"{name.removesuffix('.yaml')}.yaml"
    if shipped.is_file():
        return shipped
    if path.suffix in (".yaml", ".yml") or path.is_dir():
        raise RecipeError(f"{name}: no such recipe file.{nearest(name.removesuffix('.yaml'), _all_names())}")
    raise RecipeError(
        f"{name}: no recipe of this name and no such file.{nearest(name, _all_names())} `smolmlx recipes ls` lists them."
    )


def name_of(path: Path) -> str:
    """Return what `find` takes for a recipe's file: its shipped name, or its path."""
    shipped = folder().resolve()
    inside = path.resolve().is_relative_to(shipped)
    return path.resolve().relative_to(shipped).with_suffix("").as_posix() if inside else str(path)


def find_sweep(
    source: str,
    out: str | Path | None,
    *,
    grid: Mapping[str, Sequence[Any]] | None = None,
    seeds: Sequence[int] | int | None = None,
    sets: Mapping[str, Any] | None = None,
) -> tuple[Sweep, Path]:
    """Return a sweep, or a plain recipe as one, with its folder: `out`, else runs/sweep-<name>.

    Raises:
        RecipeError: as `open_sweep`; or the folder holds runs of other values.
    """
    name = stages.run_name(source)
    name = name if name.startswith("sweep") else f"sweep-{name}"
    found = open_sweep(find(source), name, find, grid=grid, seeds=seeds, sets=sets)
    folder = Path(out) if out else Path("runs") / name
    refuse_other_recipes(found, folder)
    return found, folder


def header(path: Path) -> str:
    """Return the comment block at the top of a recipe: hardware, time, expected result, command."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("#").removeprefix(" "))
    return "\n".join(lines)
