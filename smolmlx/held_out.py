"""The rows a recipe's model is scored on: where they lie, how they are read, and that they are there before training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from smolmlx.data import formats
from smolmlx.errors import DataError, RecipeError
from smolmlx.models import files_root
from smolmlx.recipe import Evaluate, Loaded, Recipe

RESEARCH_FIELDS = ("task", "style", "gold")
"""Columns of the rows that suite research scores."""


def locate(path: str, loaded: Loaded) -> str:
    """Find a file named in a recipe: from the working folder, the recipe's folder, then the shipped files."""
    return str(formats.locate(path, (loaded.folder, files_root())) or path)


def eval_format(recipe: Recipe) -> str:
    """Return the format of a recipe's held-out rows: that of its own, unless those are pairs or documents."""
    return recipe.data.format if recipe.stage == "sft" else "auto"


def find_lack(suite: str, raw: formats.Raw, messages: Sequence[Mapping[str, Any]]) -> str:
    """Say what a suite needs and a row, turned into messages, does not have; empty where it has all."""
    if suite == "research":
        missing = [name for name in RESEARCH_FIELDS if name not in raw]
        return f"no {', '.join(missing)}" if missing else ""
    *asked, last = messages or ({},)
    answered = asked and last["role"] == "assistant" and last.get("content") is not None
    return "" if answered or suite == "loss" else "no question, or no assistant answer to compare with"


def check_held_out(loaded: Loaded) -> None:
    """Read what the recipe will be scored on, so that what is missing or broken is found before the training and not after.

    Raises:
        RecipeError: no such task registry.
        DataError: no such file, rows of an unknown layout, or that cannot be read, or that lack what the suite needs.
    """
    recipe = loaded.recipe
    wanted = recipe.evaluate
    if wanted is None:
        return
    for key in ("data", "train", "ood"):
        if path := getattr(wanted, key):
            try:
                source = formats.open_source(
                    locate(path, loaded), form=eval_format(recipe), columns=recipe.data.columns, split="test"
                )
                _check_rows(source, wanted, limited=key != "train")
            except DataError as error:
                raise DataError(f"evaluate.{key}: {error.head}", error.problems) from error
    if wanted.tasks_file and not Path(locate(wanted.tasks_file, loaded)).is_file():
        raise RecipeError(f"evaluate.tasks_file: {wanted.tasks_file}: no such file.")


def _check_rows(source: formats.Source, wanted: Evaluate, limited: bool) -> None:
    """Refuse rows that the evaluation would refuse: of those beyond its limit only what cannot be read."""
    problems: list[str] = []
    index = -1
    for index, (where, raw) in enumerate(formats.read_rows(source.files, problems)):
        if limited and wanted.limit is not None and index >= wanted.limit:
            if wanted.suite == "loss":
                break
            continue
        try:
            messages = formats.to_example(raw, source.form, where, source.columns, source.system).messages
        except DataError as error:
            problems.append(str(error))
            continue
        if lack := find_lack(wanted.suite, raw, messages):
            problems.append(f"{where}: {lack}")
    if problems:
        raise DataError(f"suite {wanted.suite} cannot score {source.files[0]}", problems)
    if index < 0:
        raise DataError(f"{source.files[0]}: no rows. Check the path.")
