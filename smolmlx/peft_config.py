"""What PEFT's adapter_config.json must say before it is believed: the types of the keys that are used."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

DEFAULT_RANK = DEFAULT_ALPHA = 8
"""What PEFT takes for `r` and `lora_alpha` where a config does not say."""
_MAX_RANK = 1 << 31
_MAX_FLOAT32 = 3.4028234663852886e38


def other_kind(config: Mapping[str, Any]) -> list[str]:
    """Say that an adapter is not LoRA; empty where it is."""
    kind = config.get("peft_type")
    if kind == "LORA":
        return []
    return [f"peft_type: {kind!r} is not LORA; only LoRA, rsLoRA and DoRA are known here."]


def config_problems(config: Mapping[str, Any]) -> list[str]:
    """Name every key that is of another type than is meant."""
    problems = []
    if not isinstance(config.get("peft_type"), str):
        problems.append(
            f"peft_type: expected the kind of adapter, such as LORA, found {_shown(config.get('peft_type'))}."
        )
    if not _is_rank(config.get("r", DEFAULT_RANK)):
        problems.append(f"r: expected a positive integer, found {_shown(config['r'])}.")
    for key in ("lora_alpha", "lora_dropout"):
        if not is_number(config.get(key, 0)):
            problems.append(f"{key}: expected a number, found {_shown(config[key])}.")
    for key, is_good, what in (("rank_pattern", _is_rank, "positive integer"), ("alpha_pattern", is_number, "number")):
        patterns = config.get(key) or {}
        if not isinstance(patterns, dict) or not all(is_good(value) for value in patterns.values()):
            problems.append(f"{key}: expected a table of pattern: {what}, found {_shown(patterns)}.")
            continue
        problems += [
            f"{key}: {pattern!r} is not a regular expression." for pattern in patterns if not _compiles(pattern)
        ]
    for key in ("target_modules", "exclude_modules"):
        found = config.get(key)
        if isinstance(found, str) and not _compiles(found):
            problems.append(f"{key}: {found!r} is not a regular expression.")
        elif not isinstance(found, (str, list, type(None))) or (
            isinstance(found, list) and not all(isinstance(item, str) for item in found)
        ):
            problems.append(f"{key}: expected names or one regular expression, found {found!r}.")
    for key, kind in (("target_parameters", str), ("modules_to_save", str), ("layers_to_transform", int)):
        found = config.get(key) or []
        found = [found] if key == "layers_to_transform" and type(found) is int else found
        if not isinstance(found, list) or any(type(item) is not kind for item in found):
            what = "names" if kind is str else "layer numbers"
            problems.append(f"{key}: expected a list of {what}, found {found!r}.")
    return problems


def _is_rank(value: Any) -> bool:
    return type(value) is int and 0 < value < _MAX_RANK


def _shown(value: Any) -> str:
    """Return the start of a value, which may be a number of thousands of digits."""
    return repr(value)[:200]


def _compiles(pattern: str) -> bool:
    try:
        re.compile(rf"(.*\.)?({pattern})$")
    except re.error:
        return False
    return True


def is_number(value: Any) -> bool:
    """Whether a value from JSON is a number that float32 holds."""
    return type(value) in (int, float) and abs(value) <= _MAX_FLOAT32
