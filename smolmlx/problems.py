"""What is wrong with a recipe's values, in this project's words."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from smolmlx.errors import common, nearest

_NUMBER = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?([eE][-+]?[0-9]+)?")


_EXPECTED = {
    "string_type": "text", "bool_type": "true or false", "list_type": "a list", "tuple_type": "a list",
    "int_type": "a whole number", "float_type": "a number", "finite_number": "a finite number",
    "dict_type": "a section of keys and values", "model_type": "a section of keys and values", "literal_error": "{expected}",
    "too_short": "at least {min_length} in the list", "too_long": "at most {max_length} in the list",
    "string_too_short": "text of at least {min_length} character", "greater_than_equal": "at least {ge}",
    "greater_than": "more than {gt}", "less_than_equal": "at most {le}", "less_than": "less than {lt}",
}  # fmt: skip
"""Type of a pydantic error -> what it wants, from the error's context."""


def explain(errors: Sequence[dict[str, Any]], origins: Mapping[str, str], model: type[BaseModel]) -> Iterator[str]:
    """Turn pydantic's errors into this project's words, one line for each value, with the option before it that gave it."""
    found: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for error in errors:
        branches = ("literal[", "list[", "constrained", "function-", "bool")  # of a value that may be of several types
        location = tuple(str(part) for part in error["loc"] if not str(part).startswith(branches))
        if error["type"] == "missing" and isinstance(error["loc"][-1], int):
            wanted = {"min_length": error["loc"][-1] + 1}
            location, error = location[:-1], {**error, "type": "too_short", "ctx": wanted}
        found.setdefault(location, []).append(error)
    for location, here in found.items():
        if not any(other != location and other[: len(location)] == location for other in found):
            dotted = ".".join(location)
            origin = next(
                (origin for key, origin in origins.items() if _within(key, dotted) or _within(dotted, key)), ""
            )
            option = f"{origin} " if origin.startswith("--") else ""
            yield from (f"{option}{said}" for said in _explain_value(location, here, model))  # else its parts say more


def _within(key: str, section: str) -> bool:
    return f"{key}.".startswith(f"{section}.")


def _explain_value(
    location: tuple[str, ...], errors: Sequence[dict[str, Any]], model: type[BaseModel]
) -> Iterator[str]:
    dotted, error = ".".join(location), errors[0]
    if error["type"] == "extra_forbidden":
        known = _known_keys(location[:-1], model)
        meant = key_of(location[-1], model)
        hint = f" Did you mean '{meant}'?" if meant else nearest(location[-1], known)
        yield f"{dotted}: unknown key.{hint or ' Known: ' + ', '.join(known) + '.'}"
    elif error["type"] == "missing":
        yield f"{dotted}: missing. Add it to the recipe or pass --set {dotted}=..."
    elif error["type"] == "value_error":
        yield from str(error["ctx"]["error"]).split("\n")
    else:
        given = error["input"]
        wanted = [_EXPECTED.get(e["type"], e["msg"]).format_map(e.get("ctx", {})) for e in errors]
        quoted = isinstance(given, str) and {"int_type", "float_type"} & {e["type"] for e in errors}
        hint = " Write the number without quotes." if quoted and _NUMBER.fullmatch(given) else ""
        yield f"{dotted}: expected {' or '.join(wanted)} (got {'nothing' if given is None else repr(given)}).{hint}"


def key_of(name: str, model: type[BaseModel]) -> str | None:
    """Return the dotted key that a name stands for: one common elsewhere, or a key without its section."""
    keys = [f"{section}.{key}" for section in model.model_fields for key in _known_keys([section], model)]
    meant = common(name)
    return meant if meant in keys else next((key for key in keys if key.partition(".")[2] == name), None)


def _known_keys(parents: Sequence[str], model: type[BaseModel]) -> list[str]:
    section = model
    for name in parents:
        field = section.model_fields.get(name)
        if field is None:
            return []
        candidates = [field.annotation, *getattr(field.annotation, "__args__", ())]
        found = [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
        if not found:
            return []
        section = found[0]
    return sorted(section.model_fields)
