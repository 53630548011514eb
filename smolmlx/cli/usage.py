"""What to type instead, where click alone says only that an argument or option is wrong."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from pathlib import Path

import click

from smolmlx.errors import common

_EXTRA = re.compile(r"Got unexpected extra arguments? \((.*)\)")
_NUMBER = re.compile(r"[0-9]*\.?[0-9]+")


def advise(error: click.UsageError, arguments: Sequence[str]) -> click.UsageError:
    """Return a usage error with its likely cure."""
    if isinstance(error, click.NoSuchOption):
        meant = _find_option(error)
        return (
            click.UsageError(f"No such option '{error.option_name}'. Did you mean '{meant}'?", error.ctx)
            if meant
            else error
        )
    if match := _EXTRA.match(error.message):
        return click.UsageError(f"{error.message.rstrip('.')}.{_cure(match[1].split(), arguments)}", error.ctx)
    return error


def _find_option(error: click.NoSuchOption) -> str | None:
    """Return the option, or the recipe key, that another tool's option stands for."""
    from smolmlx.problems import key_of
    from smolmlx.recipe import Recipe

    options = {name for parameter in error.ctx.command.params for name in parameter.opts} if error.ctx else set()
    name = error.option_name.lstrip("-").replace("-", "_")
    own = "--" + (common(name) or name).rpartition(".")[2].replace("_", "-")
    key = key_of(name, Recipe)
    if own in options:
        return own
    return f"--set {key}=" if "--set" in options and key else None


def _cure(words: Sequence[str], arguments: Sequence[str]) -> str:
    """Return what to do about words that no argument takes: a pattern of several paths, or a list written with spaces."""
    if words and all(map(_NUMBER.fullmatch, words)):
        lists = {word: _numbers(arguments[i + 1 :]) for i, word in enumerate(arguments) if word.startswith("-")}
        if found := next(((word, numbers) for word, numbers in lists.items() if len(numbers) > 1), None):
            return f" Write a list with commas: {found[0]} {','.join(found[1])}"
    return " Several paths match the pattern; name one." if any(Path(word).exists() for word in words) else ""


def _numbers(words: Sequence[str]) -> list[str]:
    """Return the numbers that words begin with."""
    return list(itertools.takewhile(_NUMBER.fullmatch, words))
