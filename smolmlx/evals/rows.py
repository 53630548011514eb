"""Which rows of a file an evaluation takes, and what they are called: one rule for all suites."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from smolmlx.data.formats import Raw, Source, read_rows
from smolmlx.errors import DataError, nearest

Made = TypeVar("Made")


@dataclass(frozen=True, slots=True)
class Choice:
    """Rows to take; the default is all."""

    ids: tuple[str, ...] = ()
    """All where empty."""
    limit: int | None = None
    """The first so many of the rows of `ids`."""


def name_rows(source: Source) -> list[str]:
    """Return each row's `id` where no other row is called so, else its number: `row-0001` is the first."""
    own = [_own_id(raw) for _, raw in read_rows(source.files, [])]
    numbers = [f"row-{number:04d}" for number in range(1, len(own) + 1)]
    uses = Counter([*own, *numbers])
    return [name if name and uses[name] == 1 else number for name, number in zip(own, numbers, strict=True)]


def _own_id(raw: Raw) -> str:
    value = raw.get("id")
    return str(value) if isinstance(value, (str, int)) and not isinstance(value, bool) else ""


def choose_rows(source: Source, choice: Choice) -> dict[int, str]:
    """Return place -> id of the rows chosen, in the file's order.

    Raises:
        DataError: ids that the file does not have.
    """
    names = name_rows(source)
    wanted = set(choice.ids)
    unknown = sorted(wanted.difference(names))
    if unknown:
        like = f"Ids of this file are like {', '.join(names[:2])}." if names else "It has no rows."
        raise DataError(f"{source.files[0]}: no row {', '.join(unknown[:10])}.{nearest(unknown[0], names)} {like}")
    chosen = [(place, name) for place, name in enumerate(names) if not wanted or name in wanted]
    return dict(chosen[: choice.limit])


def read_chosen(source: Source, choice: Choice, make: Callable[[str, str, Raw], Made], refusal: str) -> list[Made]:
    """Make something of the id, `file:line` and columns of each row chosen.

    Raises:
        DataError: `refusal` with the first 20 rows that cannot be read or that `make` refuses, unknown ids, or no rows.
    """
    chosen = choose_rows(source, choice)
    problems: list[str] = []
    found = []
    for place, (where, raw) in enumerate(read_rows(source.files, problems)):
        if place in chosen:
            try:
                found.append(make(chosen[place], where, raw))
            except DataError as error:
                problems.append(str(error))
    if problems:
        raise DataError(refusal, problems)
    if not found:
        raise DataError(f"{source.files[0]}: no rows.")
    return found
