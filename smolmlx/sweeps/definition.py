"""What a sweep file asks for: a recipe, settings as a list and a grid over its keys, and seeds; resolved to cells.

Every recipe is built and checked before the first one runs, so that a typing error costs nothing.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from smolmlx import recipe as recipes
from smolmlx.errors import RecipeError, nearest
from smolmlx.recipe import Loaded

SEED = "train.seed"
KEYS = ("recipe", "description", "seeds", "set", "list", "grid")
_LONGEST = 60
"""Characters of a setting's folder name, before its seed."""


class File(BaseModel):
    """A sweep file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    recipe: str
    description: str = ""
    seeds: Annotated[int, Field(ge=1)] | Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] = 1
    common: dict[str, Any] = Field({}, alias="set")
    entries: tuple[dict[str, Any], ...] = Field((), alias="list")
    grid: dict[str, Annotated[tuple[Any, ...], Field(min_length=1)]] = {}


@dataclass(frozen=True, slots=True)
class Cell:
    """One run of a sweep."""

    setting: str
    values: Mapping[str, Any]
    """Dotted recipe key -> value, of this setting alone."""
    seed: int
    loaded: Loaded
    folder: str
    """Name of the run's folder in the sweep's."""


@dataclass(frozen=True, slots=True)
class Sweep:
    """All runs, settings in the order they were written and the seeds of one behind each other."""

    name: str
    description: str
    recipe: str
    seeds: tuple[int, ...]
    cells: tuple[Cell, ...]

    @property
    def settings(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(cell.setting for cell in self.cells))


def is_sweep(tree: Mapping[str, Any]) -> bool:
    """Whether a YAML mapping is a sweep rather than a recipe, which has no key `recipe`."""
    return "recipe" in tree


def open_sweep(
    path: Path,
    name: str,
    find: Callable[[str], Path],
    *,
    grid: Mapping[str, Sequence[Any]] | None = None,
    seeds: Sequence[int] | int | None = None,
    sets: Mapping[str, Any] | None = None,
) -> Sweep:
    """Read a sweep file, or make a sweep of a plain recipe from `--grid` and `--seeds`.

    Args:
        name: what the sweep is called; its folder is named so.
        find: turns the name of a recipe into its file.
        grid: dotted recipe key -> values, laid over the file's grid.
        seeds: in place of the file's: how many from 0, or which.
        sets: dotted recipe key -> value for every run.

    Raises:
        RecipeError: with everything that is wrong, in the file and in every recipe it leads to.
    """
    tree = recipes.read(path)
    if not is_sweep(tree):
        tree = {"recipe": str(path)}
    file = _check(tree, path)
    base = path if file.recipe == str(path) else _base(file.recipe, path.parent, find)
    axes = {**file.grid, **(grid or {})}
    chosen = file.seeds if seeds is None else seeds
    numbers = tuple(range(chosen)) if isinstance(chosen, int) else tuple(dict.fromkeys(chosen))
    _refuse_overruled(path, file.entries, axes)
    settings = list(_settings(file.entries, axes))
    common = recipes.flatten_tree(file.common)
    _refuse_bad_settings(path, settings, common)
    cells = _build(base, settings, common, numbers, sets or {})
    shown = path.name if file.recipe == str(path) else file.recipe
    return Sweep(name, file.description, shown, numbers, cells)


def parse_axis(text: str) -> tuple[str, tuple[Any, ...]]:
    """Read `key=v1,v2`, each value as YAML.

    Raises:
        RecipeError: another shape.
    """
    key, equals, values = text.partition("=")
    example = "lora.r=8,32"
    if not equals:
        raise RecipeError(f"--grid {text}: expected key=v1,v2, for example --grid {example}.")
    _, found = recipes.parse_override(f"{key}=[{values}]", "--grid", example)
    if not isinstance(found, list) or not found:
        raise RecipeError(f"--grid {text}: no values. Expected key=v1,v2, for example --grid {example}.")
    return key.strip(), tuple(found)


def parse_axes(texts: Sequence[str]) -> dict[str, tuple[Any, ...]]:
    """Read several axes.

    Raises:
        RecipeError: as of `parse_axis`, or a key given twice.
    """
    axes: dict[str, tuple[Any, ...]] = {}
    for text in texts:
        key, values = parse_axis(text)
        if key in axes:
            raise RecipeError(f"--grid {text}: {key} is given twice. Give all its values at once: --grid {key}={','.join(map(_short, (*axes[key], *values)))}.")  # fmt: skip
        axes[key] = values
    return axes


def _check(tree: Mapping[str, Any], path: Path) -> File:
    try:
        return File.model_validate(tree)
    except ValidationError as error:
        problems = []
        for item in error.errors():
            dotted = ".".join(str(part) for part in item["loc"] if part not in ("int",) and "[" not in str(part))
            if item["type"] == "extra_forbidden":
                known = nearest(dotted, KEYS) or f" Known: {', '.join(KEYS)}."
                problems.append(
                    f"{dotted}: unknown key of a sweep.{known} Recipe keys go under `set`, `list` or `grid`."
                )
            else:
                problems.append(f"{dotted}: {item['msg'][0].lower()}{item['msg'][1:]} (got {item['input']!r}).")
        raise RecipeError(str(path), problems) from error


def _base(name: str, folder: Path, find: Callable[[str], Path]) -> Path:
    beside = folder / name
    return beside if beside.is_file() else find(name)


def _settings(listed: Sequence[Mapping[str, Any]], axes: Mapping[str, Sequence[Any]]) -> Iterator[tuple[str, dict[str, Any]]]:  # fmt: skip
    """Yield (name, values): every entry of the list with every point of the grid."""
    for entry in listed or ({},):
        plain = recipes.flatten_tree({key: value for key, value in entry.items() if key != "name"})
        for point in itertools.product(*axes.values()):
            values = {**plain, **dict(zip(axes, point, strict=True))}
            given = {key: values[key] for key in axes} if "name" in entry else values
            parts = ([str(entry["name"])] if "name" in entry else []) + [f"{k}={_short(v)}" for k, v in given.items()]
            yield ", ".join(parts) or "baseline", values


def _refuse_overruled(path: Path, listed: Sequence[Mapping[str, Any]], axes: Iterable[str]) -> None:
    """Refuse a grid over what an entry of the list sets: the entry's value, and its name, would be untrue."""
    problems = []
    for number, entry in enumerate(listed, 1):
        own = recipes.flatten_tree({key: value for key, value in entry.items() if key != "name"})
        for key, axis in itertools.product(own, axes):
            if f"{key}.".startswith(f"{axis}.") or f"{axis}.".startswith(f"{key}."):
                problems.append(
                    f"{axis}: is in the grid, and '{entry.get('name', f'entry {number}')}' of the list sets {key}. Leave one of them out."
                )
    if problems:
        raise RecipeError(str(path), problems)


