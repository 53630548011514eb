"""`smolmlx recipes`: the shipped recipes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import click

from smolmlx.cli.group import Group
from smolmlx.errors import RecipeError

if TYPE_CHECKING:
    pass


@click.group("recipes", cls=Group)
def command() -> None:
    """List, show, copy and check recipes."""


@command.command("ls")
def ls() -> None:
    """List the shipped recipes and sweeps."""
    from smolmlx import console, recipe, shelf

    for kind, names in (("recipe", shelf.names()), ("sweep", shelf.sweep_names())):
        rows = [(name, str(recipe.read(shelf.find(name)).get("description", ""))) for name in names]
        console.table(rows, (kind, "what it does"))
        console.result()


@command.command("show")
@click.argument("name")
def show(name: str) -> None:
    """Print a recipe with its header."""
    from smolmlx import console, shelf

    console.result(shelf.find(name).read_text(encoding="utf-8").rstrip())


@command.command("cp")
@click.argument("name")
@click.argument("target", type=click.Path())
def cp(name: str, target: str) -> None:
    """Copy a recipe to TARGET, to change it."""
    from smolmlx import console, shelf

    path = Path(target)
    if path.is_dir():
        path = path / f"{Path(name).name}.yaml"
    if path.exists():
        raise RecipeError(f"{path}: already there. Choose another name.")
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(shelf.find(name), path)
    console.result(
        f"{path}\nNext: smolmlx {f'sweep {path} --dry-run' if shelf.is_sweep_file(path) else f'plan {path}'}"
    )


@command.command("validate")
@click.argument("names", nargs=-1, required=True)
def validate(names: tuple[str, ...]) -> None:
    """Check recipes and sweeps (names or paths) without touching data or models."""
    from smolmlx import console, pipelines, recipe, shelf
    from smolmlx.plan import check_knobs
    from smolmlx.sweeps.definition import open_sweep

    problems = []
    for name in names:
        try:
            path = shelf.find(name)
            if shelf.is_sweep_file(path):
                open_sweep(path, name, shelf.find)
            elif pipelines.is_pipeline(recipe.read(path)):
                pipelines.open_pipeline(path, name, shelf.find)
            else:
                loaded = recipe.load(path)
                if wrong := list(check_knobs(loaded.recipe)):
                    raise RecipeError(loaded.source, wrong)
            console.result(f"{name}: ok")
        except RecipeError as error:
            problems.append(str(error))
    if problems:
        raise RecipeError("\n".join(problems))
