"""The rows a recipe's model is scored on: where they lie, how they are read, and that they are there before training."""

from __future__ import annotations

from smolmlx.data import formats
from smolmlx.errors import DataError
from smolmlx.models import files_root
from smolmlx.recipe import Loaded, Recipe


def locate(path: str, loaded: Loaded) -> str:
    """Find a file named in a recipe: from the working folder, the recipe's folder, then the shipped files."""
    return str(formats.locate(path, (loaded.folder, files_root())) or path)


def eval_format(recipe: Recipe) -> str:
    """Return the format of a recipe's held-out rows: that of its own, unless those are pairs or documents."""
    return recipe.data.format if recipe.stage == "sft" else "auto"


def check_held_out(loaded: Loaded) -> None:
    """Open what the recipe will be scored on, so that a missing file is found before the training and not after.

    Raises:
        DataError: no such file, or rows of an unknown layout.
    """
    recipe = loaded.recipe
    for key in ("data", "train", "ood") if recipe.evaluate else ():
        if path := getattr(recipe.evaluate, key):
            try:
                formats.open_source(
                    locate(path, loaded), form=eval_format(recipe), columns=recipe.data.columns, split="test"
                )
            except DataError as error:
                raise DataError(f"evaluate.{key}: {error.head}", error.problems) from error