def _short(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _refuse_bad_settings(path: Path, settings: Sequence[tuple[str, Mapping[str, Any]]], common: Mapping[str, Any]) -> None:  # fmt: skip
    problems = []
    if any(SEED in values for _, values in settings) or SEED in common:
        problems.append(f"{SEED}: a sweep runs every setting with the same seeds; give them under `seeds`.")
    known: dict[str, str] = {}
    for name, _ in settings:
        folder = folder_name(name)
        if folder in known:
            problems.append(f"'{name}' and '{known[folder]}' are the same setting, or have the same name.")
        known[folder] = name
    if problems:
        raise RecipeError(str(path), list(dict.fromkeys(problems)))


def folder_name(setting: str) -> str:
    """Return a name for a setting's folders that any file system takes, from the setting alone.

    What a file name cannot hold is replaced, and four hex digits are added so that no two settings fall together.
    """
    plain = re.sub(r",? +", "-", setting)
    safe = re.sub(r"[^a-z0-9._=+-]+", "-", plain.lower()).strip("-.")
    if safe == plain and len(safe) <= _LONGEST:
        return safe
    return f"{safe[:_LONGEST].strip('-.') or 'setting'}-{hashlib.sha256(setting.encode()).hexdigest()[:4]}"


def _refuse_pipeline(base: Path, tree: Mapping[str, Any]) -> NoReturn:
    stages = tree["stages"] if isinstance(tree["stages"], Mapping) else {}
    trained = [str(stage["recipe"]) for stage in stages.values() if isinstance(stage, Mapping) and "recipe" in stage]
    raise RecipeError(
        f"{base}: is a pipeline ({', '.join(map(str, stages))}); a sweep trains one stage under many settings. Sweep the recipe of a"
        f" stage ({', '.join(trained) or 'a recipe'}), or train the pipeline once for each setting: smolmlx train PIPELINE --set STAGE.KEY=VALUE."
    )


def _build(
    base: Path, settings: Sequence[tuple[str, Mapping[str, Any]]], common: Mapping[str, Any], seeds: Sequence[int], sets: Mapping[str, Any]
) -> tuple[Cell, ...]:  # fmt: skip
    tree = recipes.read(base)
    if "stages" in tree:
        _refuse_pipeline(base, tree)
    cells: list[Cell] = []
    problems = [
        f"--set {key}: the sweep varies it, so every run would be the same there. Change the sweep's values instead."
        for key in sorted(set(sets) & {SEED, *(key for _, values in settings for key in values)})
    ]
    for name, values in settings:
        wanted = {key: ("--set", value) for key, value in sets.items()}
        wanted |= {key: ("sweep", value) for key, value in {**common, **values}.items() if key not in sets}
        for seed in seeds:
            flags = {**wanted, SEED: ("seeds", seed)}
            try:
                loaded = recipes.build(tree, source=f"{base} ({name})", folder=base.resolve().parent, flags=flags)
            except RecipeError as error:
                problems += error.problems or [str(error)]
                break  # every seed says the same
            cells.append(Cell(name, values, seed, loaded, f"{folder_name(name)}-seed{seed}"))
    if problems:
        raise RecipeError(f"{base}, as the sweep changes it", list(dict.fromkeys(problems)))
    return tuple(cells)
