"""Shipped recipes are claims: each parses, says what it does and what it costs, and docs/recipes.md lists every key.

`python tests/core/test_recipes.py` writes docs/recipes.md again.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from smolmlx import pipelines, recipe, shelf

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "recipes.md"
REMAKE = "Run `python tests/core/test_recipes.py`."

INTRO = """\
# Recipe keys

Made from the field docstrings of `smolmlx/recipe.py` by `python tests/core/test_recipes.py`; do not edit.

A recipe is a YAML file with these sections. Unknown keys, wrong types and impossible combinations are refused, all at
once. `--set section.key=value` and flags win over the recipe, the recipe over the defaults; `smolmlx plan` shows where
each value came from. `1e-4` is a number. Relative paths are tried from the working folder, then from the recipe's
folder, then among the shipped files. `on`, `off`, `yes` and `no` are words, with quotes or without (`packing: off`); only
`true` and `false` are true and false. Without an `evaluate` section nothing is scored after training.

`smolmlx recipes ls` lists the shipped recipes, `smolmlx recipes cp NAME FILE` copies one to change.

## Several stages

A file with `stages:` is a pipeline; `smolmlx train` runs its stages in order, in one folder (`notes/pipeline` is one, and
`notes/smoke` takes one step of each stage, in under a minute, to see that everything runs):

```yaml
description: what it is for
stages:
  sft: {recipe: notes/sft}                       # a shipped name, or a file beside this one
  pairs: {pairs: {rows: [data/notes], counts: [258, 42], seed: 0}}     # as `smolmlx data pairs` makes them
  dpo: {recipe: notes/dpo, set: {data.train: "{pairs}/train.jsonl", data.validation: "{pairs}/validation.jsonl"}}
```

A training stage starts from the adapter (or, after full training, the model) that the training stage before it left, unless its `set`
names `model.adapter` or `model.id`. With an adapter it takes over its tokenizer and template, `model.revision` and `model.quantize`,
where its recipe sets none. `{name}` is the folder of an earlier stage. From the command line a stage's keys begin with its name
(`--set dpo.dpo.beta=0.2`); `--max-steps` holds for each; `--resume` goes on at the first stage that is not finished,
and takes `--set` and `--max-steps` for stages that have not begun. A `{name}` that no earlier stage has, and a split that the stage
is not to make, are refused before anything runs.

A stage that makes data takes these keys, and `--set` reaches them too (`--set chunks.documents=my/papers` for a stage named `chunks`;
`research/pipeline` goes from documents to a scored adapter):

| stage | as | keys |
|---|---|---|
| `pairs` | `smolmlx data pairs` | `rows`, `counts`, `issues`, `samples`, `temperature`, `about`, `seed` |
| `chunk` | `smolmlx data chunk` | `documents` (a path or a list), `words`, `overlap`, `shares` (a list), `seed` |
| `augment` | `smolmlx data augment` | `chunks` (a folder, e.g. `"{chunks}"`), `model` (else the embedded one), `adapter`, `server` (its key in `OPENAI_API_KEY`), `tasks`, `tasks_file`, `seed` |
"""

# For fields that carry no docstring in smolmlx/recipe.py; an entry must go when its field gets one.


def sections() -> Iterator[tuple[str, dict[str, FieldInfo]]]:
    """Yield (section, its fields); the recipe's own scalar keys stand under ''."""
    top = {name: field for name, field in recipe.Recipe.model_fields.items() if section_of(field) is None}
    yield "", top
    for name, field in recipe.Recipe.model_fields.items():
        if (found := section_of(field)) is not None:
            yield name, found.model_fields


