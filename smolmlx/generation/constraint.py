"""From what a user types or sends to a constraint: a schema's file or class, a regular expression, a choice."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel

from smolmlx.backend import Constraint, OneOf, Regex
from smolmlx.errors import RecipeError
from smolmlx.generation.grammar import check


def read_constraint(schema: str | None, regex: str | None, choices: Sequence[str]) -> Constraint | None:
    """Return the one constraint that is asked for, or None.

    Args:
        schema: a file with a JSON schema, or `module:Class` of a Pydantic model.

    Raises:
        RecipeError: more than one is asked for, it cannot be read, or it cannot be kept to, by name.
    """
    asked = {"--schema": schema is not None, "--regex": regex is not None, "--choice": bool(choices)}
    given = [name for name, there in asked.items() if there]
    if len(given) > 1:
        raise RecipeError(f"{' and '.join(given)}: an answer keeps to one of them. Leave the others out.")
    if not given:
        return None
    found: Constraint
    if schema is not None:
        found = _read_file(Path(schema)) if _is_file(schema) else _import(schema)
    else:
        found = Regex(regex) if regex is not None else OneOf(tuple(choices))
    check(found)
    return found


def _is_file(name: str) -> bool:
    try:
        return Path(name).is_file()
    except OSError:  # too long for a name
        return False


def _read_file(path: Path) -> Constraint:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RecipeError(f"--schema {path}: not valid JSON ({error}).") from error
    if not isinstance(tree, dict):
        raise RecipeError(f"--schema {path}: a JSON schema is an object, this is a {type(tree).__name__}.")
    return tree


def _import(name: str) -> Constraint:
    if name.lstrip().startswith("{"):
        raise RecipeError(
            "--schema: got JSON, expected a file or module:Class. Write the schema to a file and name that."
        )
    module, _, kind = name.partition(":")
    if not all(part.isidentifier() for part in (*module.split("."), kind)):
        raise RecipeError(f"--schema {name}: no such file, and not a Pydantic model's module:Class.")
    here = str(Path.cwd())
    sys.path.insert(0, here)  # as `python -m` does, for a model that lies in the user's folder
    try:
        found = getattr(importlib.import_module(module), kind)
    except Exception as error:  # the user's own module runs here
        why = f"{type(error).__name__}: {error}"
        raise RecipeError(f"--schema {name}: cannot be imported from {here} ({why}).") from error
    finally:
        sys.path.remove(here)
    if not (isinstance(found, type) and issubclass(found, BaseModel)):
        raise RecipeError(f"--schema {name}: not a Pydantic model. Derive {kind} from pydantic.BaseModel.")
    return found
