"""What became of each run of a sweep, and the loop that runs what is left.

A run's folder says how far it got: nothing, `plan.json` (begun), `outcome.json` (finished, or failed and why). There is
no other state, so a sweep that was killed anywhere goes on where it stood.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from smolmlx import recipe as recipes
from smolmlx.errors import RecipeError, SmolError
from smolmlx.recipe import Recipe
from smolmlx.rundir import RunDir, hold, writing
from smolmlx.sweeps.definition import Cell, Sweep

State = Literal["finished", "interrupted", "failed", "to do"]
OUTCOME = "outcome.json"
FAILURES = (SmolError, RuntimeError, ValueError, MemoryError, OSError)
"""What ends one run and not the sweep: our own errors, and what engines and their libraries raise."""


def state(cell: Cell, folder: Path) -> State:
    """Say how far a run got. One that failed is tried again by the next call, from its last checkpoint."""
    run = RunDir(folder / cell.folder)
    outcome = read_outcome(run)
    scored = (run.path / "eval" / "results.json").is_file() or cell.loaded.recipe.evaluate is None
    if outcome.get("status") == "finished" and run.done and scored:
        return "finished"
    if outcome.get("status") == "failed":
        return "failed"
    return "interrupted" if (run.path / "plan.json").is_file() else "to do"


def read_outcome(run: RunDir) -> dict[str, Any]:
    return run.read_json(OUTCOME) if (run.path / OUTCOME).is_file() else {}


def refuse_other_recipes(sweep: Sweep, folder: Path) -> None:
    """Make sure that the runs that are there were made by the recipes that are wanted now.

    Raises:
        RecipeError: naming each that was not.
    """
    problems = []
    for cell in sweep.cells:
        path = folder / cell.folder / "recipe.yaml"
        if path.is_file():
            old = recipes.build(recipes.read(path), source=str(path), folder=path.parent).recipe
            keys = _differing(old, cell.loaded.recipe)
            if keys:
                problems.append(f"{path.parent}: made with other values of {', '.join(keys)}")
    if problems:
        raise RecipeError("the sweep has changed since these runs; choose another --out, or delete them", problems)


def _differing(old: Recipe, new: Recipe) -> list[str]:
    before, after = recipes.flatten(old), recipes.flatten(new)
    return [k for k in {**before, **after} if k != "description" and before.get(k) != after.get(k)]


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Keep a second process out of a sweep's folder.

    Raises:
        RunError: another process works on this sweep.
    """
    busy = f"{folder}: another process is running this sweep. Wait for it, or choose another --out."
    with hold(folder / ".lock", busy):
        yield


def run_cells(
    sweep: Sweep, folder: Path, work: Callable[[Cell, Path], None], on_end: Callable[[Cell, str | None], None]
) -> list[Cell]:
    """Run every cell that is not finished; return those that failed. The caller holds the lock.

    Args:
        work: trains and scores one cell in the folder it is given, or goes on with what it finds there.
        on_end: called with a cell and why it failed (None where it did not).
    """
    failed = []
    for cell in sweep.cells:
        if state(cell, folder) == "finished":
            continue
        run = RunDir(folder / cell.folder)
        for stale in folder.glob(f".{cell.folder}-*"):  # half-made by a process that was killed
            shutil.rmtree(stale, ignore_errors=True)
        (run.path / OUTCOME).unlink(missing_ok=True)
        why = None
        try:
            work(cell, run.path)
        except FAILURES as error:
            why = str(error) if isinstance(error, SmolError) else f"{type(error).__name__}: {error}"
            failed.append(cell)
        with writing(run.path):
            run.path.mkdir(exist_ok=True)
        run.write_json(OUTCOME, {"status": "failed", "error": why} if why is not None else {"status": "finished"})
        on_end(cell, why)
    return failed