def section_of(field: FieldInfo) -> type[BaseModel] | None:
    """Return the model behind a field, or None where the field is a value."""
    for kind in (field.annotation, *get_args(field.annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


def meaning(key: str, field: FieldInfo) -> str:
    return " ".join((field.description or "").split()).replace("|", "\\|")


def values(field: FieldInfo) -> str:
    """Describe what a field takes: its words, or its type with its bounds."""
    words = kinds(field.annotation)
    bounds = [
        f"{sign} {getattr(rule, name)}"
        for rule in field.metadata
        for name, sign in SIGNS.items()
        if hasattr(rule, name)
    ]
    return " or ".join(words) + (f", {', '.join(bounds)}" if bounds else "")


SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


def kinds(annotation: Any) -> list[str]:
    if get_origin(annotation) is Literal:
        return [f"`{word}`" for word in get_args(annotation)]
    plain = {str: "text", int: "whole number", float: "number", bool: "true or false", type(None): "nothing"}
    if annotation in plain:
        return [plain[annotation]]
    origin = get_origin(annotation)
    if origin is list:
        return [f"list of {' or '.join(kinds(get_args(annotation)[0]))}"]
    if origin is tuple:
        return [f"{len(get_args(annotation))} numbers"]
    if origin is dict:
        return ["mapping"]
    return [word for part in get_args(annotation) for word in kinds(part)]


def default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is None or value in ("", [], {}):
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ", ".join(f"{part:g}" for part in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def make_page() -> str:
    """Return docs/recipes.md."""
    parts = [INTRO]
    for name, fields in sections():
        parts.append(f"## `{name}`\n" if name else "## Top level\n")
        parts.append("| key | default | takes | meaning |\n|---|---|---|---|")
        for key, field in fields.items():
            dotted = f"{name}.{key}" if name else key
            parts.append(f"| `{dotted}` | {default(field)} | {values(field)} | {meaning(dotted, field)} |")
        parts.append("")
    return "\n".join(parts)


@pytest.mark.parametrize("name", shelf.names())
def test_recipe_is_a_claim(name: str) -> None:
    path = shelf.find(name)
    tree = recipe.read(path)
    is_pipeline = pipelines.is_pipeline(tree)
    made = pipelines.open_pipeline(path, name, shelf.find) if is_pipeline else recipe.load(path).recipe
    header = shelf.header(path)
    assert made.description and "\n" not in made.description
    assert f"smolmlx train {name}" in header, "the header must hold the command"
    for word in ("Hardware:", "Time", "esult", "Source:"):
        assert word in header, f"the header must say: {word}"


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").rglob("*.yaml")), ids=lambda path: path.stem)
def test_recipe_names_its_source(path: Path) -> None:
    """A public page, this project's own runs, or another recipe; and what was not run says so."""
    header = " ".join(shelf.header(path).split())
    source = header.partition("Source: ")[2].strip()
    assert source.startswith(("the ", "that of ", "https://", "this project's own runs"))
    assert re.search(r"not run (here|to its end)|20\d\d-\d\d-\d\d|that of|those of|names the run", header)
    assert "/work/" not in header and "shared/" not in header


def test_the_notes_stage_is_the_quickstart() -> None:
    """notes/sft promises the quickstart's cost and result, so its values must be the same."""
    trees = [recipe.read(shelf.find(name)) for name in ("notes/sft", "quickstart")]
    assert len({tree.pop("description") for tree in trees}) == 2
    assert trees[0] == trees[1]


def test_every_key_is_explained_once() -> None:
    keys = {f"{name}.{key}" if name else key: field for name, fields in sections() for key, field in fields.items()}
    assert [key for key, field in keys.items() if not meaning(key, field)] == [], "a recipe key without a docstring"


def test_the_page_of_keys_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == make_page(), f"{PAGE} is not what smolmlx/recipe.py says. {REMAKE}"


def test_the_page_names_every_key_of_a_stage_that_makes_data() -> None:
    for kind, options in pipelines.KINDS.items():
        (line,) = (line for line in INTRO.splitlines() if line.startswith(f"| `{kind}` |"))
        assert [key for key in options.model_fields if f"`{key}`" not in line] == []


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(make_page(), encoding="utf-8")
